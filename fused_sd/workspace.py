"""The memory of the chunk loop, and the GEMMs that fill and empty it.

Logits are held for a chunk at a time, their gradients for a group of chunks.  A gradient as wide as
its logit takes the logit's place; a 16-bit one has its own memory.

Dimension key:  N tokens, C tokens in a chunk, G tokens in a group, D hidden size, V vocabulary,
                W columns
"""

import torch
from torch import Tensor

from fused_sd.chunking import Layout, WalkSize, budget_on, choose_layout
from fused_sd.heads import Projection, accumulation_dtype, matmul, matmul_add_


class Workspace:
    """Logits of a chunk and gradients of a group, for one walk."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection | None,
        forming: bool,
        chunk_size: int | None,
    ) -> None:
        hidden = student.hidden
        wide = accumulation_dtype(hidden.dtype)
        self.student, self.teacher = student, teacher
        self.vocab = max(student.vocab, teacher.vocab if teacher is not None else 0)
        size = WalkSize(
            self.vocab,
            1 if teacher is None else 2,
            wide.itemsize,
            student.dtype.itemsize,
            forming,
        )
        self.width, num_tokens = size.width, hidden.shape[0]
        budget = budget_on(hidden.device) if chunk_size is None else 0
        self.layout: Layout = choose_layout(size, num_tokens, budget, chunk_size)
        chunk, group = min(self.layout.chunk, num_tokens), min(self.layout.group, num_tokens)
        self.gradients = None  # (G, W)
        if forming:
            self.gradients = hidden.new_empty((group, size.width), dtype=student.dtype)
        self.in_place = size.in_place
        sides = size.sides - size.in_place
        self.logits = hidden.new_empty((sides, chunk, size.width), dtype=wide)

    def fill(self, at: slice, start: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of a chunk on both sides, and where their gradient goes; ``start`` is the group's.

        Returns:
            (C, W) each: the student's logits, the teacher's, the gradient's memory.
        """
        count = at.stop - at.start
        dlogits = None
        if self.gradients is not None:
            dlogits = self.gradients[at.start - start : at.stop - start]
        teacher = self.teacher
        if self.in_place:
            assert dlogits is not None
            logits = self.student.logits(at, dlogits)
            theirs = None if teacher is None else teacher.logits(at, self.logits[0, :count])
        elif teacher is not None and teacher.weight is self.student.weight:
            # one GEMM over both sides' states reads the head once
            both = self.logits.flatten(0, 1)[: 2 * count]
            states = torch.cat([self.student.chunk(at), teacher.chunk(at)])
            matmul(states, teacher.weight.t(), both[:, : teacher.vocab])
            logits = self.student.finish_(both[:count])
            theirs = teacher.finish_(both[count:])
        else:
            logits = self.student.logits(at, self.logits[0, :count])
            theirs = None if teacher is None else teacher.logits(at, self.logits[1, :count])
        return logits, theirs, dlogits

    def carry(self, group: slice, dhidden: Tensor, dweight: Tensor, dbias: Tensor) -> None:
        """Carry the gradients of a group on to its hidden states, the head and its bias.

        Empty gradients are not formed.
        """
        if self.gradients is None:
            return
        dlogits = self.gradients[: group.stop - group.start, : self.student.vocab]
        if dhidden.numel():
            matmul(dlogits, self.student.weight, dhidden[group])
        if dweight.numel():
            write = matmul if group.start == 0 else matmul_add_
            write(dlogits.t(), self.student.chunk(group), dweight)
        if dbias.numel():
            dbias += dlogits.sum(0, dtype=dbias.dtype)
