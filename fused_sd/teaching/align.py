"""Where one response sits in two sequences, the student's prompt before it and the teacher's.

    places = align_responses(student_ids, student_mask, teacher_ids, teacher_mask,
                             student_response_mask=response_mask)
    student = student_hidden.flatten(0, 1)[places.student_positions]  # (N, D)
    teacher = teacher_hidden.flatten(0, 1)[places.teacher_positions]
    loss = sdpo_loss(student, head, teacher, head, token_weights=places.weights)

Rows are padded on any side, ragged, or one row packs several sequences that ``sequence_ids`` tell
apart.  Values are read: call these where batches are made, on the CPU.

Dimension key:  B rows, L positions, N response tokens of all sequences, D hidden size
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.teaching.sequences import Side


@dataclass(frozen=True, eq=False)
class Alignment:
    """The response tokens in order of sequences, and the states that predict them.

    Attributes:
        student_positions: (N,) int64, into the student's ``hidden.flatten(0, 1)``.
        teacher_positions: (N,) int64, into the teacher's.
        token_ids: (N,) int64, the token that both predict.
        weights: (N,) float32, the response mask's values.
    """

    student_positions: Tensor
    teacher_positions: Tensor
    token_ids: Tensor
    weights: Tensor


def align_responses(
    student_ids: Tensor,  # (B, L)
    student_mask: Tensor,  # (B, L)
    teacher_ids: Tensor,  # (B, L')
    teacher_mask: Tensor,  # (B, L')
    *,
    student_response_mask: Tensor,  # (B, L)
    teacher_response_mask: Tensor | None = None,  # (B, L')
    student_sequence_ids: Tensor | None = None,  # (B, L)
    teacher_sequence_ids: Tensor | None = None,  # (B, L')
) -> Alignment:
    """Find the response tokens of both sides, and the states that predict them.

    Args:
        student_ids, teacher_ids: token ids.
        student_mask, teacher_mask: attention masks, 0 for padding.
        student_response_mask: not 0 where a token is the student's own; tool outputs between turns
            are 0.  Its values become the weights.
        teacher_response_mask: the same for the teacher; None: each teacher's sequence has to end as
            the student's does from the first response token on.
        student_sequence_ids, teacher_sequence_ids: for packed rows, the number of the sequence
            that a token belongs to, ascending; None: each row is one.  The numbers pair both sides.

    Raises:
        ValueError: shapes differ, or the responses do; the first bad token is named.
    """
    student = Side.of("student", student_ids, student_mask, student_sequence_ids)
    teacher = Side.of("teacher", teacher_ids, teacher_mask, teacher_sequence_ids)
    response = student.response(student_response_mask)
    if teacher_response_mask is None:
        found = _suffix(student, response, teacher)
    else:
        found = teacher.response(teacher_response_mask)
    _check_pairs(student, response, teacher, found)
    return Alignment(
        student.predecessors(response),
        teacher.predecessors(found),
        student.ids[response],
        student_response_mask.flatten()[student.places[response]].float(),
    )


def check_alignment(
    alignment: Alignment,
    student_ids: Tensor,  # (B, L)
    student_mask: Tensor,  # (B, L)
    teacher_ids: Tensor,  # (B, L')
    teacher_mask: Tensor,  # (B, L')
    *,
    student_sequence_ids: Tensor | None = None,  # (B, L)
    teacher_sequence_ids: Tensor | None = None,  # (B, L')
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> None:
    """Make sure that positions made elsewhere predict the same tokens on both sides.

    Args:
        temperature, teacher_temperature: what the two sides' logits are divided by; None: the same.

    Raises:
        ValueError: a position is padding or the token after it is not the alignment's, which is
            named with its sequence and position; or the temperatures differ.
    """
    if teacher_temperature is not None and teacher_temperature != temperature:
        fail(
            "teacher_temperature",
            f"be the student's {temperature}",
            teacher_temperature,
            "two temperatures differ where both sides agree: pass one",
        )
    counts = {tuple(value.shape) for value in vars(alignment).values()}
    if len(counts) != 1:
        fail("alignment", "hold N values in each field", counts, "select the same tokens on both")
    student = Side.of("student", student_ids, student_mask, student_sequence_ids)
    teacher = Side.of("teacher", teacher_ids, teacher_mask, teacher_sequence_ids)
    student.check_predictions(alignment.student_positions, alignment.token_ids)
    teacher.check_predictions(alignment.teacher_positions, alignment.token_ids)
    here = student.sequences[student.order(alignment.student_positions)]
    there = teacher.sequences[teacher.order(alignment.teacher_positions)]
    if (here != there).any():
        first = int((here != there).nonzero()[0])
        fail(
            f"alignment.teacher_positions[{first}]",
            f"lie in sequence {int(here[first])} as the student's",
            f"sequence {int(there[first])}",
            "pair the sequences by their order",
        )


def _suffix(student: Side, response: Tensor, teacher: Side) -> Tensor:
    """The teacher's tokens as far from the end of their sequence as the student's response."""
    every = torch.arange(student.ids.numel(), device=student.ids.device)
    from_end = torch.searchsorted(student.sequences, student.sequences, right=True) - every
    ends = torch.searchsorted(teacher.sequences, student.sequences, right=True)
    starts = torch.searchsorted(teacher.sequences, student.sequences)
    counterparts = ends - from_end
    # from the first response token of a sequence to its end, turns of others included
    marked = torch.zeros_like(every).index_fill_(0, response, 1).cumsum(0)
    first = torch.searchsorted(student.sequences, student.sequences)
    before = torch.where(first > 0, marked[(first - 1).clamp(min=0)], 0)
    tail = (marked > before).nonzero()[:, 0]
    short = counterparts[tail] < starts[tail]
    if short.any():
        token = int(tail[short][0])
        length = int((ends - starts)[token])
        got = f"{length} tokens in sequence {int(student.sequences[token])}"
        fail("teacher_ids", "end with the student's response", got, "do not cut the response")
    _check_ids(student, tail, teacher, counterparts[tail])
    return counterparts[response]


def _check_pairs(student: Side, response: Tensor, teacher: Side, found: Tensor) -> None:
    """As many response tokens in each sequence, and the same ones."""
    here, there = student.sequences[response], teacher.sequences[found]
    if not torch.equal(here, there):
        size = int(torch.cat([here, there]).max()) + 1
        counts = torch.stack([side.bincount(minlength=size) for side in (here, there)])
        sequence = int((counts[0] != counts[1]).nonzero()[0])
        fail(
            "teacher_response_mask",
            f"mark the student's {int(counts[0, sequence])} tokens in sequence {sequence}",
            int(counts[1, sequence]),
            "mark the same response on both sides, and cut neither",
        )
    _check_ids(student, response, teacher, found)


def _check_ids(student: Side, tokens: Tensor, teacher: Side, found: Tensor) -> None:
    wrong = student.ids[tokens] != teacher.ids[found]
    if wrong.any():
        first = int(wrong.nonzero()[0])
        here, there = int(tokens[first]), int(found[first])
        fail(
            "teacher_ids",
            f"hold token {int(student.ids[here])} as the student ({student.where(here)})",
            f"token {int(teacher.ids[there])} ({teacher.where(there)})",
            "give both sides the sampled ids, not a text tokenised again",
        )
