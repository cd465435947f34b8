"""The objectives as a user writes them in PyTorch.

Eager code applies them to logits, and peers that return log-probabilities to those.  Logits and
log-probabilities are fp32; every loss is the mean over its M tokens.

Dimension key:  M tokens that count, V vocabulary
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TAIL_TOP_K = 100  # SDPO's support
RENORMALIZED_TOP_K = 64  # SD-Zero's support
ENTRY_CLIP = 0.05  # OPSD's
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "opsd", "topk_tail", "topk_renormalized")
POLICIES = ("cross_entropy", "token_log_probs", "grpo", "rlsd")
GKD_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # beta of GKD, TRL and Liger


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), the mean over the tokens."""
    return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)


def jsd(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Half KL(t || m) and half KL(s || m)."""
    log_m = torch.logaddexp(log_s, log_t) - math.log(2.0)
    return (kl(log_t, log_m) + kl(log_s, log_m)) / 2


def opsd(log_s: Tensor, log_t: Tensor) -> Tensor:
    """OPSD: KL(t || s), each entry's term cut before the sum."""
    terms = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    return terms.clamp(max=ENTRY_CLIP).sum(-1).mean()


def with_tail(log_probs: Tensor) -> Tensor:
    """Append one entry for the remaining mass, with SDPO's clamp."""
    inside = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(inside))], -1)


def topk_tail(student: Tensor, teacher: Tensor) -> Tensor:
    """SDPO: the JSD on the student's top-k and one entry for the tail."""
    chosen, ids = student.topk(TAIL_TOP_K, dim=-1)
    log_s = chosen - student.logsumexp(-1, keepdim=True)
    log_t = teacher.gather(-1, ids) - teacher.logsumexp(-1, keepdim=True)
    return jsd(with_tail(log_s), with_tail(log_t))


def topk_renormalized(student: Tensor, teacher: Tensor) -> Tensor:
    """SD-Zero: the mean of both KLs, renormalised on the teacher's top-k."""
    chosen, ids = teacher.topk(RENORMALIZED_TOP_K, dim=-1)
    log_t, log_s = chosen.log_softmax(-1), student.gather(-1, ids).log_softmax(-1)
    return (kl(log_t, log_s) + kl(log_s, log_t)) / 2


def divergence(objective: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence between the distributions of logits (M, V)."""
    if objective in TRUNCATED:
        return TRUNCATED[objective](student, teacher)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    return FULL[objective](log_s, log_t)


def selected(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities (M,) of tokens, from logits (M, V) without a second (M, V) tensor."""
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def policy(
    objective: str,
    log_probs: Tensor,  # (M,)
    teacher_log_probs: Tensor | None,  # (M,), for rlsd only
    old_log_probs: Tensor,  # (M,)
    advantages: Tensor,  # (M,)
) -> Tensor:
    """The loss that trainers compute from log-probabilities of the sampled tokens."""
    if objective in ("cross_entropy", "token_log_probs"):
        return -log_probs.mean()
    ratio = (log_probs - old_log_probs).exp()
    if objective == "grpo":
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    assert teacher_log_probs is not None
    delta = (teacher_log_probs - log_probs).detach()
    evidence = (advantages.sign() * delta).exp().clamp(0.8, 1.2)
    advantages = advantages * (0.5 + 0.5 * evidence)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    return torch.where(advantages < 0, loss.minimum(-3.0 * advantages), loss).mean()


FULL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda log_s, log_t: kl(log_t, log_s),
    "reverse_kl": kl,
    "jsd": jsd,
    "opsd": opsd,
}
TRUNCATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "topk_tail": topk_tail,
    "topk_renormalized": topk_renormalized,
}
