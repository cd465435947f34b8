"""The memory of the chunk loop, and the GEMMs that fill and empty it.

Logits are held for a chunk at a time, their gradients for a group of chunks.  A gradient as wide as
its logit takes the logit's place; a 16-bit one has its own memory.

Dimension key:  C tokens in a chunk, G tokens in a group, D hidden size, V vocabulary, W columns
"""

import torch
from torch import Tensor

from fused_sd.engine.chunk import Side
from fused_sd.engine.layout import Layout, RunSize, budget_on, choose_layout
from fused_sd.head.projection import (
    DotProducts,
    Projection,
    accumulation_dtype,
    matmul,
    matmul_add_,
)
from fused_sd.head.vocab_shard import VocabShard


class Workspace:
    """Logits of a chunk and gradients of a group, for one walk."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection | None,
        whole: tuple[bool, bool],  # sides whose whole logits are made
        dot_products: DotProducts,  # for the other sides
        has_gradient: bool,  # whether gradients by whole rows are
        reserved: int,  # bytes that finished gradients will take
        chunk_size: int | None,
        shard: VocabShard,
    ) -> None:
        hidden = student.hidden
        wide = accumulation_dtype(hidden.dtype)
        self.student, self.teacher = student, teacher
        self.whole_student, self.whole_teacher = whole[0], teacher is not None and whole[1]
        self.dot_products = dot_products
        self.shard = shard
        self.vocab = max(student.vocab, teacher.vocab if teacher is not None else 0)
        size = RunSize(
            max(shard.sizes),  # of all ranks, whose chunks must be the same
            self.whole_student + self.whole_teacher,
            wide.itemsize,
            student.dtype.itemsize,
            has_gradient,
        )
        self.width, num_tokens = size.width, hidden.shape[0]
        budget = budget_on(hidden.device, reserved, shard.alone) if chunk_size is None else 0
        self.layout: Layout = choose_layout(size, num_tokens, budget, chunk_size)
        chunk, group = min(self.layout.chunk, num_tokens), min(self.layout.group, num_tokens)
        self.gradients = None  # (G, W)
        if has_gradient:
            self.gradients = hidden.new_empty((group, size.width), dtype=student.dtype)
        self.in_place = size.in_place
        sides = size.sides - size.in_place
        self.logits = hidden.new_empty((sides, chunk, size.width), dtype=wide)

    def fill(self, at: slice, row: int) -> tuple[Side, Side | None, Tensor | None]:
        """Logits of a chunk on both sides, and where their gradient goes.

        Args:
            row: of the group's gradients, where those of the chunk begin.

        Returns:
            The student's logits, the teacher's, and the gradient's memory (C, W).
        """
        count = at.stop - at.start
        dlogits = None if self.gradients is None else self.gradients[row : row + count]
        student, teacher = self.student, self.teacher
        logits = theirs = None
        places = list(self.logits[:, :count])
        if self.in_place:
            assert dlogits is not None
            places.insert(0, dlogits)
        elif len(places) == 2 and teacher is not None and teacher.weight is student.weight:
            # one GEMM over both sides' states reads the head once
            both = self.logits.flatten(0, 1)[: 2 * count]
            states = torch.cat([student.chunk(at), teacher.chunk(at)])
            matmul(states, teacher.weight.t(), both[:, : teacher.vocab])
            logits, theirs = student.finish_(both[:count]), teacher.finish_(both[count:])
        if self.whole_student and logits is None:
            logits = student.logits(at, places.pop(0))
        if teacher is None:
            return self._side(student, at, logits), None, dlogits
        if self.whole_teacher and theirs is None:
            theirs = teacher.logits(at, places.pop(0))
        return self._side(student, at, logits), self._side(teacher, at, theirs), dlogits

    def _side(self, projection: Projection, at: slice, whole: Tensor | None) -> Side:
        return Side(whole, lambda columns: projection.entry_logits(at, columns, self.dot_products))

    def accumulate(
        self,
        tokens: slice | Tensor,  # whose gradients lie in the first rows
        dhidden: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        *,
        is_first: bool,  # then the head's gradient is written, else it is added to
    ) -> None:
        """Carry the gradients of a group on to its hidden states, the head and its bias.

        Empty gradients are not formed.
        """
        if self.gradients is None:
            return
        hidden = self.student.chunk(tokens)
        dlogits = self.gradients[: hidden.shape[0], : self.student.vocab]
        if dhidden.numel():
            matmul(dlogits, self.student.weight, dhidden)
        if dweight.numel():
            write = matmul if is_first else matmul_add_
            write(dlogits.t(), hidden, dweight)
        if dbias.numel():
            dbias += dlogits.sum(0, dtype=dbias.dtype)
