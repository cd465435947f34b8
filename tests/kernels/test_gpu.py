"""Tests that need a GPU: mixed GEMMs, compiled kernels, no synchronisation, graph capture."""

import pytest
import torch
from cases import make_case
from closeness import assert_close
from divergences import EACH
from waits import no_waits

import fused_sd
from fused_sd import reference

pytestmark = pytest.mark.gpu
DIVERGENCES = {
    **{name: {"divergence": divergence} for name, (divergence, _) in EACH.items()},
    "student top-k": {"divergence": "reverse_kl", "support": fused_sd.StudentTopK(20)},
    "teacher nucleus": {"divergence": "forward_kl", "support": fused_sd.TeacherNucleus(20, 0.9)},
}


def on_gpu(dtype, vocab=32_003, num_tokens=300, **settings):
    case = make_case(num_tokens, 256, vocab, peak=7, gap=0.05, **settings)
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.detach().cuda())
    return case.to(torch.bfloat16).to(dtype)


def loss_of(case, shared=False, **settings):
    teacher_head = case.head if shared else case.teacher_head
    sides = case.hidden, case.head, case.teacher_hidden, teacher_head
    return fused_sd.divergence_loss(
        *sides, token_weights=case.token_weights, **{"reduction": "sum", **settings}
    )


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_against_float64(name, dtype, backend, shared):
    case, settings = on_gpu(dtype), DIVERGENCES[name]
    double = case.to(torch.float64)
    output = loss_of(case, shared, backend=backend, chunk_size=32, **settings)
    exact = loss_of(double, shared, backend="torch", **settings)
    assert abs(output.loss.double() - exact.loss) <= 1e-3 * exact.loss
    found = torch.autograd.grad(output.loss, case.inputs)
    expected = torch.autograd.grad(exact.loss, double.inputs)
    bound = 1e-4 if dtype == torch.float32 else 3e-3
    for value, truth in zip(found, expected, strict=True):
        assert (value.double() - truth).norm() <= bound * truth.norm()


def test_fp16_gradients_survive_tiny_weights():
    """A gradient times 1 / N underflows in fp16, so the factor must be applied in fp32."""
    case = on_gpu(torch.float16)
    double = case.to(torch.float64)
    case.token_weights = case.token_weights * 1e-9
    found = torch.autograd.grad(loss_of(case).loss * 1e9, case.inputs)
    expected = torch.autograd.grad(loss_of(double).loss, double.inputs)
    for value, truth in zip(found, expected, strict=True):
        assert (value.double() - truth).norm() <= 3e-3 * truth.norm()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_host_synchronisation_without_compaction(name):
    case, settings = on_gpu(torch.bfloat16), DIVERGENCES[name]
    loss_of(case, compact=False, **settings).loss.backward()
    with no_waits():
        loss_of(case, compact=False, **settings).loss.backward()


def test_policy_losses_do_not_synchronise_either():
    case = on_gpu(torch.bfloat16)
    old = case.old_log_probs.float()

    def losses():
        common = {"compact": False}
        given = case.hidden, case.head, case.token_ids
        teacher = {"teacher_hidden": case.teacher_hidden, "teacher_head": case.teacher_head}
        evidence = fused_sd.Evidence()
        policy = fused_sd.policy_loss(
            *given, old, old_log_probs=old, evidence=evidence, reduction="sum", **teacher, **common
        ).loss
        log_probs = fused_sd.token_log_probs(*given, entropy=True, **common)
        (policy + log_probs.log_probs.sum() + log_probs.entropy.sum()).backward()

    losses()
    with no_waits():
        losses()


def test_a_cuda_graph_replays_the_loss():
    case = on_gpu(torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile every kernel, with every token kept as in the graph
        eager = torch.autograd.grad(loss_of(case, compact=False).loss, case.inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(loss_of(case).loss, case.inputs)
    graph.replay()
    torch.cuda.synchronize()
    for value, other in zip(captured, eager, strict=True):
        assert (value.float() - other.float()).norm() <= 1e-2 * other.float().norm()


def test_runs_are_bitwise_repeatable():
    case = on_gpu(torch.bfloat16)
    runs = [torch.autograd.grad(loss_of(case).loss, case.inputs) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_a_teacher_equal_to_the_student_gives_exactly_zero():
    case = on_gpu(torch.bfloat16)
    for settings in DIVERGENCES.values():
        loss = fused_sd.divergence_loss(
            case.hidden, case.head, case.hidden, case.head, reduction="sum", **settings
        ).loss
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, case.inputs))


def test_token_path_on_gpu():
    case = on_gpu(torch.bfloat16)
    found = fused_sd.token_log_probs(case.hidden, case.head, case.token_ids, entropy=True)
    logits = reference.logits(case.hidden, case.weight)
    exact = reference.token_log_prob(logits, case.token_ids)
    assert_close(found.log_probs, exact, torch.float32)
    assert_close(found.entropy, reference.entropy(logits), torch.float32)


def test_memory_beside_the_inputs_does_not_grow_with_tokens_times_vocabulary():
    case = on_gpu(torch.bfloat16, vocab=100_003, num_tokens=4096)
    logits = 4 * 4096 * 100_003
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_of(case, chunk_size=128).loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 0.4 * logits
