"""``gradient="auto"``: sparse where few rows are dense, dense and not searched where most are."""

import functools

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd
from fused_sd.engine import gradients
from fused_sd.engine.auto_gradients import AutoGradients
from fused_sd.engine.operator import RunSettings
from fused_sd.head.lm_head import LMHead, Shaping
from fused_sd.objectives.divergence import DivergenceObjective
from fused_sd.settings import encode

CHUNK, GROUP = 4, 8  # float64 dlogits are as wide as logits, so that a group is two chunks
TOLERANCE = 2.0**-6


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    """Rows keep at most 12 entries, so that flat ones are dense."""
    monkeypatch.setattr(gradients, "MOST", 12)


@pytest.fixture
def searched(monkeypatch):
    """The number of rows of every search."""
    counts = []
    select = gradients.CertifiedGradients._select

    def counting(self, group):
        counts.append(group.stop - group.start)
        return select(self, group)

    monkeypatch.setattr(gradients.CertifiedGradients, "_select", counting)
    return counts


def case_of(kinds, **how):
    """A case with a token for each letter: D for nearly decided, F for flat."""
    case = make_case(len(kinds), 16, 211, peak=20.0, **how)
    scale = torch.tensor([0.05 if kind == "F" else 1.0 for kind in kinds])[:, None]
    case.hidden.data *= scale
    case.teacher_hidden = case.hidden.detach() + 0.1 * scale * torch.randn_like(case.hidden)
    return case


def run(case, gradient, **how):
    """Output and gradients of a reverse KL."""
    how = {"chunk_size": CHUNK, "reduction": "none", **how}
    if gradient != "dense":
        how.setdefault("tolerance", TOLERANCE)
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    output = fused_sd.divergence_loss(*sides, gradient=gradient, **how)
    wanted = [tensor for tensor in case.inputs if tensor.requires_grad]
    return output, torch.autograd.grad(output.loss.sum(), wanted, retain_graph=True)


def check_certificate(case, output, found, dense, tolerance=TOLERANCE):
    """What is dropped is within the tolerance and within the bound, and norms are known."""
    certificate = output.certificate
    error = (found[0].double() - dense[0].double()).norm(dim=-1)
    assert (error <= certificate.hidden_bound(case.head).double()).all()
    assert certificate.dropped_share <= tolerance
    everything = run(case, "sparse", tolerance=tolerance)[0].certificate
    assert_close(certificate.norm, everything.norm, certificate.norm.dtype)
    assert (certificate.kept[certificate.dense] == 0).all()
    assert (certificate.dropped[certificate.dense] == 0).all()


@pytest.mark.bits
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("kinds", ["D" * 40, "DDFD" * 10, "DF" * 20, "D" * 32 + "F" * 8])
def test_it_is_the_sparse_gradient_where_few_rows_are_dense(kinds, reduction):
    case = case_of(kinds, bias=True)
    sparse, auto = (run(case, kind, reduction=reduction) for kind in ("sparse", "auto"))
    for one, other in zip(auto[1], sparse[1], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(auto[0].certificate, sparse[0].certificate, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(auto[0].loss, sparse[0].loss)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_it_is_the_dense_gradient_where_all_rows_are_dense(reduction, frozen, searched):
    case = case_of("F" * 40, bias=not frozen)
    case.weight.requires_grad_(not frozen)
    tolerance = 2**-9
    dense = run(case, "dense", reduction=reduction)
    auto = run(case, "auto", reduction=reduction, tolerance=tolerance)
    assert searched == [CHUNK] * 5  # the first of two chunks of every group
    assert auto[0].certificate.dense.all()
    for one, other in zip(auto[1], dense[1], strict=True):
        assert_close(one, other, torch.float64)
    if reduction == "none":
        check_certificate(case, auto[0], auto[1], dense[1], tolerance)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_dense_groups_make_the_gemms_of_a_dense_gradient(reduction, monkeypatch):
    rows = []
    accumulate = gradients.Workspace.accumulate

    def counting(self, tokens, *given, **how):
        count = tokens.stop - tokens.start if isinstance(tokens, slice) else tokens.numel()
        if self.dlogits is not None:
            rows.append(count)
        accumulate(self, tokens, *given, **how)

    monkeypatch.setattr(gradients.Workspace, "accumulate", counting)
    case = case_of("F" * 40)
    made = []
    for kind in ("dense", "auto"):
        rows.clear()
        how = {} if kind == "dense" else {"tolerance": 2**-9}
        run(case, kind, reduction=reduction, **how)
        made.append(list(rows))
    assert made == [[GROUP] * 5] * 2


@pytest.mark.parametrize("wide", [True, False])
def test_a_run_that_changes_is_decided_by_the_rows_searched_so_far(wide, searched):
    decided_first, flat_first = case_of("D" * 24 + "F" * 24), case_of("F" * 24 + "D" * 24)
    if not wide:
        decided_first, flat_first = (c.to(torch.float32) for c in (decided_first, flat_first))
    for case, expected in (
        # never above three quarters: 24 of 48 rows
        (decided_first, [CHUNK, GROUP - CHUNK, *[GROUP] * 5]),
        # 3 chunks of flat rows, then 1 of 4 is decided: 3/4 is not above, the rest is searched
        (flat_first, [CHUNK] * 4 + [GROUP - CHUNK] + [GROUP] * 2),
    ):
        searched.clear()
        output, found = run(case, "auto")
        assert searched == expected
        dense = run(case, "dense")
        check_certificate(case, output, found, dense[1])
        is_dense = output.certificate.dense
        assert is_dense.sum() == 24


def test_decided_rows_of_a_group_that_is_not_searched_are_dense(searched):
    case = case_of("F" * 8 + "FFFF" + "DDDD" + "F" * 8)
    output, found = run(case, "auto")
    assert searched == [CHUNK] * 3
    assert output.certificate.dense.all()
    check_certificate(case, output, found, run(case, "dense")[1])


def test_a_chunk_that_is_searched_alone_keeps_its_values(searched):
    """The last group's first chunk is decided, but 16 of 20 searched rows are dense."""
    case = case_of("F" * 32 + "DDDD" + "FFFF")
    output, found = run(case, "auto")
    assert searched == [CHUNK] * 5
    assert output.certificate.dense.tolist() == [True] * 32 + [False] * 4 + [True] * 4
    check_certificate(case, output, found, run(case, "dense")[1])


@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 5, 9])
@pytest.mark.parametrize("vocab", [1, 5, 211])
def test_few_tokens_and_few_columns(vocab, num_tokens, reduction):
    case = make_case(num_tokens, 16, vocab, bias=True, peak=0.3)
    how = {"reduction": reduction, "token_weights": case.token_weights}
    dense = run(case, "dense", **how)
    output, found = run(case, "auto", tolerance=2**-12, **how)
    for one, other in zip(found, dense[1], strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 2**-10 * other.norm() + 1e-12
    assert output.certificate.norm.shape == (num_tokens,)
    assert output.certificate.dropped_share <= 2**-12


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tokens_without_a_weight(reduction, compact):
    case = case_of("F" * 40, bias=True)
    weights = torch.ones(40, dtype=torch.float64)
    weights[::3] = 0
    case.hidden.data[::3] = torch.nan
    how = {"reduction": reduction, "compact": compact, "token_weights": weights}
    output, found = run(case, "auto", tolerance=2**-9, **how)
    for one, other in zip(found, run(case, "dense", **how)[1], strict=True):
        assert_close(one, other, torch.float64)
    assert torch.equal(output.certificate.dense, weights != 0)
    assert (output.certificate.norm[::3] == 0).all()
    how["token_weights"] = torch.zeros_like(weights)
    output, found = run(case, "auto", **how)
    assert not any(gradient.any() for gradient in found)
    assert output.certificate.dropped_share == 0


@pytest.mark.bits
@pytest.mark.parametrize("kinds", ["DF" * 20, "F" * 40, "F" * 20 + "D" * 20])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_again_and_again(reduction, kinds):
    case = case_of(kinds, bias=True)
    output, once = run(case, "auto", reduction=reduction, tolerance=2**-9)
    twice = torch.autograd.grad(output.loss.sum(), case.inputs, retain_graph=True)
    assert all(map(torch.equal, once, twice))
    factors = torch.rand_like(output.loss)
    found = torch.autograd.grad(output.loss, case.inputs, factors)
    dense = run(case, "dense", reduction=reduction)[0]
    for one, other in zip(
        found, torch.autograd.grad(dense.loss, case.inputs, factors), strict=True
    ):
        assert (one - other).norm() <= 2**-6 * other.norm()


def test_a_graph_capture_searches_nothing(searched, monkeypatch):
    """On a CPU the capture is played: what needs no count from the device is all that runs."""
    begin = AutoGradients.__init__

    def begin_captured(self, *given):
        begin(self, *given)
        self.may_search = False

    monkeypatch.setattr(AutoGradients, "__init__", begin_captured)
    case = case_of("D" * 20)
    output, found = run(case, "auto", reduction="sum")
    assert not searched
    assert output.certificate.dense.all()
    for one, other in zip(found, run(case, "dense", reduction="sum")[1], strict=True):
        assert_close(one, other, torch.float64)


@pytest.mark.gpu
def test_a_captured_graph_has_the_dense_gradient():
    case = case_of("DF" * 20).to(torch.bfloat16)
    inputs = [tensor.detach().cuda().requires_grad_() for tensor in (case.hidden, case.weight)]
    teacher = case.teacher_hidden.cuda(), case.teacher_weight.cuda()

    def step(gradient):
        loss = fused_sd.divergence_loss(
            *inputs, *teacher, gradient=gradient, compact=False, reduction="sum"
        ).loss
        return torch.autograd.grad(loss, inputs)

    expected = step("dense")
    step("auto")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step("auto")
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).float().norm() <= 2**-7 * other.float().norm()


@pytest.mark.parametrize("reduced", [True, False])
def test_opcheck(reduced):
    case = case_of("F" * 12, bias=True)
    objective = DivergenceObjective(fused_sd.Comparison("reverse_kl"))
    shapings = Shaping(1.0, None), Shaping(0.5, 3.0)
    settings = RunSettings(*shapings, reduced, True, "torch", 3, 2**-4, None, auto=True)
    weights = case.token_weights[:, None]
    args = (
        *case.inputs,
        *(case.teacher_hidden.detach(), case.teacher_weight.detach(), None),
        weights if reduced else (weights != 0).double(),
        [],
        *encode((objective, settings)),
        [True, True, True],
    )
    torch.library.opcheck(torch.ops.fused_sd.chunked_run, args)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_whole(reduction):
    case = case_of("F" * 16 + "D" * 16, bias=True)

    def step(hidden, weight, bias):
        output = fused_sd.divergence_loss(
            *(hidden * 2, LMHead(weight, bias), case.teacher_hidden, case.teacher_head),
            **{"gradient": "auto", "reduction": reduction, "chunk_size": CHUNK},
        )
        return output.loss * 3, output.certificate

    loss, certificate = step(*case.inputs)
    other, of_compiled = torch.compile(step, fullgraph=True)(*case.inputs)
    assert all(map(torch.equal, certificate, of_compiled))
    grad = functools.partial(torch.autograd.grad, inputs=case.inputs)
    assert all(map(torch.equal, grad(loss.sum()), grad(other.sum())))


def test_what_has_gradients_of_its_own_is_refused():
    case = case_of("D" * 4)
    with pytest.raises(ValueError, match='gradient="dense"'):
        run(case, "auto", with_grad=("student_log_prob",), token_ids=case.token_ids)
