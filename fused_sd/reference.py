"""Every loss of the library as its paper writes it: float64, whole logits, plain autograd.

Here the mathematics is read, and the fused code is tested against it; the library itself never
imports this file.  A divergence loss is

    loss = sum_n w_n clip( sum_{v in S_n} term(log s_nv, log t_nv) )

with student s, teacher t and mixture m = beta t + (1 - beta) s.  ``student`` and ``teacher`` are
logits (..., V), already divided by their side's temperature, by which nothing is multiplied again.
The student comes first among the arguments and alone has a gradient.  The sampled token's
log-probability is ``a`` by the student, ``b`` by the teacher, ``a_old`` by the policy that sampled
it; sg is the stop-gradient.  A function returns (...), one number per token, unless it says so.
"""

import math
from typing import Any

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
) -> Tensor:
    """softcap(scale (h W^T + b)) / temperature, -inf from column valid_vocab on: (..., V)."""
    z = hidden.double() @ weight.double().T
    z = logit_scale * (z if bias is None else z + bias.double())
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if valid_vocab is not None:
        z = z.masked_fill(torch.arange(z.shape[-1], device=z.device) >= valid_vocab, -torch.inf)
    return z / temperature


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the vocabulary: (..., V)."""
    return logits.double().log_softmax(-1)


def token_log_prob(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability of each given token."""
    return log_probs(logits).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: Tensor, token_ids: Tensor) -> Tensor:
    """-a: SFT, RFT and both terms of SD-Zero's phase 1, which differ in the tokens they mask."""
    return -token_log_prob(logits, token_ids)


def entropy(logits: Tensor) -> Tensor:
    """H(s) = -sum_v s log s."""
    log_s = log_probs(logits)
    return -weighted(log_s, log_s).sum(-1)


def weighted(log_w: Tensor, value: Tensor) -> Tensor:
    """``w * value`` with 0 * inf = 0, gradient included; an infinite product is a constant."""
    product = log_w.exp() * value.masked_fill(~value.isfinite(), 0.0)
    return torch.where(value.isinf() & ~log_w.isneginf(), value.detach(), product)


def log_mass(log_x: Tensor) -> Tensor:
    """log sum_v x_v: (..., 1).  Nothing has mass -inf and gradient 0, where torch would say nan."""
    nothing = log_x.isneginf().all(-1, keepdim=True)
    return log_x.masked_fill(nothing, 0.0).logsumexp(-1, True).masked_fill(nothing, -torch.inf)


def at_most(x: Tensor, bound: float | None) -> Tensor:
    """min(x, bound), with gradient 0 above the bound."""
    return x if bound is None else x.clamp(max=bound)


def kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), whose sum over the vocabulary is KL(a || b): (..., V)."""
    return weighted(log_a, log_a - log_b)


def log_mixture(log_t: Tensor, log_s: Tensor, teacher_weight: float) -> Tensor:
    """log m of m = teacher_weight t + (1 - teacher_weight) s: (..., V)."""
    absent = log_s.isneginf() & log_t.isneginf()  # logaddexp of two -inf has gradient nan
    weighted_t = log_t.masked_fill(absent, 0.0) + math.log(teacher_weight)
    return torch.logaddexp(weighted_t, log_s.masked_fill(absent, 0.0) + math.log1p(-teacher_weight))


def terms(
    log_s: Tensor,
    log_t: Tensor,
    divergence: str,
    *,
    beta: float = 0.5,
    forward_weight: float = 0.5,
    student_weight: float = 0.9,
) -> Tensor:
    """The terms whose sum over the vocabulary is the divergence: (..., V).

    ``forward_kl`` is KL(t || s), ``reverse_kl`` is KL(s || t), and ``mixed_kl`` is forward_weight
    times the one plus 1 - forward_weight times the other.  ``jsd`` is beta KL(t || m) +
    (1 - beta) KL(s || m).  It vanishes with beta and with 1 - beta, where JSD / beta tends to
    KL(t || s) and JSD / (1 - beta) to KL(s || t), so the end points themselves are an error.
    ``skew_kl`` is KL(t || (1 - student_weight) t + student_weight s), arXiv 2402.03898 eq. 4.
    """
    if divergence == "forward_kl" or (divergence == "mixed_kl" and forward_weight == 1):
        return kl_terms(log_t, log_s)
    if divergence == "reverse_kl" or (divergence == "mixed_kl" and forward_weight == 0):
        return kl_terms(log_s, log_t)
    if divergence == "mixed_kl":
        forward, reverse = kl_terms(log_t, log_s), kl_terms(log_s, log_t)
        return forward_weight * forward + (1 - forward_weight) * reverse
    if divergence == "jsd":
        log_m = log_mixture(log_t, log_s, beta)
        return beta * kl_terms(log_t, log_m) + (1 - beta) * kl_terms(log_s, log_m)
    if divergence == "skew_kl":
        return kl_terms(log_t, log_mixture(log_t, log_s, 1 - student_weight))
    raise ValueError(f"divergence must be a name from the docstring, got {divergence!r}")


def given_ids(token_ids: Tensor, vocab_size: int) -> Tensor:
    """The support of the tokens (..., K) as a mask (..., V): repeats count once, ids < 0 not."""
    slots = token_ids.masked_fill(token_ids < 0, vocab_size)
    mask = token_ids.new_zeros(*token_ids.shape[:-1], vocab_size + 1, dtype=torch.bool)
    return mask.scatter(-1, slots, True)[..., :vocab_size]


def student_topk(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The student's k likeliest tokens: (..., V).  Ties fall as ``torch.topk`` lets them."""
    vocab_size = student.shape[-1]
    return given_ids(student.topk(min(k, vocab_size)).indices, vocab_size)


def teacher_topk(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The teacher's k likeliest tokens: (..., V)."""
    return student_topk(teacher, student, k)


def union_topk(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The tokens among the k likeliest of either side, each once: (..., V)."""
    return student_topk(student, teacher, k) | teacher_topk(student, teacher, k)


def teacher_nucleus(student: Tensor, teacher: Tensor, k: int, mass: float) -> Tensor:
    """The fewest likeliest tokens of the teacher that reach a mass, at most k: (..., V)."""
    vocab_size = student.shape[-1]
    t, ids = log_probs(teacher.detach()).exp().sort(stable=True, dim=-1, descending=True)
    before = t.cumsum(-1) - t
    is_needed = (before < mass) & (torch.arange(vocab_size, device=t.device) < k)
    return given_ids(ids.masked_fill(~is_needed, -1), vocab_size)


def served_teacher(token_ids: Tensor, teacher_log_probs: Tensor, vocab_size: int) -> Tensor:
    """Logits (..., V) of a teacher known by K ids and their log-probabilities (..., K) only.

    The mass the server kept back is spread evenly over the tokens it did not name.  On the support
    ``given_ids(token_ids)`` nothing is thereby assumed: no remainder looks inside the complement.
    The mass is at least what rounding can hide: each log-probability is known to eps of itself in
    the dtype that was sent, and the softmax to eps of fp32 (fp64 where that was sent).
    """
    named = given_ids(token_ids, vocab_size)
    slots = token_ids.masked_fill(token_ids < 0, vocab_size)
    log_t = torch.full((*named.shape[:-1], vocab_size + 1), -torch.inf, dtype=torch.double)
    log_t = log_t.to(named.device).scatter(-1, slots, teacher_log_probs.detach().double())
    log_t = log_t[..., :vocab_size]
    wide = torch.promote_types(teacher_log_probs.dtype, torch.float32)
    entropy = -weighted(log_t, log_t).sum(-1, True).clamp(max=0.0)
    hidden = torch.finfo(wide).eps + torch.finfo(teacher_log_probs.dtype).eps * entropy
    log_rest = torch.maximum(-torch.expm1(log_mass(log_t)), hidden).log()
    return torch.where(named, log_t, log_rest - (~named).double().sum(-1, True).log())


def restrict(
    log_x: Tensor, support: Tensor, remainder: str, tail_floor: float | None = None
) -> Tensor:
    """One side's log-probabilities on the support and -inf off it: (..., V), (..., V + 1) by tail.

    ``tail`` appends log sum_{v not in S} x_v, or with ``tail_floor`` the arithmetic of SDPO's code:
    log(1 - mass) with log mass at most -tail_floor (theirs is 1e-7), which loses a smaller tail and
    its gradient.  ``renormalize`` divides by the mass of the support, ``drop`` does nothing more.
    """
    inside = log_x.masked_fill(~support, -torch.inf)
    if remainder == "drop":
        return inside
    if remainder == "renormalize":
        return inside - log_mass(inside)
    if remainder != "tail":
        raise ValueError(f"remainder must be tail, renormalize or drop, got {remainder!r}")
    if tail_floor is None:
        tail = log_mass(log_x.masked_fill(support, -torch.inf))
    else:
        tail = torch.log(-torch.expm1(log_mass(inside).clamp(max=-tail_floor)))
    return torch.cat([inside, tail], -1)


def divergence(
    student: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V)
    *,
    divergence: str = "reverse_kl",
    support: Tensor | None = None,  # (..., V), a mask; None compares the whole vocabulary
    remainder: str = "tail",
    tail_floor: float | None = None,
    log_prob_floor: float | None = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    **parameter: float,  # beta, forward_weight or student_weight: see ``terms``
) -> Tensor:
    """The divergence of each token, terms cut at ``entry_clip`` and their sum at ``token_clip``.

    ``remainder="teacher_renormalize"`` is the soft-target cross entropy -sum_S t~ log s of the
    Fireworks and Tinker recipes, with the teacher renormalised on the support and the student's
    full softmax.  It exists for ``forward_kl`` and includes the entropy of t~, so it is not a KL.
    """
    log_s, log_t = log_probs(student), log_probs(teacher.detach())
    if support is not None and remainder == "teacher_renormalize":
        if divergence != "forward_kl":
            raise ValueError(f"teacher_renormalize must go with forward_kl, got {divergence!r}")
        term = -weighted(restrict(log_t, support, "renormalize"), log_s)
    else:
        if support is not None:
            log_s = restrict(log_s, support, remainder, tail_floor)
            log_t = restrict(log_t, support, remainder, tail_floor)
        if support is not None and log_prob_floor is not None:  # verl's log_prob_min_clamp
            log_s, log_t = (
                torch.where(support, x.clamp(min=log_prob_floor), x) for x in (log_s, log_t)
            )
        term = terms(log_s, log_t, divergence, **parameter)
    return at_most(at_most(term, entry_clip).sum(-1), token_clip)


def gkd(student: Tensor, teacher: Tensor, *, beta: float = 0.5, **choices: Any) -> Tensor:
    """GKD (arXiv 2306.13649) eq. 1: JSD_beta, where beta 0 is KL(t || s) and 1 is KL(s || t).

    That is every trainer's convention for the end points and not the limit of the formula, which
    is 0.  TRL's temperature is 0.9.  ``choices`` are those of ``divergence``.
    """
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    return divergence(student, teacher, divergence=name, beta=beta, **choices)


def sdpo(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    *,
    alpha: float = 0.5,
    k: int = 100,
    importance_cap: float = 2.0,
    tail_floor: float | None = None,
) -> Tensor:
    """SDPO (arXiv 2601.20802).  Eq. 1 is the full KL(s || t); the official code has other losses.

    It compares the student's k likeliest tokens and their tail: JSD 0.5 with k = 100, or with
    environment feedback KL(s || t), that is alpha = 1, with k = 20.  It multiplies by the sampled
    token's capped ratio, and for a rollout engine that disagrees with the old policy by
    ``importance(old_log_prob, rollout_log_prob, 2)`` as well.  TRL defaults to ``sampled_k1``.
    """
    support = student_topk(student, teacher, k)
    loss = gkd(student, teacher, beta=alpha, support=support, tail_floor=tail_floor)
    if token_ids is None or old_log_prob is None:
        return loss
    return loss * importance(token_log_prob(student, token_ids), old_log_prob, importance_cap)


def sd_zero(
    student: Tensor, teacher: Tensor, *, k: int = 64, forward_weight: float = 0.5
) -> Tensor:
    """SD-Zero's phase 2 (arXiv 2604.12002) in its official code.

    Half KL(t || s) and half KL(s || t), both renormalised on the teacher's k likeliest tokens.
    """
    return divergence(
        student,
        teacher,
        divergence="mixed_kl",
        forward_weight=forward_weight,
        support=teacher_topk(student, teacher, k),
        remainder="renormalize",
    )


def sd_zero_paper(student: Tensor, teacher: Tensor) -> Tensor:
    """SD-Zero's phase 2 in the paper: the full KL(s || t), which its prose calls forward."""
    return divergence(student, teacher, divergence="reverse_kl")


def opsd(
    student: Tensor,
    teacher: Tensor,
    *,
    entry_clip: float | None = 0.05,
    support: Tensor | None = None,
) -> Tensor:
    """OPSD (arXiv 2601.18734, v3): the full KL(t || s) with each term cut at 0.05.

    Cut before the sum, it can be negative.  The code's first release was ``gkd`` without a clip.
    """
    return divergence(
        student, teacher, divergence="forward_kl", support=support, entry_clip=entry_clip
    )


def opsd_topk(student: Tensor, teacher: Tensor, *, k: int = 100) -> Tensor:
    """OPSD in RLCSD's code: on the teacher's k likeliest tokens and their tail."""
    return opsd(student, teacher, support=teacher_topk(student, teacher, k))


def sdft(student: Tensor, teacher: Tensor) -> Tensor:
    """SDFT (arXiv 2601.19897): the full KL(t || s) of all its results; its v1 writes KL(s || t).

    The code masks the first three tokens (``skip_first``), and weights each sequence by the mean
    of its capped ratios.
    """
    return divergence(student, teacher, divergence="forward_kl")


def sdft_trl(student: Tensor, teacher: Tensor, *, alpha: float = 0.5, k: int = 100) -> Tensor:
    """SDFT in TRL: JSD 0.5 renormalised on the student's k likeliest tokens."""
    support = student_topk(student, teacher, k)
    return gkd(student, teacher, beta=alpha, support=support, remainder="renormalize")


def sampled_k1(log_prob: Tensor, teacher_log_prob: Tensor) -> Tensor:
    """sg(a - b) a, REINFORCE on the estimate k1: on policy its mean gradient is KL(s || t)'s.

    Differentiating k1 = a - b itself would follow the gradient of a, which knows no teacher.
    """
    return (log_prob - teacher_log_prob).detach().double() * log_prob.double()


def sampled_k2(log_prob: Tensor, teacher_log_prob: Tensor) -> Tensor:
    """(a - b)^2 / 2, whose gradient is that of ``sampled_k1``."""
    return (log_prob.double() - teacher_log_prob.detach().double()).square() / 2


def sampled_k3(log_prob: Tensor, teacher_log_prob: Tensor) -> Tensor:
    """e^(b - a) - (b - a) - 1: its mean is KL(s || t), its mean gradient KL(t || s)'s.

    Above b - a = 20 it stays constant, which keeps exp finite.
    """
    d = (teacher_log_prob.detach().double() - log_prob.double()).clamp(max=20.0)
    return d.exp() - d - 1


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """e^(a - a_old).  The exponent's bound, verl's, is far above every cap and keeps exp finite."""
    return (log_prob.double() - old_log_prob.detach().double()).clamp(-20.0, 20.0).exp()


def importance(log_prob: Tensor, old_log_prob: Tensor, cap: float | None = None) -> Tensor:
    """sg min(e^(a - a_old), cap), truncated from above only and so not PPO's clip."""
    return at_most(ratio(log_prob.detach(), old_log_prob), cap)


def policy(
    log_prob: Tensor,
    advantages: Tensor,
    old_log_prob: Tensor | None = None,  # None: the token was sampled by this very policy
    *,
    ratio_clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    reference_log_prob: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), rho = e^(a - a_old).

    PPO (arXiv 1707.06347) eq. 7, with two bounds since DAPO (arXiv 2503.14476).  ``dual_clip`` c
    holds the loss of a negative advantage below -c A (arXiv 1912.09729).  A reference adds
    kl_coefficient times the k3 of GRPO (arXiv 2402.03300) eq. 4.
    """
    advantages = advantages.detach().double()
    rho = ratio(log_prob, log_prob if old_log_prob is None else old_log_prob)
    loss = -rho * advantages
    if ratio_clip is not None:
        loss = loss.maximum(-rho.clamp(1 - ratio_clip[0], 1 + ratio_clip[1]) * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, loss.minimum(-dual_clip * advantages), loss)
    if reference_log_prob is not None:
        loss = loss + kl_coefficient * sampled_k3(log_prob, reference_log_prob)
    return loss


def grpo(
    log_prob: Tensor, advantages: Tensor, old_log_prob: Tensor | None = None, **choices: Any
) -> Tensor:
    """GRPO (arXiv 2402.03300), the token's part of eq. 3.  ``choices`` are those of ``policy``."""
    return policy(log_prob, advantages, old_log_prob, **choices)


def rlsd_advantages(
    log_prob: Tensor,
    teacher_log_prob: Tensor,
    advantages: Tensor,
    *,
    mix: float = 0.5,
    clip: tuple[float, float] = (0.2, 0.2),
) -> Tensor:
    """A ((1 - mix) + mix w), the advantage scaled by the teacher's evidence for the token.

    RLSD (arXiv 2604.03128): Delta = sg(b - a) (eq. 13); w = e^(sign(A) Delta) (eq. 14), clipped to
    [1 - low, 1 + high] (eq. 15).
    """
    advantages = advantages.detach().double()
    delta = (teacher_log_prob.double() - log_prob.double()).detach()
    w = (advantages.sign() * delta.masked_fill(advantages == 0, 0.0)).exp()
    return advantages * ((1 - mix) + mix * w.clamp(1 - clip[0], 1 + clip[1]))


def rlsd(
    log_prob: Tensor,
    teacher_log_prob: Tensor,
    advantages: Tensor,
    old_log_prob: Tensor | None = None,
    *,
    evidence_log_prob: Tensor | None = None,  # the student's part of Delta; None: the current one
    mix: float = 0.5,
    evidence_clip: tuple[float, float] = (0.2, 0.2),
    ratio_clip: tuple[float, float] = (0.2, 0.28),
    dual_clip: float | None = 3.0,
) -> Tensor:
    """RLSD (arXiv 2604.03128) as its code has it, PPO on ``rlsd_advantages``.

    Eq. 16 contains no ratio, hence has no gradient as printed.  Delta is against the current
    student in the code, against the old one in ms-swift and SDPG.
    """
    student = log_prob if evidence_log_prob is None else evidence_log_prob
    evidence = rlsd_advantages(student, teacher_log_prob, advantages, mix=mix, clip=evidence_clip)
    return policy(log_prob, evidence, old_log_prob, ratio_clip=ratio_clip, dual_clip=dual_clip)


def rlcsd_advantages(
    advantages: Tensor,
    correct_log_prob: Tensor,
    wrong_log_probs: Tensor,  # (..., K), -inf in an empty slot
    *,
    temperature: float = 0.02,
    scale: float = 1.0,
    mix: float = 0.5,
    clip: tuple[float, float] = (-2.0, 2.0),
    threshold: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """The advantages moved by the contrast of hints, and where they were moved: both (...).

    RLCSD (arXiv 2606.11709): e = b_correct - log mean_k e^(b_wrong_k) of teachers shown a correct
    or one of K wrong solutions; r = clip(scale mix tanh(e / temperature)); where |r| > threshold
    A + r replaces A, or 0 does if the sign would change.  The defaults are the code's YAML's.  Its
    samples always have a wrong hint; here a token without one keeps its advantage.
    """
    advantages, wrong = advantages.detach().double(), wrong_log_probs.detach().double()
    num_wrong = (~wrong.isneginf()).double().sum(-1)
    log_mean = log_mass(wrong).squeeze(-1) - num_wrong.log()
    e = (correct_log_prob.detach().double() - log_mean).masked_fill(num_wrong == 0, 0.0)
    r = (scale * mix * torch.tanh(e / temperature)).clamp(*clip)
    selected = r.abs() > threshold
    moved = advantages + r.masked_fill(~selected, 0.0)
    return moved.masked_fill(moved * advantages <= 0, 0.0), selected


def rlcsd(
    log_prob: Tensor,
    advantages: Tensor,
    correct_log_prob: Tensor,
    wrong_log_probs: Tensor,  # (..., K)
    old_log_prob: Tensor | None = None,
    *,
    ratio_clip: tuple[float, float] = (0.2, 0.2),
    **choices: Any,
) -> Tensor:
    """PPO on ``rlcsd_advantages``, whose ``choices`` these are; reduced by ``rlcsd_mean``."""
    moved, _ = rlcsd_advantages(advantages, correct_log_prob, wrong_log_probs, **choices)
    return policy(log_prob, moved, old_log_prob, ratio_clip=ratio_clip)


def iw_opd(
    log_prob: Tensor,  # (B, T)
    teacher_log_prob: Tensor,  # (B, T)
    rollout_log_prob: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    gamma: float = 0.5,
) -> Tensor:
    """IW-OPD (arXiv 2606.22600): -sg(w A) a with A = b - a_rollout: (B, T).

    w_n = 1 + gamma (1 - sum_{i<n} |A_i| / sum_i |A_i|) falls from 1 + gamma along the sequence.
    """
    gap = (teacher_log_prob.double() - rollout_log_prob.double()).detach()
    gap = gap.masked_fill(mask == 0, 0.0)
    spent = gap.abs().cumsum(-1) - gap.abs()
    w = 1 + gamma * (1 - spent / gap.abs().sum(-1, True).clamp(min=1e-8))
    return -w * gap * log_prob.double()


def skip_first(mask: Tensor, num_tokens: int = 3) -> Tensor:
    """The mask (B, T) without the first positions of every row, as SDFT trains."""
    return mask * (torch.arange(mask.shape[-1], device=mask.device) >= num_tokens)


def row_sums(token_loss: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """sum_T loss mask and sum_T mask of rows (B, T): both (B,).  Masked garbage stays out."""
    kept = token_loss.double().masked_fill(mask == 0, 0.0) * mask
    return kept.sum(-1), mask.double().sum(-1)


def token_sum(token_loss: Tensor, mask: Tensor) -> Tensor:
    """sum loss mask: ()."""
    return row_sums(token_loss, mask)[0].sum()


def token_mean(token_loss: Tensor, mask: Tensor, num_tokens: float | None = None) -> Tensor:
    """sum loss mask / N: ().

    N is the micro-batch's sum of the mask, at least 1, in SDPO's code; SD-Zero, verl and TRL's DAPO
    give that of the whole batch.  SDPO's seq-mean-token-sum-norm is N = the response length.
    """
    counted = mask.double().sum().clamp(min=1.0)
    return token_sum(token_loss, mask) / (counted if num_tokens is None else num_tokens)


def sequence_mean_token_sum(token_loss: Tensor, mask: Tensor) -> Tensor:
    """Row sums, averaged over the rows with tokens: ().  Without any it is 0, and nan in verl."""
    sums, counts = row_sums(token_loss, mask)
    return sums.sum() / (counts > 0).sum().clamp(min=1)


def sequence_mean_token_mean(token_loss: Tensor, mask: Tensor) -> Tensor:
    """Row means, averaged over the rows with tokens: ().  verl adds 1e-8 to a row's tokens."""
    sums, counts = row_sums(token_loss, mask)
    return (sums / counts.clamp(min=1.0)).sum() / (counts > 0).sum().clamp(min=1)


def all_sequences_mean_token_mean(token_loss: Tensor, mask: Tensor) -> Tensor:
    """Row means, averaged over all rows: (), as in SDFT's code and TRL's SDPO, SDFT and "grpo".

    An empty row counts as 0, so the loss shrinks with the share of rows that have a teacher.
    """
    sums, counts = row_sums(token_loss, mask)
    return (sums / counts.clamp(min=1.0)).mean()


def constant_length(token_loss: Tensor, mask: Tensor, length: float) -> Tensor:
    """sum loss mask / (B length): (), of Dr. GRPO; verl's seq-mean-token-sum-norm."""
    return token_sum(token_loss, mask) / (len(mask) * length)


def rlcsd_mean(token_loss: Tensor, mask: Tensor, selected: Tensor, eta: float = 1.0) -> Tensor:
    """mean over unselected tokens + eta mean over selected ones: ().

    The means divide by counts of tokens: the mask may carry a rollout correction.
    """
    means = []
    for part in (mask * ~selected, mask * selected):
        total, _ = row_sums(token_loss, part)
        means.append(total.sum() / (part != 0).double().sum().clamp(min=1))
    return means[0] + eta * means[1]
