"""The benchmark's suites fit their time, resume, and become tables and plots."""

import json
import re

import pytest
import torch

from benchmarks import report, run, sparse_table, suites
from benchmarks.storage import SuiteResults, file_slug, suite_documents
from benchmarks.suites import SUITES, CellRequest, Suite, expected_seconds
from fused_sd.bench import rounds
from fused_sd.bench.measure import Effort
from fused_sd.bench.problem import OBJECTIVES, SHAPES
from fused_sd.bench.providers import PROVIDERS
from fused_sd.measuring.markdown_block import END

PAIR = ("fused_sd", "eager")
MARKER = "<!-- speed: a command -->"


def cells(name):
    return [request for part in SUITES[name].parts.values() for request in part]


@pytest.mark.parametrize("name", SUITES, ids="suite-{}".format)
def test_a_suite_is_whole_and_fits_its_time(name):
    providers = {provider.name for provider in PROVIDERS}
    for request in cells(name):
        assert set(request.providers) <= providers, request.key
        assert request.providers[0] == "fused_sd"
        assert request.shape in SHAPES
    assert {request.objective for request in cells(name)} == set(OBJECTIVES) - {"opsd"}
    keys = [(part, request.key) for part, found in SUITES[name].parts.items() for request in found]
    assert len(keys) == len(set(keys))
    assert set(suites.FACTORS) <= providers
    seconds = sum(expected_seconds(request, name) for request in cells(name))
    assert seconds < 60 * SUITES[name].minutes


def test_the_gpu_suite_covers_what_is_claimed():
    asked = cells("gpu")
    assert SUITES["gpu"].minutes <= 9
    assert SUITES["gpu"].effort.runs >= 20
    assert SUITES["gpu"].floor_warm_seconds >= 2
    assert {a.shape for a in asked} >= {
        "qwen3-4b",
        "qwen3-8b",
        "olmo-3-7b",
        "llama-3-8b",
        "qwen3.5-35b-a3b",
    }
    whole = {a.tokens for a in asked if a[2:] == asked[-1][2:] or a.objective == "reverse_kl"}
    assert whole >= {1024, 4096, 16384, 65536}
    assert any(not a.trainable for a in asked)
    assert any(a.mask_share == 0.5 for a in asked)
    sparse = SUITES["gpu"].parts["sparse"]
    assert {a.entropy for a in sparse if a.objective == "reverse_kl"} == {0.3, 0.6, 1.3}
    assert {a.objective for a in sparse} >= {"topk_renormalized", "topk_tail"}
    assert {a.tokens for a in sparse} == {16384}
    everybody = {name for a in asked for name in a.providers}
    assert everybody == {provider.name for provider in PROVIDERS}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Replace the CPU suite by one that takes seconds; return a folder for its results."""

    def cell(objective, **others):
        return CellRequest("tiny", 40, objective, PAIR, dtype="float32")._replace(**others)

    parts = {
        "main": [cell("reverse_kl"), cell("grpo", trainable=False)],
        "sparse": [
            cell("reverse_kl", entropy=entropy, providers=("fused_sd", suites.SPARSE))
            for entropy in (0.3, 1.0)
        ],
        "scaling": [cell("reverse_kl", tokens=20), cell("reverse_kl", tokens=80)],
        "accuracy": [cell("jsd", timed=False, kl=0.01)],
    }
    monkeypatch.setitem(SUITES, "cpu", Suite(parts, Effort(0.0, 2), 0.0, 5.0))
    monkeypatch.setitem(suites.SETUP_SECONDS, "cpu", 0.1)
    monkeypatch.setitem(suites.CHECK_SECONDS, "cpu", 0.1)
    return tmp_path / "results"


def measure(folder, *arguments):
    return run.main(["--suite", "cpu", "--out", str(folder), "--commit", "abc", *arguments])


def document(folder):
    (found,) = suite_documents(folder)
    return found


def test_a_suite_is_measured_kept_and_resumed(tiny, capsys, monkeypatch):
    assert measure(tiny, "--parts", "main") == 0
    found = document(tiny)
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["commit"] == "abc"
    assert list(found["parts"]) == ["main"]
    first, second = found["parts"]["main"].values()
    assert first["shape"] == "tiny"
    assert [row["status"] for row in first["rows"]] == ["ok", "ok"]
    assert first["floor"]["u"] == 4
    assert second["floor"]["u"] == 2
    assert second["rows"][0]["errors"]["dweight"] is None

    requests = []
    measure_request = run.measure_request

    def recorded(request, *arguments):
        requests.append(request)
        return measure_request(request, *arguments)

    monkeypatch.setattr(run, "measure_request", recorded)
    assert measure(tiny, "--resume") == 0
    assert [(request.tokens, request.entropy) for request in requests] == [
        (40, 0.3),
        (40, 1.0),
        (20, None),
        (80, None),
        (40, None),
    ]
    resumed = document(tiny)
    assert resumed["parts"]["main"] == found["parts"]["main"]
    (errors_only,) = resumed["parts"]["accuracy"].values()
    assert errors_only["floor"] is None
    assert errors_only["rows"][0]["errors"]["dhidden"] < 1e-3
    assert [row["status"] for row in errors_only["rows"]] == ["checked"] * 2
    assert errors_only["rows"][0]["times"] is None
    assert measure(tiny, "--resume") == 0
    assert len(requests) == 5


def test_what_does_not_fit_is_left_for_the_next_run(tiny, capsys):
    assert measure(tiny, "--minutes", "0") == 3
    out = capsys.readouterr().out
    assert "The time is up before main: tiny, 40, reverse_kl" in out
    assert "--resume" in out
    assert not suite_documents(tiny)


def test_results_of_another_environment_are_not_mixed_in(tiny, capsys):
    assert measure(tiny, "--parts", "main") == 0
    arguments = ["--suite", "cpu", "--out", str(tiny), "--resume", "--commit", "other"]
    assert run.main(arguments) == 2
    assert "another commit; leave it out" in capsys.readouterr().err
    assert run.main([*arguments[:4], "--parts", "accuracy", "--commit", "other"]) == 0
    assert list(document(tiny)["parts"]) == ["accuracy"]


def test_wrong_use_says_what_to_do(tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--suite", "gpu", "--out", str(tiny)]) == 2
    assert "pass --suite cpu" in capsys.readouterr().err
    assert measure(tiny, "--parts", "shapes") == 2
    message = "--parts must be one of 'main', 'sparse', 'scaling', 'accuracy', got"
    assert message in capsys.readouterr().err
    assert run.main(["--suite", "gpu", "--plan"]) == 0
    assert re.search(r"in all \d+ s, of 540", capsys.readouterr().out)


def test_whoever_loses_the_device_is_named_and_left_out(tiny, capsys, monkeypatch):
    """The cell is measured again: after an illegal access, whatever is called fails."""
    eager = next(provider for provider in PROVIDERS if provider.name == "eager")
    dead = []

    def build(problem):
        if problem.objective == "grpo":
            dead.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return eager.build(problem)

    def synchronize(device):
        if dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    others = [provider for provider in PROVIDERS if provider is not eager]
    monkeypatch.setattr(run, "PROVIDERS", [eager._replace(build=build), *others])
    monkeypatch.setattr(rounds, "synchronize", synchronize)
    assert measure(tiny, "--parts", "main") == 1
    assert "eager lost the device: CUDA error" in capsys.readouterr().err
    first = document(tiny)
    assert list(first["parts"]["main"]) == ["tiny, 40, reverse_kl, float32"]
    assert "main: tiny, 40, grpo" in first["lost"]["eager"]
    dead.clear()  # a new process has the device again
    assert measure(tiny, "--parts", "main", "--resume") == 0
    before, after = document(tiny)["parts"]["main"].values()
    assert [row["status"] for row in before["rows"]] == ["ok", "ok"]
    status = {row["provider"]: row["status"] for row in after["rows"]}
    assert status == {"fused_sd": "ok", "eager": "unavailable"}
    assert "illegal memory access" in after["rows"][1 - list(status).index("fused_sd")]["reason"]


def test_providers_that_compile_have_the_last_part():
    for suite in SUITES.values():
        *earlier, last = suite.parts.values()
        assert {name for request in last for name in request.providers} & set(suites.COMPILING)
        for request in (request for part in earlier for request in part):
            assert not set(request.providers) & set(suites.COMPILING), request.key


def test_time_is_expected_by_the_memory_of_the_gpu(monkeypatch):
    eager = CellRequest("qwen3-8b", 40_000, "reverse_kl", ("eager",))
    large = expected_seconds(eager, "gpu")
    monkeypatch.setattr(suites, "gpu_memory", lambda: 80e9)
    assert expected_seconds(eager, "gpu") < large
    small = eager._replace(tokens=16_384)
    assert expected_seconds(small, "gpu") > expected_seconds(eager, "gpu")


def test_a_device_has_one_folder():
    assert file_slug("CPU (x86_64, 1 thread)") == file_slug("CPU (x86_64, 8 threads)")
    assert file_slug("NVIDIA H200") == "nvidia-h200"


def test_results_become_tables_and_plots_again_and_again(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert measure(tiny) == 0
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(f"before\n\n{MARKER}\n{END}\n\nafter\n")
    arguments = ["--results", str(tiny), "--docs", str(docs), "--update", str(readme)]
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert report.main(arguments) == 0
    assert readme.read_text() == text
    assert text.startswith("before\n\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "GPU figures are still to be measured" in text
    assert "| **fused_sd** |" in text
    assert "| the bare GEMMs (4u) |" in text
    assert "| reverse_kl | tiny | 80 | trained |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {11, 12, 13}
    pictures = re.findall(r"\(docs/(\S+\.png)\)", text)
    assert sorted(pictures) == sorted(path.name for path in docs.iterdir())
    assert len(pictures) == 3
    capsys.readouterr()
    assert report.main(["--results", str(tiny)]) == 0
    assert "| **fused_sd** |" in capsys.readouterr().out
    readme.write_text("nothing")
    assert report.main(arguments) == 2
    assert "add the two lines" in capsys.readouterr().err


def test_sparse_gradients_stand_beside_dense_ones_by_entropy(tiny):
    assert measure(tiny, "--parts", "sparse") == 0
    cells = document(tiny)["parts"]["sparse"]
    assert list(cells) == [f"tiny, 40, reverse_kl, float32, entropy {e}" for e in ("0.3", "1")]
    first = next(iter(cells.values()))
    table = list(sparse_table.sparse_lines(cells))
    dense, sparse = (line.split(" | ") for line in table[2:4])
    assert dense[:3] == ["| reverse_kl, tiny, 40", f"{first['entropy']:.2f}", "dense"]
    assert sparse[2] == "sparse"
    kept = first["rows"][1]["kept"]
    assert dense[6:9] == ["-"] * 3
    assert sparse[6] == f"{kept['entries']:.3g}"
    assert float(sparse[4]) == pytest.approx(first["rows"][1]["ratio_to_floor"], abs=0.005)
    renormalized = {"floor": {"u": 1, "milliseconds": 3.0}}
    assert sparse_table.times_4u(renormalized, {"times": {"p50": 6.0}}) == pytest.approx(0.5)
    text = "\n".join(report.markdown_lines([document(tiny)], {}))
    assert sparse_table.LEGEND in text


def test_who_has_no_time_is_named_with_the_reason(tmp_path):
    row = {"provider": "theirs", "status": "out of memory", "reason": "9 GiB", "times": None}
    cell = {
        "objective": "jsd",
        "shape": "qwen3-8b",
        "tokens": 8,
        "counted": 4,
        "trainable": False,
        "dtype": "bfloat16",
        "floor": None,
        "rows": [row],
    }
    where = {"device": "NVIDIA H200", "torch": "2.11", "trl": "not installed", "commit": "abc"}
    store = SuiteResults(tmp_path / "nvidia-h200", "gpu", where, resume=False)
    store.add("main", "a cell", cell)
    text = "\n".join(report.markdown_lines(suite_documents(tmp_path), {}))
    assert "still to be measured" not in text
    assert "NVIDIA H200; torch 2.11; commit abc:" in text
    assert "Without a time: theirs: out of memory (9 GiB)." in text
    assert "jsd, qwen3-8b, 8 tokens, head frozen (4 count), bfloat16" in text
    assert json.loads(store.path.read_text())["parts"]["main"]["a cell"]["date"]


def test_the_whole_step_stands_below_the_readmes_section(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("## Speed\n\n" + MARKER + "\nold\n" + END + "\n\n## Next\n")
    monkeypatch.setattr(report, "suite_documents", lambda folder: [])
    monkeypatch.setattr(report, "step_documents", lambda folder: [{}])
    monkeypatch.setattr(report, "step_markdown", lambda step: "## One step\n\n### small\n")
    assert report.main(["--update", str(readme)]) == 0
    headings = [line for line in readme.read_text().splitlines() if line.startswith("#")]
    assert headings == ["## Speed", "### One step", "#### small", "## Next"]
    assert "old" not in readme.read_text()
