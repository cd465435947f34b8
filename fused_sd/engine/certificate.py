"""What a sparse gradient leaves out, and the bound that a user is given.

A sparse row of dlogits keeps its largest values.  Two numbers are known of the others: their L1
norm (``dropped``) and their signed sum (``dropped_mass``).  dhidden gets the signed sum times the
mean row of the head, as if it were spread evenly over the vocabulary.  dhidden is then off by
``sum over the dropped of g_v (W_v - mean row)``, at most ``dropped * max_v |W_v - mean row|``; all
of dweight is off by at most the sum of the tokens' ``dropped * |hidden state|``.

Rounding adds to these errors, in dense rows too: their GEMM has another shape than that of a fully
dense gradient, and a BLAS orders its sums by the shape.

Dimension key:  (...) tokens, D hidden size, V vocabulary
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.head.lm_head import LMHead, as_head
from fused_sd.head.projection import accumulation_dtype
from fused_sd.torch_kernels.slices import slices

GradientKind = Literal["dense", "sparse", "auto"]
TOLERANCE = 2.0**-8  # the rounding of a bf16 gradient
SLAB = 2**13  # rows of a head that are read together
# How far two sums of V numbers in different orders may be apart, in units of sqrt(V) eps: single
# roundings are of either sign.  A BLAS that adds one number after the other also loses small ones
# beside a large sum: 0.75 units were measured in fp32 at V 49152, and 0.03 where blocks are summed.
SUM_ROUNDING = 4.0


class GradientCertificate(NamedTuple):
    """How far a sparse gradient is from the dense one.

    Norms are L1 norms of each token's gradient w.r.t. the product of hidden state and head.  They
    are weighted as the loss is, before a mean's division; with ``reduction="none"`` they are norms
    of each token's own loss, and the bound holds for every token.  Where ranks share the head, the
    numbers and the tolerance are of this rank's columns, and sums over the ranks keep the tolerance
    too.

    Attributes:
        kept: (...) int64, number of values kept; 0 for a token that is dense or left out.
        dense: (...) bool, whether the token's gradient is dense.
        dropped: (...) norm of what is left out; 0 for a dense token.
        norm: (...) norm of the whole gradient.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.randn(300, 16)
        >>> teacher = hidden.detach() + 0.1 * torch.randn(8, 16)
        >>> output = fused_sd.gkd_loss(hidden, head, teacher, head, gradient="auto")
        >>> bool(output.certificate.dropped_share <= 2**-8)
        True
        >>> output.certificate.hidden_bound(head).shape
        torch.Size([8])
    """

    kept: Tensor
    dense: Tensor
    dropped: Tensor
    norm: Tensor

    @property
    def dropped_share(self) -> Tensor:
        """Share () of the norm that is dropped, at most the tolerance."""
        norm = self.norm.sum()
        return self.dropped.sum() / torch.where(norm == 0, 1, norm)

    def hidden_bound(self, head: Tensor | LMHead) -> Tensor:
        """Bound (...) on the error of each hidden state's gradient, by its 2-norm.

        The error is the distance from the dense gradient as the same machine computes it.  The
        bound is ``dropped * max_v |W_v - mean row|``, for what is left out, plus ``norm *
        max_v |W_v| * (4 sqrt(V) eps + eps')`` for rounding: of two sums of V products in orders
        that a BLAS chooses (eps of fp32, of fp64 operands fp64), and of their results to the
        head's dtype (eps').  A dense token has the second part alone.  Gradients below the smallest
        normal number of a dtype lose digits besides; a last part of that size covers them.

        A factor of the loss multiplies the bound, but its last part only where it is above 1.  With
        ``reduction="none"`` backward computes dense rows again, from logits whose GEMM has another
        shape: the rounding of logits, which a dense gradient has as well, is not covered.

        Args:
            head: the student's, as the loss was given it, under autocast in autocast's dtype; it is
                read once.  Where ranks share it: this rank's rows, without padding; the error of
                the sum is at most the bounds' sum.
        """
        head = as_head(head, "head")
        tensor_checks.check_device("head", head.weight, self.norm.device, "the certificate")
        farthest, longest = radius(head)
        bound = self.dropped * farthest + self.norm * (longest * rounding(head))
        return bound + (self.norm != 0) * underflow(head, longest)


def checked_tolerance(gradient: str, tolerance: float | None) -> float | None:
    """The tolerance of a gradient that may be sparse; None for a dense one.

    Raises:
        ValueError: when the tolerance is out of range or comes with a dense gradient.
    """
    checks.check_one_of("gradient", gradient, get_args(GradientKind))
    if gradient == "dense":
        if tolerance is not None:
            checks.fail(
                "tolerance",
                "come with gradient='sparse' or 'auto'",
                repr(tolerance),
                "pass one of them, or leave it out: a dense gradient drops nothing",
            )
        return None
    if tolerance is None:
        return TOLERANCE
    checks.check_positive("tolerance", tolerance, "pass a share of the gradient, such as 2**-8")
    if tolerance >= 1:
        checks.fail("tolerance", "be below 1", tolerance, "it is a share of the gradient's norm")
    return float(tolerance)


def radius(head: LMHead) -> tuple[Tensor, Tensor]:
    """Largest distance () of a row of the head from its mean row, and largest length () of a row.

    A dropped unit of a gradient moves a hidden state's gradient by at most the first.
    """
    weight = head.weight.detach()[: head.num_tokens]
    centre = mean_row(weight)
    farthest, longest = centre.new_zeros(()), centre.new_zeros(())
    for at in slices(0, weight.shape[0], SLAB):
        rows = weight[at].to(centre.dtype)
        longest = torch.maximum(longest, rows.norm(dim=-1).max())
        farthest = torch.maximum(farthest, (rows - centre).norm(dim=-1).max())
    return farthest, longest


def rounding(head: LMHead) -> float:
    """Rounding of a hidden state's gradient, in units of ``norm * max_v |W_v|``."""
    dtype = head.weight.dtype
    sums = SUM_ROUNDING * head.num_tokens**0.5 * torch.finfo(accumulation_dtype(dtype)).eps
    return sums + torch.finfo(dtype).eps


def underflow(head: LMHead, longest: Tensor) -> Tensor:
    """Error () that numbers below the smallest normal one add to a hidden state's gradient."""
    dtype = head.weight.dtype
    sums, result = (
        torch.finfo(kind).smallest_normal * torch.finfo(kind).eps
        for kind in (accumulation_dtype(dtype), dtype)
    )
    return sums * head.num_tokens * (1 + longest) + result * head.weight.shape[1] ** 0.5


def mean_row(weight: Tensor) -> Tensor:
    """(D,) mean of a head's rows, in fp32 or fp64; 0 of none, as a rank with padding alone has."""
    if not weight.shape[0]:
        return weight.new_zeros(weight.shape[1], dtype=accumulation_dtype(weight.dtype))
    return weight.mean(0, dtype=accumulation_dtype(weight.dtype))
