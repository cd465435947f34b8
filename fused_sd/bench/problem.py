"""Problems to measure on: an objective, and operands like those of a model that distils itself.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.measuring import realistic
from fused_sd.measuring.head_sizes import head_size
from fused_sd.measuring.losses import LOSSES, STORED_NAMES

OBJECTIVES = (  # means over the tokens that count, at temperature 1
    "forward_kl",  # full vocabulary, as are the next three
    "reverse_kl",
    "jsd",  # beta 0.5
    "opsd",  # the forward KL, each entry's term cut at 0.05
    "topk_tail",  # SDPO: the student's top-100 and one bucket for the rest, JSD 0.5
    "topk_renormalized",  # SD-Zero: the teacher's top-64, both sides renormalised, MixedKl(0.5)
    "cross_entropy",  # of token_ids
    "token_log_probs",  # -log pi(token_ids): what RL code builds on
    "grpo",  # surrogate clipped at (0.2, 0.2)
    "rlsd",  # the defaults of rlsd_loss, the teacher by its hidden states
)
# the objective that times each loss of the table: its own or, where that is of another name, one
# whose arithmetic with the vocabulary is the same
OBJECTIVE_OF = {
    **{name: name for name in LOSSES if name in OBJECTIVES},
    **{loss: stored for stored, loss in STORED_NAMES.items()},
    "sd_zero_paper": "reverse_kl",
    "sdft": "forward_kl",
    "gkd": "jsd",
    "sampled_kl": "rlsd",
    "rlcsd": "grpo",  # the contrast is arithmetic on given log-probabilities
}
MEAN_KL = 0.05  # nat: KL(t||s)
CALIBRATION_TOKENS = 32  # tokens on which the mean KL is set
ENTROPY_TOKENS = 256  # tokens on which the mean entropy is set, if one is asked for
PATCH_TOKENS = 4096  # tokens whose states are drawn at a time
PATCH_LOGITS = 2**27  # logits held at a time while tokens are sampled
SEQUENCE = 1024  # tokens of a sequence, of which the first are masked
# the old policy's log-probabilities are the student's and noise of this deviation; every 20th token
# is moved far enough to be clipped
OLD_DEVIATION, CLIPPED_DEVIATION, CLIPPED_EVERY = 0.05, 0.5, 20


class Shape(NamedTuple):
    """The name and the sizes of a head."""

    name: str
    hidden_size: int
    vocab: int


_SMALL = {  # for a CPU
    "tiny": (64, 1024),
    "small": (256, 32000),
    "wide": (256, 151936),
    "deep": (1024, 49152),  # its GEMMs take most of the time
}
_MODELS = (
    *("smollm2-135m", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"),
    *("olmo-3-7b", "llama-3-8b", "qwen3.5-35b-a3b"),
)
SHAPES = {name: Shape(name, *sizes) for name, sizes in _SMALL.items()}
SHAPES |= {name: Shape(name, *head_size(name)) for name in _MODELS}


@dataclass(frozen=True, eq=False)
class Problem:
    """An objective and its operands, on one device; hidden states and heads share a dtype."""

    objective: str
    hidden: Tensor  # (N, D) leaf, requires a gradient
    weight: Tensor  # (V, D) leaf, requires a gradient unless the head is frozen
    teacher_hidden: Tensor  # (N, D)
    teacher_weight: Tensor  # (V, D): weight itself, or the teacher's own
    mask: Tensor  # (N,) bool: tokens that count
    token_ids: Tensor  # (N,) int64
    old_log_probs: Tensor  # (N,) fp32
    advantages: Tensor  # (N,) fp32
    entropies: Tensor  # (N,) fp32, nat, the student's

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def trainable(self) -> bool:
        """Whether the head has a gradient."""
        return self.weight.requires_grad


Loss = Callable[[], Tensor]  # (), differentiable w.r.t. problem.hidden and a trainable weight
BY_TOKEN = ("hidden", "teacher_hidden", "token_ids", "old_log_probs", "advantages", "entropies")


def make_problem(
    shape: Shape,
    num_tokens: int,
    *,
    objective: str = "reverse_kl",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    trainable: bool = True,
    mask_share: float = 0.0,
    shared_head: bool = True,
    kl: float = MEAN_KL,
    entropy: float | None = None,
    seed: int = 0,
) -> Problem:
    """Draw a problem on its device, without ever holding the logits of all tokens.

    Args:
        shape: the head's.
        num_tokens: N.
        objective: one of ``OBJECTIVES``.
        dtype: of hidden states and heads.
        device: of all operands.
        trainable: whether the head requires a gradient.
        mask_share: share of the tokens that the mask leaves out.
        shared_head: whether the teacher's head is the student's tensor; False: a copy of it.
        kl: mean KL(t||s) in nat, set on a few tokens.
        entropy: the student's mean in nat, set on a few tokens; None: 0.6 to 1, with half of the
            tokens nearly decided.
        seed: of the random numbers.
    """
    device = torch.device(device)
    draw = torch.Generator(device).manual_seed(seed)
    weight, centres, of_row = realistic.draw_head(shape.vocab, shape.hidden_size, dtype, draw)
    hidden = torch.empty((num_tokens, shape.hidden_size), dtype=dtype, device=device)
    teacher = torch.empty_like(hidden)
    gap, states_of = None, _states_of(entropy, weight, centres, of_row, draw)
    for rows in realistic.slabs(num_tokens, PATCH_TOKENS):
        count = rows.stop - rows.start
        states = states_of(count).to(dtype)
        direction = realistic.normal(draw, *states.shape)
        if gap is None:
            few = slice(0, CALIBRATION_TOKENS)
            gap = realistic.gap_at(states[few], weight, direction[few], kl)
        hidden[rows], teacher[rows] = states, realistic.moved(states, direction, gap)
    token_ids, log_probs, entropies = _sampled(hidden, weight, draw)
    old = log_probs + OLD_DEVIATION * realistic.normal(draw, num_tokens)
    old[::CLIPPED_EVERY] -= CLIPPED_DEVIATION
    old[CLIPPED_EVERY // 2 :: CLIPPED_EVERY] += CLIPPED_DEVIATION
    sign = torch.randint(2, (num_tokens,), generator=draw, device=device) * 2.0 - 1
    size = torch.rand(num_tokens, generator=draw, device=device) + 0.5
    drawn = Problem(
        objective,
        hidden,
        weight,
        teacher,
        weight if shared_head else weight.clone(),
        torch.ones(num_tokens, dtype=torch.bool, device=device),
        token_ids,
        old.clamp(max=0),
        sign * size,
        entropies,
    )
    return variant(drawn, trainable=trainable, mask_share=mask_share)


def variant(
    problem: Problem,
    *,
    objective: str | None = None,
    num_tokens: int | None = None,
    trainable: bool = True,
    mask_share: float = 0.0,
) -> Problem:
    """Return another problem on the first tokens of the same operands, with leaves of its own.

    Both problems share the memory of the heads, but not that of the tokens.
    """
    count = len(problem.mask) if num_tokens is None else num_tokens
    weight = problem.weight.detach().requires_grad_(trainable)
    shared = problem.teacher_weight is problem.weight
    by_token = {name: getattr(problem, name).detach()[:count].clone() for name in BY_TOKEN}
    by_token["hidden"].requires_grad_()
    at = torch.arange(count, device=problem.mask.device)
    period = min(count, SEQUENCE)
    return replace(
        problem,
        objective=problem.objective if objective is None else objective,
        weight=weight,
        teacher_weight=weight if shared else problem.teacher_weight,
        mask=at % period >= round(mask_share * period),
        **by_token,
    )


def refill_(problem: Problem, source: Problem, tokens: Tensor) -> None:
    """Overwrite a problem's tokens in place by those of ``source`` at the indices ``tokens``."""
    with torch.no_grad():
        for name in BY_TOKEN:
            mine, theirs = getattr(problem, name), getattr(source, name)
            for rows in realistic.slabs(len(tokens), PATCH_TOKENS):
                mine[rows] = theirs[tokens[rows]]


def _states_of(
    entropy: float | None,
    weight: Tensor,
    centres: Tensor,
    of_row: Tensor,
    draw: torch.Generator,
) -> Callable[[int], Tensor]:
    """Return a function that draws fp32 states (N, D), given N, with the given mean entropy.

    If an entropy is given, the rows of the head (V, D) get a common direction, in place.
    """
    if entropy is None:
        return lambda count: realistic.draw_policy_states(count, weight, centres, of_row, draw)
    direction = realistic.add_frequencies_(weight, draw)
    head = weight, centres, of_row, direction, draw
    few = realistic.draw_graded_states(ENTROPY_TOKENS, *head)
    sharpness = realistic.sharpness_at(few, weight, entropy)
    return lambda count: sharpness * realistic.draw_graded_states(count, *head)


def _sampled(hidden: Tensor, weight: Tensor, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Sample a token for each state; return ids, log-probabilities and entropies, (N,) each."""
    token_ids = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    entropies = torch.empty_like(log_probs)
    for rows in realistic.slabs(len(hidden), max(1, PATCH_LOGITS // len(weight))):
        log_s = realistic.wide_logits(hidden[rows], weight).log_softmax(-1)
        probs = log_s.exp()
        chosen = torch.multinomial(probs, 1, generator=draw)
        token_ids[rows] = chosen[:, 0]
        log_probs[rows] = log_s.gather(1, chosen)[:, 0]
        entropies[rows] = -(probs * log_s).sum(-1)
    return token_ids, log_probs, entropies
