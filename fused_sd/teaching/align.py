"""Find a response in two sequences: behind the student's prompt and behind the teacher's.

    places = align_responses(student_ids, student_mask, teacher_ids, teacher_mask,
                             student_response_mask=response_mask)
    student = student_hidden.flatten(0, 1)[places.student_positions]  # (N, D)
    teacher = teacher_hidden.flatten(0, 1)[places.teacher_positions]
    loss = sdpo_loss(student, head, teacher, head, token_weights=places.weights)

Rows may be padded on either side, or hold several packed sequences that ``sequence_ids`` number.
These functions read values of tensors: call them where batches are made, on the CPU.

Dimension key:  B rows, L the student's positions (L' the teacher's), N response tokens of all
    sequences, D hidden size
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd.checks import check_instance, check_positive, fail
from fused_sd.checks.tensors import REAL, check_dtype, check_integers, check_tensor
from fused_sd.teaching.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Alignment:
    """List the N response tokens of a batch with the states of both sides that predict them.

    Attributes:
        student_positions: (N,) int64, rows of the student's ``hidden.flatten(0, 1)``.
        teacher_positions: (N,) int64, rows of the teacher's ``hidden.flatten(0, 1)``.
        token_ids: (N,) int64, the token that both states predict.
        weights: (N,) float32, the student's response mask at the token.

    Examples:
        >>> import torch, fused_sd
        >>> places = fused_sd.Alignment(  # of tokens 7 and 8, behind 2 and behind 4 others
        ...     student_positions=torch.tensor([1, 2]),
        ...     teacher_positions=torch.tensor([3, 4]),
        ...     token_ids=torch.tensor([7, 8]),
        ...     weights=torch.ones(2),
        ... )
        >>> teacher_hidden = torch.randn(1, 6, 16).flatten(0, 1)[places.teacher_positions]
        >>> teacher_hidden.shape
        torch.Size([2, 16])
    """

    student_positions: Tensor
    teacher_positions: Tensor
    token_ids: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_tensor(name, value)
            if value.dim() != 1 or value.shape != self.student_positions.shape:
                counts = {field: tuple(values.shape) for field, values in vars(self).items()}
                remedy = "select the same tokens on both"
                fail("alignment", "hold N values in each field", counts, remedy)
            if name == "weights":
                check_dtype(name, value, REAL, "pass floats")
            else:
                check_integers(name, value)


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
    """Find the response tokens in both sides' sequences, and the states that predict them.

    The state that predicts a token is the one before it, wherever the padding is.

    Args:
        student_ids, teacher_ids: token ids, integers.
        student_mask, teacher_mask: attention masks, 0 for padding.
        student_response_mask: 0 where a token is not the student's own, as in tool outputs between
            turns.  The other values become the weights.
        teacher_response_mask: marks the same tokens in the teacher's sequences.  None: the
            teacher's sequence must end with everything from the student's first response token on.
        student_sequence_ids, teacher_sequence_ids: for packed rows, the number of each token's
            sequence, ascending.  Sequences of one number belong together.  None: one sequence a
            row, numbered by row.

    Returns:
        The response tokens in order of their sequences, on the device of the ids.

    Raises:
        ValueError: shapes differ, a response has no token before it, or the responses differ; the
            message names the first such token.

    Examples:
        >>> import torch, fused_sd
        >>> student, teacher = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 9, 9, 5, 6, 7, 8]])
        >>> places = fused_sd.align_responses(
        ...     student, torch.ones_like(student), teacher, (teacher != 0).long(),  # 0 is padding
        ...     student_response_mask=torch.tensor([[0, 0, 1, 1]]),
        ... )
        >>> places.token_ids, places.student_positions, places.teacher_positions
        (tensor([7, 8]), tensor([1, 2]), tensor([4, 5]))
    """
    student = Sequences.of("student", student_ids, student_mask, student_sequence_ids)
    teacher = Sequences.of("teacher", teacher_ids, teacher_mask, teacher_sequence_ids)
    response = student.response(student_response_mask)
    if teacher_response_mask is None:
        found = _find_suffix(student, response, teacher)
    else:
        found = teacher.response(teacher_response_mask)
    _check_same_response(student, response, teacher, found)
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
    """Check that positions computed elsewhere predict the same tokens on both sides.

    Args:
        alignment: the positions and token ids to check.
        student_ids, teacher_ids, student_mask, teacher_mask: as in ``align_responses``.
        student_sequence_ids, teacher_sequence_ids: as in ``align_responses``.
        temperature, teacher_temperature: the divisors of the two sides' logits.  None: the
            teacher's is the student's.

    Raises:
        ValueError: a position is padding, is followed by another token than the alignment's, or
            lies in another sequence than the student's; the message names it.  Or the
            temperatures differ.

    Examples:
        >>> import torch, fused_sd
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> at, late = torch.tensor([1, 2]), torch.tensor([2, 3])  # late: of the tokens, not before
        >>> places = fused_sd.Alignment(at, late, torch.tensor([7, 8]), torch.ones(2))
        >>> fused_sd.check_alignment(places, ids, torch.ones_like(ids), ids, torch.ones_like(ids))
        Traceback (most recent call last):
        ValueError: ...
    """
    check_positive("temperature", temperature)
    if teacher_temperature is not None:
        check_positive("teacher_temperature", teacher_temperature)
    check_instance("alignment", alignment, Alignment)
    if teacher_temperature is not None and teacher_temperature != temperature:
        fail(
            "teacher_temperature",
            f"be the student's {temperature}",
            teacher_temperature,
            "two temperatures differ where both sides agree: pass one",
        )
    student = Sequences.of("student", student_ids, student_mask, student_sequence_ids)
    teacher = Sequences.of("teacher", teacher_ids, teacher_mask, teacher_sequence_ids)
    student.check_predictions(alignment.student_positions, alignment.token_ids)
    teacher.check_predictions(alignment.teacher_positions, alignment.token_ids)
    here = student.numbers[student.tokens_at(alignment.student_positions)]
    there = teacher.numbers[teacher.tokens_at(alignment.teacher_positions)]
    if (here != there).any():
        first = int((here != there).nonzero()[0])
        fail(
            f"alignment.teacher_positions[{first}]",
            f"lie in sequence {int(here[first])} as the student's",
            f"sequence {int(there[first])}",
            "pair the sequences by their order",
        )


def _find_suffix(student: Sequences, response: Tensor, teacher: Sequences) -> Tensor:
    """Find the teacher's tokens that are as far from their sequence's end as the response's."""
    tokens = torch.arange(student.ids.numel(), device=student.ids.device)
    from_end = torch.searchsorted(student.numbers, student.numbers, right=True) - tokens
    ends = torch.searchsorted(teacher.numbers, student.numbers, right=True)
    starts = torch.searchsorted(teacher.numbers, student.numbers)
    counterparts = ends - from_end
    # compare all tokens behind a sequence's first response token, tool outputs included
    marked = torch.zeros_like(tokens).index_fill_(0, response, 1).cumsum(0)
    first = torch.searchsorted(student.numbers, student.numbers)
    before = torch.where(first > 0, marked[(first - 1).clamp(min=0)], 0)
    tail = (marked > before).nonzero()[:, 0]
    short = counterparts[tail] < starts[tail]
    if short.any():
        token = int(tail[short][0])
        length = int((ends - starts)[token])
        got = f"{length} tokens in sequence {int(student.numbers[token])}"
        fail("teacher_ids", "end with the student's response", got, "do not cut the response")
    _check_same_ids(student, tail, teacher, counterparts[tail])
    return counterparts[response]


def _check_same_response(
    student: Sequences, response: Tensor, teacher: Sequences, found: Tensor
) -> None:
    """Check that each sequence has the same response tokens on both sides."""
    here, there = student.numbers[response], teacher.numbers[found]
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
    _check_same_ids(student, response, teacher, found)


def _check_same_ids(student: Sequences, tokens: Tensor, teacher: Sequences, found: Tensor) -> None:
    """Check that paired tokens have the same id."""
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
