"""The command line: what it prints, what it finds broken, and what it says of wrong use."""

import json
import re
import subprocess
import sys

import pytest
import torch

import fused_sd
from fused_sd.bench.problem import OBJECTIVE_OF, OBJECTIVES
from fused_sd.cli import main
from fused_sd.head import projection as heads
from fused_sd.measuring.losses import LOSSES, STORED_NAMES, loss_names
from fused_sd.planning import objectives
from fused_sd.verify.cases import CASES

TINY = ["verify", "--device", "cpu", "--tokens", "8", "--hidden", "16", "--vocab", "96"]


def verify(capsys, *arguments):
    """Exit status and standard output of a tiny verification."""
    status = main([*TINY, *arguments])
    return status, capsys.readouterr().out


@pytest.mark.bits
@pytest.mark.parametrize("name", CASES)
def test_every_loss_keeps_every_promise(capsys, name):
    status, out = verify(capsys, "--losses", name)
    assert status == 0, out
    assert "OK.  The loss keeps every promise" in out
    assert len(re.findall(rf"^{name} +[\d-]", out, re.MULTILINE)) in (1, 3)
    assert len(re.findall(rf"^{name} sparse +[\d-]", out, re.MULTILINE)) == CASES[name].has_sparse


def test_all_commands_have_one_table_of_losses():
    assert set(CASES) == set(OBJECTIVE_OF) == set(LOSSES)
    assert set(OBJECTIVE_OF.values()) == set(OBJECTIVES)
    assert set(objectives.OBJECTIVES) == {*LOSSES, *objectives.GENERIC}
    assert set(STORED_NAMES) == set(OBJECTIVES) - set(LOSSES)
    assert {"sdpo", "sd_zero", "rlsd", "rlcsd", "opsd", "sdft", "gkd", "grpo"} <= set(LOSSES)


def test_a_loss_is_named_as_people_write_it():
    assert loss_names("--losses", "all") == tuple(LOSSES)
    assert loss_names("--losses", "SD-Zero, sdpo,topk_tail") == ("sd_zero", "sdpo")


@pytest.mark.parametrize("command", [["verify"], ["bench"], ["plan", "--tokens", "8"]])
def test_an_unknown_loss_is_answered_with_the_known_ones_in_a_line(capsys, command):
    for option in ("--losses", "--loss"):
        assert main([*command, option, "sdpo,kd"]) == 2
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert f"--losses must be a loss ({', '.join(LOSSES)}" in line
        assert line.endswith("got 'kd'; write one of these")
        assert shown.out == ""


def test_a_quick_verification_measures_every_loss_at_one_kl(capsys):
    status, out = verify(capsys, "--quick", "--losses", "sdft,grpo,token_log_probs", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["settings"]["kls"] == [1e-3]
    names = ["sdft", "sdft sparse", "grpo", "grpo sparse", "token_log_probs"]
    assert [m["loss"] for m in found["measurements"]] == names
    assert main(["verify", "--device", "cpu", "--quick", "--losses", "grpo"]) == 0
    assert "32 tokens x 64 x 8192" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["env"], 141),
        (["plan", "--model", "qwen3-8b", "--tokens", "64", "--losses", "all"], 141),
        (["bench", "--help"], 0),  # argparse meets the closed pipe itself
    ],
)
def test_a_reader_that_has_enough_ends_a_command_quietly(arguments, status):
    """As in ``fused_sd env | head -1``: the pipe is closed before the command writes."""
    command = [sys.executable, "-m", "fused_sd", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        ran.stdout.close()
        assert ran.stderr.read() == b""
    assert ran.returncode == status


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "fp64"])
def test_other_dtypes_keep_their_promises(capsys, dtype):
    status, out = verify(capsys, "--losses", "sdpo,sdft,rlsd,cross_entropy", "--dtype", dtype)
    assert status == 0, out


def test_more_tokens_than_the_reference_samples_are_computed(capsys):
    status, out = verify(capsys, "--losses", "gkd", "--tokens", "300")
    assert status == 0, out


def test_a_line_fits_a_terminal(capsys):
    _, out = verify(capsys, "--losses", "sdpo,grpo")
    assert max(map(len, out.splitlines())) <= 100


def test_logits_rounded_to_16_bits_are_found_and_named(capsys, monkeypatch):
    exact = heads.Projection.project

    def rounded(self, states, out):
        exact(self, states, out)
        return out.copy_(out.bfloat16())

    monkeypatch.setattr(heads.Projection, "project", rounded)
    status, out = verify(capsys, "--losses", "sdpo")
    assert status == 1
    assert "BROKEN" in out
    for error in ("loss", "dhidden", "dweight"):
        assert re.search(rf"sdpo at KL \S+: the error of {error} must be at most \S+, got", out)


def test_a_scaled_gradient_is_found_and_named(capsys, monkeypatch):
    exact = fused_sd.sdft_loss

    def scaled(*arguments, **settings):
        output = exact(*arguments, **settings)
        loss = 1.01 * output.loss
        return output._replace(loss=loss - 0.01 * output.loss.detach())

    monkeypatch.setattr(fused_sd, "sdft_loss", scaled)
    status, out = verify(capsys, "--losses", "sdft,gkd")
    assert status == 1
    verdict = out[out.index("BROKEN") :]
    assert "sdft at KL" in verdict
    assert "dhidden" in verdict
    assert "gkd" not in verdict
    assert "of loss" not in verdict


def test_broken_invariants_are_found_and_named(capsys, monkeypatch):
    exact, calls = fused_sd.gkd_loss, []

    def leaking(hidden, weight, teacher, *arguments, token_weights, **settings):
        calls.append(None)  # what no run has in common with the next
        output = exact(hidden, weight, teacher, *arguments, token_weights=token_weights, **settings)
        return output._replace(loss=output.loss + 1e-9 * len(calls))

    monkeypatch.setattr(fused_sd, "gkd_loss", leaking)
    status, out = verify(capsys, "--losses", "gkd")
    assert status == 1
    assert "gkd: two runs must be equal to the bit" in out
    assert "gkd: a masked token that holds NaN must contribute exactly 0" in out
    assert "gkd: a teacher equal to the student must give loss and gradient exactly 0" in out


def test_a_certificate_that_is_not_kept_is_found_and_named(capsys, monkeypatch):
    exact = fused_sd.sdft_loss

    def careless(*arguments, **settings):
        if settings.get("gradient") == "sparse":
            settings["tolerance"] = 0.2
        return exact(*arguments, **settings)

    monkeypatch.setattr(fused_sd, "sdft_loss", careless)
    status, out = verify(capsys, "--losses", "sdft,gkd")
    assert status == 1
    (line,) = [line for line in out.splitlines() if line.startswith("  ") and "must" in line]
    assert re.search(
        r"sdft sparse at KL \S+: the share that is dropped must be at most 3.9e-03", line
    )


def test_an_error_beyond_its_certificate_is_found_and_named(capsys, monkeypatch):
    exact = fused_sd.cross_entropy_loss

    def deceiving(*arguments, **settings):
        output = exact(*arguments, **settings)
        if output.certificate is None:
            return output
        return output._replace(loss=1.5 * output.loss - 0.5 * output.loss.detach())

    monkeypatch.setattr(fused_sd, "cross_entropy_loss", deceiving)
    status, out = verify(capsys, "--losses", "cross_entropy")
    assert status == 1
    for name in ("dhidden", "dweight"):
        assert f"cross_entropy sparse: the error of {name} must be at most" in out


def test_json_holds_every_number(capsys):
    status, out = verify(capsys, "--losses", "opsd,grpo", "--json", "--seed", "1")
    found = json.loads(out)
    assert found["ok"] == (status == 0)
    assert found["settings"]["backend"] == "torch"
    names = ["opsd"] * 3 + ["opsd sparse", "grpo", "grpo sparse"]
    assert [m["loss"] for m in found["measurements"]] == names
    assert found["measurements"][-1]["kl"] is None
    for measured in found["measurements"]:
        if "sparse" in measured["loss"]:
            assert 0 < measured["kept"]["entries"] <= 96
            assert measured["kept"]["dropped_share"] <= 2**-8
        else:
            assert measured["kept"] is None
            assert measured["fused_sd"]["dweight"] < measured["16-bit logits"]["dweight"]
    assert found["environment"]["torch"] == torch.__version__


def test_markdown_is_a_table(capsys):
    status, out = verify(capsys, "--losses", "sdft", "--markdown")
    assert status == 0
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {line.count("|") for line in table} == {11}


def test_a_readme_gets_its_table_again_and_again(capsys, tmp_path):
    path = tmp_path / "page.md"
    marker = "<!-- measured: python -m fused_sd verify --update -->"
    path.write_text(f"before\n\n{marker}\n<!-- end -->\n\nafter\n")
    for _ in range(2):
        status, out = verify(capsys, "--losses", "sdft", "--update", str(path))
        assert (status, out) == (0, "")
        text = path.read_text()
        assert text.startswith(f"before\n\n{marker}\n\nCPU")
        assert text.endswith("|\n\n<!-- end -->\n\nafter\n")
        assert text.count("| sdft |") == 3


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^fused_sd +{re.escape(fused_sd.__version__)}$", out, re.MULTILINE)
    assert torch.__version__ in out
    assert re.search(r"^verl +(not installed|\d)", out, re.MULTILINE)
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = "triton" if torch.cuda.is_available() else "torch"
    assert facts["backend auto (bf16, fp16, fp32)"] == expected
    assert facts["backend auto (fp64)"] == "torch"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--dtype", "int8"], r"--dtype must be one of 'bf16'.*, got 'int8'; choose"),
        (["--device", "tpu"], r"--device must be one of .*, got 'tpu'; choose"),
        (["--backend", "cuda"], r"--backend must be one of .*, got 'cuda'; choose"),
        (["--tokens", "1"], r"--tokens must be at least 2, got 1; leave"),
        (["--model", "qwen3-8b"], r"model must come without hidden_size.*, got 'qwen3-8b'; leave"),
        (["--update", "no_such.md"], r"--update must name a file.*; add the two"),
        (["--backend", "triton", "--dtype", "fp64"], r"backend must be 'torch' for float64"),
    ],
)
def test_wrong_use_says_rule_value_and_remedy(capsys, arguments, says):
    assert main([*TINY, *arguments]) == 2
    shown = capsys.readouterr()
    assert re.search(says, shown.err)
    assert shown.out == ""


def test_an_unknown_model_is_refused(capsys):
    assert main(["verify", "--model", "gpt-9"]) == 2
    assert "model must be a config.json, a model in transformers' cache" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert main(["verify", "--device", "cuda"]) == 2
    assert "--device must be 'auto' or 'cpu' where PyTorch sees no GPU" in capsys.readouterr().err
