"""verl's FSDP2 engine with the losses inside lm_head trains as verl's own does on the logits."""

import pathlib

import pytest
import torch
from engine_batches import TEMPERATURE, VOCAB, make_samples
from engine_runs import KINDS, RUNS, assert_same_training, remains, save_model
from torch import Tensor
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

from fused_sd.integrations.shared.self_check import is_whole


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_on_the_logits(kind):
    assert_same_training(remains()[kind], remains()[f"{kind}, eager"])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_entropy_of_compute_log_prob_are_those_of_the_logits(kind):
    for one, other in zip(remains()[kind], remains()[f"{kind}, eager"], strict=True):
        torch.testing.assert_close(one["inferred"], other["inferred"], rtol=1e-5, atol=1e-5)
        assert float(one["inferred"]["log_probs"].abs().sum()) > 0


def test_padding_and_checkpointing_change_nothing():
    assert_same_training(remains()["padded"], remains()["tied, policy, eager"])


def test_adapters_train_as_on_the_logits():
    one, other = remains()["adapter"], remains()["adapter, eager"]
    assert all("lora" in name for name in one[0]["parameters"])
    assert_same_training(one, other)


def test_a_process_without_response_tokens_trains_along():
    assert RUNS["empty"].lengths[2:] == ((17, 0), (4, 0))
    assert_same_training(remains()["empty"], remains()["empty, eager"])


def test_bf16_is_at_least_as_exact_as_logits_in_bf16():
    for rank in range(2):
        exact, fused, eager = (
            remains()[name][rank] for name in ("bf16, exact", "bf16", "bf16, eager")
        )
        for name in ("losses", "grad_norms"):
            assert _error(fused[name], exact[name]) <= _error(eager[name], exact[name])
        for name, precise in exact["inferred"].items():
            known = [_error(run["inferred"][name], precise) for run in (fused, eager)]
            assert known[0] < 0.1 * known[1]


def _error(values: Tensor | list[float], exact: Tensor | list[float]) -> float:
    return float((torch.as_tensor(values) - torch.as_tensor(exact)).abs().max())


@pytest.mark.parametrize("run", ["live", "live, padded", "live, ulysses"])
def test_a_live_teacher_sees_its_context_and_only_the_student_learns(run, tmp_path):
    expected = _train_on_logits(save_model(tmp_path, tied=False), RUNS[run].steps)
    for one in remains()[run]:
        _assert_trained(one, expected)


def _train_on_logits(folder: pathlib.Path, steps: int) -> dict[str, Tensor]:
    """Parameters and losses of one process that holds all logits: mean reverse KL of tokens."""
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, eps=1e-6)
    samples = list(make_samples(RUNS["live"].lengths))
    count = sum(int(sample["response_mask"].sum()) for sample in samples)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for sample in samples:
            length = len(sample["responses"])
            log_s = _log_probs(model, sample["input_ids"], length)
            with torch.no_grad():
                log_t = _log_probs(model, sample["teacher_input_ids"], length)
            divergence = (log_s.exp() * (log_s - log_t)).sum(-1)
            total = total + (divergence * sample["response_mask"]).sum() / count
        total.backward()
        losses.append(total.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {**named, "losses": torch.stack(losses)}


def _log_probs(model: torch.nn.Module, ids: Tensor, length: int) -> Tensor:
    logits = model(input_ids=ids[None]).logits[0, -length - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1)


def _assert_trained(one: dict, expected: dict[str, Tensor]) -> None:
    losses = torch.tensor(one["losses"], dtype=torch.float32)
    torch.testing.assert_close(losses, expected["losses"], rtol=1e-5, atol=1e-5)
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5, msg=name)


def test_only_rows_that_predict_counted_tokens_reach_the_head():
    for name in ("untied", "empty"):
        counts = [int(one["response_mask"].sum()) for one in make_samples(RUNS[name].lengths)]
        for rank, one in enumerate(remains()[name]):
            # each of the process's samples is a micro-batch, in each pass again
            assert set(one["rows"]) == set(counts[2 * rank : 2 * rank + 2]), name


def test_nothing_as_large_as_the_logits_is_held():
    logits = 4 * VOCAB * max(sum(lengths) for lengths in RUNS["untied"].lengths)
    for rank in range(2):
        assert remains()["untied"][rank]["largest"] < logits
    assert remains()["untied, eager"][0]["largest"] >= logits


def test_a_flattened_parameter_is_not_taken_for_a_whole_one():
    model = torch.nn.Linear(2, 2)
    assert is_whole(model)
    _set_fsdp_flattened(model.weight)  # as FSDP1 does
    assert not is_whole(model)


def test_no_class_is_changed():
    for name, run in RUNS.items():
        if run.backend in ("fused_sd", None):
            assert all(one["untouched"] for one in remains()[name]), name


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("calculate_sum_pi_squared", "calculate_sum_pi_squared must be off with impl_backend"),
        ("temperature", "per sample temperature"),
    ],
)
def test_what_fused_kernels_lack_is_refused(setting, said):
    assert said in remains()["untied"][0]["refusals"][setting]


def test_without_fused_kernels_it_is_verls_engine():
    ours, theirs = remains()["not fused"], remains()["untied, eager"]
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == other["losses"][:1]
        assert one["grad_norms"] == other["grad_norms"][:1]
        for name, values in one["inferred"].items():
            assert torch.equal(values, other["inferred"][name])


def test_with_another_backend_it_is_verls_engine():
    for one, other in zip(remains()["torch"], remains()["torch, verl's"], strict=True):
        assert not one["untouched"]  # verl's kernels ran
        assert one["losses"] == other["losses"]
        for name, parameter in one["parameters"].items():
            assert torch.equal(parameter, other["parameters"][name])
