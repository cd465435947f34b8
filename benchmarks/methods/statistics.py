"""Confidence intervals of accuracies."""

import math
import random
from collections.abc import Sequence

Z = 1.959963984540054  # two-sided 95 %
NUM_RESAMPLES = 1000


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927), for one run's questions.

    Raises:
        ValueError: ``total`` is 0, or ``right`` is not between 0 and ``total``.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"right must be between 0 and total, total above 0, got {right}, {total}")
    share, square = right / total, Z * Z / total
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / total + square / total / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    runs: Sequence[str], against: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile 95 % interval of the mean accuracy; seeds and questions are resampled.

    Args:
        runs: For each seed a string with "1" for each question answered rightly and "0" for any
            other, the questions in the same order.  A resample draws one set of questions for all
            of its seeds.
        against: Another method's runs with the same seeds.  The interval is then that of the mean
            difference, paired by seed and question.
        seed: The seed of the resampling.

    Raises:
        ValueError: There is no run, or the runs differ in their numbers of questions.
    """
    others = ["0" * len(run) for run in runs] if against is None else against
    lengths = {len(run) for run in (*runs, *others)}
    if len(lengths) != 1 or 0 in lengths or len(others) != len(runs):
        raise ValueError(
            f"runs must be equally many, equally long and not empty, got {sorted(lengths)}"
        )
    rng = random.Random(seed)
    (length,) = lengths
    gains = [
        [(mark == "1") - (other == "1") for mark, other in zip(*pair)] for pair in zip(runs, others)
    ]
    means = []
    for _ in range(NUM_RESAMPLES):
        chosen = rng.choices(gains, k=len(gains))
        sums = [sum(marks) for marks in zip(*chosen)]
        means.append(sum(rng.choices(sums, k=length)) / (length * len(gains)))
    means.sort()
    return means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES) - 1]


def interval(runs: Sequence[str]) -> tuple[float, float]:
    """Return Wilson's interval for one run, the bootstrap's for several."""
    if len(runs) == 1:
        return wilson(runs[0].count("1"), len(runs[0]))
    return bootstrap(runs)
