"""The supports: which vocabulary entries of a token are compared.

A support is a class that knows itself: its name, how many entries it has, whose whole logits it
must see, and how it chooses.  To add one: write its class here, list it in ``NAMED_SUPPORTS``,
define it in ``reference.py``, and export it.  What becomes of the entries outside is the
comparison's ``remainder``; the arithmetic of a truncated row is in ``objectives/truncated.py``.

Dimension key:  C rows in a chunk, K entries of the support
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.settings import setting
from fused_sd.terms.ids import first_occurrence

Remainder = Literal["tail", "renormalize", "drop", "teacher_renormalize"]
SideName = Literal["student", "teacher"]
SIDES: tuple[SideName, SideName] = ("student", "teacher")


class Rows(Protocol):
    """What a support may ask of a chunk of logits."""

    def top_k(self, side: SideName, k: int) -> Tensor:
        """Ids (C, k) of a side's largest logits, largest first, equal logits by lowest id."""

    def log_probs(self, side: SideName, ids: Tensor) -> Tensor:
        """A side's log-probabilities (C, K) of ids, over the whole vocabulary."""


class Support:
    """The entries of each token that are compared.

    Attributes:
        name: what configurations and the command line call it.
        is_truncated: whether entries are left out.
        num_entries: K, the most entries that a token may have; 0 where all are compared.
        top_k: how many largest entries of a side it looks for; 0: it looks for none.
        num_normalizers: how many sides' normalisers the choice needs.
    """

    name: ClassVar[str]
    is_truncated: ClassVar[bool] = True
    num_normalizers: ClassVar[int] = 0
    top_k: int = 0

    @property
    def num_entries(self) -> int:
        raise NotImplementedError

    def reads_whole(self, side: SideName) -> bool:
        """Whether the choice needs a side's logits of the whole vocabulary."""
        return False

    def chooses(self, side: SideName) -> bool:
        """Whether the choice looks for a side's largest entries."""
        return self.top_k > 0 and self.reads_whole(side)

    def choose(self, rows: Rows, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Choose the entries of each row.

        Args:
            rows: the logits, of both sides.
            inputs: per-token tensors of the loss; ``entry_ids`` (C, K) are given entries.

        Returns:
            ids: (C, K) int64, at least 0.
            counted: (C, K) bool, which of them are compared; None: all.
        """
        raise NotImplementedError

    def without_tensors(self) -> "Support":
        """The same support for an operator, which takes tensors as inputs of their own."""
        return self

    def check_size(self, vocab: int) -> None:
        """Refuse to look for more entries than both vocabularies have."""
        if self.top_k > vocab:
            remedy = "compare every entry with FULL_VOCABULARY, or top_k=None"
            checks.fail(
                f"top_k, the k of {type(self).__name__},",
                f"be at most the vocabulary's {vocab}",
                self.top_k,
                remedy,
            )


@setting
@dataclass(frozen=True)
class FullVocabulary(Support):
    """Every entry is compared; there is no remainder.

    Examples:
        >>> import fused_sd
        >>> fused_sd.FULL_VOCABULARY.is_truncated
        False
        >>> fused_sd.Comparison().support == fused_sd.FULL_VOCABULARY  # the default
        True
    """

    name: ClassVar[str] = "full"
    is_truncated: ClassVar[bool] = False

    @property
    def num_entries(self) -> int:
        return 0

    def reads_whole(self, side: SideName) -> bool:
        return True


@dataclass(frozen=True)
class _TopK(Support):
    k: int

    def __post_init__(self) -> None:
        checks.check_positive_int(f"top_k, the k of {type(self).__name__},", self.k)

    @property
    def top_k(self) -> int:  # type: ignore[override]
        return self.k

    @property
    def num_entries(self) -> int:
        return self.k


@setting
@dataclass(frozen=True)
class StudentTopK(_TopK):
    """The student's k most likely entries (SDPO).  The choice is not differentiated.

    Args:
        k: number of entries, at least 1.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> output = fused_sd.divergence_loss(
        ...     student, head, teacher, head, support=fused_sd.StudentTopK(10), reduction="mean",
        ...     metrics=("student_mass", "teacher_mass"),
        ... )
        >>> mass = output.metrics
        >>> bool((mass["student_mass"] > mass["teacher_mass"]).all())  # on its entries
        True
    """

    name: ClassVar[str] = "student"

    def reads_whole(self, side: SideName) -> bool:
        return side == "student"

    def choose(self, rows: Rows, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return rows.top_k("student", self.k), None


@setting
@dataclass(frozen=True)
class TeacherTopK(_TopK):
    """The teacher's k most likely entries (SD-Zero's and OPSD's code).

    Args:
        k: number of entries, at least 1.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> sides = student, head, teacher, head
        >>> supports = [fused_sd.TeacherTopK(k) for k in (4, 40, 100)]
        >>> few, more, whole = (
        ...     fused_sd.divergence_loss(*sides, support=support, reduction="mean").loss
        ...     for support in supports
        ... )
        >>> bool(few < more < whole)  # with a tail, a truncated KL is a lower bound
        True
    """

    name: ClassVar[str] = "teacher"

    def reads_whole(self, side: SideName) -> bool:
        return side == "teacher"

    def choose(self, rows: Rows, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return rows.top_k("teacher", self.k), None


@setting
@dataclass(frozen=True)
class UnionTopK(_TopK):
    """The k most likely entries of either side, each counted once: between k and 2k entries.

    Args:
        k: number of entries of each side, at least 1.

    Examples:
        >>> import torch, fused_sd
        >>> fused_sd.UnionTopK(8).num_entries  # at most
        16
        >>> hidden, head = torch.randn(4, 16), torch.randn(100, 16)
        >>> output = fused_sd.divergence_loss(
        ...     hidden, head, hidden, head, support=fused_sd.UnionTopK(8), reduction="mean",
        ...     metrics=("topk_overlap",),
        ... )
        >>> output.metrics["topk_overlap"]  # both sides name the same 8
        tensor([1., 1., 1., 1.])
    """

    name: ClassVar[str] = "union"

    @property
    def num_entries(self) -> int:
        return 2 * self.k

    def reads_whole(self, side: SideName) -> bool:
        return True

    def choose(self, rows: Rows, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        ids = torch.cat([rows.top_k("student", self.k), rows.top_k("teacher", self.k)], -1)
        return ids, first_occurrence(ids)


@setting
@dataclass(frozen=True)
class TeacherNucleus(_TopK):
    """The smallest set of the teacher's entries whose probability is at least ``mass``.

    A token has as many entries as the teacher's distribution needs, at most k: a sure teacher is
    compared on one or two, an open one on k.  Places that a token does not need hold nothing.

    Args:
        mass: probability that the entries must reach together, in the open interval (0, 1).
        k: most entries of a token, at least 1; memory and time are those of ``TeacherTopK(k)``.

    Reference:
        Holtzman et al., *The Curious Case of Neural Text Degeneration*, arXiv 1904.09751, eq. 2.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> output = fused_sd.divergence_loss(
        ...     student, head, teacher, head, support=fused_sd.TeacherNucleus(50, mass=0.8),
        ...     reduction="mean", metrics=("teacher_mass",),
        ... )
        >>> bool((output.metrics["teacher_mass"] >= 0.8).all())
        True
    """

    mass: float = 0.95

    name: ClassVar[str] = "teacher_nucleus"
    num_normalizers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_open_interval("mass", self.mass, "use FULL_VOCABULARY for a mass of 1")

    def reads_whole(self, side: SideName) -> bool:
        return side == "teacher"

    def choose(self, rows: Rows, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        ids = rows.top_k("teacher", self.k)
        mass = rows.log_probs("teacher", ids).exp()
        before = mass.cumsum(-1) - mass  # of the entries that are more likely
        return ids, before < self.mass


@dataclass(frozen=True, eq=False)
class TokenIds(Support):
    """Entries that the caller names.

    Args:
        ids: (..., K) int64, one set for each token.  A repeated id counts once; a negative id is
            padding and does not count.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> yes_or_no = torch.tensor([3, 5]).expand(4, 2)  # the two tokens that a judge may answer
        >>> output = fused_sd.divergence_loss(
        ...     student, head, teacher, head, support=fused_sd.TokenIds(yes_or_no),
        ...     remainder="renormalize", reduction="mean",
        ... )
        >>> output.token_loss.shape
        torch.Size([4])
    """

    ids: Tensor

    name: ClassVar[str] = "ids"

    def __post_init__(self) -> None:
        tensor_checks.check_tensor("ids", self.ids)
        tensor_checks.check_integers("ids", self.ids)

    @property
    def num_entries(self) -> int:
        return int(self.ids.shape[-1])

    def without_tensors(self) -> "Support":
        return GivenEntries(self.num_entries)


@setting
@dataclass(frozen=True)
class GivenEntries(Support):
    """Stands for ``TokenIds`` inside an operator, where the ids are an input."""

    count: int

    name: ClassVar[str] = "ids"

    @property
    def num_entries(self) -> int:
        return self.count

    def choose(self, rows: Rows, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        ids, log_probs = inputs["entry_ids"], inputs.get("teacher_log_probs")
        if log_probs is not None:  # padding, which may repeat the id of an entry
            ids = ids.masked_fill(log_probs == -torch.inf, -1)
        return ids.clamp(min=0), first_occurrence(ids)


FULL_VOCABULARY = FullVocabulary()
# the supports that a name and numbers describe, as configurations and the command line do
NAMED_SUPPORTS: dict[str, type[Support]] = {
    kind.name: kind
    for kind in (FullVocabulary, StudentTopK, TeacherTopK, UnionTopK, TeacherNucleus)
}

_TRUNCATED: list[Any] = [*NAMED_SUPPORTS.values(), TokenIds][1:]
LEGAL_SUPPORTS = "FULL_VOCABULARY, " + ", ".join(
    f"{kind.__name__}({', '.join(field.name for field in fields(kind))})" for kind in _TRUNCATED
)


def named_support(name: str, *numbers: Any) -> Support:
    """A support by its name and its numbers: K, and of a nucleus its mass.

    Raises:
        ValueError: when the name is unknown or a number is missing, superfluous or out of range.
    """
    checks.check_one_of("support", name, NAMED_SUPPORTS)
    kind: Any = NAMED_SUPPORTS[name]
    try:
        made: Support = kind(*numbers)
        return made
    except TypeError:
        names = [field.name for field in fields(kind)]
        rule = f"have {' and '.join(names) or 'no number'}"
        remedy = f"pass what {kind.__name__}({', '.join(names)}) takes"
        checks.fail(f"support {name!r}", rule, list(numbers), remedy)
