"""How long this library should take, from rates: a prediction, where a floor is a bound.

GEMMs at the device's rate; what the row functions, the gathers and the rounding read and write at
the rate of its copies; what the collectives send at the rate of its link, and a latency for each.
Nothing is taken to overlap, and the sum of the head's gradient to hide in its GEMM.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, K entries of a row
"""

from dataclasses import asdict, dataclass

from fused_sd.planning import chunked, fused
from fused_sd.planning.chunked import WIDE, num_entries
from fused_sd.planning.devices import Rates
from fused_sd.planning.objectives import PlannedObjective
from fused_sd.planning.wire import Traffic
from fused_sd.planning.workload import Workload, total


@dataclass(frozen=True)
class Prediction:
    """Seconds of forward and backward on every rank.

    Attributes:
        gemms: products with the head and its gradients.
        rows: passes over the logits, and rows gathered for entries.
        rounding: of finished gradients to the operands' dtype.
        wire: what collectives send.
        latency: what collectives take besides.
    """

    gemms: float
    rows: float
    rounding: float
    wire: float
    latency: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By name, without what is not there."""
        return {name: seconds for name, seconds in asdict(self).items() if seconds}


def predict(work: Workload, traffic: Traffic | None, rates: Rates) -> Prediction | None:
    """The time of a loss with dense gradients, or exact entries; None: a rate is unknown."""
    if rates.gemms is None or rates.copies is None:
        return None
    wire = latency = 0.0
    if traffic is not None:
        if rates.link is None:
            return None
        wire, latency = traffic.sent_bytes / rates.link, traffic.num_collectives * rates.latency
    return Prediction(
        fused.FUSED_SD.gemms(work) / rates.gemms,
        row_bytes(work) / rates.copies,
        _rounding_bytes(work) / rates.copies,
        wire,
        latency,
    )


def row_reads(objective: PlannedObjective) -> int:
    """How often all logits of one side are read, in fp32.

    For the normalisers, for the gradient, where a gradient needs a sum of its own for that too, and
    where the largest are chosen.
    """
    if not objective.is_divergence:
        return 2 + objective.has_teacher
    if objective.support == "full":
        return 6 if objective.divergence == "jsd" or objective.entry_clip else 4
    choosing = {"student": 1, "teacher": 1, "union": 2, "ids": 0}[objective.support]
    if num_entries(objective):
        return choosing
    return choosing + sum(chunked.whole_sides(objective)) + 1


def row_bytes(work: Workload) -> float:
    """What passes over the rows read and write, beside the GEMMs.

    A second walk is counted as a whole one, though the first leaves the gradient out.
    """
    logits = work.active * work.vocab
    read = WIDE * row_reads(work.objective) * logits
    count = num_entries(work.objective)
    if not count:
        return fused.walks(work) * read + work.element * logits
    # each side's dot products, the hidden states' gradient and the head's read a row an entry; the
    # entries of other ranks all point to one, which stays in the caches
    visits = 1 + work.objective.has_teacher + 1 + work.trained
    own = work.active * count / work.tensor_parallel
    gathered = visits * own * work.hidden_size * work.element
    return read + gathered + total(work.gradients)


def _rounding_bytes(work: Workload) -> int:
    """Gradients are read as they were summed and written in their dtype."""
    if num_entries(work.objective):
        return 0
    return total(work.gradients) * (WIDE + work.element) // work.element
