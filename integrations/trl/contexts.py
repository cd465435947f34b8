"""Teacher prompts: templates filled in, tokens cut and padded.

Dimension key:  B sequences, L positions, T completion tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.integrations.trl.rollouts import Rollout


def last_user_text(prompt: Any) -> str:
    """The text that a template's ``{prompt}`` stands for: of the last user turn, or all of it."""
    if isinstance(prompt, str):
        return prompt
    if not prompt or prompt[-1].get("role") != "user":
        role = prompt[-1].get("role") if prompt else None
        fail(
            "prompt",
            "end with a user turn, whose text the teacher's template rewrites",
            f"a last turn of {role!r}",
            "move prefilled answers and tool turns out of the prompt",
        )
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def with_user_text(prompt: Any, text: str) -> Any:
    """The prompt with other words in its last user turn; earlier turns stay."""
    if isinstance(prompt, str):
        return text
    return [*prompt[:-1], {**prompt[-1], "content": text}]


def check_template(name: str, template: str, *needed: str) -> None:
    """Refuse a template that lacks a placeholder or has one that nobody fills in."""
    try:
        template.format(**dict.fromkeys(needed, ""))
    except (KeyError, IndexError, ValueError) as error:
        fail(
            name, f"hold no placeholders but {_braced(needed)}", repr(error), "double other braces"
        )
    missing = [field for field in needed if f"{{{field}}}" not in template]
    if missing:
        fail(name, f"hold {_braced(needed)}", repr(template), f"add {_braced(missing)}")


def _braced(fields: Sequence[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in fields)


class PrivilegedPrompt:
    """For trainers whose teacher reads the dataset's ``privileged_context`` in a template."""

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        if not rollout.privileged:
            return None
        text = self.args.reprompt_template.format(
            prompt=last_user_text(rollout.prompt), privileged=rollout.privileged
        )
        return self.tokenize(with_user_text(rollout.prompt, text))


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
    max_length: int | None,
) -> TeacherInputs:
    """Pad prompts on the left and put the completions behind them.

    A prompt over the limit loses its beginning: its end holds the generation header.
    """
    kept = [ids if max_length is None else ids[-max_length:] for ids in prompts]
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
