"""What a run returns beside a divergence, with a gradient: log-probabilities and entropies."""

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd

K = 5
VOCAB = 67
SUPPORTS = {
    "full": fused_sd.FULL_VOCABULARY,
    "student": fused_sd.StudentTopK(K),
    "teacher": fused_sd.TeacherTopK(K),
    "union": fused_sd.UnionTopK(K),
}
BOTH = ("student_log_prob", "student_entropy")


def divergence(case, kind, remainder, **settings):
    run = {"token_weights": case.token_weights, "chunk_size": 3, "reduction": "none", **settings}
    if kind != "server":
        teacher = case.teacher_hidden, case.teacher_head
        support = SUPPORTS[kind]
        remainder = "tail" if kind == "full" else remainder
        return fused_sd.divergence_loss(
            case.hidden, case.head, *teacher, support=support, remainder=remainder, **run
        )
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(case.hidden.shape[0])])
    known = fused_sd.entry_log_probs(case.teacher_hidden, case.teacher_head, ids).log_probs
    return fused_sd.topk_divergence_loss(
        case.hidden, case.head, ids, known.detach(), remainder=remainder, **run
    )


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop"])
@pytest.mark.parametrize("kind", [*SUPPORTS, "server"])
def test_values_and_gradients_are_those_of_two_runs(kind, remainder, softcap):
    case = make_case(bias=True, softcap=softcap)
    factors = torch.randn((3, 7), dtype=torch.float64)
    joint = divergence(case, kind, remainder, token_ids=case.token_ids, with_grad=BOTH)
    found = joint.loss, joint.with_grad["student_log_prob"], joint.with_grad["student_entropy"]
    alone = divergence(case, kind, remainder)
    scored = fused_sd.token_log_probs(
        case.hidden, case.head, case.token_ids, entropy=True, token_weights=case.token_weights
    )
    expected = alone.loss, scored.log_probs, scored.entropy
    for value, exact in zip(found, expected, strict=True):
        assert_close(value, exact, torch.float64)
    gradients = [
        torch.autograd.grad(sum((f * v).sum() for f, v in zip(factors, values)), case.inputs)
        for values in (found, expected)
    ]
    for value, exact in zip(*gradients, strict=True):
        assert_close(value, exact, torch.float64)


@pytest.mark.parametrize("names", [("student_log_prob",), ("student_entropy",)])
def test_one_of_them_alone_has_its_own_gradient(names):
    case = make_case()
    output = divergence(case, "full", "tail", token_ids=case.token_ids, with_grad=names)
    assert set(output.with_grad) == set(names)
    scored = fused_sd.token_log_probs(case.hidden, case.head, case.token_ids, entropy=True)
    alive = case.token_weights != 0
    exact = scored.log_probs if names == ("student_log_prob",) else scored.entropy
    mine = torch.autograd.grad(output.with_grad[names[0]].sum(), case.inputs)
    theirs = torch.autograd.grad((exact * alive).sum(), case.inputs)
    for value, wanted in zip(mine, theirs, strict=True):
        assert_close(value, wanted, torch.float64)


def test_nothing_is_kept_of_the_vocabulary_and_backward_may_come_twice():
    case = make_case()
    output = divergence(case, "student", "tail", token_ids=case.token_ids, with_grad=BOTH)
    total = output.loss.sum() - output.with_grad["student_log_prob"].sum()
    first = torch.autograd.grad(total, case.inputs, retain_graph=True)
    second = torch.autograd.grad(total, case.inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_it_compiles_as_one_graph():
    case = make_case()

    def total(hidden, weight):
        case.hidden, case.weight = hidden, weight
        output = divergence(case, "student", "tail", token_ids=case.token_ids, with_grad=BOTH)
        return (
            output.loss + output.with_grad["student_log_prob"] * output.with_grad["student_entropy"]
        ).sum()

    inputs = case.inputs
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs)
    for value, exact in zip(found, torch.autograd.grad(total(*inputs), inputs), strict=True):
        assert torch.equal(value, exact)


def test_a_token_without_weight_has_zeros_whatever_it_holds():
    case = make_case()
    dead = case.token_weights == 0
    assert dead.any()
    case.hidden.data[dead] = torch.nan
    output = divergence(case, "full", "tail", token_ids=case.token_ids, with_grad=BOTH)
    values = torch.stack([output.loss, *output.with_grad.values()])
    assert (values[:, dead] == 0).all()
    dhidden, *_ = torch.autograd.grad(values.sum(), case.inputs)
    assert (dhidden[dead] == 0).all()
    assert dhidden.isfinite().all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"with_grad": ("student_log_prob",)}, "come with token_ids"),
        ({"with_grad": ("logits",), "token_ids": True}, "with_grad"),
        ({"with_grad": BOTH, "token_ids": True, "reduction": "sum"}, 'reduction="none"'),
        ({"with_grad": BOTH, "token_ids": True, "gradient": "sparse"}, 'gradient="dense"'),
    ],
)
def test_what_cannot_be_differentiated_beside_it_is_refused(settings, message):
    case = make_case()
    if "token_ids" in settings:
        settings = {**settings, "token_ids": case.token_ids}
    with pytest.raises(ValueError, match=message):
        divergence(case, "full", "tail", **settings)
