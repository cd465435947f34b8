"""The shims that stand in for other libraries' losses give what those give."""

import pytest

pytest.importorskip("liger_kernel")

import cce_shims
import cce_suite
import liger_shims
import suites
import torch
from liger_kernel.chunked_loss.functional import liger_fused_linear_grpo, liger_fused_linear_jsd
from torch.nn import functional as F

B, T, D, V = 2, 5, 8, 23


def made(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def assert_same(ours, theirs, tensors):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    found, expected = gradients(ours, tensors), gradients(theirs, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_jsd_is_ligers(beta, temperature):
    states = made(T, D), made(V, D), made(T, 2 * D, grad=False), made(V, 2 * D, grad=False)
    labels = torch.tensor([3, -100, 5, 7, 11])
    biases = made(V), made(V, grad=False)
    given = *states, labels, *biases, 0.3, 0.7, beta, -100, temperature, False
    assert_same(
        liger_shims.chunked_jsd(*given), liger_fused_linear_jsd(*given), (*states[:2], biases[0])
    )


def test_fused_linear_jsd_is_a_mean_over_labels():
    student, teacher = (made(T, D), made(V, D)), (made(T, D, grad=False), made(V, D, grad=False))
    labels = torch.tensor([3, 2, 5, 2, 11])
    log_s, log_t = (F.log_softmax(h @ w.T / 2, -1) for h, w in (student, teacher))
    counted = labels != 2
    expected = (log_t.exp() * (log_t - log_s)).sum(-1)[counted].mean()
    found = liger_shims.fused_linear_jsd(*student, *teacher, labels, 0.0, 2, 2.0)
    assert_same(found, expected, student)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_pytorchs(reduction):
    hidden, weight, bias = made(T, D), made(V, D), made(V)
    labels = torch.tensor([3, -100, 5, 7, 11])
    logits = 5 * torch.tanh((hidden @ weight.T + bias) / 5)
    expected = F.cross_entropy(logits, labels, reduction=reduction)
    tensors = hidden, weight, bias
    found = cce_shims.linear_cross_entropy(
        hidden, weight, labels, bias, softcap=5.0, reduction=reduction
    )
    assert_same(found, expected, tensors)
    found, *others = liger_shims.fused_linear_cross_entropy(
        hidden, weight, labels, bias, reduction=reduction, softcap=5.0
    )
    assert_same(found, expected, tensors)
    assert others == [None] * 3


def test_cross_entropy_shifts_as_cut_cross_entropy_does():
    hidden, weight, labels = made(B, T, D), made(V, D), torch.randint(V, (B, T))
    expected = F.cross_entropy((hidden[:, :-2] @ weight.T).flatten(0, 1), labels[:, 2:].flatten())
    found = cce_shims.linear_cross_entropy(hidden, weight, labels, shift=2)
    assert_same(found, expected, (hidden, weight))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "vespo"])
@pytest.mark.parametrize(("beta", "delta"), [(0.0, None), (0.2, 1.5)])
def test_chunked_grpo_is_ligers(loss_type, beta, delta):
    hidden, weight, ids = made(B, T, D), made(V, D), torch.randint(V, (B, T))
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        known = liger_shims.chunk_forward(hidden, weight, ids)
    old, reference = known - torch.rand(B, T) / 2, known - torch.rand(B, T)
    states = hidden, weight, ids, mask, torch.tensor([1.0, -0.5]), None, reference, old
    named = {"beta": beta, "loss_type": loss_type, "max_completion_length": T, "delta": delta}
    named |= {"vllm_is_ratio": torch.rand(B, T) + 0.5, "compiled": False, "epsilon_high": 0.28}
    # what autograd.Function.apply takes has no names
    given = liger_shims._given(liger_shims.LigerFusedLinearGRPOFunction, states, named)
    arguments = list(vars(given).values())[1:]
    ours, metrics = liger_shims.chunked_grpo(*arguments)
    theirs, expected = liger_fused_linear_grpo(*arguments)
    assert_same(ours, theirs, (hidden, weight))
    # the KL, or the clipped share, which is another with a delta: ours counts tokens that it bounds
    torch.testing.assert_close(metrics[0], expected[0], rtol=1e-4, atol=1e-5)


def test_an_option_that_ours_lack_skips_the_test():
    given = made(T, D), made(V, D), torch.randint(V, (T,))
    with pytest.raises(pytest.skip.Exception, match="our losses have no label_smoothing"):
        liger_shims.fused_linear_cross_entropy(*given, label_smoothing=0.1)
    with pytest.raises(pytest.skip.Exception, match="no log-sum-exp"):
        cce_shims.linear_cross_entropy(*given, return_lse=True)


def test_a_wrong_loss_of_ours_is_lost(tmp_path):
    """A whole run of a suite, of one test, right and with a loss 2 % too large."""
    checkout = tmp_path / "checkout"
    for name in ("tests", "cut_cross_entropy"):
        (checkout / name).mkdir(parents=True)
    (checkout / "cut_cross_entropy" / "__init__.py").write_text(THEIRS)
    for file in cce_suite.FILES:
        (checkout / file).write_text(SAMPLE)
    cce_suite.prepared(checkout, tmp_path / "work")
    file = cce_suite.FILES[0]
    ways = [
        suites.run(cce_suite.SUITE, file, tmp_path / "work", swap=swap, scale=scale)
        for swap, scale in ((False, 1), (True, 1), (True, 1.02))
    ]
    right, wrong = (suites.compare(file, ways[0], ours) for ours in ways[1:])
    assert right.stock == {"passed": 2}
    assert right.ours == {"passed": 1, "skipped": 1}
    assert right.skipped == {"our losses return no log-sum-exp": 1}
    assert right.answered == 2
    assert not right.lost
    assert [line.split(":")[0] for line in wrong.lost] == ["test_loss"]


THEIRS = """
import torch


def linear_cross_entropy(e, c, targets, return_lse=False):
    loss = torch.nn.functional.cross_entropy(e @ c.T, targets)
    return (loss, None) if return_lse else loss
"""
SAMPLE = """
import torch
from cut_cross_entropy import linear_cross_entropy


def test_loss():
    torch.cuda.manual_seed(0)
    e, c = torch.randn(4, 8, device="cuda"), torch.randn(9, 8, device="cuda")
    targets = torch.randint(9, (4,))
    expected = torch.nn.functional.cross_entropy(e @ c.T, targets)
    torch.testing.assert_close(linear_cross_entropy(e, c, targets), expected)


def test_lse():
    linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.arange(4), return_lse=True)
"""
