"""Builds the teacher's sequences: a prompt of its own, then the student's response.

The trainer adds to verl's batch, one row a sample:

* ``teacher_input_ids``, ``teacher_position_ids``: jagged int64, the teacher's prompt and behind it
  the student's whole response.  No start index is stored, because the response is the last R tokens
  of both sequences.  A sample without a context gets its own prompt, so that every rank runs the
  same forwards.  Positions of M-RoPE are (B, L, 4); verl has them as (B, 4, L), but mends only its
  own column where a worker has received it (``maybe_fix_3d_position_ids``).
* ``self_distillation_mask``: (B,) float32, 1 for samples with a context.

Dimension key:  B samples, P prompt tokens, R response tokens, L = P + R
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.integrations.verl.images import Vision

Jagged = Any  # a jagged nested tensor; Tensor's type lacks its methods


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """The teacher's sequences.

    Attributes:
        input_ids: jagged (B, L) with the teacher's own P, int64.
        position_ids: jagged (B, L), or (B, L, 4) for a model with M-RoPE, int64.
        mask: (B,) float32, 1 for samples with a context.
        num_truncated: number of contexts that lost their beginning.
        num_left_out: number of contexts that were too long and could not be cut.
    """

    input_ids: Jagged
    position_ids: Jagged
    mask: Tensor
    num_truncated: int
    num_left_out: int = 0

    def fields(self) -> dict[str, Tensor]:
        """Return the columns of verl's batch."""
        return {
            "teacher_input_ids": self.input_ids,
            "teacher_position_ids": self.position_ids,
            "self_distillation_mask": self.mask,
        }


def teacher_batch(
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    contexts: Sequence[Sequence[int] | None],
    *,
    max_prompt_length: int | None = None,
    num_turn_tokens: Sequence[int] | None = None,
    vision: Vision | None = None,
) -> TeacherBatch:
    """Put the teacher's prompts before the student's responses.

    A context that is too long loses its beginning, because its end holds the generation header.
    With images or videos it is left out instead: a cut could take tokens whose pixels stay.  The
    response is never cut.

    Args:
        prompts, responses: (P,) and (R,) int64 of each sample.
        contexts: the tokens of each sample's teacher prompt; None if there is nothing to show.
        max_prompt_length: most tokens of a context; None: no limit.
        num_turn_tokens: how many tokens of each context are not counted, because they are the turns
            of a conversation, which stand at its end; None: all are counted.
        vision: the samples' images and videos; None for a model of text.

    Raises:
        ValueError: the numbers of samples differ, a sequence has other images than the student's,
            or a prompt or context is empty: then no row would predict the response's first token.
    """
    if not len(prompts) == len(responses) == len(contexts):
        got = f"{len(prompts)} prompts, {len(responses)} responses and {len(contexts)}"
        fail("contexts", "be one for each sample", got, "give None where there is nothing to show")
    sequences, mask, num_truncated, num_left_out = [], [], 0, 0
    turns = num_turn_tokens or [0] * len(prompts)
    for n, (prompt, response, context) in enumerate(zip(prompts, responses, contexts)):
        shown = prompt
        limit = (max_prompt_length or math.inf) + turns[n]
        is_long = context is not None and len(context) > limit
        if is_long and vision is not None and vision.has_any(n):
            context, is_long = None, False
            num_left_out += 1
        if context is not None:
            kept = list(context)[-int(limit) :] if is_long else list(context)
            num_truncated += is_long
            shown = torch.tensor(kept, dtype=prompt.dtype, device=prompt.device)
        if not len(shown):
            rule, remedy = "hold a token", "give None where there is nothing to show"
            fail("prompts" if context is None else "contexts", rule, "an empty one", remedy)
        sequences.append(torch.cat([shown, response]))
        mask.append(float(context is not None))
    positions = [
        torch.arange(len(ids), device=ids.device) if vision is None else vision.positions(n, ids)
        for n, ids in enumerate(sequences)
    ]
    taught = torch.tensor(mask)
    return TeacherBatch(jagged(sequences), jagged(positions), taught, num_truncated, num_left_out)


def response_rows(values: Jagged, lengths: Tensor) -> list[Tensor]:
    """Select the rows that predict the response from values of whole sequences.

    Args:
        values: jagged (B, L) or (B, L, ...); row i belongs to the prediction of token i + 1.
        lengths: (B,) R of each sample.

    Returns:
        (R, ...) of each sample.
    """
    ends = values.offsets()[1:].tolist()
    packed = values.values()
    return [packed[end - n - 1 : end - 1] for end, n in zip(ends, lengths.tolist())]


def at_student_rows(values: Sequence[Tensor], prompts: Sequence[Tensor]) -> Jagged:
    """Place values of response tokens where verl keeps a server's ``teacher_logprobs``.

    Args:
        values: (R,) of each sample.
        prompts: (P,) the student's prompt of each sample.

    Returns:
        Jagged (B, L, 1): row i belongs to the prediction of token i + 1; rows that predict no
        response token are 0.
    """
    rows = []
    for value, prompt in zip(values, prompts):
        row = value.new_zeros(len(prompt) + len(value), 1)
        row[len(prompt) - 1 : -1, 0] = value
        rows.append(row)
    return jagged(rows)


def mask_without_context(response_mask: Jagged, mask: Tensor) -> Jagged:
    """Set the jagged response mask (B, R) to 0 in samples whose mask (B,) is 0."""
    per_token = mask.to(response_mask.dtype).repeat_interleave(lengths_of(response_mask))
    kept = response_mask.values() * per_token
    return torch.nested.nested_tensor_from_jagged(kept, response_mask.offsets())


def lengths_of(ids: Jagged) -> Tensor:
    """Return the sequence lengths (B,) of a jagged tensor."""
    lengths: Tensor = ids.offsets().diff()
    return lengths


def jagged(rows: Sequence[Tensor]) -> Jagged:
    """Make a jagged tensor of rows that differ in length."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
