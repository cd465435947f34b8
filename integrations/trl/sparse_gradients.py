"""How a trainer's loss is run: its chunks, and sparse gradients with what is logged about them.

Dimension key:  (...) tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fused_sd import GradientCertificate
from fused_sd.checks import check_number, check_one_of, check_positive_int, fail


@dataclass
class GradientSettings:
    """Mixin before one of TRL's configurations: a loss's chunks, and the form of its gradient.

    Raises:
        ValueError: a value is out of its range, or a tolerance is given for a dense gradient.
    """

    chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits the loss holds at a time; None: by memory."},
    )
    gradient: Literal["dense", "sparse", "auto"] = field(
        default="dense",
        metadata={
            "help": "`sparse` keeps the largest entries of a token's gradient w.r.t. its logits "
            "where few are enough for `gradient_tolerance`; other tokens stay dense. `auto` does "
            "so while few enough tokens of a batch stay dense, and else leaves most of them dense."
        },
    )
    gradient_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Share of the gradient's norm that `sparse` and `auto` may drop; None: 2**-8."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # of TRL's configuration, which is next in the method order
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)
        check_one_of("gradient", self.gradient, ("dense", "sparse", "auto"))
        tolerance = self.gradient_tolerance
        if tolerance is None:
            return
        if self.gradient == "dense":
            rule = "come with gradient='sparse' or 'auto'"
            remedy = "pass one of them, or leave it out: a dense gradient drops nothing"
            fail("gradient_tolerance", rule, repr(tolerance), remedy)
        ok = isinstance(tolerance, int | float) and 0 < tolerance < 1
        rule, remedy = "lie in the open interval (0, 1)", "2**-8 is the default"
        check_number("gradient_tolerance", tolerance, rule, ok, remedy)

    @property
    def gradient_options(self) -> dict[str, Any]:
        """The keywords of a loss function."""
        return {
            "gradient": self.gradient,
            "tolerance": self.gradient_tolerance,
            "chunk_size": self.chunk_size,
        }


def mixed_certificate(
    one: GradientCertificate | None, other: GradientCertificate | None, share: float
) -> GradientCertificate | None:
    """Return a certificate for the gradient of ``(1 - share) * one + share * other``.

    Norms are interpolated too: by the triangle inequality that bounds the mixture's.
    """
    if one is None or other is None:
        return None
    return GradientCertificate(
        one.kept + other.kept,
        one.dense | other.dense,
        torch.lerp(one.dropped, other.dropped, share),
        torch.lerp(one.norm, other.norm, share),
    )


def certificate_sums(certificate: GradientCertificate) -> Tensor:
    """Sum a certificate over its tokens.

    Returns:
        (5,): entries kept; tokens with a sparse gradient; tokens with a dense one; the dropped
        gradients' norms; the gradients' norms.
    """
    has_gradient = certificate.norm != 0
    counts = certificate.kept, has_gradient & ~certificate.dense, certificate.dense
    parts = *counts, certificate.dropped, certificate.norm
    return torch.stack([part.sum(dtype=certificate.norm.dtype) for part in parts])


def certificate_means(sums: Sequence[float]) -> dict[str, float]:
    """Return the metrics to log, from ``certificate_sums`` added over all processes.

    {} where no token has a gradient.
    """
    kept, num_sparse, num_dense, dropped, norm = sums
    if not num_sparse + num_dense:
        return {}
    return {
        "gradient_entries": kept / max(num_sparse, 1),  # for each sparse token
        "gradient_dense_fraction": num_dense / (num_sparse + num_dense),
        "gradient_dropped_fraction": dropped / norm,
    }
