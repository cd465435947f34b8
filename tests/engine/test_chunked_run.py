"""What callers do with a fused loss: scale it, go back twice, freeze inputs, mask, reduce."""

import pytest
import torch
from cases import make_case
from closeness import TOLERANCE, assert_close, assert_no_worse_than_eager

import fused_sd
from fused_sd import LMHead, reference
from fused_sd.engine.workspace import Workspace


def loss_of(case, **settings):
    settings = {
        "reduction": "sum",
        "token_weights": case.token_weights,
        "chunk_size": 3,
        **settings,
    }
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    return fused_sd.divergence_loss(*sides, **settings)


def reference_of(case, *, temperature=1.0, teacher_temperature=None, **settings):
    head = {"logit_scale": case.logit_scale, "softcap": case.softcap}
    head["valid_vocab"] = case.valid_vocab
    student = reference.logits(case.hidden, case.weight, case.bias, temperature=temperature, **head)
    teacher = reference.logits(
        case.teacher_hidden,
        case.teacher_weight,
        temperature=teacher_temperature or temperature,
        **head,
    )
    return reference.divergence(student, teacher, **settings)


def weighted(token_loss, weights):
    """Sum over the tokens that have a weight, whatever the others hold."""
    return torch.where(weights != 0, token_loss * weights, 0).sum()


def assert_gradients(found, expected, dtype=torch.float64):
    for name, value, exact in zip(("hidden", "weight", "bias"), found, expected, strict=False):
        assert_close(value, exact, dtype, f"gradient by {name}")


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reductions_are_exact_under_any_upstream_gradient(reduction, dtype):
    case = make_case(bias=True, dtype=dtype)
    double = case.to(torch.float64)
    exact = reference_of(double) * double.token_weights
    output = loss_of(case, reduction=reduction)
    if reduction == "none":
        row_weights = torch.randn(7, dtype=dtype)
        found = torch.autograd.grad((output.loss * row_weights).sum(), case.inputs)
        expected = torch.autograd.grad((exact * row_weights.double()).sum(), double.inputs)
        assert_close(output.loss, exact, dtype)
    else:
        scale = 1 if reduction == "sum" else double.token_weights.sum()
        found = torch.autograd.grad(3 * output.loss, case.inputs)
        expected = torch.autograd.grad(3 * exact.sum() / scale, double.inputs)
        assert_close(output.loss, exact.sum() / scale, dtype)
    assert_gradients(found, expected, dtype)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_twice_adds_the_same_gradient_twice(reduction):
    case = make_case(bias=True)
    loss = (loss_of(case, reduction=reduction).loss * 0.5).sum()
    once = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip(case.inputs, once, strict=True):
        assert torch.equal(tensor.grad, 2 * gradient)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trainable", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(reduction, trainable):
    case = make_case(bias=True)
    expected = torch.autograd.grad((reference_of(case) * case.token_weights).sum(), case.inputs)
    for at, tensor in enumerate(case.inputs):
        tensor.requires_grad_(at in trainable)
    loss_of(case, reduction=reduction).loss.sum().backward()
    for at, tensor in enumerate(case.inputs):
        if at in trainable:
            assert_close(tensor.grad, expected[at], torch.float64)
        else:
            assert tensor.grad is None


def test_gradient_accumulation_over_micro_batches_is_the_whole_batchs_gradient():
    case = make_case()
    whole = torch.autograd.grad(loss_of(case).loss, case.inputs)
    for rows in (slice(0, 3), slice(3, 7)):
        fused_sd.divergence_loss(
            case.hidden[rows],
            case.head,
            case.teacher_hidden[rows],
            case.teacher_head,
            token_weights=case.token_weights[rows],
            reduction="sum",
        ).loss.backward()
    for tensor, gradient in zip(case.inputs, whole, strict=True):
        assert_close(tensor.grad, gradient, torch.float64)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("support", [fused_sd.FULL_VOCABULARY, fused_sd.StudentTopK(5)])
def test_chunk_size_does_not_change_the_result(chunk_size, support):
    case = make_case()
    one = loss_of(case, chunk_size=None, support=support)
    other = loss_of(case, chunk_size=chunk_size, support=support)
    assert_close(other.loss, one.loss, torch.float64)
    pairs = (torch.autograd.grad(output.loss, case.inputs) for output in (other, one))
    assert_gradients(*pairs)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_token_of_weight_zero_contributes_exactly_nothing(compact, garbage, reduction):
    clean = make_case()
    settings = {
        "support": fused_sd.StudentTopK(5),
        "importance": fused_sd.ImportanceCap(clean.old_log_probs),
        "compact": compact,
        "reduction": reduction,
        "metrics": ("student_entropy", "student_log_prob", "importance_ratio"),
    }
    expected = loss_of(clean, token_ids=clean.token_ids, **settings)
    gradients = torch.autograd.grad(expected.loss.sum(), clean.inputs)
    dirty = clean.to(torch.float64)
    dead = dirty.token_weights == 0
    with torch.no_grad():
        dirty.hidden[dead] = garbage
        dirty.teacher_hidden[dead] = garbage
    dirty.token_ids = torch.where(dead, -100, clean.token_ids)
    old = torch.where(dead, garbage, dirty.old_log_probs)
    settings["importance"] = fused_sd.ImportanceCap(old)
    output = loss_of(dirty, token_ids=dirty.token_ids, **settings)
    found = torch.autograd.grad(output.loss.sum(), dirty.inputs)
    assert_close(output.loss, expected.loss, torch.float64)
    for name, values in output.metrics.items():
        assert_close(values, expected.metrics[name], torch.float64, name)
        assert (values[dead] == 0).all()
    assert (found[0][dead] == 0).all()
    assert_gradients(found, gradients)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_all_masked_gives_an_attached_zero(compact, reduction):
    case = make_case(bias=True)
    case.token_weights = torch.zeros(7, dtype=torch.float64)
    with torch.no_grad():
        case.hidden.fill_(torch.nan)
        case.bias[3] = -torch.inf  # an infinite divergence even where the states are emptied
    output = loss_of(case, reduction=reduction, compact=compact, divergence="forward_kl")
    assert (output.loss == 0).all()
    for gradient in torch.autograd.grad(output.loss.sum(), case.inputs):
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_tokens_at_all_give_an_attached_zero(reduction):
    case = make_case(num_tokens=0)
    for weights in (None, case.token_weights):
        output = loss_of(case, reduction=reduction, token_weights=weights)
        assert output.loss.sum() == 0
        for gradient in torch.autograd.grad(output.loss.sum(), case.inputs):
            assert (gradient == 0).all()


def test_a_single_token_and_leading_shapes():
    case = make_case(num_tokens=6)
    flat = loss_of(case, reduction="none").loss
    shaped = fused_sd.divergence_loss(
        case.hidden.reshape(2, 3, -1),
        case.head,
        case.teacher_hidden.reshape(2, 3, -1),
        case.teacher_head,
        token_weights=case.token_weights.reshape(2, 3),
        reduction="none",
        metrics=("jsd",),
    )
    assert shaped.loss.shape == shaped.token_loss.shape == shaped.metrics["jsd"].shape == (2, 3)
    assert_close(shaped.loss.flatten(), flat, torch.float64)
    one = fused_sd.divergence_loss(
        case.hidden[0], case.head, case.teacher_hidden[0], case.teacher_head, reduction="sum"
    )
    assert_close(one.loss * case.token_weights[0], flat[0], torch.float64)


# prime, smaller than a block, one more and one less than a multiple of 16, several blocks
@pytest.mark.parametrize("vocab", [2, 13, 31, 33, 1009, 4099])
def test_vocabularies_of_any_size(vocab):
    case = make_case(vocab=vocab)
    output = loss_of(case)
    exact = (reference_of(case) * case.token_weights).sum()
    assert_close(output.loss, exact, torch.float64)
    pairs = (torch.autograd.grad(loss, case.inputs) for loss in (output.loss, exact))
    assert_gradients(*pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {"softcap": 3.0},
        {"logit_scale": 0.3},
        {"softcap": 2.0, "logit_scale": 1.7, "valid_vocab": 50},
        {"valid_vocab": 41},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["full", "tail", "drop", "renormalize", "union"])
def test_heads_with_bias_scale_softcap_and_padding(settings, kind):
    case = make_case(bias=True, **settings)
    double = {"temperature": 0.7, "teacher_temperature": 1.3}
    truncated, choice = {}, {}
    if kind != "full":
        top = fused_sd.UnionTopK(5) if kind == "union" else fused_sd.StudentTopK(5)
        remainder = "tail" if kind == "union" else kind
        truncated = {"support": top, "remainder": remainder}
        head = dict(settings)
        student = reference.logits(case.hidden, case.weight, case.bias, temperature=0.7, **head)
        teacher = reference.logits(
            case.teacher_hidden, case.teacher_weight, temperature=1.3, **head
        )
        choose = reference.union_topk if kind == "union" else reference.student_topk
        choice = {"support": choose(student, teacher, 5), "remainder": remainder}
    output = loss_of(case, **double, **truncated)
    exact = (reference_of(case, **double, **choice) * case.token_weights).sum()
    assert_close(output.loss, exact, torch.float64)
    pairs = (torch.autograd.grad(loss, case.inputs) for loss in (output.loss, exact))
    assert_gradients(*pairs)


@pytest.mark.parametrize("teacher_vocab", [60, 80])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_unequal_vocabularies_have_no_mass_on_the_missing_side(teacher_vocab, divergence):
    case = make_case(teacher_hidden_size=5, teacher_vocab=teacher_vocab)
    infinite = (divergence == "forward_kl") == (teacher_vocab > 67) and divergence != "jsd"
    choice = fused_sd.Jsd(0.3) if divergence == "jsd" else divergence
    if infinite:
        with pytest.raises(ValueError, match="valid_vocab"):
            loss_of(case, divergence=choice)
        return
    width = max(67, teacher_vocab)

    def padded(hidden, weight):
        logits = reference.logits(hidden, weight)
        return torch.nn.functional.pad(logits, (0, width - logits.shape[1]), value=-torch.inf)

    student = padded(case.hidden, case.weight)
    teacher = padded(case.teacher_hidden, case.teacher_weight)
    for support, kind in ((fused_sd.FULL_VOCABULARY, None), (fused_sd.TeacherTopK(4), "top")):
        chosen = None if kind is None else reference.teacher_topk(student, teacher, 4)
        if kind and divergence == "forward_kl" and teacher_vocab > 67:
            continue
        exact = reference.divergence(
            student, teacher, divergence=divergence, beta=0.3, support=chosen
        )
        output = loss_of(case, divergence=choice, support=support)
        assert_close(output.loss, weighted(exact, case.token_weights), torch.float64)
        pairs = (
            torch.autograd.grad(loss, case.inputs, retain_graph=True)
            for loss in (output.loss, weighted(exact, case.token_weights))
        )
        assert_gradients(*pairs)


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", [fused_sd.FULL_VOCABULARY, fused_sd.StudentTopK(4)])
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", fused_sd.Jsd(0.3), fused_sd.MixedKl(0.3)], ids=str
)
def test_a_teacher_equal_to_the_student_gives_exactly_zero(dtype, support, divergence):
    case = make_case(dtype=dtype, vocab=1009)
    output = fused_sd.divergence_loss(
        case.hidden,
        case.weight,
        case.hidden,
        case.weight,
        divergence=divergence,
        support=support,
        reduction="sum",
    )
    assert output.loss == 0
    for gradient in torch.autograd.grad(output.loss, (case.hidden, case.weight)):
        assert (gradient == 0).all()


@pytest.mark.bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "support",
    [fused_sd.StudentTopK(4), fused_sd.TeacherTopK(4), fused_sd.UnionTopK(4), None],
    ids=str,
)
def test_an_equal_teacher_gives_exactly_zero_where_one_sides_logits_are_made(support, dtype):
    """The other side's are dot products, whose sums run in another order."""
    case = make_case(num_tokens=3, hidden_size=576, vocab=77, dtype=dtype)
    if support is None:
        support = fused_sd.TokenIds(torch.arange(9).view(3, 3))
    for metrics in ((), ("reverse_kl",)):
        output = fused_sd.divergence_loss(
            *(case.hidden, case.weight, case.hidden, case.weight),
            support=support,
            remainder="renormalize",
            metrics=metrics,
            reduction="sum",
        )
        assert output.loss == 0
        for gradient in torch.autograd.grad(output.loss, (case.hidden, case.weight)):
            assert (gradient == 0).all()


def test_non_contiguous_inputs():
    case = make_case(num_tokens=8)
    hidden = torch.stack([case.hidden, case.hidden], 1)[:, 0]
    weight = case.weight.t().contiguous().t()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    output = fused_sd.divergence_loss(
        hidden, weight, case.teacher_hidden[:], weight.detach(), reduction="sum"
    )
    assert_close(output.loss, reference_of(case).sum(), torch.float64)
    pairs = (
        torch.autograd.grad(loss, (case.hidden, case.weight))
        for loss in (output.loss, reference_of(case).sum())
    )
    assert_gradients(*pairs)


def test_nothing_is_formed_for_backward_under_no_grad():
    case = make_case()
    with torch.no_grad():
        output = loss_of(case)
    assert not output.loss.requires_grad
    assert_close(output.loss, loss_of(case).loss, torch.float64)


def test_token_loss_is_detached_and_before_weighting():
    case = make_case()
    output = loss_of(case)
    assert not output.token_loss.requires_grad
    alive = case.token_weights != 0
    assert_close(output.token_loss[alive], reference_of(case)[alive], torch.float64)


def test_tokens_may_be_permuted_and_concatenated():
    case = make_case()
    order = torch.randperm(7)
    moved = fused_sd.divergence_loss(
        case.hidden[order],
        case.head,
        case.teacher_hidden[order],
        case.teacher_head,
        token_weights=case.token_weights[order],
        reduction="sum",
    )
    assert_close(moved.loss, loss_of(case).loss, torch.float64)


def test_weights_are_linear():
    case = make_case()
    tripled = loss_of(case, token_weights=3 * case.token_weights)
    assert_close(tripled.loss, 3 * loss_of(case).loss, torch.float64)
    pairs = [torch.autograd.grad(o.loss, case.inputs) for o in (tripled, loss_of(case))]
    assert_gradients(pairs[0], [3 * gradient for gradient in pairs[1]])


def test_negative_weights_are_weights():
    case = make_case()
    flipped = loss_of(case, token_weights=-case.token_weights)
    assert_close(flipped.loss, -loss_of(case).loss, torch.float64)


@pytest.mark.bits
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("support", [fused_sd.FULL_VOCABULARY, fused_sd.StudentTopK(9)])
def test_runs_are_bitwise_repeatable(reduction, support, poisoned_memory):
    case = make_case(vocab=1009, dtype=torch.float32)
    outputs = [loss_of(case, reduction=reduction, support=support) for _ in range(2)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    pairs = [torch.autograd.grad(output.loss.sum(), case.inputs) for output in outputs]
    for one, other in zip(*pairs, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peak", [20, 40, 80])
def test_sixteen_bit_operands_are_no_worse_than_eager_and_far_from_its_logits(dtype, peak):
    """Eager PyTorch rounds its logits to the operands' dtype, and loses the signal with them."""
    case = make_case(num_tokens=24, hidden_size=64, vocab=2003, peak=peak / 3.5, gap=0.02)
    case = case.to(dtype)
    case.token_weights = torch.ones(24, dtype=torch.float64)
    double = case.to(torch.float64)
    exact = reference_of(double).sum()
    expected = torch.autograd.grad(exact, double.inputs)
    eager = case.to(dtype)
    log_s = (eager.hidden @ eager.weight.T).float().log_softmax(-1)
    log_t = (eager.teacher_hidden @ eager.weight.detach().T).float().log_softmax(-1)
    eager_loss = (log_s.exp() * (log_s - log_t)).sum()
    theirs = torch.autograd.grad(eager_loss, eager.inputs)
    output = loss_of(case)
    mine = torch.autograd.grad(output.loss, case.inputs)
    assert_no_worse_than_eager(output.loss, eager_loss, exact, "loss")
    for name, value, other, truth in zip(("hidden", "weight"), mine, theirs, expected, strict=True):
        assert_no_worse_than_eager(value, other, truth, name)
        assert value.dtype == dtype


def test_logits_are_not_rounded_to_sixteen_bits():
    """At a KL of 1e-5, logits rounded to bf16 would be noise: the loss would be off by far more."""
    case = make_case(num_tokens=16, hidden_size=64, vocab=4001, peak=7, gap=1e-2)
    case = case.to(torch.bfloat16)
    double = case.to(torch.float64)
    exact = (reference_of(double) * double.token_weights).sum()
    output = loss_of(case)
    assert abs(output.loss.double() - exact) <= 1e-3 * exact
    found = torch.autograd.grad(output.loss, case.inputs)
    expected = torch.autograd.grad(exact, double.inputs)
    for value, truth in zip(found, expected, strict=True):
        error = (value.double() - truth).norm() / truth.norm()
        assert error <= 3e-3
    rounded = (double.hidden @ double.weight.T).bfloat16().double().log_softmax(-1)
    teacher = (double.teacher_hidden @ double.teacher_weight.T).bfloat16().double().log_softmax(-1)
    sixteen_bit = ((rounded.exp() * (rounded - teacher)).sum(-1) * double.token_weights).sum()
    assert abs(sixteen_bit - exact) > 0.05 * exact


def test_dw_is_accumulated_in_fp32_and_rounded_once():
    """Many chunks of bf16 operands: accumulating in bf16 would lose whole digits."""
    case = make_case(num_tokens=512, hidden_size=8, vocab=33, dtype=torch.bfloat16)
    case.token_weights = torch.ones(512)
    double = case.to(torch.float64)
    output = loss_of(case, chunk_size=1)
    found = torch.autograd.grad(output.loss, case.inputs)
    expected = torch.autograd.grad(reference_of(double).sum(), double.inputs)
    for value, truth in zip(found, expected, strict=True):
        # one rounding to bf16 is at most 2^-9 of the element
        assert ((value.double() - truth).abs() <= 2.0**-8 * truth.abs() + 1e-5).all()


def test_autocast_takes_the_matrices_and_leaves_fp32_logits():
    case = make_case(dtype=torch.float32, vocab=101)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss_of(case)
        loss = loss_of(case.to(torch.bfloat16))
    assert_close(output.loss, loss.loss, torch.float32)
    for tensor, gradient in zip(
        case.inputs, torch.autograd.grad(output.loss, case.inputs), strict=True
    ):
        assert gradient.dtype == tensor.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("valid_vocab", [None, 60])
def test_a_shared_head_is_cast_once_under_autocast(valid_vocab, monkeypatch):
    made, init = [], Workspace.__init__

    def watch(self, student, teacher, *rest):
        made.append((student, teacher))
        init(self, student, teacher, *rest)

    monkeypatch.setattr(Workspace, "__init__", watch)
    case = make_case(dtype=torch.float32, valid_vocab=valid_vocab)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for weight in (case.weight.detach(), case.weight.detach().clone()):
            head = LMHead(weight, valid_vocab=valid_vocab)
            fused_sd.divergence_loss(
                case.hidden, case.head, case.teacher_hidden, head, reduction="sum"
            )
    (student, teacher), (_, apart) = made
    assert student.given[0].dtype == torch.bfloat16
    assert teacher.weight is student.weight
    assert apart.weight is not student.weight


def test_mixed_hidden_and_head_under_autocast():
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused_sd.divergence_loss(
            case.hidden.bfloat16(),
            case.weight,
            case.teacher_hidden.bfloat16(),
            case.weight,
            reduction="sum",
        )
    output.loss.backward()
    assert case.weight.grad.dtype == torch.float32


def test_second_derivatives_are_refused():
    case = make_case()
    for reduction in ("sum", "none"):
        loss = loss_of(case, reduction=reduction).loss.sum()
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(loss, case.inputs, create_graph=True)


def test_gradcheck_in_float64():
    case = make_case(num_tokens=3, hidden_size=4, vocab=9, bias=True)
    weights = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)

    def loss(hidden, weight, bias, **settings):
        return fused_sd.divergence_loss(
            hidden,
            LMHead(weight, bias, softcap=5.0),
            case.teacher_hidden,
            case.teacher_weight,
            token_weights=weights,
            temperature=0.8,
            **{"reduction": "sum", **settings},
        ).loss

    for settings in (
        {"divergence": "forward_kl"},
        {"divergence": fused_sd.Jsd(0.3), "reduction": "none"},
        {"support": fused_sd.TokenIds(torch.arange(9).reshape(3, 3)), "remainder": "tail"},
        {"support": fused_sd.TokenIds(torch.arange(9).reshape(3, 3)), "remainder": "drop"},
    ):
        assert torch.autograd.gradcheck(lambda *x: loss(*x, **settings), case.inputs)  # noqa: B023


def test_clips_bound_entries_and_tokens():
    case = make_case(gap=1.0)
    settings = {"divergence": "forward_kl", "metrics": ("entry_clip_fraction",), "entry_clip": 0.05}
    output = loss_of(case, **settings)
    exact = reference_of(case, divergence="forward_kl", entry_clip=0.05)
    assert_close(output.loss, (exact * case.token_weights).sum(), torch.float64)
    assert 0 < output.metrics["entry_clip_fraction"].max() < 1
    bound = 1.001 * float(reference_of(case).detach().median())  # no token lies at it
    output = loss_of(case, token_clip=bound, metrics=("token_clip_fraction",))
    exact = reference_of(case, token_clip=bound)
    assert_close(output.loss, (exact * case.token_weights).sum(), torch.float64)
    pairs = (
        torch.autograd.grad(loss, case.inputs)
        for loss in (output.loss, (exact * case.token_weights).sum())
    )
    assert_gradients(*pairs)
    assert output.metrics["token_clip_fraction"].sum() > 0


def test_a_token_clip_saves_a_token_whose_divergence_is_infinite():
    case = make_case(bias=True)
    with torch.no_grad():
        case.bias[3] = -torch.inf
    case.bias.requires_grad_(False)
    output = loss_of(case, divergence="forward_kl", token_clip=5.0)
    assert output.loss.isfinite()
    for gradient in torch.autograd.grad(output.loss, (case.hidden, case.weight)):
        assert (gradient == 0).all()


def test_a_token_clip_saves_a_token_whose_derivative_is_infinite():
    """KL(s||t) where the teacher leaves out an entry: its log-ratio is infinite too."""
    case = make_case()
    bias = torch.zeros(67, dtype=torch.float64)
    bias[3] = -torch.inf
    sides = case.hidden, case.head, case.teacher_hidden, fused_sd.LMHead(case.teacher_weight, bias)
    output = fused_sd.divergence_loss(
        *sides, divergence="reverse_kl", token_clip=5.0, reduction="sum"
    )
    assert output.loss == 7 * 5.0
    for gradient in torch.autograd.grad(output.loss, (case.hidden, case.weight)):
        assert (gradient == 0).all()


def test_importance_ratio_is_formed_in_the_chunk_and_capped():
    case = make_case()
    output = loss_of(
        case,
        token_ids=case.token_ids,
        importance=fused_sd.ImportanceCap(case.old_log_probs, cap=1.5),
        temperature=0.8,
        metrics=("importance_ratio", "importance_cap_fraction", "student_log_prob"),
    )
    logits = reference.logits(case.hidden, case.weight, temperature=0.8)
    log_prob = reference.token_log_prob(logits, case.token_ids)
    ratio = reference.importance(log_prob, case.old_log_probs, 1.5)
    exact = (reference_of(case, temperature=0.8) * ratio * case.token_weights).sum()
    assert_close(output.loss, exact, torch.float64)
    pairs = (torch.autograd.grad(loss, case.inputs) for loss in (output.loss, exact))
    assert_gradients(*pairs)
    alive = case.token_weights != 0
    assert_close(output.metrics["importance_ratio"][alive], ratio[alive], torch.float64)
    assert_close(output.metrics["student_log_prob"][alive], log_prob[alive], torch.float64)


@pytest.mark.parametrize("support", ["full", "student", "teacher", "union"])
def test_metrics_are_those_of_the_whole_distributions(support):
    case = make_case(vocab=1009)
    case.token_weights = torch.ones(7, dtype=torch.float64)
    student = reference.logits(case.hidden, case.weight).detach()
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight).detach()
    names = [*fused_sd.METRICS[:6], "student_log_prob", "teacher_log_prob"]
    k = 2
    kinds = {
        "full": fused_sd.FULL_VOCABULARY,
        "student": fused_sd.StudentTopK(k),
        "teacher": fused_sd.TeacherTopK(k),
        "union": fused_sd.UnionTopK(k),
    }
    if support != "full":
        names += [*fused_sd.METRICS[6:11]]
    for remainder in ("tail",) if support == "full" else ("tail", "renormalize", "drop"):
        found = loss_of(
            case,
            support=kinds[support],
            remainder=remainder,
            metrics=names,
            token_ids=case.token_ids,
        ).metrics
        assert list(found) == names
        exact = {
            "forward_kl": reference.divergence(student, teacher, divergence="forward_kl"),
            "reverse_kl": reference.divergence(student, teacher, divergence="reverse_kl"),
            "jsd": reference.divergence(student, teacher, divergence="jsd", beta=0.5),
            "student_entropy": reference.entropy(student),
            "teacher_entropy": reference.entropy(teacher),
            "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
            "student_log_prob": reference.token_log_prob(student, case.token_ids),
            "teacher_log_prob": reference.token_log_prob(teacher, case.token_ids),
        }
        if support != "full":
            choose = getattr(reference, f"{support}_topk")
            mask = choose(student, teacher, k)
            for side, logits in (("student", student), ("teacher", teacher)):
                exact[f"{side}_mass"] = (logits.softmax(-1) * mask).sum(-1)
                exact[f"{side}_tail_mass"] = (logits.softmax(-1) * ~mask).sum(-1)
            both = reference.student_topk(student, teacher, k)
            both = both & reference.teacher_topk(student, teacher, k)
            exact["topk_overlap"] = both.sum(-1) / k
        for name, values in found.items():
            assert not values.requires_grad
            assert_close(values, exact[name].double(), torch.float64, name)


def test_no_tensor_of_tokens_by_vocabulary_is_ever_allocated():
    num_tokens, vocab = 600, 5003
    case = make_case(num_tokens, 8, vocab, dtype=torch.float32)
    limit = num_tokens * vocab * 4 // 2
    for settings in (
        {},
        {"reduction": "none"},
        {"support": fused_sd.StudentTopK(20)},
        {"support": fused_sd.TeacherTopK(20), "remainder": "renormalize"},
        {"metrics": ("forward_kl", "student_entropy")},
    ):
        with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
            loss_of(case, chunk_size=16, **settings).loss.sum().backward()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert 0 < largest < limit, settings


def test_tolerances_are_those_that_are_promised():
    assert {torch.float64: 1e-10, torch.float32: 1e-5} == TOLERANCE
