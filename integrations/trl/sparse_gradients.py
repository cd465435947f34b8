"""The setting by which a trainer's gradient may be sparse, and what is logged of it.

Dimension key:  (...) tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fused_sd import GradientCertificate
from fused_sd.checks import check_number, check_one_of, fail


@dataclass
class GradientSettings:
    """Put before a configuration of TRL's: how the loss forms its gradient.

    Raises:
        ValueError: a value is out of its range, or a tolerance is given that nothing reads.
    """

    gradient: Literal["dense", "sparse"] = field(
        default="dense",
        metadata={
            "help": "`sparse` keeps the largest entries of each token's gradient by the logits, "
            "where few are enough for `gradient_tolerance`; the other tokens stay dense."
        },
    )
    gradient_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Share of the gradient's norm that `gradient='sparse'` may drop; None: 2**-8."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # of the configuration that comes behind
        check_one_of("gradient", self.gradient, ("dense", "sparse"))
        tolerance = self.gradient_tolerance
        if tolerance is None:
            return
        if self.gradient == "dense":
            remedy = "pass gradient='sparse', or leave it out: a dense gradient drops nothing"
            fail("gradient_tolerance", "come with gradient='sparse'", repr(tolerance), remedy)
        ok = isinstance(tolerance, int | float) and 0 < tolerance < 1
        rule, remedy = "lie in the open interval (0, 1)", "2**-8 is the default"
        check_number("gradient_tolerance", tolerance, rule, ok, remedy)

    @property
    def gradient_run(self) -> dict[str, Any]:
        """The loss functions' keywords."""
        return {"gradient": self.gradient, "tolerance": self.gradient_tolerance}


def mixed_certificate(
    one: GradientCertificate | None, other: GradientCertificate | None, share: float
) -> GradientCertificate | None:
    """Of ``(1 - share) * one + share * other``, whose norm is at most the parts' together."""
    if one is None or other is None:
        return None
    return GradientCertificate(
        one.kept + other.kept,
        one.dense | other.dense,
        torch.lerp(one.dropped, other.dropped, share),
        torch.lerp(one.norm, other.norm, share),
    )


def certificate_sums(certificate: GradientCertificate) -> Tensor:
    """(5,) entries kept; tokens with a sparse, tokens with a dense gradient; norm dropped, norm."""
    has_gradient = certificate.norm != 0
    counts = certificate.kept, has_gradient & ~certificate.dense, certificate.dense
    parts = *counts, certificate.dropped, certificate.norm
    return torch.stack([part.sum(dtype=certificate.norm.dtype) for part in parts])


def certificate_means(sums: Sequence[float]) -> dict[str, float]:
    """What is logged, from sums over all processes; nothing where no token has a gradient."""
    kept, num_sparse, num_dense, dropped, norm = sums
    if not num_sparse + num_dense:
        return {}
    return {
        "gradient_entries": kept / max(num_sparse, 1),  # of a sparse token
        "gradient_dense_fraction": num_dense / (num_sparse + num_dense),
        "gradient_dropped_fraction": dropped / norm,
    }
