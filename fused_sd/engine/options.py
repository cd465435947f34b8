"""The options that every loss takes: declared once, checked once, passed on as one object.

A public loss ends in ``**options: Unpack[LossOptions]``, so that callers write plain keywords.  It
makes one ``Options`` of them before anything else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.certificate import GradientKind, checked_tolerance

Reduction = Literal["sum", "mean", "none"]


class LossOptions(TypedDict, total=False):
    """Keywords that every loss takes; ``Options`` says what they mean.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.zeros(2, 16), torch.randn(100, 16)
        >>> options: fused_sd.LossOptions = {"temperature": 0.9, "reduction": "sum"}
        >>> imitation = fused_sd.cross_entropy_loss(hidden, head, torch.tensor([3, 5]), **options)
        >>> distillation = fused_sd.sdft_loss(hidden, head, hidden, head, **options)
        >>> distillation.loss.item() < imitation.loss.item()
        True
    """

    token_weights: Tensor | None
    temperature: float
    teacher_temperature: float | None
    reduction: Reduction
    metrics: Sequence[str]
    gradient: GradientKind
    tolerance: float | None
    compact: bool
    backend: str
    chunk_size: int | None
    process_group: "dist.ProcessGroup | None"
    reduce_dhidden: bool


# losses whose reduction was a sum where the caller named none
ONCE_SUMMED = {
    "cross_entropy_loss",
    "divergence_loss",
    "policy_loss",
    "sampled_kl_loss",
    "topk_divergence_loss",
}


def check_keywords(call: str, passed: Mapping[str, Any], legal: type) -> None:
    """Refuse a keyword that a public function does not know, by that function's name."""
    for name in passed:
        if name not in legal.__annotations__:
            options = ", ".join(legal.__annotations__)
            raise TypeError(
                f"{call}() got an unknown keyword {name!r}: beside its own it takes {options}"
            )


def passed_on(call: str, passed: Mapping[str, Any], legal: type) -> Any:
    """The keywords that a named loss passes on, checked, with its reduction among them."""
    check_keywords(call, passed, legal)
    return {"reduction": Options.reduction, **passed}


@dataclass(frozen=True, eq=False)
class Options:
    """How a loss is weighted, reduced, observed and run, whatever it compares.

    Args:
        token_weights: (...) mask, normaliser and advantage in one.  A token of weight 0 contributes
            exactly 0 and costs nothing, whatever its states hold.  None: ones.
        temperature: divides the logits of both sides; there is no temperature-squared factor.
        teacher_temperature: divides the teacher's logits instead, where given.
        reduction: ``"mean"``, the sum divided by the sum of the weights, which must then be at
            least 0: the mean over the tokens that count, as in PyTorch; ``"sum"``; ``"none"``.
        metrics: names of what to return per token beside the loss.
        gradient: ``"dense"``; ``"sparse"``: of each token's logit gradient the largest entries
            are kept, the rest is put on the head's mean row, and a token whose gradient is not
            nearly sparse keeps all of it, which saves two of four GEMMs where most tokens are
            nearly decided; or ``"auto"``: sparse, but once more than three quarters of the tokens
            searched so far in a call kept all of it, only a part of the others is searched, and
            the rest is dense.  A renormalised support needs none of this: its gradient has K
            entries.
        tolerance: share of the gradient's L1 norm that a gradient other than a dense one may drop,
            over the batch; with ``reduction="none"`` of each token.  None: 2**-8.
        compact: drop tokens of weight 0 before any GEMM; the number of tokens left is read from the
            device once.  False runs all tokens and sets the results of those to 0.
        backend: ``"auto"``: Triton on a GPU, PyTorch elsewhere; or one of the two by name.
        chunk_size: tokens whose logits are held at a time; changes memory and time, and the result
            in the last bits only.  None: as many as a memory budget allows.
        process_group: ranks that share the vocabulary (tensor parallelism).  Each passes its own
            rows of both heads, and the same of everything else; ids count over all ranks.  Every
            rank returns the same loss, and the gradient of its own rows.  The first call with a
            given weight runs one all-gather to check that all ranks hold equally many rows; pass
            ``LMHead(weight, shard_sizes=...)`` to skip it.
        reduce_dhidden: with ``process_group``, add the ranks' parts of the hidden states' gradient;
            False where the framework does (Megatron's sequence parallelism, an all-reduce behind
            the loss).

    Raises:
        ValueError: when a value is out of range.

    Examples:
        >>> import fused_sd
        >>> fused_sd.Options().reduction, fused_sd.Options().chunk_size
        ('mean', None)
        >>> fused_sd.Options(temperature=0)  # checked before anything is computed
        Traceback (most recent call last):
        ValueError: temperature must be ...
    """

    token_weights: Tensor | None = None
    temperature: float = 1.0
    teacher_temperature: float | None = None
    reduction: Reduction = "mean"
    metrics: Sequence[str] = ()
    gradient: GradientKind = "dense"
    tolerance: float | None = None
    compact: bool = True
    backend: str = "auto"
    chunk_size: int | None = None
    process_group: "dist.ProcessGroup | None" = None
    reduce_dhidden: bool = True

    def __post_init__(self) -> None:
        checks.check_reduction(self.reduction)
        checks.check_positive("temperature", self.temperature)
        if self.teacher_temperature is not None:
            checks.check_positive("teacher_temperature", self.teacher_temperature)
        checks.check_backend_choice(self.backend)
        if self.chunk_size is not None:
            checks.check_positive_int("chunk_size", self.chunk_size)
        checked_tolerance(self.gradient, self.tolerance)
        checks.check_bool("compact", self.compact)
        checks.check_bool("reduce_dhidden", self.reduce_dhidden)
        checks.check_names("metrics", self.metrics)
        if self.token_weights is not None:
            tensor_checks.check_tensor("token_weights", self.token_weights)
            legal = tensor_checks.REAL
            tensor_checks.check_dtype("token_weights", self.token_weights, legal, "pass floats")
        if self.process_group is not None and not isinstance(self.process_group, dist.ProcessGroup):
            checks.fail(
                "process_group",
                "be a torch.distributed.ProcessGroup that this rank belongs to, or None",
                repr(self.process_group),
                "pass the tensor-parallel group, such as mesh.get_group('tp')",
            )

    @classmethod
    def of(cls, call: str, passed: Mapping[str, Any], legal: type = LossOptions) -> "Options":
        """The options of a call, of the keywords that it does not name itself.

        Args:
            call: the name of the public function.
            passed: names and values, as the caller wrote them.
            legal: the typed dict of the options that mean something there.

        Raises:
            TypeError: when a name is not one of them.
            ValueError: when a value is out of range.
        """
        check_keywords(call, passed, legal)
        if call in ONCE_SUMMED and "reduction" not in passed:
            checks.warn_once(
                f"{call} returns the mean over the tokens that count, where it was their sum "
                'before: pass reduction="mean" or reduction="sum" to say which you want'
            )
        return cls(**passed)

    @property
    def is_reduced(self) -> bool:
        """Whether the loss is one number, whose row weights are known in forward."""
        return self.reduction != "none"

    @property
    def sparse_tolerance(self) -> float | None:
        """Tolerance of a gradient that may be sparse; None: the gradient is dense."""
        return checked_tolerance(self.gradient, self.tolerance)

    def teacher_divisor(self, has_teacher_states: bool) -> float:
        """What the teacher's logits are divided by.

        Raises:
            ValueError: when a teacher's temperature is given and there are no logits to divide.
        """
        given = self.teacher_temperature
        if given is not None and not has_teacher_states:
            checks.fail(
                "teacher_temperature",
                "be left out where the teacher is not given by its hidden states",
                given,
                "log-probabilities have the temperature that they were computed at",
            )
        return self.temperature if given is None else given
