"""Gradients that may be sparse: what is dropped is certified, the rest is the dense gradient.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import itertools

import pytest
import torch
from cases import make_case
from closeness import assert_close

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fused_sd
from fused_sd.engine import gradients
from fused_sd.engine.budget import count_within_budget
from fused_sd.engine.certificate import radius, underflow
from fused_sd.engine.operator import RunSettings
from fused_sd.head.lm_head import LMHead, Shaping
from fused_sd.objectives.divergence import DivergenceObjective
from fused_sd.settings import encode

TOLERANCE = 2.0**-5


def divergence(**how):
    def loss(case, hidden, head, **run):
        sides = hidden, head, case.teacher_hidden, case.teacher_head
        return fused_sd.divergence_loss(*sides, **{"reduction": "sum", **how, **run})

    return loss


def importance(case, hidden, head, **run):
    cap = fused_sd.ImportanceCap(case.old_log_probs, 1.5)
    return divergence(token_ids=case.token_ids, importance=cap)(case, hidden, head, **run)


def cross_entropy(case, hidden, head, **run):
    return fused_sd.cross_entropy_loss(hidden, head, case.token_ids, **{"reduction": "sum", **run})


def mixed_case(num_tokens=24, vocab=211, **head):
    """Most rows nearly decided, every fifth nearly flat: some sparse, some dense."""
    case = make_case(num_tokens, 16, vocab, peak=20.0, **head)
    scale = torch.where(torch.arange(num_tokens) % 5 == 3, 0.02, 1.0)[:, None]
    case.hidden.data *= scale
    case.teacher_hidden = case.hidden.detach() + 0.1 * scale * torch.randn_like(case.hidden)
    return case


def policy(loss, **how):
    def of(case, hidden, head, **run):
        advantages = torch.linspace(-1, 1, hidden.shape[0], dtype=hidden.dtype)
        given = {"old_log_probs": case.old_log_probs, **how, **run}
        if loss is fused_sd.rlsd_loss:
            given |= {"teacher_hidden": case.teacher_hidden, "teacher_head": case.teacher_head}
        return loss(hidden, head, case.token_ids, advantages, **given)

    return of


LOSSES = {
    "forward_kl": divergence(divergence="forward_kl"),
    "reverse_kl": divergence(),
    "jsd": divergence(divergence=fused_sd.Jsd(0.3)),
    "mixed_kl": divergence(divergence=fused_sd.MixedKl(0.5)),
    "entry clip": divergence(divergence="forward_kl", entry_clip=0.02),
    "token clip": divergence(token_clip=0.5),
    "importance": importance,
    "tail": divergence(divergence=fused_sd.Jsd(0.5), support=fused_sd.StudentTopK(5)),
    "drop": divergence(support=fused_sd.TeacherTopK(5), remainder="drop"),
    "cross entropy": cross_entropy,
    "grpo": policy(fused_sd.grpo_loss),
    "rlsd": policy(fused_sd.rlsd_loss, reduction="sum"),
}


def product_gradient(loss, case, **run):
    """(N, V) float64 gradient by the product, dense: that of a head which is the identity."""
    case = case.to(torch.float64)
    head = case.head
    product = (case.hidden @ case.weight.t()).detach()
    if case.bias is not None:
        product += case.bias.detach()
    identity = torch.eye(case.weight.shape[0], dtype=torch.float64)
    given = LMHead(identity, None, head.logit_scale, head.softcap, head.valid_vocab)
    product.requires_grad_()
    return torch.autograd.grad(loss(case, product, given, **run).loss.sum(), product)[0]


def run_both(loss, case, grad_output=1.0, tolerance=TOLERANCE, **run):
    dense = loss(case, case.hidden, case.head, **run)
    sparse = loss(case, case.hidden, case.head, gradient="sparse", tolerance=tolerance, **run)
    found = [
        torch.autograd.grad((output.loss * grad_output).sum(), case.inputs)
        for output in (sparse, dense)
    ]
    assert torch.allclose(sparse.loss, dense.loss, rtol=0, atol=0, equal_nan=True)
    return sparse, *found


def of_logits(case):
    """(N,) gradient of a hidden state by which dense rows that run again may be off.

    Their logits come from a GEMM of another shape; a divergence's gradient follows a logit by its
    log-ratio.
    """
    rows = [case.hidden.detach(), case.teacher_hidden]
    given = zip(rows, [case.weight.detach(), case.teacher_weight], strict=True)
    student, teacher = ((h @ w.t() * case.logit_scale).log_softmax(-1).double() for h, w in given)
    log_ratio = (student - teacher[:, : student.shape[1]]).abs().amax(-1)
    longest = radius(case.head)[1].double()
    eps = torch.finfo(case.hidden.dtype).eps
    logits = 4 * case.hidden.shape[1] ** 0.5 * eps * rows[0].double().norm(dim=-1) * longest
    return case.logit_scale * logits * (1 + log_ratio) * longest


def check(case, sparse, found, dense, tolerance, reduced, rounding=1e-4, grad_output=None):
    """The certificate is kept, for the batch or for every token, and bounds every gradient."""
    certificate = sparse.certificate
    share = certificate.dropped <= tolerance * certificate.norm
    assert certificate.dropped_share <= tolerance if reduced else share.all()
    factor = torch.ones_like(certificate.norm) if grad_output is None else grad_output.abs()
    dropped = (certificate.dropped * factor).double()
    slack = rounding * (certificate.norm * factor).double()
    error = (found[0].double() - dense[0].double()).norm(dim=-1)
    bound = certificate.hidden_bound(case.head).double() * factor.double()
    # what the factor makes too small for its digits
    bound += (factor != 0) * underflow(case.head, radius(case.head)[1])
    if not reduced:
        bound += torch.where(certificate.dense, factor * of_logits(case), 0)
    assert (error <= bound).all()
    hidden = torch.where(
        (factor * certificate.norm)[:, None] == 0, 0, case.hidden.detach().double()
    )
    error = (found[1] - dense[1]).double().norm()
    assert error <= ((dropped + slack) * hidden.norm(dim=-1)).sum() + 1e-30
    if case.bias is not None:
        assert (found[2] - dense[2]).double().norm() <= (dropped + slack).sum()


@pytest.fixture
def few_entries(monkeypatch):
    """Rows keep at most 12 entries, so that some must be dense."""
    monkeypatch.setattr(gradients, "MOST", 12)


@pytest.mark.bits
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_certified(name, reduction, few_entries):
    case = mixed_case(bias=False, softcap=50.0, logit_scale=1.3)
    run = {"reduction": reduction, "token_weights": case.token_weights, "chunk_size": 5}
    grad_output = torch.rand(24, dtype=torch.float64) if reduction == "none" else None
    given = 1.0 if grad_output is None else grad_output
    sparse, found, dense = run_both(LOSSES[name], case, given, **run)
    factor = None if grad_output is None else grad_output * case.token_weights
    check(case, sparse, found, dense, TOLERANCE, reduction == "sum", 1e-9, factor)
    certificate = sparse.certificate
    expected = product_gradient(LOSSES[name], case, **run)
    if reduction == "none":
        expected = expected / torch.where(case.token_weights == 0, 1, case.token_weights)[:, None]
    assert_close(certificate.norm, expected.abs().sum(-1), torch.float64)
    assert (certificate.kept[certificate.dense] == 0).all()
    assert (certificate.dropped[certificate.dense] == 0).all()
    assert (certificate.kept <= 12).all()
    assert certificate.dense.any() or reduction == "sum"  # whose budget may buy them all
    assert certificate.kept.any() or name in ("importance", "grpo", "rlsd")  # of unlikely tokens


@pytest.mark.bits
@example(339998, 2, 30.0, 1e-3, 0.9, 1, 1, "none", "cross entropy")  # dhidden below 1e-38
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([1, 2, 67, 211, 1009]),
    peak=st.sampled_from([0.01, 1.0, 5.0, 30.0]),
    gap=st.sampled_from([1e-3, 0.1, 3.0]),
    tolerance=st.sampled_from([0.9, 2**-2, 2**-5, 2**-8, 2**-14]),
    most=st.sampled_from([1, 3, 20, 512]),
    chunk=st.sampled_from([1, 3, 50]),
    reduction=st.sampled_from(["sum", "none"]),
    name=st.sampled_from(sorted(LOSSES)),
)
def test_the_certificate_is_never_violated(
    seed, vocab, peak, gap, tolerance, most, chunk, reduction, name
):
    torch.manual_seed(seed)
    before, gradients.MOST = gradients.MOST, most
    try:
        case = make_case(
            13, 8, max(vocab, 5 if name in ("tail", "drop") else 1), peak=peak, gap=gap
        )
        case = case.to(torch.float32)
        grad_output = torch.randn(13) if reduction == "none" else None
        run = {"reduction": reduction, "token_weights": case.token_weights, "chunk_size": chunk}
        given = 1.0 if grad_output is None else grad_output
        sparse, found, dense = run_both(LOSSES[name], case, given, tolerance, **run)
    finally:
        gradients.MOST = before
    factor = None if grad_output is None else grad_output * case.token_weights
    check(case, sparse, found, dense, tolerance, reduction == "sum", grad_output=factor)


@pytest.mark.parametrize("tail", ["flat", "geometric", "one block", "huge", "equal"])
def test_adversarial_tails(tail, few_entries):
    """Heads whose logits are what the tail says, whatever the random state."""
    vocab = 1009
    at = torch.arange(vocab, dtype=torch.float64)
    logits = {
        "flat": torch.zeros_like(at),
        "geometric": -at * 0.05,
        "one block": torch.where((at >= 512) & (at < 640), 5.0, 0.0),
        "huge": torch.where(at == 1008, 80.0, 0.0),
        "equal": torch.where(at % 2 == 0, 3.0, -3.0),
    }[tail]
    case = make_case(9, 8, vocab, peak=0.05)
    weight = case.weight.detach().clone()
    weight[:, 0] = logits
    case.weight = weight.requires_grad_()
    case.hidden.data[:, 0] = 1
    case.teacher_weight = weight.detach()
    for name, reduction in itertools.product(
        ("reverse_kl", "jsd", "cross entropy"), ("sum", "none")
    ):
        sparse, found, dense = run_both(LOSSES[name], case, reduction=reduction)
        check(case, sparse, found, dense, TOLERANCE, reduction == "sum", 1e-9)


@pytest.mark.bits
def test_dense_rows_are_the_dense_gradient(few_entries):
    """Where no row can be sparse, nothing is dropped, whatever waits for whatever."""
    case = make_case(24, 16, 211, bias=True, peak=0.1)
    for reduction, chunk in itertools.product(("sum", "none"), (1, 5, 24)):
        run = {"reduction": reduction, "tolerance": 2**-12, "chunk_size": chunk}
        sparse, found, dense = run_both(LOSSES["reverse_kl"], case, **run)
        assert sparse.certificate.dense.all()
        assert sparse.certificate.dropped_share == 0
        for one, other in zip(found, dense, strict=True):
            assert_close(one, other, torch.float64)


@pytest.mark.parametrize("compact", [True, False])
def test_tokens_without_a_weight_are_not_called_dense(compact, few_entries):
    case = make_case(24, 16, 211, peak=0.1)
    run = {"token_weights": case.token_weights, "compact": compact, "tolerance": 2**-12}
    sparse, *_ = run_both(LOSSES["reverse_kl"], case, **run)
    assert torch.equal(sparse.certificate.dense, case.token_weights != 0)


def test_where_most_rows_are_dense_all_are(few_entries):
    """The others would save less than selecting and moving costs."""
    case = make_case(24, 16, 211, peak=0.1)
    case.hidden.data[::6] *= 300
    case.teacher_hidden = case.hidden.detach() * 0.9
    sparse, *_ = run_both(LOSSES["reverse_kl"], case, tolerance=0.1, reduction="none")
    assert sparse.certificate.dense.all()
    alone = case.hidden.detach()[::6], case.head, case.teacher_hidden[::6], case.teacher_head
    alone[0].requires_grad_()
    output = fused_sd.divergence_loss(*alone, gradient="sparse", tolerance=0.1, reduction="none")
    assert not output.certificate.dense.any()


@pytest.mark.bits
def test_a_mixture_of_dense_and_sparse_rows(few_entries):
    """Dense rows of several groups wait in the workspace while sparse rows pass."""
    case = mixed_case(40)
    for reduction, chunk in itertools.product(("sum", "none"), (1, 2, 4, 40)):
        run = {"reduction": reduction, "chunk_size": chunk}
        sparse, found, dense = run_both(LOSSES["reverse_kl"], case, tolerance=2**-4, **run)
        if reduction == "none":
            assert 0 < sparse.certificate.dense.sum() < 20
        check(case, sparse, found, dense, 2**-4, reduction == "sum", 1e-9)


@pytest.mark.parametrize("support", ["student", "teacher", "ids"])
@pytest.mark.parametrize("sizes", [{}, {"teacher_vocab": 150, "teacher_hidden_size": 9}])
def test_entries_are_those_of_whole_rows(support, sizes):
    """Dot products see the bias, the scale, the soft-cap and both vocabularies, as a GEMM does."""
    case = make_case(24, 16, 211, bias=True, softcap=20.0, logit_scale=1.3, **sizes)
    ids = torch.randint(-1, 211, (24, 6))
    of_top_k = {"student": fused_sd.StudentTopK(5), "teacher": fused_sd.TeacherTopK(5)}
    how = {"support": of_top_k.get(support, fused_sd.TokenIds(ids)), "remainder": "renormalize"}
    if sizes:
        how["divergence"] = fused_sd.Jsd(0.5)  # finite where one side has no such token
    loss = divergence(**how)
    outputs = [loss(case, case.hidden, case.head, metrics=m) for m in ((), ("student_mass",))]
    for one, other in zip(
        *(torch.autograd.grad(o.loss, case.inputs) for o in outputs), strict=True
    ):
        assert_close(one, other, torch.float64)
    assert_close(outputs[0].token_loss, outputs[1].token_loss, torch.float64)


def test_an_id_counts_once_among_the_kept():
    case = make_case(3, 16, 211)
    ids = torch.tensor([[5, 5, 7, 9], [-1, 2, -1, 3], [4, 3, 2, 1]])
    output = divergence(support=fused_sd.TokenIds(ids), remainder="renormalize")(
        case, case.hidden, case.head, gradient="sparse"
    )
    assert output.certificate.kept.tolist() == [3, 2, 4]


@pytest.mark.bits
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["reverse_kl", "exact"])
def test_backward_takes_any_factor_again_and_again(name, reduction, few_entries):
    how = {"support": fused_sd.UnionTopK(4), "remainder": "renormalize"} if name == "exact" else {}
    case = mixed_case(bias=True)
    output = divergence(**how)(
        case, case.hidden, case.head, gradient="sparse", reduction=reduction, chunk_size=5
    )
    grad_output = torch.rand_like(output.loss)
    once, twice = (
        torch.autograd.grad(output.loss, case.inputs, grad_output, retain_graph=True)
        for _ in range(2)
    )
    tripled = torch.autograd.grad(output.loss, case.inputs, 3 * grad_output, retain_graph=True)
    for one, two, three in zip(once, twice, tripled, strict=True):
        assert torch.equal(one, two)
        assert_close(three, 3 * one, torch.float64)
    for place, tensor in enumerate(case.inputs):  # each alone
        alone = torch.autograd.grad(output.loss, tensor, grad_output, retain_graph=True)[0]
        assert torch.equal(alone, once[place])


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_input_costs_the_others_nothing(frozen, reduction, few_entries):
    case = mixed_case(bias=True)
    whole = run_both(LOSSES["reverse_kl"], case, reduction=reduction, chunk_size=5)[1]
    names = ["hidden", "weight", "bias"]
    expected = dict(zip(names, whole, strict=True))
    getattr(case, frozen).requires_grad_(False)
    output = LOSSES["reverse_kl"](
        *(case, case.hidden, case.head),
        gradient="sparse",
        tolerance=TOLERANCE,
        reduction=reduction,
        chunk_size=5,
    )
    output.loss.sum().backward()
    assert getattr(case, frozen).grad is None
    for name in names:
        if name != frozen:
            assert_close(getattr(case, name).grad, expected[name], torch.float64)


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, few_entries):
    case = mixed_case(bias=True).to(dtype)
    sparse, found, dense = run_both(LOSSES["reverse_kl"], case, token_weights=case.token_weights)
    rounding = 1e-4 if dtype == torch.float32 else 1e-2
    check(case, sparse, found, dense, TOLERANCE, True, rounding)
    assert all(gradient.dtype == dtype for gradient in found)


@pytest.mark.bits
def test_bitwise_equal_run_to_run(few_entries):
    case = mixed_case(bias=True).to(torch.float32)
    runs = [run_both(LOSSES["jsd"], case, chunk_size=5) for _ in range(2)]
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(runs[0][0].certificate, runs[1][0].certificate, strict=True):
        assert torch.equal(one, other)


@pytest.mark.bits
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
@pytest.mark.parametrize("exact", [True, False])
def test_nan_behind_a_zero_weight(exact, reduction, compact, few_entries):
    how = {"support": fused_sd.TeacherTopK(4), "remainder": "renormalize"} if exact else {}
    case = mixed_case(bias=True)
    run = {"gradient": "sparse", "reduction": reduction, "compact": compact, "chunk_size": 5}
    run["token_weights"] = case.token_weights
    whole = divergence(**how)(case, case.hidden, case.head, **run)
    expected = torch.autograd.grad(whole.loss.sum(), case.inputs)
    dead = case.token_weights == 0
    case.hidden.data[dead] = torch.nan
    case.teacher_hidden[dead] = torch.inf
    output = divergence(**how)(case, case.hidden, case.head, **run)
    grad_output = torch.ones_like(output.loss)
    if reduction == "none":
        grad_output[dead] = torch.nan
    found = torch.autograd.grad(output.loss, case.inputs, grad_output)
    assert torch.equal(output.loss, whole.loss)
    assert (output.certificate.kept[dead] == 0).all()
    assert not output.certificate.dense[dead].any()
    assert (found[0][dead] == 0).all()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("exact", [True, False])
def test_without_compaction_it_is_the_same_gradient(exact):
    how = {"support": fused_sd.TeacherTopK(4), "remainder": "renormalize"} if exact else {}
    case = mixed_case(bias=True)
    run = {"gradient": "sparse", "token_weights": case.token_weights}
    found = []
    for compact in (True, False):
        output = divergence(**how)(case, case.hidden, case.head, compact=compact, **run)
        found.append(torch.autograd.grad(output.loss, case.inputs))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, torch.float64)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 6])
def test_no_tokens_at_all(exact, num_tokens):
    how = {"support": fused_sd.TeacherTopK(4), "remainder": "renormalize"} if exact else {}
    for reduction in ("sum", "none", "mean"):
        case = make_case(num_tokens, 16, 67, bias=True)
        case.token_weights.zero_()
        output = divergence(**how)(
            *(case, case.hidden, case.head),
            gradient="sparse",
            token_weights=case.token_weights,
            reduction=reduction,
        )
        output.loss.sum().backward()
        for tensor in case.inputs:
            assert (tensor.grad == 0).all()
        assert output.certificate.dropped_share == 0


def test_a_row_that_is_not_finite_stays_dense(few_entries):
    """It poisons what it would poison densely, and no certificate is written for it."""
    case = make_case(12, 16, 211, peak=6.0)
    case.hidden.data[3] = torch.nan
    for reduction in ("sum", "none"):
        sparse, found, dense = run_both(LOSSES["reverse_kl"], case, reduction=reduction)
        assert sparse.certificate.dense[3]
        assert torch.equal(found[0].isnan(), dense[0].isnan())
        assert torch.equal(found[1].isnan(), dense[1].isnan())


def test_without_a_gradient_there_is_no_certificate():
    case = make_case(12, 16, 67)
    with torch.no_grad():
        assert LOSSES["jsd"](case, case.hidden, case.head, gradient="sparse").certificate is None
    assert LOSSES["jsd"](case, case.hidden, case.head).certificate is None


def test_a_mean_is_certified_as_its_sum(few_entries):
    case = mixed_case()
    run = {"token_weights": case.token_weights, "chunk_size": 5}
    one, summed, _ = run_both(LOSSES["reverse_kl"], case, reduction="sum", **run)
    other, mean, _ = run_both(LOSSES["reverse_kl"], case, reduction="mean", **run)
    assert all(map(torch.equal, one.certificate, other.certificate))
    for a, b in zip(summed, mean, strict=True):
        assert_close(b * case.token_weights.sum(), a, torch.float64)


def test_shapes_follow_the_tokens():
    case = make_case(12, 16, 67)
    hidden, teacher = (tensor.unflatten(0, (3, 4)) for tensor in (case.hidden, case.teacher_hidden))
    output = fused_sd.divergence_loss(
        *(hidden, case.head, teacher, case.teacher_head), gradient="sparse", reduction="sum"
    )
    assert all(tensor.shape == (3, 4) for tensor in output.certificate)
    assert output.certificate.hidden_bound(case.head).shape == (3, 4)


def test_a_row_of_the_head_that_no_token_keeps_has_no_gradient():
    """Adam makes whole steps of however little."""
    case = mixed_case(bias=True)
    case.hidden.data[3::5] *= 50  # no flat token
    case.teacher_hidden = case.hidden.detach() * 0.95
    for reduction in ("sum", "none"):
        sparse, found, dense = run_both(LOSSES["reverse_kl"], case, reduction=reduction)
        assert not sparse.certificate.dense.any()
        untouched = (found[1] == 0).all(-1)
        assert untouched.sum() >= 211 - sparse.certificate.kept.sum() > 0
        assert (found[2][untouched] == 0).all()
        assert (dense[1][untouched] != 0).any()


def test_small_rows_are_left_out():
    """A token that hardly counts keeps nothing, and the tolerance is spent, not wasted."""
    case = mixed_case()
    weights = torch.ones(24, dtype=torch.float64)
    weights[::2] = 1e-8
    output = LOSSES["reverse_kl"](
        case, case.hidden, case.head, gradient="sparse", token_weights=weights
    )
    assert (output.certificate.kept[::2] == 0).all()
    assert_close(output.certificate.dropped[::2], output.certificate.norm[::2], torch.float64)
    assert output.certificate.dropped_share > 0.9 * 2**-8


def test_prices_are_counted_from_the_first():
    prices = torch.tensor([0.0, 0.5, 0.5, 1.0, torch.inf])
    budgets = {1.0: 3, 2.5: 4, 0.4: 1, 0.0: 0, -1.0: 0, float("nan"): 0}
    for budget, number in budgets.items():
        assert count_within_budget(prices, torch.tensor(budget)) == number
    many = torch.full((2**20,), 1e30)  # whose sum nothing could hold
    assert count_within_budget(many, torch.tensor(1e-30)) == 0


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_opcheck(reduced, exact, few_entries):
    case = make_case(12, 16, 211, bias=True, peak=2.0)
    comparison = fused_sd.Comparison("reverse_kl")
    if exact:
        comparison = fused_sd.Comparison("reverse_kl", fused_sd.TeacherTopK(4), "renormalize")
    rows = DivergenceObjective(comparison)
    shapings = Shaping(1.0, None), Shaping(0.5, 3.0)
    settings = RunSettings(*shapings, reduced, True, "torch", 3, 2**-4, None)
    grad_output = case.token_weights[:, None]
    teacher = case.teacher_hidden.detach(), case.teacher_weight.detach(), None
    args = (
        *case.inputs,
        *teacher,
        grad_output if reduced else (grad_output != 0).double(),
        [],
        *encode((rows, settings)),
        [True, True, True],
    )
    torch.library.opcheck(torch.ops.fused_sd.chunked_run, args)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_whole(reduction, few_entries):
    case = mixed_case(bias=True)

    def step(hidden, weight, bias):
        output = fused_sd.divergence_loss(
            *(hidden * 2, LMHead(weight, bias), case.teacher_hidden, case.teacher_head),
            gradient="sparse",
            tolerance=2**-4,
            reduction=reduction,
            chunk_size=5,
        )
        return output.loss * 3, output.certificate

    compiled = torch.compile(step, fullgraph=True)
    loss, certificate = step(*case.inputs)
    other, of_compiled = compiled(*case.inputs)
    assert 0 < certificate.dense.sum() < 24
    assert all(map(torch.equal, certificate, of_compiled))
    for one, two in zip(
        *(torch.autograd.grad(x.sum(), case.inputs) for x in (loss, other)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gradient": "thin"}, "gradient must be"),
        ({"tolerance": 0.01}, "tolerance must come with gradient='sparse' or 'auto'"),
        ({"gradient": "sparse", "tolerance": 0.0}, "tolerance must be"),
        ({"gradient": "auto", "tolerance": 0.0}, "tolerance must be"),
        ({"gradient": "sparse", "tolerance": 1.0}, "tolerance must be below 1"),
        ({"gradient": "sparse", "tolerance": float("nan")}, "tolerance must be"),
    ],
)
def test_bad_settings(wrong, message):
    case = make_case(6, 8, 67)
    for loss in (LOSSES["reverse_kl"], LOSSES["cross entropy"], LOSSES["grpo"]):
        with pytest.raises(ValueError, match=message):
            loss(case, case.hidden, case.head, **wrong)
