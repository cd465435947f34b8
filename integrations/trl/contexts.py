"""Teacher prompts: filled templates, cut and padded tokens.

Dimension key:  B sequences, L positions, T completion tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd.integrations.shared.prompts import reprompted
from fused_sd.integrations.shared.rollouts import Rollout


class PrivilegedPrompt:
    """Mixin for trainers whose teacher reads a hint in ``reprompt_template``."""

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        """Return the prompt with the row's ``privileged_context``, or None where it has none."""
        return self.hinted(rollout, rollout.privileged) if rollout.privileged else None

    def hinted(self, rollout: Rollout, hint: str) -> list[int]:
        """Return the tokens of the rollout's prompt with a hint."""
        template = self.args.reprompt_template
        return self.tokenize(reprompted(rollout.prompt, template, privileged=hint))


@dataclass(frozen=True, eq=False)
class TeacherInputs:
    """The teacher's sequences: its prompts, left-padded, before the student's completions."""

    input_ids: Tensor  # (B, L + T)
    attention_mask: Tensor  # (B, L + T)
    num_truncated: int


def teacher_inputs(
    prompts: Sequence[Sequence[int]],
    completion_ids: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T)
    *,
    pad_id: int,
    max_length: int,
) -> TeacherInputs:
    """Pad prompts on the left and put the completions behind them.

    A prompt over the limit loses its beginning, because its end holds the generation header.

    Args:
        pad_id: the padding token.
        max_length: of a prompt, in tokens.
    """
    kept = [ids[-max_length:] for ids in prompts]
    longest = max((len(ids) for ids in kept), default=0)
    rows = torch.full((len(kept), longest), pad_id, dtype=completion_ids.dtype)
    mask = torch.zeros(len(kept), longest, dtype=completion_mask.dtype)
    for row, ids in enumerate(kept):
        if len(ids):
            rows[row, -len(ids) :] = torch.tensor(ids)
            mask[row, -len(ids) :] = 1
    return TeacherInputs(
        torch.cat([rows.to(completion_ids.device), completion_ids], 1),
        torch.cat([mask.to(completion_mask.device), completion_mask], 1),
        sum(len(ids) < len(whole) for ids, whole in zip(kept, prompts)),
    )
