"""``python -m benchmarks.report``: tables and plots from the stored results.

python -m benchmarks.report             prints the tables
python -m benchmarks.report --update    writes them into docs/reference/measurements.md, and plots
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, sparse_table
from benchmarks.markdown import environment_line, table
from benchmarks.step.report import markdown as step_markdown
from benchmarks.storage import RESULTS, ROOT, step_documents, suite_documents
from fused_sd.bench.table import US, is_ours, memory, number, percent
from fused_sd.measuring.markdown_block import Block

BLOCK = "speed"  # the page's block
PAGE = ROOT / "docs" / "reference" / "measurements.md"
TO_COME = (
    "**GPU figures are still to be measured**: by `python -m benchmarks.run --suite gpu`, which "
    "ends within nine minutes; `python -m benchmarks.report --update` then puts them here."
)
WHOLE_TABLES = ("main", "compiled")  # the parts whose cells are shown with every provider
PLOT_TITLES = {
    "plane.png": "Time against error",
    "scaling.png": "Time and memory by tokens",
    "entropy.png": "Time by the policy's entropy",
}
COLUMNS = (
    "ms",
    "p20 - p80",
    "x floor",
    "TFLOP/s",
    "row GB/s",
    "peak memory",
    "loss bias",
    "dH error",
    "dW error",
)
SUMMARY_COLUMNS = (
    "objective",
    "shape",
    "tokens",
    "head",
    "floor, ms",
    "fused_sd, ms",
    "x floor",
    "memory",
    "eager, ms",
    "memory",
    "fastest other, ms",
    "memory",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables or write them into the page; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs" / "images", help="folder of the plots"
    )
    parser.add_argument("--update", nargs="?", const=PAGE, type=Path, metavar="PAGE")
    options = parser.parse_args(arguments)
    documents, steps = suite_documents(options.results), step_documents(options.results)
    if options.update is None:
        print(*markdown_lines(documents, {}), *map(step_markdown, steps), sep="\n")
        return 0
    try:
        block = Block(options.update, BLOCK)
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    to_plots = os.path.relpath(options.docs, options.update.parent)
    plots = {
        index: [f"{to_plots}/{name}" for name in figures.plots(one, options.docs)]
        for index, one in enumerate(documents)
    }
    # the block stands in a section of the page: headings go one level down
    inside = [re.sub("^#", "##", step_markdown(step), flags=re.MULTILINE) for step in steps]
    block.fill([*markdown_lines(documents, plots), *inside])
    return 0


def markdown_lines(
    documents: Sequence[dict[str, Any]], plots: dict[int, list[str]]
) -> Iterator[str]:
    """Yield the tables of every suite, and a note if no GPU was measured.

    Args:
        documents: The suites' results.
        plots: Paths of the plots from the page, by the place in ``documents``.
    """
    if not any(document["suite"].startswith("gpu") for document in documents):
        yield from (TO_COME, "")
    for index, document in enumerate(documents):
        yield from (f"{environment_line(document['environment'])}:", "")
        for name in plots.get(index, []):
            yield from (f"![{PLOT_TITLES[name.rpartition('_')[2]]}]({name})", "")
        for part in WHOLE_TABLES:
            for cell in document["parts"].get(part, {}).values():
                yield from cell_lines(cell)
        sparse = document["parts"].get(sparse_table.PART, {})
        yield from (sparse_table.sparse_lines(sparse) if sparse else ())
        rest = [
            cell
            for part, cells in document["parts"].items()
            if part not in (*WHOLE_TABLES, sparse_table.PART)
            for cell in cells.values()
            if cell["floor"] is not None
        ]
        if rest:
            yield from (*table(SUMMARY_COLUMNS, map(summary_row, rest), texts=4), "")


def cell_lines(cell: dict[str, Any]) -> Iterator[str]:
    """Yield a table of all providers, fastest first, and the reasons of those without a time."""
    timed = sorted((r for r in cell["rows"] if r["times"]), key=lambda r: r["times"]["p50"])
    rows = [measured_row(row) for row in timed]
    if cell["floor"] is not None:
        rows.insert(0, floor_row(cell["floor"]))
    title = f"{cell['objective']}, {cell['shape']}, {cell['tokens']} tokens, {head(cell)}"
    yield from (*table([title, *COLUMNS], rows), "")
    missing = [
        f"{r['provider']}: {r['status']} ({r['reason']})" for r in cell["rows"] if not r["times"]
    ]
    if missing:
        yield from (f"Without a time: {'; '.join(missing)}.", "")


def floor_row(floor: dict[str, Any]) -> list[str]:
    tflops = floor["flop"] / floor["milliseconds"] / 1e9
    name = f"the bare GEMMs ({floor['u']}u)"
    cells = [name, number(floor["milliseconds"]), "", "1.00", f"{tflops:.3g}"]
    return [*cells, *[""] * (len(COLUMNS) + 1 - len(cells))]


def measured_row(row: dict[str, Any]) -> list[str]:
    times, errors = row["times"], row["errors"]
    return [
        f"**{row['provider']}**" if row["provider"] == US else row["provider"],
        number(times["p50"]),
        f"{number(times['p20'])} - {number(times['p80'])}",
        _two(row["ratio_to_floor"]),
        _three(row["tflops"]),
        _three(row["row_gigabytes"]),
        memory(row["peak_bytes"]),
        *(percent(errors[name]) for name in ("loss_bias", "dhidden", "dweight")),
    ]


def summary_row(cell: dict[str, Any]) -> list[str]:
    """Return a cell's row: the library, eager PyTorch and the fastest of all other providers."""
    by_name = {row["provider"]: row for row in cell["rows"]}
    others = [
        row
        for row in cell["rows"]
        if row["times"] and not is_ours(row["provider"]) and row["provider"] != "eager"
    ]
    fastest = min(others, key=lambda r: r["times"]["p50"], default=None)
    ours, eager = by_name.get(US), by_name.get("eager")
    best = "-"
    if fastest is not None:
        best = f"{number(fastest['times']['p50'])} ({fastest['provider']})"
    return [
        cell["objective"],
        cell["shape"],
        f"{cell['tokens']}" + _masked(cell),
        "trained" if cell["trainable"] else "frozen",
        number(cell["floor"]["milliseconds"]),
        _time(ours),
        _two(None if ours is None else ours["ratio_to_floor"]),
        _memory(ours),
        _time(eager),
        _memory(eager),
        best,
        _memory(fastest),
    ]


def head(cell: dict[str, Any]) -> str:
    return f"head {'trained' if cell['trainable'] else 'frozen'}{_masked(cell)}, {cell['dtype']}"


def _masked(cell: dict[str, Any]) -> str:
    return "" if cell["counted"] == cell["tokens"] else f" ({cell['counted']} count)"


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return number(row["times"]["p50"]) if row["times"] else row["status"]


def _memory(row: dict[str, Any] | None) -> str:
    return "-" if row is None else memory(row["peak_bytes"])


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
