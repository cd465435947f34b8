"""The two arms of the comparison, and the record that each training step leaves."""

from dataclasses import dataclass
from typing import Any

from fused_sd import LossOutput


@dataclass(frozen=True)
class Arm:
    """A form of the loss's gradient.

    Attributes:
        name: The name in the results.
        tolerance: The sparse gradient's tolerance; None: the gradient is dense.
    """

    name: str
    tolerance: float | None = None

    @property
    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments of a loss."""
        if self.tolerance is None:
            return {"gradient": "dense"}
        return {"gradient": "sparse", "tolerance": self.tolerance}


DENSE, SPARSE = Arm("dense"), Arm("2^-8", 2.0**-8)


def step_record(output: LossOutput) -> dict[str, float]:
    """Return a step's loss and, if the gradient is sparse, its certificate in four numbers."""
    record = {"loss": output.loss.item()}
    certificate = output.certificate
    if certificate is not None:
        sparse = ~certificate.dense
        record |= {
            "tokens": float(certificate.dense.numel()),
            "dense": certificate.dense.double().sum().item(),
            "entries": certificate.kept.double().sum().item() / max(1, int(sparse.sum())),
            "dropped": certificate.dropped_share.item(),
        }
    return record
