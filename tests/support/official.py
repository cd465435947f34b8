"""What official codes compute for divergences, in plain PyTorch on whole logits.

Written from the codes that papers were run with, in other words, and apart from the library: the
tests compare the fused losses with these, loss and gradient.  Every function takes a ``Batch`` and
gives the loss that is differentiated.

Dimension key:  B sequences, T tokens of a sequence, V vocabulary, K entries of a support
"""

import torch
from official_batches import Batch
from torch import Tensor
from torch.nn.functional import kl_div


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Entries of KL(a||b), as every official code forms them."""
    return kl_div(log_b, log_a, reduction="none", log_target=True)


def generalized_jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Entries of GKD's divergence; its end points are the two KLs."""
    if beta == 0:
        return kl(log_t, log_s)
    if beta == 1:
        return kl(log_s, log_t)
    share = torch.tensor(beta, dtype=log_s.dtype)
    log_m = torch.logsumexp(torch.stack([log_s + torch.log1p(-share), log_t + share.log()]), 0)
    return torch.lerp(kl(log_s, log_m), kl(log_t, log_m), share)


def token_mean(token_loss: Tensor, mask: Tensor, num_tokens: float | None = None) -> Tensor:
    total = torch.where(mask != 0, token_loss, 0).mul(mask).sum()
    return total / (mask.sum().clamp(min=1) if num_tokens is None else num_tokens)


def mean_of_all_sequences(token_loss: Tensor, mask: Tensor) -> Tensor:
    """TRL's and SDFT's average: a sequence without tokens counts as 0."""
    return ((token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def capped_ratio(log_prob: Tensor, old: Tensor, cap: float) -> Tensor:
    return (log_prob.detach() - old).clamp(-20, 20).exp().clamp(max=cap)


def clamped_tail(log_entries: Tensor) -> Tensor:
    """SDPO's entries with the tail bucket that keeps their mass below exp(-1e-7)."""
    log_mass = log_entries.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_entries, torch.log(-torch.expm1(log_mass))], -1)


def renormalized(log_entries: Tensor) -> Tensor:
    return log_entries - log_entries.logsumexp(-1, keepdim=True)


def sdpo(
    batch: Batch,
    *,
    alpha: float,
    top_k: int | None,
    add_tail: bool = True,
    cap: float | None = 2.0,
    tis_cap: float | None = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """SDPO's update: truncation, divergence, two importance factors, masks, micro-batch mean."""
    student = batch.student_logits(temperature).log_softmax(-1)
    teacher = batch.teacher_logits(temperature).log_softmax(-1)
    log_prob = student.gather(-1, batch.token_ids[..., None])[..., 0]
    if top_k is not None:
        ids = student.topk(top_k, -1).indices
        close = clamped_tail if add_tail else renormalized
        student, teacher = close(student.gather(-1, ids)), close(teacher.gather(-1, ids))
    token_loss = generalized_jsd(student, teacher, alpha).sum(-1)
    if cap is not None:
        token_loss = token_loss * capped_ratio(log_prob, batch.old, cap)
    if tis_cap is not None:
        token_loss = token_loss * (batch.old - batch.rollout).exp().clamp(max=tis_cap)
    return token_mean(token_loss, batch.mask * batch.taught[:, None])


def sdpo_sampled(batch: Batch, *, cap: float = 2.0) -> Tensor:
    """SDPO without logits: the score-function form of the reverse KL, of the sampled token."""
    log_prob = batch.log_prob(batch.student_logits())
    gap = (log_prob - batch.log_prob(batch.teacher_logits())).detach()
    token_loss = gap * log_prob * capped_ratio(log_prob, batch.old, cap)
    return token_mean(token_loss, batch.mask * batch.taught[:, None])


def trl_student_top_k(batch: Batch, *, alpha: float, top_k: int, cap: float = 2.0) -> Tensor:
    """TRL's SDFT (and SDPO's ``topk_logits``): renormalised, mean of the sequences' means."""
    logits, teacher = batch.student_logits(), batch.teacher_logits()
    ids = logits.topk(top_k, -1).indices
    sides = renormalized(logits.gather(-1, ids)), renormalized(teacher.gather(-1, ids))
    token_loss = generalized_jsd(*sides, alpha).sum(-1)
    ratio = capped_ratio(batch.log_prob(logits), batch.old, cap)
    return mean_of_all_sequences(token_loss * ratio, batch.mask)


def sd_zero(
    batch: Batch,
    *,
    top_k: int,
    num_tokens: float,
    forward_weight: float = 0.5,
    zero_outside: bool = False,
) -> Tensor:
    """SD-Zero's phase 2: mixed KL over the teacher's top-k, mean over the global batch's tokens.

    ``zero_outside`` leaves the student its whole softmax and gives the teacher exp(-100) outside.
    """
    logits, teacher_logits = batch.student_logits(), batch.teacher_logits()
    top = teacher_logits.topk(top_k, -1)
    teacher, student = renormalized(top.values), renormalized(logits.gather(-1, top.indices))
    rest: Tensor | float = 0.0
    if zero_outside:
        whole = logits.log_softmax(-1)
        student = whole.gather(-1, top.indices)
        negative_entropy = (whole.exp() * whole).sum(-1) - (student.exp() * student).sum(-1)
        rest = (1 - forward_weight) * (negative_entropy + 100 * (1 - student.exp().sum(-1)))
    forward = teacher.exp() * (teacher - student)
    reverse = student.exp() * (student - teacher)
    mixed = (forward_weight * forward + (1 - forward_weight) * reverse).sum(-1)
    return token_mean(mixed + rest, batch.mask, num_tokens)


def sd_zero_paper(batch: Batch) -> Tensor:
    """SD-Zero's phase 2 as the paper writes it: KL(s||t)."""
    sides = batch.student_logits().log_softmax(-1), batch.teacher_logits().log_softmax(-1)
    return token_mean(kl(*sides).sum(-1), batch.mask)


def self_revision_training(batch: Batch, revision: Tensor) -> Tensor:
    """SD-Zero's phase 1: cross entropy of the revision, and of the whole assistant turn."""
    cross_entropy = -batch.log_prob(batch.student_logits())
    return token_mean(cross_entropy, revision) + token_mean(cross_entropy, batch.mask)


def opsd(
    batch: Batch,
    *,
    beta: float = 0.0,
    entry_clip: float | None = None,
    top_k: int | None = None,
    tail: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """OPSD: generalised JSD, each entry clipped before the sum, mean over the valid tokens."""
    student, teacher = batch.student_logits(temperature), batch.teacher_logits(temperature)
    if top_k is not None:
        ids = teacher.topk(top_k, -1).indices
        if tail:  # as RLCSD runs it
            student = clamped_tail(student.log_softmax(-1).gather(-1, ids))
            teacher = clamped_tail(teacher.log_softmax(-1).gather(-1, ids))
        else:
            student, teacher = student.gather(-1, ids), teacher.gather(-1, ids)
    if not tail:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    entries = generalized_jsd(student, teacher, beta)
    if entry_clip is not None:
        entries = entries.clamp(max=entry_clip)
    return token_mean(entries.sum(-1), batch.mask)


def sdft(batch: Batch, *, cap: float = 2.0, skip: int = 3) -> Tensor:
    """SDFT: forward KL, first tokens skipped, each sequence times its mean capped ratio."""
    mask = batch.mask * (batch.mask.cumsum(-1) > skip)
    sides = batch.student_logits().log_softmax(-1), batch.teacher_logits().log_softmax(-1)
    ratio = (batch.old - batch.rollout).exp().clamp(max=cap)
    weight = (ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean_of_all_sequences(generalized_jsd(*sides, 0.0).sum(-1) * weight, mask)


def gkd(batch: Batch, *, beta: float, temperature: float) -> Tensor:
    return opsd(batch, beta=beta, temperature=temperature)


def served(batch: Batch, top_k: int) -> tuple[Tensor, Tensor]:
    """A server's answer: the teacher's top-k log-probabilities and their ids."""
    log_probs, ids = batch.teacher_logits().log_softmax(-1).topk(top_k, -1)
    return log_probs, ids


def verl_forward_kl(
    batch: Batch, *, top_k: int, loss_max: float | None = None, log_prob_min: float | None = None
) -> Tensor:
    """verl's forward_kl_topk: not renormalised, kept from below 0."""
    teacher, ids = served(batch, top_k)
    student = batch.student_logits().log_softmax(-1).gather(-1, ids)
    if log_prob_min is not None:
        student, teacher = student.clamp(min=log_prob_min), teacher.clamp(min=log_prob_min)
    token_loss = (teacher.exp() * (teacher - student)).sum(-1).clamp(min=0)
    if loss_max is not None:
        token_loss = token_loss.clamp(max=loss_max)
    return token_mean(token_loss, batch.mask)


def fireworks_forward_kl(batch: Batch, *, top_k: int) -> Tensor:
    """The cross entropy of Fireworks' and Tinker's recipes: the teacher alone renormalised."""
    teacher, ids = served(batch, top_k)
    student = batch.student_logits().log_softmax(-1).gather(-1, ids)
    return token_mean(-(renormalized(teacher).exp() * student).sum(-1), batch.mask)


def iw_opd_union(batch: Batch, *, beta: float, top_k: int) -> Tensor:
    """TRL's IW-OPD, mixed divergence: the union of both sides' top-k, each once, and a tail."""
    student = batch.student_logits().log_softmax(-1)
    teacher = batch.teacher_logits().log_softmax(-1)
    chosen = torch.zeros_like(teacher, dtype=torch.bool)
    for side in (student, teacher):
        chosen = chosen.scatter(-1, side.topk(top_k, -1).indices, True)
    entries = torch.where(chosen, generalized_jsd(student, teacher, beta), 0).sum(-1)
    tails = [side.masked_fill(chosen, -torch.inf).logsumexp(-1) for side in (student, teacher)]
    return token_mean(entries + generalized_jsd(*tails, beta), batch.mask)
