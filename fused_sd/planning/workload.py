"""One loss on one device as numbers, and how its peak memory is found.

An implementation describes its memory by a few *moments*: points in time at which it may hold the
most.  A moment is a dict of named parts in bytes, all of them beyond the inputs.  The peak is the
largest moment.  A part is left out if its size grows neither with tokens x vocabulary nor with a
weight, and vanishes beside a part whose size does.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fused_sd.planning.objectives import PlannedObjective

Parts = dict[str, int]  # bytes by the name of the part
Moments = Callable[["Workload"], Sequence[Parts]]


class Workload(NamedTuple):
    """One loss, forward and backward, on one device."""

    tokens: int  # N
    active: int  # A
    hidden_size: int  # D
    vocab: int  # V; of the largest shard if ranks share the head
    teacher_hidden_size: int
    teacher_vocab: int  # of the largest shard if ranks share the head
    element: int  # bytes of an element of hidden states and head: 2 or 4
    objective: PlannedObjective
    trained: bool  # whether the head has a gradient
    reduced: bool  # whether the loss is one number; False: one number a token
    kind: str  # "cuda" or "cpu"
    shared_head: bool  # whether student and teacher have one head tensor
    free_bytes: int  # on the device, before the hidden states are allocated
    chunk_size: int | None = None  # the loss's argument of that name
    kept: int | None = None  # entries that a token's sparse gradient keeps; None: it is dense
    dense_share: float = 0.0  # share of the tokens whose gradient is dense with "sparse" or "auto"
    tensor_parallel: int = 1  # ranks that share the head

    @property
    def weight_bytes(self) -> int:
        """Bytes of the student's head, and of its gradient in its own dtype."""
        return self.element * self.vocab * self.hidden_size

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the student's hidden states, and of their gradient in their own dtype."""
        return self.element * self.tokens * self.hidden_size

    @property
    def logits(self) -> int:
        """Number of the student's logits of tokens with a weight."""
        return self.active * self.vocab

    @property
    def teacher_logits(self) -> int:
        """Number of the teacher's logits of tokens with a weight; 0 without a teacher's states."""
        return self.active * self.teacher_vocab if self.objective.has_teacher else 0

    @property
    def inputs_bytes(self) -> int:
        """Bytes of the inputs that grow with the tokens: both sides' hidden states, and ids."""
        teacher = self.teacher_hidden_size if self.objective.has_teacher else 0
        return self.tokens * (self.element * (self.hidden_size + teacher) + 8)

    @property
    def selected(self) -> Parts:
        """Copies of the hidden states of tokens with a weight."""
        teacher = self.teacher_hidden_size if self.objective.has_teacher else 0
        return {"selected rows": self.element * self.active * (self.hidden_size + teacher)}

    @property
    def gradients(self) -> Parts:
        """Gradients that backward returns to autograd."""
        weight = self.weight_bytes if self.trained else 0
        return {"dH": self.hidden_bytes, "dW": weight}

    @property
    def gemm(self) -> Parts:
        """The fp32 sum of dweight inside a 16-bit GEMM, which a CPU rounds afterwards."""
        widens = self.kind == "cpu" and self.element == 2 and self.trained
        return {"dW in the GEMM": 4 * self.vocab * self.hidden_size if widens else 0}


class Implementation(NamedTuple):
    """One implementation of the losses, named as ``fused_sd bench`` names it."""

    name: str
    moments: Moments  # returns an empty list for an objective that is not implemented or known
    gemms: Callable[[Workload], float]  # FLOPs of logits and gradients
    source: str  # how its moments were found


def total(parts: Parts) -> int:
    """Add up the bytes of all parts."""
    return sum(parts.values())


def peak(moments: Sequence[Parts]) -> Parts:
    """Return the largest moment, without its empty parts."""
    largest = max(moments, key=total)
    return {name: size for name, size in largest.items() if size}


def gemm_flops(work: Workload, student: float, teacher: float) -> float:
    """FLOPs of GEMMs of A x D x V: ``student`` of them on one side, ``teacher`` on the other."""
    own = student * work.hidden_size * work.vocab
    other = teacher * work.teacher_hidden_size * work.teacher_vocab
    return 2.0 * work.active * (own + (other if work.objective.has_teacher else 0))
