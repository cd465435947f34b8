"""The reference is right: golden values, identities, impossible tokens and cases done by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_sd import reference

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
VOCAB, TOP, SAMPLED = GOLDEN["vocab"], GOLDEN["k"], GOLDEN["sampled"]
STUDENT = 2 * torch.sin(1.7 * torch.arange(VOCAB, dtype=torch.double) + 0.3)
TEACHER = 2 * torch.cos(1.1 * torch.arange(VOCAB, dtype=torch.double))
SUPPORTS = {
    "student_topk": reference.student_topk,
    "teacher_topk": reference.teacher_topk,
    "union_topk": reference.union_topk,
}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mixed_kl", "skew_kl")
ESTIMATORS = {
    "k1": reference.sampled_k1,
    "k2": reference.sampled_k2,
    "k3": reference.sampled_k3,
}
NEVER = -torch.inf


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Double-precision logits that differ from seed to seed and have no ties."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.double)


def numbers(*values: float) -> Tensor:
    """The numbers, in float64."""
    return torch.tensor(values, dtype=torch.double)


def logs(*values: float) -> Tensor:
    """The natural logarithms of the numbers, in float64."""
    return numbers(*values).log()


def loss_and_gradient(loss_of: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """The per-token losses at the given logits and the gradient of their sum."""
    leaf = at.detach().clone().requires_grad_(True)
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def assert_equal(actual: Tensor, expected: Tensor | float, atol: float = 1e-12) -> None:
    """Equal up to rounding in float64."""
    expected = torch.as_tensor(expected, dtype=torch.double).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def golden_loss(name: str, student: Tensor) -> Tensor:
    """The reference's loss for a row of the golden file, named "<what> <support> <how>"."""
    what, *options = name.split()
    if what == "sampled":
        a, b = (reference.token_log_prob(x, torch.tensor(SAMPLED)) for x in (student, TEACHER))
        return ESTIMATORS[options[0]](a, b)
    choices: dict[str, Any] = {"divergence": "mixed_kl" if what == "mixed" else what}
    for option in options:
        if option in SUPPORTS:
            choices["support"] = SUPPORTS[option](student, TEACHER, TOP)
        elif "=" in option:
            key, value = option.split("=")
            choices[key] = float(value)
        elif option != "full":
            choices["remainder"] = option
    return reference.divergence(student, TEACHER, **choices)


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: row["name"].replace(" ", "-"))
def test_loss_and_gradient_equal_the_golden_values(row: dict[str, Any]) -> None:
    loss, gradient = loss_and_gradient(lambda z: golden_loss(row["name"], z), STUDENT)
    assert_equal(loss, row["loss"])
    assert_equal(gradient, torch.tensor(row["dlogits"], dtype=torch.double))


def test_golden_supports_are_the_top_tokens() -> None:
    for name in ("student_topk", "teacher_topk"):
        support = SUPPORTS[name](STUDENT, TEACHER, TOP)
        assert support.nonzero().flatten().tolist() == sorted(GOLDEN[name])


def test_logits_scale_then_cap_then_divide_by_the_temperature() -> None:
    hidden, weight = random_logits(5, 4), random_logits(7, 4, seed=1)
    bias = random_logits(7, seed=2)
    actual = reference.logits(
        hidden, weight, bias, logit_scale=0.5, softcap=3.0, temperature=2.0, valid_vocab=6
    )
    expected = 3 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3) / 2
    assert_equal(actual[:, :6], expected[:, :6])
    assert actual[:, 6].isneginf().all()


def test_half_precision_logits_are_computed_in_float64() -> None:
    student, teacher = random_logits(3, 9).bfloat16(), random_logits(3, 9, seed=1).bfloat16()
    loss = reference.divergence(student, teacher)
    assert loss.dtype == torch.double
    assert torch.equal(loss, reference.divergence(student.double(), teacher.double()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_distribution_does_not_diverge_from_itself(divergence: str) -> None:
    z = random_logits(4, 33)
    loss, gradient = loss_and_gradient(
        lambda x: reference.divergence(x, z, divergence=divergence), z
    )
    assert_equal(loss, 0.0)
    assert_equal(gradient, 0.0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_of_swapped_sides_is_jsd_of_the_other_weight(beta: float) -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    there = reference.divergence(s, t, divergence="jsd", beta=beta)
    assert_equal(there, reference.divergence(t, s, divergence="jsd", beta=1 - beta))


def test_reverse_kl_is_forward_kl_of_swapped_sides() -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    reverse = reference.divergence(s, t, divergence="reverse_kl")
    assert_equal(reverse, reference.divergence(t, s, divergence="forward_kl"))


def test_jsd_over_its_weight_tends_to_the_kls() -> None:
    s, t, small = random_logits(4, 33), random_logits(4, 33, seed=1), 1e-7
    forward = reference.divergence(s, t, divergence="jsd", beta=small) / small
    reverse = reference.divergence(s, t, divergence="jsd", beta=1 - small) / small
    assert_equal(forward, reference.divergence(s, t, divergence="forward_kl"), atol=1e-3)
    assert_equal(reverse, reference.divergence(s, t, divergence="reverse_kl"), atol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_refuses_the_end_points_and_gkd_maps_them_to_the_kls(beta: float) -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    with pytest.raises(ValueError):
        reference.divergence(s, t, divergence="jsd", beta=beta)
    kl = "reverse_kl" if beta else "forward_kl"
    assert_equal(reference.gkd(s, t, beta=beta), reference.divergence(s, t, divergence=kl))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixed_kl_is_linear_in_its_weight_and_ends_in_the_kls(weight: float) -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    forward = reference.divergence(s, t, divergence="forward_kl")
    reverse = reference.divergence(s, t, divergence="reverse_kl")
    mixed = reference.divergence(s, t, divergence="mixed_kl", forward_weight=weight)
    assert_equal(mixed, weight * forward + (1 - weight) * reverse)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_merging_a_tail_into_one_bucket_never_increases_a_divergence(
    divergence: str, support: str
) -> None:
    s, t = random_logits(64, 33), random_logits(64, 33, seed=1)
    full = reference.divergence(s, t, divergence=divergence)
    mask = SUPPORTS[support](s, t, 5)
    tail = reference.divergence(s, t, divergence=divergence, support=mask)
    assert (tail <= full + 1e-12).all()
    assert (tail >= -1e-12).all()


@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop"])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_support_of_the_whole_vocabulary_is_no_truncation(
    divergence: str, support: str, remainder: str
) -> None:
    s, t = random_logits(4, 9), random_logits(4, 9, seed=1)
    choices: dict[str, Any] = {"support": SUPPORTS[support](s, t, 9), "remainder": remainder}
    full = loss_and_gradient(lambda x: reference.divergence(x, t, divergence=divergence), s)
    same = loss_and_gradient(
        lambda x: reference.divergence(x, t, divergence=divergence, **choices), s
    )
    assert_equal(same[0], full[0])
    assert_equal(same[1], full[1])


def test_the_union_contains_both_sides_and_nothing_else() -> None:
    s, t = random_logits(64, 33), random_logits(64, 33, seed=1)
    of_student, of_teacher = reference.student_topk(s, t, 5), reference.teacher_topk(s, t, 5)
    union = reference.union_topk(s, t, 5)
    assert torch.equal(union, of_student | of_teacher)
    counts = union.sum(-1)
    assert ((counts >= 5) & (counts <= 10)).all()
    assert_equal(reference.union_topk(s, s, 5).double(), of_student.double())


def test_repeated_ids_count_once_and_negative_ids_not_at_all() -> None:
    ids = torch.tensor([[3, 1, 3, -1], [0, -1, -1, -1]])
    assert reference.given_ids(ids, 4).tolist() == [
        [False, True, False, True],
        [True, False, False, False],
    ]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_renormalised_support_has_no_gradient_outside_and_needs_only_its_own_logits(
    divergence: str,
) -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    ids = t.topk(5).indices
    support = reference.given_ids(ids, 33)
    loss, gradient = loss_and_gradient(
        lambda x: reference.divergence(
            x, t, divergence=divergence, support=support, remainder="renormalize"
        ),
        s,
    )
    gathered = reference.divergence(s.gather(-1, ids), t.gather(-1, ids), divergence=divergence)
    assert_equal(loss, gathered)
    assert_equal(gradient[~support], 0.0)


@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop", "teacher_renormalize"])
@pytest.mark.parametrize("tail_floor", [None, 1e-7])
def test_a_served_teacher_gives_the_loss_of_the_whole_teacher(
    remainder: str, tail_floor: float | None
) -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    log_t, ids = reference.log_probs(t).topk(5)
    padded_ids = torch.cat([ids, torch.full((4, 1), -1)], -1)
    served = reference.served_teacher(
        padded_ids, torch.cat([log_t, torch.zeros(4, 1)], -1), vocab_size=33
    )
    assert_equal(served.exp().sum(-1), 1.0)
    choices: dict[str, Any] = {
        "divergence": "forward_kl",
        "support": reference.given_ids(padded_ids, 33),
        "remainder": remainder,
        "tail_floor": tail_floor,
    }
    assert_equal(reference.divergence(s, served, **choices), reference.divergence(s, t, **choices))


def test_the_tail_floor_matters_only_below_the_floor() -> None:
    flat, peaked = random_logits(1, 33), random_logits(1, 33)
    peaked[0, 0] += 60
    t = random_logits(1, 33, seed=1)

    def tail_loss(floor: float | None) -> Callable[[Tensor], Tensor]:
        def loss_of(s: Tensor) -> Tensor:
            support = reference.student_topk(s, t, 5)
            return reference.divergence(s, t, support=support, tail_floor=floor)

        return loss_of

    for exact, floored in zip(
        loss_and_gradient(tail_loss(None), flat), loss_and_gradient(tail_loss(1e-7), flat)
    ):
        assert_equal(floored, exact)
    support = reference.student_topk(peaked, t, 5)
    exact_tail, floored_tail = (
        reference.restrict(reference.log_probs(peaked), support, "tail", floor)[0, -1]
        for floor in (None, 1e-7)
    )
    assert exact_tail < -40
    assert_equal(floored_tail, math.log(-math.expm1(-1e-7)))
    _, gradient = loss_and_gradient(tail_loss(1e-7), peaked)
    assert gradient.isfinite().all()


def test_teacher_renormalize_is_the_cross_entropy_to_the_renormalised_teacher() -> None:
    s, t = random_logits(4, 33), random_logits(4, 33, seed=1)
    ids = t.topk(5).indices
    target = torch.zeros_like(t).scatter(-1, ids, t.gather(-1, ids).softmax(-1))
    loss, gradient = loss_and_gradient(
        lambda x: reference.divergence(
            x,
            t,
            divergence="forward_kl",
            support=reference.given_ids(ids, 33),
            remainder="teacher_renormalize",
        ),
        s,
    )
    assert_equal(loss, torch.nn.functional.cross_entropy(s, target, reduction="none"))
    assert_equal(gradient, s.softmax(-1) - target)
    with pytest.raises(ValueError, match="forward_kl"):
        reference.divergence(
            s, t, support=reference.given_ids(ids, 33), remainder="teacher_renormalize"
        )


def test_gradients_are_the_closed_forms_of_the_derivation() -> None:
    z, u, beta = random_logits(4, 33), random_logits(4, 33, seed=1), 0.3
    log_s, log_t = z.log_softmax(-1), u.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    log_m = (beta * t + (1 - beta) * s).log()
    reverse = (s * (log_s - log_t)).sum(-1, keepdim=True)
    mixture = (s * (log_s - log_m)).sum(-1, keepdim=True)
    expected = {
        "forward_kl": s - t,
        "reverse_kl": s * (log_s - log_t - reverse),
        "jsd": (1 - beta) * s * (log_s - log_m - mixture),
    }
    for name, dlogits in expected.items():
        _, gradient = loss_and_gradient(
            lambda x, name=name: reference.divergence(x, u, divergence=name, beta=beta), z
        )
        assert_equal(gradient, dlogits)


def test_the_gradient_of_an_entry_clip_is_that_of_the_entries_left() -> None:
    z, u, clip = random_logits(4, 33), random_logits(4, 33, seed=1), 0.05
    s, t = z.softmax(-1), u.softmax(-1)
    loss, gradient = loss_and_gradient(lambda x: reference.opsd(x, u, entry_clip=clip), z)
    term = t * (t.log() - s.log())
    left = term <= clip
    assert not left.all()
    assert_equal(loss, term.clamp(max=clip).sum(-1))
    assert_equal(gradient, s * (t * left).sum(-1, keepdim=True) - t * left)


def test_a_clipped_token_has_the_value_of_the_clip_and_no_gradient() -> None:
    s, t = random_logits(16, 33), random_logits(16, 33, seed=1)
    free, free_gradient = loss_and_gradient(lambda x: reference.divergence(x, t), s)
    clip = free.median().item()
    loss, gradient = loss_and_gradient(lambda x: reference.divergence(x, t, token_clip=clip), s)
    cut = free > clip
    assert cut.any()
    assert_equal(loss[cut], clip)
    assert_equal(gradient[cut], 0.0)
    assert_equal(loss[~cut], free[~cut])
    assert_equal(gradient[~cut], free_gradient[~cut])


def test_only_the_student_is_differentiated() -> None:
    student, teacher = random_logits(3, 9), random_logits(3, 9, seed=1).requires_grad_(True)
    ids = torch.tensor([1, 2, 3])
    old = teacher[:, 0]
    assert not reference.divergence(student, teacher).requires_grad
    assert not reference.sdpo(student, teacher, ids, old).requires_grad
    a = reference.token_log_prob(student, ids)
    assert not reference.rlsd(a, teacher[:, 0], teacher[:, 1], teacher[:, 2]).requires_grad
    assert not reference.importance(teacher[:, 0], a).requires_grad
    for estimator in ESTIMATORS.values():
        assert not estimator(a, teacher[:, 0]).requires_grad


def expected_gradient(estimator: Callable[[Tensor, Tensor], Tensor], z: Tensor) -> Tensor:
    """The mean gradient of an estimator over a token sampled from the student, logits (V,)."""
    log_t, total = reference.log_probs(TEACHER), torch.zeros_like(z)
    for token, probability in enumerate(z.softmax(-1)):
        y = torch.tensor(token)
        _, gradient = loss_and_gradient(
            lambda x, y=y: estimator(reference.token_log_prob(x, y), log_t[y]), z
        )
        total += probability * gradient
    return total


@pytest.mark.parametrize(
    "estimator, divergence", [("k1", "reverse_kl"), ("k2", "reverse_kl"), ("k3", "forward_kl")]
)
def test_the_mean_gradient_of_an_estimator_is_that_of_a_kl(estimator: str, divergence: str) -> None:
    _, gradient = loss_and_gradient(
        lambda x: reference.divergence(x, TEACHER, divergence=divergence), STUDENT
    )
    assert_equal(expected_gradient(ESTIMATORS[estimator], STUDENT), gradient)


def test_the_mean_gradient_of_k1_itself_is_zero() -> None:
    assert_equal(expected_gradient(lambda a, b: a - b, STUDENT), 0.0)


def test_k1_reinforce_and_k2_have_the_same_gradient() -> None:
    a, b = random_logits(20), random_logits(20, seed=1)
    _, k1 = loss_and_gradient(lambda x: reference.sampled_k1(x, b), a)
    _, k2 = loss_and_gradient(lambda x: reference.sampled_k2(x, b), a)
    assert_equal(k1, k2)


def test_the_mean_of_k3_is_the_reverse_kl() -> None:
    a, b = reference.log_probs(STUDENT), reference.log_probs(TEACHER)
    mean = (a.exp() * reference.sampled_k3(a, b)).sum()
    assert_equal(mean, reference.divergence(STUDENT, TEACHER, divergence="reverse_kl"))


def test_entropy_and_cross_entropy_are_those_of_torch() -> None:
    z, ids = random_logits(4, 33), torch.tensor([0, 5, 9, 32])
    assert_equal(reference.entropy(z), torch.distributions.Categorical(logits=z).entropy())
    cross_entropy = torch.nn.functional.cross_entropy(z, ids, reduction="none")
    assert_equal(reference.cross_entropy(z, ids), cross_entropy)


CHOICES = [
    {"divergence": name, **more}
    for name in DIVERGENCES
    for more in ({}, {"entry_clip": 0.05}, {"token_clip": 0.5})
]


@pytest.mark.parametrize(
    "choices", CHOICES, ids=lambda choices: "-".join(map(str, choices.values()))
)
@pytest.mark.parametrize(
    "remainder", [None, "tail", "renormalize", "drop", "floor"], ids="remainder={}".format
)
def test_tokens_impossible_on_both_sides_change_nothing(
    choices: dict[str, Any], remainder: str | None
) -> None:
    s, t = random_logits(4, 9), random_logits(4, 9, seed=1)
    nothing = torch.full((4, 3), NEVER, dtype=torch.double)

    def loss_of(t: Tensor) -> Callable[[Tensor], Tensor]:
        more: dict[str, Any] = {}
        if remainder is not None:
            # not all of the 9, so that the tail has mass before and after the padding
            ids = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]).expand(4, -1)
            more = {"support": reference.given_ids(ids, t.shape[-1]), "remainder": remainder}
        if remainder == "floor":
            more |= {"remainder": "tail", "tail_floor": 1e-7}
        return lambda x: reference.divergence(x, t, **choices, **more)

    loss, gradient = loss_and_gradient(loss_of(t), s)
    padded_loss, padded_gradient = loss_and_gradient(
        loss_of(torch.cat([t, nothing], -1)), torch.cat([s, nothing], -1)
    )
    assert_equal(padded_loss, loss)
    assert_equal(padded_gradient[:, :9], gradient)
    assert_equal(padded_gradient[:, 9:], 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tail_of_impossible_tokens_contributes_nothing(divergence: str) -> None:
    s, t = random_logits(4, 9), random_logits(4, 9, seed=1)
    s[:, 6:] = t[:, 6:] = NEVER
    support = reference.given_ids(torch.arange(6).expand(4, -1), 9)
    loss, gradient = loss_and_gradient(
        lambda x: reference.divergence(x, t, divergence=divergence, support=support), s
    )
    full, full_gradient = loss_and_gradient(
        lambda x: reference.divergence(x, t, divergence=divergence), s
    )
    assert_equal(loss, full)
    assert_equal(gradient, full_gradient)


def test_a_token_impossible_on_one_side_costs_what_the_mathematics_says() -> None:
    whole, less = random_logits(1, 9), random_logits(1, 9, seed=1)
    less[0, 4] = NEVER
    others = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    w, x = whole.softmax(-1)[0, others], less.softmax(-1)[0, others]
    finite, infinite = (x * (x / w).log()).sum(), torch.tensor(torch.inf)
    for student, teacher, divergence, expected in [
        (whole, less, "forward_kl", finite),
        (less, whole, "reverse_kl", finite),
        (whole, less, "reverse_kl", infinite),
        (less, whole, "forward_kl", infinite),
        (whole, less, "jsd", jsd_by_probabilities(whole, less)),
        (less, whole, "jsd", jsd_by_probabilities(less, whole)),
    ]:
        loss, gradient = loss_and_gradient(
            lambda z, teacher=teacher, divergence=divergence: reference.divergence(
                z, teacher, divergence=divergence
            ),
            student,
        )
        assert_equal(loss, expected)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("weight, divergence", [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_the_ends_of_mixed_kl_forget_the_other_side_even_when_it_is_infinite(
    weight: float, divergence: str
) -> None:
    student, teacher = random_logits(1, 9), random_logits(1, 9, seed=1)
    (student if divergence == "reverse_kl" else teacher)[0, 4] = NEVER
    mixed = reference.divergence(student, teacher, divergence="mixed_kl", forward_weight=weight)
    assert_equal(mixed, reference.divergence(student, teacher, divergence=divergence))
    assert mixed.isfinite().all()


def jsd_by_probabilities(student: Tensor, teacher: Tensor) -> Tensor:
    """JSD at beta 1/2 as H(m) - H(s) / 2 - H(t) / 2."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    h_m, h_s, h_t = (torch.special.entr(x).sum(-1) for x in ((s + t) / 2, s, t))
    return h_m - (h_s + h_t) / 2


def test_an_infinite_entry_can_be_clipped() -> None:
    z, u = random_logits(1, 9), random_logits(1, 9, seed=1)
    u[0, 4] = NEVER
    loss, gradient = loss_and_gradient(lambda x: reference.divergence(x, u, entry_clip=0.05), z)
    s, t = z.softmax(-1)[0], u.softmax(-1)[0]
    others = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    assert_equal(loss, (s * (s / t).log())[others].clamp(max=0.05).sum() + 0.05)
    assert gradient.isfinite().all()


def test_impossible_tokens_have_no_entropy() -> None:
    z = torch.tensor([0.0, 0.0, NEVER, NEVER], dtype=torch.double)
    entropy, gradient = loss_and_gradient(reference.entropy, z)
    assert_equal(entropy, math.log(2))
    assert_equal(gradient, 0.0)


def test_the_policy_loss_of_each_clip_case_is_the_one_done_by_hand() -> None:
    # ratios 2, 1.1, 0.5, then the same for A = -1; low 0.2, high 0.3
    a, old = logs(0.8, 0.44, 0.2).repeat(2), logs(0.4, 0.4, 0.4).repeat(2)
    advantages = numbers(1.0, 1, 1, -1, -1, -1)
    loss, gradient = loss_and_gradient(
        lambda x: reference.policy(x, advantages, old, ratio_clip=(0.2, 0.3)), a
    )
    assert_equal(loss, numbers(-1.3, -1.1, -0.5, 2.0, 1.1, 0.8))
    assert_equal(gradient, numbers(0, -1.1, -0.5, 2.0, 1.1, 0))


def test_the_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    a, old = logs(0.8, 0.8, 0.4), logs(0.1, 0.1, 0.4)
    advantages = numbers(-2.0, 2.0, -2.0)
    loss, gradient = loss_and_gradient(
        lambda x: reference.policy(x, advantages, old, dual_clip=3.0), a
    )
    assert_equal(loss, numbers(6.0, -2.4, 2.0))
    assert_equal(gradient, numbers(0.0, 0.0, 2.0))


def test_on_policy_the_surrogate_is_reinforce() -> None:
    a, advantages = random_logits(7), random_logits(7, seed=1)
    loss, gradient = loss_and_gradient(lambda x: reference.grpo(x, advantages), a)
    assert_equal(loss, -advantages)
    assert_equal(gradient, -advantages)


def test_the_reference_adds_its_k3() -> None:
    a, b = logs(0.5, 0.25), logs(0.25, 0.5)
    loss = reference.grpo(a, torch.zeros(2), reference_log_prob=b, kl_coefficient=0.1)
    by_hand = [0.1 * (0.5 + math.log(2) - 1), 0.1 * (2 - math.log(2) - 1)]
    assert_equal(loss, numbers(*by_hand))


def test_huge_log_ratios_are_bounded() -> None:
    a = numbers(0.0, -500.0)
    ratio = reference.importance(a, a.flip(0))
    assert_equal(ratio / numbers(math.exp(20), math.exp(-20)), 1.0)
    assert_equal(reference.importance(logs(0.6, 0.2), logs(0.2, 0.4), cap=2.0), numbers(2.0, 0.5))


def test_rlsd_scales_advantages_as_done_by_hand() -> None:
    # e^delta = 1.1, 2, 0.5 for a positive, a negative and a zero advantage each
    a, b = logs(0.4, 0.4, 0.4).repeat(3), logs(0.44, 0.8, 0.2).repeat(3)
    advantages = numbers(2.0, -2.0, 0.0).repeat_interleave(3)
    full = reference.rlsd_advantages(a, b, advantages, mix=1.0, clip=(0.2, 0.3))
    negative = (-2 / 1.1, -2 * 0.8, -2 * 1.3)  # e^-delta = 0.909, 0.5 and 2
    assert_equal(full, numbers(2.2, 2.6, 1.6, *negative, 0, 0, 0))
    half = reference.rlsd_advantages(a, b, advantages, mix=0.5, clip=(0.2, 0.3))
    assert_equal(half, (advantages + full) / 2)


def test_rlsd_survives_a_teacher_that_excludes_the_token() -> None:
    a, b = logs(0.4, 0.4, 0.4), torch.full((3,), NEVER, dtype=torch.double)
    advantages = numbers(1.0, -1.0, 0.0)
    shaped = reference.rlsd_advantages(a, b, advantages, mix=1.0)
    assert_equal(shaped, numbers(0.8, -1.2, 0.0))


def test_rlsd_is_the_policy_loss_of_its_advantages() -> None:
    a, b, old = logs(0.5, 0.5), logs(0.55, 0.45), logs(0.4, 0.5)
    advantages = numbers(1.0, -1.0)
    loss, gradient = loss_and_gradient(lambda x: reference.rlsd(x, b, advantages, old, mix=1.0), a)
    # token 1: w = 1.1, rho = 1.25 < 1.28;  token 2: w = 1 / 0.9, rho = 1
    assert_equal(loss, numbers(-1.1 * 1.25, 1 / 0.9))
    assert_equal(gradient, loss)
    against_old = reference.rlsd(a, b, advantages, old, evidence_log_prob=old, mix=1.0)
    assert_equal(against_old, numbers(-1.2 * 1.25, 1 / 0.9))


def test_rlsd_without_evidence_is_grpo() -> None:
    a, b, old, advantages = (random_logits(9, seed=seed, scale=0.3) for seed in range(4))
    grpo = reference.grpo(a, advantages, old, ratio_clip=(0.2, 0.28), dual_clip=3.0)
    assert_equal(reference.rlsd(a, b, advantages, old, mix=0.0), grpo)


def test_the_defaults_of_the_shaped_policies_are_their_codes() -> None:
    a, b, c, old, advantages = (random_logits(99, seed=seed, scale=1.0) for seed in range(5))
    shaped = reference.rlsd_advantages(a, b, advantages, mix=0.5, clip=(0.2, 0.2))
    rlsd = reference.policy(a, shaped, old, ratio_clip=(0.2, 0.28), dual_clip=3.0)
    assert_equal(reference.rlsd(a, b, advantages, old), rlsd)
    contrast = 0.5 * torch.tanh((b - c) / 0.02)
    moved, selected = reference.rlcsd_advantages(advantages, b, c[:, None])
    assert torch.equal(selected, contrast.abs() > 0.02)
    assert_equal(moved[advantages > 0.5], (advantages + contrast)[advantages > 0.5])
    rlcsd = reference.policy(a, moved, old, ratio_clip=(0.2, 0.2))
    assert_equal(reference.rlcsd(a, advantages, b, c[:, None], old), rlcsd)


def test_rlcsd_moves_advantages_as_done_by_hand() -> None:
    # contrasts +, -, none and an empty set of hints; tau so small that tanh is the sign
    correct = logs(0.6, 0.1, 0.2, 0.9)
    wrong = torch.stack([logs(0.1, 0.3), logs(0.8, 0.4), logs(0.1, 0.3), logs(0.0, 0.0)])
    advantages = numbers(1.0, 0.3, 1.0, 1.0)
    moved, selected = reference.rlcsd_advantages(advantages, correct, wrong, temperature=1e-6)
    assert selected.tolist() == [True, True, False, False]
    assert_equal(moved, numbers(1.5, 0.0, 1.0, 1.0))
    moved, _ = reference.rlcsd_advantages(-advantages, correct, wrong, temperature=1e-6)
    assert_equal(moved, numbers(-0.5, -0.8, -1.0, -1.0))
    moved, _ = reference.rlcsd_advantages(0 * advantages, correct, wrong, temperature=1e-6)
    assert_equal(moved, 0.0)


def test_rlcsd_averages_over_the_hints_that_are_there() -> None:
    correct, wrong = logs(0.6), logs(0.1, 0.3, 0.0)
    moved, _ = reference.rlcsd_advantages(
        torch.ones(1), correct, wrong[None], temperature=10.0, threshold=0.0
    )
    assert_equal(moved, 1 + 0.5 * math.tanh(math.log(0.6 / 0.2) / 10))
    loss = reference.rlcsd(logs(0.5), torch.ones(1), correct, wrong[None], temperature=10.0)
    assert_equal(loss, -moved)


def test_iw_opd_weighs_the_start_of_a_sequence_more() -> None:
    a, rollout = logs(0.5, 0.5, 0.5, 0.5)[None], torch.zeros(1, 4)
    b = torch.tensor([[1.0, -2.0, 1.0, 9.0]], dtype=torch.double)
    mask = torch.tensor([[1, 1, 1, 0]])
    loss, gradient = loss_and_gradient(lambda x: reference.iw_opd(x, b, rollout, mask), a)
    # gaps 1, -2, 1 of 4 in all: weights 1.5, 1.375, 1.125
    assert_equal(gradient, -numbers(1.5, -2 * 1.375, 1.125, 0)[None])
    assert_equal(loss, gradient * a)


def test_presets_are_the_divergences_they_name() -> None:
    s, t, ids = random_logits(4, 300), random_logits(4, 300, seed=1), torch.tensor([0, 1, 2, 3])
    student_100 = reference.student_topk(s, t, 100)
    teacher_100 = reference.teacher_topk(s, t, 100)
    teacher_64 = reference.teacher_topk(s, t, 64)

    def expected(divergence: str, **choices: Any) -> Tensor:
        return reference.divergence(s, t, divergence=divergence, **choices)

    assert_equal(reference.sdpo(s, t), expected("jsd", support=student_100))
    assert_equal(
        reference.sdpo(s, t, alpha=1.0, k=20),
        expected("reverse_kl", support=reference.student_topk(s, t, 20)),
    )
    assert_equal(
        reference.sd_zero(s, t),
        expected("mixed_kl", support=teacher_64, remainder="renormalize"),
    )
    assert_equal(reference.sd_zero_paper(s, t), expected("reverse_kl"))
    assert_equal(reference.opsd(s, t), expected("forward_kl", entry_clip=0.05))
    assert_equal(
        reference.opsd_topk(s, t), expected("forward_kl", support=teacher_100, entry_clip=0.05)
    )
    assert_equal(reference.sdft(s, t), expected("forward_kl"))
    assert_equal(
        reference.sdft_trl(s, t), expected("jsd", support=student_100, remainder="renormalize")
    )
    assert_equal(reference.gkd(s, t), expected("jsd"))
    a = reference.token_log_prob(s, ids)
    old = a - logs(3.0, 1.5, 1.0, 0.5)
    weighted = reference.sdpo(s, t, ids, old)
    assert_equal(weighted, reference.sdpo(s, t) * numbers(2.0, 1.5, 1.0, 0.5))


LOSS = torch.tensor([[1.0, 2, 3, 4], [5, 6, torch.nan, torch.inf], [torch.nan] * 4])
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_reductions_are_the_averages_done_by_hand_and_ignore_masked_garbage() -> None:
    for reduced, by_hand in [
        (reference.token_sum(LOSS, MASK), 18.0),
        (reference.token_mean(LOSS, MASK), 18 / 5),
        (reference.token_mean(LOSS, MASK, num_tokens=10), 1.8),
        (reference.sequence_mean_token_sum(LOSS, MASK), 18 / 2),
        (reference.sequence_mean_token_mean(LOSS, MASK), (7 / 3 + 11 / 2) / 2),
        (reference.all_sequences_mean_token_mean(LOSS, MASK), (7 / 3 + 11 / 2) / 3),
        (reference.constant_length(LOSS, MASK, length=4), 18 / 12),
    ]:
        assert_equal(reduced, by_hand)


@pytest.mark.parametrize(
    "reduction",
    [
        reference.token_sum,
        reference.token_mean,
        reference.sequence_mean_token_sum,
        reference.sequence_mean_token_mean,
        reference.all_sequences_mean_token_mean,
    ],
    ids=lambda reduction: reduction.__name__,
)
def test_nothing_reduces_to_zero_with_zero_gradient(
    reduction: Callable[[Tensor, Tensor], Tensor],
) -> None:
    loss, gradient = loss_and_gradient(lambda x: reduction(x, torch.zeros_like(MASK)), LOSS)
    assert_equal(loss, 0.0)
    assert not gradient.any()


def test_rlcsd_averages_selected_tokens_apart() -> None:
    selected = torch.tensor([[True, False, True, False], [False, True, True, True], [True] * 4])
    mean = reference.rlcsd_mean(LOSS, MASK, selected, eta=0.5)
    assert_equal(mean, (2 + 4 + 5) / 3 + 0.5 * (1 + 6) / 2)


def test_skip_first_masks_positions_not_counted_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    assert reference.skip_first(mask).tolist() == [[0, 0, 0, 1, 1]]
