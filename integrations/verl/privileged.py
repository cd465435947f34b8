"""Token surgery: a teacher that reads another prompt before the student's own response.

What the trainer's stage adds to verl's batch, one row a sample:

* ``teacher_input_ids``, ``teacher_position_ids``: jagged int64, the teacher's prompt and behind it
  the student's response, all of it.  No start is kept: the response is the last R tokens of both
  sequences.  A sample without a context has its own prompt there, so that every rank runs the same
  forwards.
* ``self_distillation_mask``: (B,) float32, 1 where a context exists.

Dimension key:  B samples, P prompt tokens, R response tokens, L = P + R
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fused_sd.checks import fail

Ids = Sequence[int]
Jagged = Any  # a jagged nested tensor, whose methods Tensor's type does not have


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """The teacher's sequences.

    Attributes:
        input_ids, position_ids: jagged (B, L) of each sample's own P, int64.
        mask: (B,) float32, 1 where a context exists.
        num_truncated: contexts whose beginning was cut off.
    """

    input_ids: Jagged
    position_ids: Jagged
    mask: Tensor
    num_truncated: int

    def fields(self) -> dict[str, Tensor]:
        """By the names that the batch knows them by."""
        return {
            "teacher_input_ids": self.input_ids,
            "teacher_position_ids": self.position_ids,
            "self_distillation_mask": self.mask,
        }


def rows_of(
    ids: Tensor, mask: Tensor | None = None, *, padded: Literal["left", "right"] = "right"
) -> list[Tensor]:
    """The sequences of a jagged tensor, or of a padded one and its mask.

    Args:
        ids: jagged (B, *), or (B, L).
        mask: (B, L) 1 for tokens, of a padded tensor.
        padded: the side that a padded tensor's padding is on: verl's prompts have it on the left,
            its responses on the right.

    Raises:
        ValueError: the mask is missing, or its padding is elsewhere.
    """
    if ids.is_nested:
        return list(ids.unbind())
    if mask is None or mask.shape != ids.shape:
        got = "none" if mask is None else tuple(mask.shape)
        fail("mask", f"be {tuple(ids.shape)} for padded ids", got, "pass their attention mask")
    assert mask is not None
    lengths = mask.sum(1).tolist()
    columns = torch.arange(ids.shape[1], device=ids.device)
    counts = torch.tensor(lengths, device=ids.device)[:, None]
    is_left = padded == "left"
    expected = columns >= ids.shape[1] - counts if is_left else columns < counts
    if not torch.equal(mask != 0, expected):
        fail("mask", f"have its zeros on the {padded}", "others", "pass padded= as it is")
    return [row[len(row) - n :] if is_left else row[:n] for row, n in zip(ids, lengths)]


def teacher_batch(
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    contexts: Sequence[Ids | None],
    *,
    max_prompt_length: int | None = None,
) -> TeacherBatch:
    """The teacher's prompts before the student's responses.

    A context over the limit loses its beginning: its end holds the generation header, and the
    response is never cut.

    Args:
        prompts, responses: (P,) and (R,) int64 of each sample.
        contexts: the teacher's prompt of each sample; None where there is nothing to show.
        max_prompt_length: tokens of a context; None: no limit.

    Raises:
        ValueError: counts differ, or a prompt or context is empty, so that no row would predict the
            response's first token.
    """
    if not len(prompts) == len(responses) == len(contexts):
        got = f"{len(prompts)} prompts, {len(responses)} responses and {len(contexts)}"
        fail("contexts", "be one for each sample", got, "give None where there is nothing to show")
    sequences, num_truncated = [], 0
    for prompt, response, context in zip(prompts, responses, contexts):
        shown = prompt
        if context is not None:
            kept = list(context)[-max_prompt_length:] if max_prompt_length else list(context)
            num_truncated += len(kept) < len(context)
            shown = torch.tensor(kept, dtype=prompt.dtype, device=prompt.device)
        if not len(shown):
            rule, remedy = "hold a token", "give None where there is nothing to show"
            fail("prompts" if context is None else "contexts", rule, "an empty one", remedy)
        sequences.append(torch.cat([shown, response]))
    positions = [torch.arange(len(ids), device=ids.device) for ids in sequences]
    mask = torch.tensor([float(context is not None) for context in contexts])
    return TeacherBatch(_jagged(sequences), _jagged(positions), mask, num_truncated)


def response_rows(values: Jagged, lengths: Tensor) -> list[Tensor]:
    """Of values at each row of packed sequences, those at the rows that predict the response.

    Args:
        values: jagged (B, L) or (B, L, ...), row i of the prediction of token i + 1.
        lengths: (B,) R of each sample.

    Returns:
        (R, ...) of each sample.
    """
    ends = values.offsets()[1:].tolist()
    packed = values.values()
    return [packed[end - n - 1 : end - 1] for end, n in zip(ends, lengths.tolist())]


def student_rows(values: Sequence[Tensor], prompts: Sequence[Tensor]) -> Jagged:
    """Put values of the response's tokens where verl has a teacher's.

    Args:
        values: (R,) of each sample.
        prompts: (P,) the student's.

    Returns:
        Jagged (B, L, 1), K = 1: row i of the prediction of token i + 1, 0 in the rows before the
        response's and in the last.
    """
    rows = []
    for value, prompt in zip(values, prompts):
        row = value.new_zeros(len(prompt) + len(value), 1)
        row[len(prompt) - 1 : -1, 0] = value
        rows.append(row)
    return _jagged(rows)


def taught_tokens(response_mask: Jagged, mask: Tensor) -> Jagged:
    """The jagged response mask (B, R), 0 in samples whose mask (B,) is."""
    counted = mask.to(response_mask.dtype).repeat_interleave(lengths_of(response_mask))
    kept = response_mask.values() * counted
    return torch.nested.nested_tensor_from_jagged(kept, response_mask.offsets())


def lengths_of(ids: Jagged) -> Tensor:
    """(B,) of a jagged tensor."""
    lengths: Tensor = ids.offsets().diff()
    return lengths


def _jagged(rows: list[Tensor]) -> Jagged:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
