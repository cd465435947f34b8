"""``python -m benchmarks.report``: tables and plots from the stored results.

python -m benchmarks.report                    prints the tables
python -m benchmarks.report --update-readme    writes them into README.md, plots into docs/images
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, sparse_table
from benchmarks.markdown import line, ruler
from benchmarks.methods.storage import ROOT
from benchmarks.results_store import RESULTS, stored, stored_steps
from benchmarks.step.report import markdown as step_markdown
from fused_sd import checks
from fused_sd.bench.providers import PROVIDERS
from fused_sd.bench.table import US, is_ours, memory, number, percent

MARKER, END = "<!-- speed: python -m benchmarks.report --update-readme -->", "<!-- end -->"
TO_COME = (
    "**GPU figures are still to be measured**: by `python -m benchmarks.run --suite gpu`, which "
    "ends within nine minutes; `python -m benchmarks.report --update-readme` then puts them here."
)
ABSENT = "not installed"
WHOLE_TABLE = "main"  # the part whose cells are shown with everybody
SHOWN = {
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
ROW_METRICS = (
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
    """Print the tables, or put them where they belong; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs" / "images", help="folder of the plots"
    )
    parser.add_argument(
        "--update-readme", nargs="?", const=ROOT / "README.md", type=Path, metavar="PATH"
    )
    chosen = parser.parse_args(arguments)
    documents, steps = stored(chosen.results), stored_steps(chosen.results)
    if chosen.update_readme is None:
        print(*markdown_lines(documents, {}), *map(step_markdown, steps), sep="\n")
        return 0
    try:
        before, after = around(chosen.update_readme)
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    plots = {index: figures.plots(found, chosen.docs) for index, found in enumerate(documents)}
    inside = [re.sub("^#", "##", step_markdown(step), flags=re.MULTILINE) for step in steps]
    body = "\n".join([*markdown_lines(documents, plots), *inside]).rstrip()
    chosen.update_readme.write_text(f"{before}\n\n{body}\n\n{after}", encoding="utf-8")
    return 0


def around(path: Path) -> tuple[str, str]:
    """What stands before and behind the tables' place, markers included.

    Raises:
        ValueError: the file has no such place.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.search(f"{re.escape(MARKER)}\n(.*?){re.escape(END)}", text, re.DOTALL)
    if match is None:
        checks.fail(
            "--update-readme",
            f"name a file with a line {MARKER!r} and a line {END!r} below it",
            repr(str(path)),
            "add the two lines where the tables belong",
        )
    assert match is not None
    return text[: match.start(1) - 1], text[match.end(1) :]


def markdown_lines(
    documents: Sequence[dict[str, Any]], plots: dict[int, list[str]]
) -> Iterator[str]:
    """The tables of every suite; what is not measured is said."""
    if not any(found["suite"].startswith("gpu") for found in documents):
        yield from (TO_COME, "")
    for index, found in enumerate(documents):
        yield from (setting_line(found["environment"]), "")
        for name in plots.get(index, []):
            yield from (f"![{SHOWN[name.rpartition('_')[2]]}](docs/images/{name})", "")
        for cell in found["parts"].get(WHOLE_TABLE, {}).values():
            yield from cell_lines(cell)
        sparse = found["parts"].get(sparse_table.PART, {})
        yield from (sparse_table.sparse_lines(sparse) if sparse else ())
        rest = [
            cell
            for part, cells in found["parts"].items()
            if part not in (WHOLE_TABLE, sparse_table.PART)
            for cell in cells.values()
            if cell["floor"] is not None
        ]
        if rest:
            yield from (line(ROW_METRICS), ruler(4, len(ROW_METRICS)), *map(summary_row, rest), "")


def setting_line(where: dict[str, str]) -> str:
    """Where all of a suite was measured, and by which versions."""
    packages = {provider.package for provider in PROVIDERS if provider.package}
    names = ("driver", "torch", "triton", *sorted(packages))
    known = [f"{name} {where[name]}" for name in names if where.get(name, ABSENT) != ABSENT]
    return f"{where['device']}; {', '.join(known)}; commit {where['commit']}:"


def cell_lines(cell: dict[str, Any]) -> Iterator[str]:
    """A cell with everybody, fastest first; who could not be measured, and why."""
    rows = sorted((r for r in cell["rows"] if r["times"]), key=lambda r: r["times"]["p50"])
    title = f"{cell['objective']}, {cell['shape']}, {cell['tokens']} tokens, {head(cell)}"
    yield line([title, *COLUMNS])
    yield ruler(1, 1 + len(COLUMNS))
    if cell["floor"] is not None:
        floor = cell["floor"]
        tflops = floor["flop"] / floor["milliseconds"] / 1e9
        name = f"the bare GEMMs ({floor['u']}u)"
        cells = [name, number(floor["milliseconds"]), "", "1.00", f"{tflops:.3g}"]
        yield line([*cells, *[""] * (len(COLUMNS) + 1 - len(cells))])
    yield from (measured_row(row) for row in rows)
    yield ""
    missing = [
        f"{r['provider']}: {r['status']} ({r['reason']})" for r in cell["rows"] if not r["times"]
    ]
    if missing:
        yield from (f"Without a time: {'; '.join(missing)}.", "")


def measured_row(row: dict[str, Any]) -> str:
    times, errors = row["times"], row["errors"]
    return line(
        [
            f"**{row['provider']}**" if row["provider"] == US else row["provider"],
            number(times["p50"]),
            f"{number(times['p20'])} - {number(times['p80'])}",
            _two(row["ratio_to_floor"]),
            _three(row["tflops"]),
            _three(row["row_gigabytes"]),
            memory(row["peak_bytes"]),
            *(percent(errors[name]) for name in ("loss_bias", "dhidden", "dweight")),
        ]
    )


def summary_row(cell: dict[str, Any]) -> str:
    """The library beside eager PyTorch and the fastest of all others."""
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
    return line(
        [
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
    )


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
