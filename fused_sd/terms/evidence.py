"""RLSD's evidence: a teacher that knows the answer reweights each token's advantage.

Dimension key:  (...) tokens, C tokens in a chunk
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.terms.weighting import log_ratio


@dataclass(frozen=True, eq=False)
class Evidence:
    """Settings of RLSD's reweighting of advantages by what a teacher knows.

    ``delta = log P_T - log P_S`` of the sampled token (a constant), ``w = exp(sign(A) delta)``
    clipped to ``[1 - clip[0], 1 + clip[1]]``, and the advantage becomes ``A ((1 - mix) + mix w)``.

    Args:
        clip: how far the weight may leave 1, downwards and upwards.
        mix: lambda, the share of the evidence: a float, such as an ``EvidenceSchedule``'s value, or
            a tensor (...) with one for each token; a token of mix 0 keeps its advantage.
        log_prob: whether P_S is the ``"current"`` policy (the official code) or the ``"old"`` one
            that sampled the token (ms-swift, SDPG).

    Raises:
        ValueError: when a number is out of range.

    Reference:
        Yang et al., *Self-Distilled RLVR* (RLSD), arXiv 2604.03128, eq. 13-15.  Equation 16 of
        the paper has no policy ratio and so, the weight being a constant, no gradient; the official
        code reweights the advantage of a clipped policy ratio, as here.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(2, 16), torch.randn(100, 16), torch.tensor([3, 5])
        >>> own = fused_sd.token_log_probs(hidden, head, token_ids).log_probs
        >>> evidence = fused_sd.Evidence(clip=(0.2, 0.2), mix=torch.tensor([0.0, 1.0]))
        >>> output = fused_sd.rlsd_loss(
        ...     hidden, head, token_ids, torch.ones(2), teacher_log_probs=own + 1, evidence=evidence
        ... )
        >>> output.token_loss  # the first token keeps its advantage
        tensor([-1.0000, -1.2000])
    """

    clip: tuple[float, float] = (0.2, 0.2)
    mix: float | Tensor = 0.5
    log_prob: Literal["current", "old"] = "current"

    def __post_init__(self) -> None:
        checks.check_clip_pair("clip", self.clip)
        if isinstance(self.mix, Tensor):
            tensor_checks.check_tensor("mix", self.mix)
            tensor_checks.check_dtype("mix", self.mix, tensor_checks.REAL, "pass floats")
        else:
            checks.check_unit_interval("mix", self.mix)
        checks.check_one_of("log_prob", self.log_prob, ("current", "old"))


def evidence_weight(
    teacher_log_prob: Tensor,
    student_log_prob: Tensor,
    advantages: Tensor,
    clip: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """RLSD's clipped weight (C,) of each token, and 1 where the clip cut it.

    Args:
        teacher_log_prob, student_log_prob: (C,) of the sampled tokens, nats.
        advantages: (C,), of which only the sign is read.
        clip: how far the weight may leave 1, downwards and upwards.
    """
    delta = log_ratio(teacher_log_prob, student_log_prob)
    weight = torch.exp(torch.sign(advantages) * delta)
    clipped = weight.clamp(1 - clip[0], 1 + clip[1])
    return clipped, (clipped != weight).to(weight)


class EvidenceSchedule:
    """RLSD's lambda over the training steps: a linear warm-up, a constant, a linear decay to 0.

    Call ``step()`` after each optimiser step and pass ``value`` as ``Evidence.mix``.

    Args:
        peak: lambda after the warm-up.
        warmup_steps: steps from 0 to the peak.
        hold_steps: steps at the peak.
        decay_steps: steps from the peak to 0; 0 holds it for ever.
        first_step: number of the first update: 1 as RLSD's official code counts, so that its
            warm-up begins above 0 and its decay below the peak; 0 as RLCSD's code counts, whose
            first update has the peak.

    Examples:
        >>> import fused_sd
        >>> schedule, values = fused_sd.EvidenceSchedule(0.5, warmup_steps=2, decay_steps=5), []
        >>> for _ in range(7):
        ...     values.append(round(schedule.value, 2))  # for Evidence(mix=schedule.value)
        ...     schedule.step()
        >>> values
        [0.25, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    """

    def __init__(
        self,
        peak: float = 0.5,
        warmup_steps: int = 0,
        hold_steps: int = 0,
        decay_steps: int = 0,
        *,
        first_step: int = 1,
    ) -> None:
        checks.check_unit_interval("peak", peak)
        for name, steps in (
            ("warmup_steps", warmup_steps),
            ("hold_steps", hold_steps),
            ("decay_steps", decay_steps),
            ("first_step", first_step),
        ):
            checks.check_whole(name, steps, "pass a number of steps")
        self.peak, self.warmup_steps = peak, warmup_steps
        self.hold_steps, self.decay_steps = hold_steps, decay_steps
        self.first_step, self.num_steps = first_step, 0

    def step(self) -> None:
        """Count an optimiser step."""
        self.num_steps += 1

    @property
    def value(self) -> float:
        """Lambda of the next update."""
        now = self.first_step + self.num_steps
        if now < self.warmup_steps:
            return self.peak * now / self.warmup_steps
        late = now - self.warmup_steps - self.hold_steps
        if self.decay_steps == 0 or late <= 0:
            return self.peak
        return self.peak * max(0.0, 1 - late / self.decay_steps)

    def state_dict(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_steps = state["num_steps"]
