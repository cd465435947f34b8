"""How long a loss will take: from measurements on such a device, else from its GEMMs.

The measurements are those of ``fused_sd bench --json`` and of the benchmark suite; ``python -m
fused_sd.planning.timing RESULT.json ...`` distils them into ``measured.json`` beside this file.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fused_sd.planning.objectives import benchmark_name
from fused_sd.planning.workload import Implementation, Workload

TABLE = Path(__file__).with_name("measured.json")
MEASURED, FLOOR = "measured", "floor"


class Entry(NamedTuple):
    """One measured time."""

    device: str  # the GPU's name
    provider: str
    objective: str
    hidden_size: int
    vocab: int
    counted: int  # tokens that had a weight
    dtype: str
    trained: bool
    milliseconds: float  # median of forward and backward


class Expected(NamedTuple):
    """A time and where it comes from."""

    seconds: float | None  # None: nothing is known
    source: str  # MEASURED, FLOOR or ""


def expected(
    work: Workload, peer: Implementation, device: str, rate: float | None, dtype: str
) -> Expected:
    """The time of forward and backward.

    From the nearest measurement of the same provider, objective and head, in proportion to its
    GEMMs; without one, the time that the GEMMs alone take at the device's rate: a bound, which
    nothing reaches and some miss by far.
    """
    name = benchmark_name(work.objective)
    work_done = work.active * work.hidden_size * work.vocab
    nearest, distance = None, math.inf
    for entry in table():
        kind = (entry.provider, entry.objective, entry.dtype, entry.trained)
        if kind != (peer.name, name, dtype, work.trained):
            continue
        if entry.device != device and device not in entry.device:
            continue
        gap = sum(
            abs(math.log(mine / theirs))
            for mine, theirs in (
                (work.active, entry.counted),
                (work.hidden_size, entry.hidden_size),
                (work.vocab, entry.vocab),
            )
        )
        if gap <= distance:  # of the same case at several entropies the slowest, which comes last
            nearest, distance = entry, gap
    if nearest is not None and work.reduced:
        share = work_done / (nearest.counted * nearest.hidden_size * nearest.vocab)
        return Expected(share * nearest.milliseconds / 1e3, MEASURED)
    if rate is None:
        return Expected(None, "")
    return Expected(peer.gemms(work) / rate, FLOOR)


@lru_cache(maxsize=1)
def table() -> Sequence[Entry]:
    """What was measured; nothing where the file does not exist yet."""
    if not TABLE.exists():
        return ()
    return [Entry(**entry) for entry in json.loads(TABLE.read_text(encoding="utf-8"))]


def distil(results: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The times of results on GPUs, without what was wrong or did not run."""
    entries = set()
    for result in results:
        gpu = result["environment"].get("gpu 0")
        if gpu is None:
            continue
        for cell in _cells(result):
            entries |= {
                Entry(
                    gpu.partition(" (capability")[0],
                    row["provider"],
                    cell["objective"],
                    cell["hidden_size"],
                    cell["vocab"],
                    cell["counted"],
                    cell["dtype"],
                    cell["trainable"],
                    round(row["times"]["p50"], 4),
                )
                for row in cell["rows"]
                if row["status"] == "ok"
            }
    return sorted(entries)


def _cells(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of ``fused_sd bench --json``, or of a suite, which has other parts too."""
    if "cells" in result:
        return list(result["cells"])
    cells = [cell for part in result["parts"].values() for cell in part.values()]
    return [cell for cell in cells if "rows" in cell and "objective" in cell]


def main(paths: Sequence[str]) -> int:
    """Write the table from files of results."""
    results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    entries = [entry._asdict() for entry in distil(results)]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    TABLE.write_text(f"[\n{lines}\n]\n" if entries else "[]\n", encoding="utf-8")
    print(f"{len(entries)} times in {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
