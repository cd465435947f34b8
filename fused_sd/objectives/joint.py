"""Runs two objectives on the same logits and adds their gradients.

Dimension key:  C rows in a chunk, W columns of a chunk's logits
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.settings import setting


@setting
class JointObjective(NamedTuple):
    """The values, extras and inputs of the first objective, then those of the second.

    Both write their gradient over the logits that they read, so the first works on a copy of the
    student's logits.  Both gradients are in the dtype of the logits, and their sum is rounded once.
    """

    first: Any  # an Objective whose replay is itself
    second: Any  # an Objective whose replay is itself
    num_inputs: int  # of the first

    @property
    def num_values(self) -> int:
        return int(self.first.num_values + self.second.num_values)

    @property
    def num_sparse_values(self) -> int:
        return 0

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        sides = zip(self.first.whole_sides, self.second.whole_sides, strict=True)
        student, teacher = (first or second for first, second in sides)
        return student, teacher

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        return [*self.first.extras(), *self.second.extras()]

    def replay(self, extras: list[Tensor]) -> tuple[Objective, list[Tensor]]:
        return self, []

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        logits, row_weights, num = chunk.student, chunk.row_weights, self.first.num_values
        copy = chunk._replace(
            student_side=chunk.student_side._replace(whole=logits.clone()),
            inputs=chunk.inputs[: self.num_inputs],
            row_weights=None if row_weights is None else row_weights[:, :num],
        )
        values, extras = self.first(copy._replace(dlogits=copy.student))
        rest = chunk._replace(
            inputs=chunk.inputs[self.num_inputs :],
            row_weights=None if row_weights is None else row_weights[:, num:],
            dlogits=logits,
        )
        more_values, more_extras = self.second(rest)
        if row_weights is not None:
            assert chunk.dlogits is not None
            torch.add(copy.student, logits, out=chunk.dlogits)
            logits[:, chunk.student_side.vocab :] = -torch.inf
        return torch.cat([values, more_values], 1), [*extras, *more_extras]
