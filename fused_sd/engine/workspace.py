"""The memory of the chunk loop, and the GEMMs that fill it and empty it.

Logits are held for one chunk at a time, dlogits (their gradients) for a group of chunks.  fp32 and
fp64 dlogits overwrite the student's logits; 16-bit dlogits have memory of their own.

Dimension key:  C tokens in a chunk, G tokens in a group, D hidden size, V vocabulary, W columns
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Side
from fused_sd.engine.layout import Layout, Room, RunSize, choose_layout
from fused_sd.engine.out_of_memory import explained
from fused_sd.head.projection import (
    DotProducts,
    Projection,
    accumulation_dtype,
    matmul,
    matmul_add_,
)
from fused_sd.head.vocab_shard import VocabShard


class Needs(NamedTuple):
    """What a run needs of its workspace."""

    whole_sides: tuple[bool, bool]  # whether the whole logits of student and teacher are made
    has_dlogits: bool  # whether gradients of whole rows are held
    dweight_bytes: int  # of the gradient that every group adds to; 0: there is none
    room: Room  # what the workspace may take
    chunk_size: int | None  # as the caller chose it


class Workspace:
    """Logits of a chunk and dlogits of a group, for one run."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection | None,
        needs: Needs,
        dot_products: DotProducts,  # for a side whose whole logits are not made
        shard: VocabShard,
    ) -> None:
        hidden = student.hidden
        wide = accumulation_dtype(hidden.dtype)
        self.student, self.teacher = student, teacher
        self.whole_student = needs.whole_sides[0]
        self.whole_teacher = teacher is not None and needs.whole_sides[1]
        self.dot_products = dot_products
        self.shard = shard
        self.vocab = max(student.vocab, teacher.vocab if teacher is not None else 0)
        self.size = size = RunSize(
            max(shard.sizes),  # of all ranks, whose chunks must be equally long
            self.whole_student + self.whole_teacher,
            wide.itemsize,
            student.dtype.itemsize,
            needs.has_dlogits,
            needs.dweight_bytes,
        )
        self.width, num_tokens = size.width, hidden.shape[0]
        self.layout: Layout = choose_layout(size, num_tokens, needs.room, needs.chunk_size)
        chunk, group = min(self.layout.chunk, num_tokens), min(self.layout.group, num_tokens)
        self.in_place = size.in_place
        self.dlogits = None  # (G, W)
        with explained(size, self.layout):
            if needs.has_dlogits:
                self.dlogits = hidden.new_empty((group, size.width), dtype=student.dtype)
            sides = size.sides - size.in_place
            self.logits = hidden.new_empty((sides, chunk, size.width), dtype=wide)
        made = [student] * (self.whole_student and not size.in_place)
        if self.whole_teacher and teacher is not None:
            made.append(teacher)
        for whole, projection in zip(self.logits, made, strict=True):
            whole[:, projection.vocab :] = -torch.inf  # no GEMM writes there

    def fill(self, at: slice, row: int) -> tuple[Side, Side | None, Tensor | None]:
        """Make the logits of a chunk on both sides.

        Args:
            at: the chunk's tokens.
            row: first row of the group's dlogits that belongs to the chunk.

        Returns:
            The student's logits, the teacher's, and the memory (C, W) for dlogits.
        """
        count = at.stop - at.start
        dlogits = None if self.dlogits is None else self.dlogits[row : row + count]
        student, teacher = self.student, self.teacher
        logits = teacher_logits = None
        places = list(self.logits[:, :count])
        if self.in_place:
            assert dlogits is not None
            dlogits[:, student.vocab :] = -torch.inf  # where the last gradient wrote
            places.insert(0, dlogits)
        elif len(places) == 2 and teacher is not None and self._is_joint(student, teacher):
            both = self.logits.flatten(0, 1)[: 2 * count]
            student.project(torch.cat([student.chunk(at), teacher.chunk(at)]), both)
            logits, teacher_logits = both[:count], both[count:]
        if self.whole_student and logits is None:
            logits = student.project(student.chunk(at), places.pop(0))
        if teacher is None:
            return self._side(student, at, logits), None, dlogits
        if self.whole_teacher and teacher_logits is None:
            teacher_logits = teacher.project(teacher.chunk(at), places.pop(0))
        return self._side(student, at, logits), self._side(teacher, at, teacher_logits), dlogits

    def _is_joint(self, student: Projection, teacher: Projection) -> bool:
        """Whether one GEMM makes both sides' logits, so that a shared head is read once.

        A CPU's BLAS sums a row in an order that depends on how many rows there are and which it is:
        only two GEMMs of one shape and one stride give equal sides equal logits, and a loss the
        same bits whether or not its gradient takes the place of the logits.
        """
        return student.dtype != self.logits.dtype and teacher.equals(student)

    def _side(self, projection: Projection, at: slice, whole: Tensor | None) -> Side:
        return Side(
            whole,
            projection.vocab,
            lambda columns: projection.entry_logits(at, columns, self.dot_products),
        )

    def accumulate(
        self,
        tokens: slice | Tensor,  # whose dlogits lie in the first rows
        dhidden: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        *,
        is_first: bool,  # then dweight is written, else added to
    ) -> None:
        """Turn a group's dlogits into dhidden, dweight and dbias.

        An empty output is not wanted and is left alone.
        """
        if self.dlogits is None:
            return
        hidden = self.student.chunk(tokens)
        dlogits = self.dlogits[: hidden.shape[0], : self.student.vocab]
        if dhidden.numel():
            matmul(dlogits, self.student.weight, dhidden)
        if dweight.numel():
            write = matmul if is_first else matmul_add_
            write(dlogits.t(), hidden, dweight)
        if dbias.numel():
            dbias += dlogits.sum(0, dtype=dbias.dtype)
