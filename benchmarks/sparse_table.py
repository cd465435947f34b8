"""The table of the part "sparse": kept values, time and memory of sparse gradients, by entropy."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.markdown import table
from fused_sd.bench.table import US, memory, number, percent

PART = "sparse"
COLUMNS = (
    "entropy",
    "gradient",
    "ms",
    "x 4u",
    "peak memory",
    "entries a token",
    "dense tokens",
    "dropped",
    "dH error",
    "dW error",
)
LEGEND = (
    "4u: four GEMMs with the head, timed in the same cell; entropy: the student's mean, in nat; "
    "entries: kept for a token that is not dense; dropped: share of the gradient's L1 norm."
)


def sparse_lines(cells: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table with a row for each provider in each cell, and its legend."""
    rows = [_row(cell, row) for cell in cells.values() for row in cell["rows"]]
    yield from (*table(["objective", *COLUMNS], rows, texts=3), "", LEGEND, "")


def times_4u(cell: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Return a provider's time over that of four GEMMs, even if the objective needs fewer."""
    if cell["floor"] is None or row["times"] is None:
        return None
    return float(row["times"]["p50"] * cell["floor"]["u"] / (4 * cell["floor"]["milliseconds"]))


def _gradient(cell: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the form of the library's gradient, or another provider's name."""
    if row["provider"] == US:
        return "exactly sparse" if cell["objective"] == "topk_renormalized" else "dense"
    return str(row["provider"]).removeprefix(f"{US}, ")


def _row(cell: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    ratio, kept, errors = times_4u(cell, row), row["kept"], row["errors"]
    problem = f"{cell['objective']}, {cell['shape']}, {cell['tokens']}"
    return [
        problem,
        f"{cell['entropy']:.2f}",
        _gradient(cell, row),
        number(row["times"]["p50"]) if row["times"] else row["status"],
        "-" if ratio is None else f"{ratio:.2f}",
        memory(row["peak_bytes"]),
        "-" if kept is None else f"{kept['entries']:.3g}",
        "-" if kept is None else percent(kept["dense_share"]),
        "-" if kept is None else percent(kept["dropped_share"]),
        *(percent(errors[name] if errors else None) for name in ("dhidden", "dweight")),
    ]
