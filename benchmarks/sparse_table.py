"""The part "sparse" as a table: what is kept, what it costs, and what it saves, by entropy."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.markdown import line, ruler
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
    "4u: four products with the head, by the bare GEMMs of the same cell; entropy: nat, of the "
    "student; entries: kept of a token that is not dense; dropped: share of the gradient's L1 norm."
)


def sparse_lines(cells: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """A row for everybody in each cell, dense beside sparse."""
    yield line(["objective", *COLUMNS])
    yield ruler(3, 1 + len(COLUMNS))
    for cell in cells.values():
        yield from (line(_row(cell, row)) for row in cell["rows"])
    yield from ("", LEGEND, "")


def times_4u(cell: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """A time over that of four products, whatever the objective needs of them."""
    if cell["floor"] is None or row["times"] is None:
        return None
    return float(row["times"]["p50"] * cell["floor"]["u"] / (4 * cell["floor"]["milliseconds"]))


def _gradient(cell: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """How the library's is kept, or whose it is."""
    if row["provider"] == US:
        return "exactly sparse" if cell["objective"] == "topk_renormalized" else "dense"
    return str(row["provider"]).removeprefix(f"{US}, ")


def _row(cell: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    ratio, kept, errors = times_4u(cell, row), row["kept"], row["errors"]
    of = f"{cell['objective']}, {cell['shape']}, {cell['tokens']}"
    return [
        of,
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
