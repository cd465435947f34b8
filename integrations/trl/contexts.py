"""Teacher prompts: filled templates, cut and padded tokens, and what kind of token each one is.

Dimension key:  B sequences, L positions, T completion tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.integrations.shared.prompts import reprompted
from fused_sd.integrations.shared.rollouts import Rollout


class PrivilegedPrompt:
    """Mixin for trainers whose teacher reads a hint in ``reprompt_template``."""

    strips_prompt: ClassVar[bool] = False
    """Whether the official code strips the question and the hint."""

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        """Return the prompt with the row's ``privileged_context``, or None where it has none."""
        hint = rollout.hint
        return None if hint is None else self.hinted(rollout, hint)

    def hinted(self, rollout: Rollout, hint: str) -> list[int]:
        """Return the tokens of the rollout's prompt with a hint."""
        prompt = reprompted(
            self.question(rollout),
            self.args.reprompt_template,
            stripped=self.strips_prompt,
            privileged=hint,
        )
        return self.tokenize(prompt, rollout.tools)

    def question(self, rollout: Rollout) -> Any:
        """Return the prompt whose last user turn is the template's ``{prompt}``."""
        return rollout.prompt


@dataclass(frozen=True, eq=False)
class TeacherInputs:
    """The teacher's sequences: its prompts, left-padded, before the student's completions."""

    input_ids: Tensor  # (B, L + T)
    attention_mask: Tensor  # (B, L + T)


def teacher_inputs(
    prompts: Sequence[Sequence[int]],
    completion_ids: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T)
    *,
    pad_id: int,
    multiple: int | None = None,
) -> TeacherInputs:
    """Pad prompts on the left and put the completions behind them.

    Args:
        pad_id: the padding token.
        multiple: the padded prompts' length is a multiple of this; None: that of the longest.
    """
    longest = max((len(ids) for ids in prompts), default=0)
    longest = -(-longest // (multiple or 1)) * (multiple or 1)
    rows = torch.full((len(prompts), longest), pad_id, dtype=completion_ids.dtype)
    mask = torch.zeros(len(prompts), longest, dtype=completion_mask.dtype)
    for row, ids in enumerate(prompts):
        if len(ids):
            rows[row, -len(ids) :] = torch.tensor(ids)
            mask[row, -len(ids) :] = 1
    return TeacherInputs(
        torch.cat([rows.to(completion_ids.device), completion_ids], 1),
        torch.cat([mask.to(completion_mask.device), completion_mask], 1),
    )


class TokenTypes:
    """Which kind of token each token is, such as text or image, as a function of its id.

    Processors tell it for the student's sequences alone.  Those of the teacher have the same
    images among other text, and all families that are supported mark an image's own tokens.

    Args:
        ids: (B, L) the student's sequences.
        types: (B, L) what the processor and TRL say of them.

    Raises:
        ValueError: one id has two types, so that they do not follow from the id.
    """

    def __init__(self, ids: Tensor, types: Tensor) -> None:
        self.table = types.new_zeros(int(ids.max()) + 1)
        self.table[ids] = types
        if not torch.equal(self.table[ids], types):
            fail(
                "token types",
                "follow from the token's id, to be known for the teacher's sequences",
                "two types of one id",
                "train on text, or use a model that marks image tokens alone",
            )

    def of(self, ids: Tensor) -> Tensor:
        """Return the types of ids of any shape; an id that the student does not have is text."""
        known = ids < len(self.table)
        return self.table[torch.where(known, ids, 0)] * known
