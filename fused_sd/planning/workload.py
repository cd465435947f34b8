"""What is planned, as numbers, and how a peak is made of moments.

A provider's memory is described by the few *moments* at which it may be largest, each a dict of
named parts in bytes, all beyond the inputs; the peak is the largest moment.  Parts of a size that
does not grow with tokens x vocabulary or with a weight are left out where they vanish beside one
that does.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fused_sd.planning.objectives import PlannedObjective

Parts = dict[str, int]  # bytes of each part


class Workload(NamedTuple):
    """One loss, forward and backward, on one device."""

    tokens: int  # N
    active: int  # A
    hidden_size: int  # D
    vocab: int  # V, of the largest shard where ranks share the head
    teacher_hidden_size: int
    teacher_vocab: int  # likewise
    element: int  # bytes of an element of hidden states and head: 2 or 4
    objective: PlannedObjective
    trained: bool  # whether the head is
    reduced: bool  # one loss, or one of each token
    kind: str  # "cuda" or "cpu"
    shared_head: bool  # both sides have one head
    free_bytes: int  # on the device, before the hidden states are there
    chunk_size: int | None = None  # what this library is told to take
    kept: int | None = None  # entries of a sparse gradient a token; None: it is dense
    dense_share: float = 0.0  # of the tokens, whose gradient is dense nevertheless
    tensor_parallel: int = 1  # ranks that share the head

    @property
    def weight_bytes(self) -> int:
        """Of the head, and of its gradient in its own dtype."""
        return self.element * self.vocab * self.hidden_size

    @property
    def hidden_bytes(self) -> int:
        """Of the student's hidden states, and of their gradient in its own dtype."""
        return self.element * self.tokens * self.hidden_size

    @property
    def logits(self) -> int:
        """Entries of the logits of the tokens that count."""
        return self.active * self.vocab

    @property
    def teacher_logits(self) -> int:
        return self.active * self.teacher_vocab if self.objective.has_teacher else 0

    @property
    def inputs_bytes(self) -> int:
        """Of the hidden states of both sides and the ids: the inputs that grow with the tokens."""
        teacher = self.teacher_hidden_size if self.objective.has_teacher else 0
        return self.tokens * (self.element * (self.hidden_size + teacher) + 8)

    @property
    def selected(self) -> Parts:
        """Copies of the rows that count, as code without a mask of its own selects them."""
        teacher = self.teacher_hidden_size if self.objective.has_teacher else 0
        return {"selected rows": self.element * self.active * (self.hidden_size + teacher)}

    @property
    def gradients(self) -> Parts:
        """What autograd is handed."""
        weight = self.weight_bytes if self.trained else 0
        return {"dH": self.hidden_bytes, "dW": weight}

    @property
    def gemm(self) -> Parts:
        """On the CPU a 16-bit GEMM sums the head's gradient in fp32 first."""
        widens = self.kind == "cpu" and self.element == 2 and self.trained
        return {"dW in the GEMM": 4 * self.vocab * self.hidden_size if widens else 0}


Moments = Callable[[Workload], Sequence[Parts]]


class Peer(NamedTuple):
    """One implementation, as a plan sees it; named as the benchmark names it."""

    name: str
    moments: Moments  # none: it does not have the objective
    gemms: Callable[[Workload], float]  # FLOPs of its projections and their gradients
    source: str  # where its moments are from
    shards: bool = False  # whether its ranks can share a head


def total(parts: Parts) -> int:
    """Bytes of all parts."""
    return sum(parts.values())


def peak(moments: Sequence[Parts]) -> Parts:
    """The largest moment, without its empty parts."""
    largest = max(moments, key=total)
    return {name: size for name, size in largest.items() if size}


def gemm_flops(work: Workload, student: float, teacher: float, rows: int | None = None) -> float:
    """FLOPs of so many GEMMs of tokens x hidden size x vocabulary on each side."""
    tokens = work.active if rows is None else rows
    own = student * work.hidden_size * work.vocab
    other = teacher * work.teacher_hidden_size * work.teacher_vocab
    return 2.0 * tokens * (own + (other if work.objective.has_teacher else 0))


def exact_gemms(work: Workload) -> float:
    """The floor of a dense loss: logits of both sides, dH, and dW where the head is trained."""
    return gemm_flops(work, 2 + work.trained, 1)
