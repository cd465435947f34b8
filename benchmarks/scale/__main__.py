"""``docs/scale.md``: memory, traffic and predicted time of the losses on ranks that share the head.

python -m benchmarks.scale --count    runs small cases on 2, 4 and 8 ranks and stores the counts
python -m benchmarks.scale --write    writes the page from plans and the stored counts
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale import cases, tables
from benchmarks.storage import RESULTS, ROOT
from fused_sd.measuring.head_sizes import head_size
from fused_sd.planning.devices import CARDS, LATENCY

PAGE = ROOT / "docs" / "scale.md"
# the page with <<names>> of tables and <names> of numbers
TEMPLATE = Path(__file__).with_name("template.md")
COUNTS = RESULTS / "scale.json"


def count() -> dict[str, Any]:
    """Run the small cases; return the ranks' median peak and what each rank sends."""
    rows = []
    for ranks in tables.SHARING:
        with tempfile.TemporaryDirectory() as folder:
            found = cases.count(ranks, Path(folder))
        for case, by_rank in zip(cases.CASES, found, strict=True):
            first = by_rank[0]
            assert all(each[1:3] == first[1:3] for each in by_rank)
            peak = statistics.median_low(each.peak_bytes for each in by_rank)
            row = {"case": str(case), "ranks": ranks, "peak": peak}
            row |= {"sent": first.sent, "collectives": first.num_collectives}
            rows.append(row | {"kept": cases.kept_together(by_rank)})
    return {"torch": torch.__version__, "cases": rows}


def kept_counts() -> dict[str, Any]:
    """Return the stored results of ``count``."""
    counts: dict[str, Any] = json.loads(COUNTS.read_text(encoding="utf-8"))
    return counts


def page() -> str:
    """Return the template with its tables and numbers filled in."""
    counts = kept_counts()
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, lines in {
        "HEADS": tables.head_lines(),
        "MEMORY": tables.memory_lines(),
        "PARTS": tables.part_lines(),
        "NUMBERS": tables.number_lines(),
        "WIRE": tables.wire_lines(),
        "TIME": tables.time_lines(),
        "TIME PARTS": tables.time_part_lines(),
        "LINKS": tables.link_lines(),
        "WAYS": tables.way_lines(),
        "COUNTED": tables.counted_lines(counts),
    }.items():
        text = text.replace(f"<<{name}>>", "\n".join(lines).rstrip())
    for name, word in numbers(counts).items():
        text = text.replace(f"<{name}>", word)
    return text


def numbers(counts: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers in the page's sentences, by their names in the template."""
    card, head = CARDS[tables.CARD], head_size(tables.MODELS[0])
    assert card.link is not None
    model, most = tables.MODELS[0], tables.RANKS[-1]
    again = tables.planned(model, "reverse_kl", most, reduction="none")
    return {
        "RATE": f"{card.rate / 1e12:.0f} TFLOP/s",
        "COPIES": f"{card.bandwidth / 1e12:.1f} TB/s",
        "LINK": f"{card.link / 1e9:.0f} GB/s",
        "LATENCY": f"{1e6 * LATENCY:.0f} µs",
        "SHARE OF ANOTHER RANK": f"{card.rate / (head.vocab * card.link):.1%}",
        "AGAIN": f"{again.peak_bytes / tables.GIB:.2f}",
        "WORST": f"{worst(counts):.1%}",
        "TORCH": counts["torch"],
    }


def worst(counts: Mapping[str, Any]) -> float:
    """Return the plans' largest relative error of a counted peak."""
    return max(
        abs(tables.planned_again(row).peak_bytes / row["peak"] - 1) for row in counts["cases"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and write or print the page; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", action="store_true", help="run the small cases first (minutes)")
    parser.add_argument(
        "--write", action="store_true", help="write the page instead of printing it"
    )
    options = parser.parse_args(arguments)
    if options.count:
        COUNTS.write_text(json.dumps(count(), indent=1) + "\n", encoding="utf-8")
    if options.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
