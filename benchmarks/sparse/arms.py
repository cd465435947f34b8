"""The arms of the comparison, and what is kept of each step's loss."""

from dataclasses import dataclass
from typing import Any

from fused_sd import LossOutput


@dataclass(frozen=True)
class Arm:
    """How the logits' gradient is formed.

    Attributes:
        name: in results and on the command line.
        tolerance: of the sparse gradient; None: dense.
    """

    name: str
    tolerance: float | None = None

    @property
    def choice(self) -> dict[str, Any]:
        """Keywords of a loss."""
        if self.tolerance is None:
            return {"gradient": "dense"}
        return {"gradient": "sparse", "tolerance": self.tolerance}


DENSE = Arm("dense")
ARMS = {arm.name: arm for arm in (DENSE, Arm("2^-8", 2.0**-8), Arm("2^-6", 2.0**-6))}


def step_record(output: LossOutput) -> dict[str, float]:
    """Loss, student's entropy where it was asked for, and what the certificate says of a step."""
    record = {"loss": output.loss.item()}
    if "student_entropy" in output.metrics:
        record["entropy"] = output.metrics["student_entropy"].mean().item()
    found = output.certificate
    if found is not None:
        sparse = ~found.dense
        record |= {
            "tokens": float(found.dense.numel()),
            "dense": found.dense.double().sum().item(),
            "entries": found.kept.double().sum().item() / max(1, int(sparse.sum())),
            "dropped": found.dropped_share.item(),
        }
    return record
