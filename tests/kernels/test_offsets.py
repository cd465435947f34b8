"""Logits with a large offset in common: errors no larger than those of eager PyTorch.

A direction in the hidden states that all of the head's rows share adds one number to all logits of
a token.  The GEMM rounds the logits to that number's size, on both sides of the comparison alike;
what follows has to lose nothing more.
"""

import pytest
import torch
import torch.nn.functional as F
from closeness import errors

import fused_sd

NUM_TOKENS, WIDTH, VOCAB, K = 16, 32, 200, 8
PARTS = ("loss", "dhidden", "dhead")
# Both have the same logits, whose rounding dominates, and sum them in other orders.  A log-sum-exp
# that is rounded to fp32 fails by factors from 1.5 to 8.
FACTOR, FLOOR = 1.15, 2e-6
OFFSETS = [0.0, 10.0, 200.0, 1e3, 1e4]
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(VOCAB, (NUM_TOKENS,), generator=GENERATOR)
ENTRIES = torch.stack([torch.randperm(VOCAB, generator=GENERATOR)[:K] for _ in IDS])
SUPPORT = fused_sd.TokenIds(ENTRIES)
KINDS = {"forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "jsd": fused_sd.Jsd(0.5)}


def sides(offset):
    """States and heads, exact in fp32, whose logits all have the offset."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    teacher = states + 0.3 * torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    head = torch.randn(VOCAB, WIDTH, generator=generator) / 4
    states[:, -1], teacher[:, -1], head[:, -1] = offset, offset, 1
    return states, teacher, head


def eager_divergence(z, z_t, name, ids=None):
    """The definition, on all entries or on some and their tail."""
    log_s, log_t = (
        side.log_softmax(-1) if ids is None else buckets(side.log_softmax(-1), ids)
        for side in (z, z_t)
    )
    if name == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if name == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=z.dtype))
    of_t, of_s = ((side.exp() * (side - log_m)).sum(-1) for side in (log_t, log_s))
    return (of_t + of_s) / 2


def buckets(log_probs, ids):
    mask = torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, ids, True)
    tail = log_probs.masked_fill(mask, -torch.inf).logsumexp(-1, True)
    return torch.cat([log_probs.gather(1, ids), tail], 1)


def dropped(z, z_t):
    log_s, log_t = (side.log_softmax(-1).gather(1, ENTRIES) for side in (z, z_t))
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def fused_divergence(h, w, t, **choices):
    return fused_sd.divergence_loss(h, w, t, w.detach(), reduction="none", **choices).loss


def entropy(z):
    log_s = z.log_softmax(-1)
    return -(log_s.exp() * log_s).sum(-1)


# (states, head, teacher's states, options) -> the fused loss; (logits of both sides) -> eager's
LOSSES = {
    **{
        name: (
            lambda h, w, t, o, d=divergence: fused_divergence(h, w, t, divergence=d, **o),
            lambda z, z_t, n=name: eager_divergence(z, z_t, n),
        )
        for name, divergence in KINDS.items()
    },
    "tail": (
        lambda h, w, t, o: fused_divergence(h, w, t, support=SUPPORT, **o),
        lambda z, z_t: eager_divergence(z, z_t, "reverse_kl", ENTRIES),
    ),
    "drop": (
        lambda h, w, t, o: fused_divergence(h, w, t, support=SUPPORT, remainder="drop", **o),
        dropped,
    ),
    "cross_entropy": (
        lambda h, w, t, o: fused_sd.cross_entropy_loss(h, w, IDS, reduction="none", **o).loss,
        lambda z, z_t: F.cross_entropy(z, IDS, reduction="none"),
    ),
    "log_probs": (
        lambda h, w, t, o: fused_sd.token_log_probs(h, w, IDS, **o).log_probs,
        lambda z, z_t: z.log_softmax(-1).gather(1, IDS[:, None])[:, 0],
    ),
    "entropy": (
        lambda h, w, t, o: fused_sd.token_log_probs(h, w, IDS, entropy=True, **o).entropy,
        lambda z, z_t: entropy(z),
    ),
}


def results(states, head, loss_of):
    states, head = states.clone().requires_grad_(), head.clone().requires_grad_()
    loss = loss_of(states, head)
    loss.sum().backward()
    # the shared direction's own gradient is a sum that cancels to 0
    return loss.detach(), states.grad[:, :-1], head.grad[:, :-1]


CASES = [
    *((name, offset, "torch") for name in LOSSES for offset in OFFSETS),
    *(
        pytest.param(name, 1e4, "triton", marks=pytest.mark.kernels)
        for name in ("reverse_kl", "tail", "drop", "cross_entropy", "entropy")
    ),
]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize(("name", "offset", "backend"), CASES)
def test_a_common_offset_costs_no_more_than_in_eager_pytorch(name, offset, backend):
    states, teacher, head = sides(offset)
    fused, eager = LOSSES[name]

    def eager_of(teacher):
        return lambda h, w: eager(h @ w.T, teacher @ w.detach().T)

    exact = results(states.double(), head.double(), eager_of(teacher.double()))
    plain = results(states, head, eager_of(teacher))
    options = {"backend": backend}
    found = results(states, head, lambda h, w: fused(h, w, teacher, options))
    for part, mine, theirs, want in zip(PARTS, found, plain, exact, strict=True):
        for error, bound in zip(errors(mine, want), errors(theirs, want), strict=True):
            assert error <= FACTOR * bound + FLOOR, f"{part}: {error:.2e}, eager {bound:.2e}"
