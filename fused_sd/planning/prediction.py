"""How long a loss of this library should take, predicted from a device's rates.

The prediction adds up four kinds of work:

* GEMMs, at the rate of the device's GEMMs;
* bytes that row passes, gathers and rounding read and write, at the rate of its copies;
* bytes that collectives send, at the rate of its link;
* a latency for each collective.

It assumes that nothing overlaps, except that the sum of dweight hides in its GEMM.

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
        gemms: logits and gradients.
        rows: passes over the logits, and rows gathered for sparse values.
        rounding: converting finished gradients to the operands' dtype.
        wire: sending the collectives' bytes.
        latency: starting the collectives.
    """

    gemms: float
    rows: float
    rounding: float
    wire: float
    latency: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by the name of the part, without parts of 0 seconds."""
        return {name: seconds for name, seconds in asdict(self).items() if seconds}


def predict(work: Workload, traffic: Traffic | None, rates: Rates) -> Prediction | None:
    """Predict the time of a loss with dense gradients or exact entries; None: a rate is unknown."""
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
    """How often the fp32 logits of one side are read.

    They are read for the normalisers, for the gradient, for a sum that some gradients need first,
    and for choosing a top-k.
    """
    comparison, support = objective.comparison, objective.truncated
    if comparison is None:
        return 2 + objective.has_teacher
    if support is None:
        is_summed = comparison.term.share_of_mean_ratio is None or comparison.entry_clip is not None
        return 6 if is_summed else 4
    choosing = chunked.choosing_sides(objective) + support.num_normalizers
    if num_entries(objective):
        return choosing
    return choosing + sum(chunked.whole_sides(objective)) + 1


def row_bytes(work: Workload) -> float:
    """Bytes that passes over the logits read and write, beside the GEMMs.

    If backward computes the logits again, both runs count in full, though the first writes no
    gradient.
    """
    logits = work.active * work.vocab
    read = WIDE * row_reads(work.objective) * logits
    count = num_entries(work.objective)
    if not count:
        return len(fused.runs(work)) * read + work.element * logits
    # each side's dot products, dhidden and dweight read one row for each entry; the entries of
    # other ranks all point to one row, which stays in the caches
    gathers = 1 + work.objective.has_teacher + 1 + work.trained
    own = work.active * count / work.tensor_parallel
    gathered = gathers * own * work.hidden_size * work.element
    return read + gathered + total(work.gradients)


def _rounding_bytes(work: Workload) -> int:
    """Bytes of reading fp32 gradients and writing them in the operands' dtype."""
    if num_entries(work.objective):
        return 0
    return total(work.gradients) * (WIDE + work.element) // work.element
