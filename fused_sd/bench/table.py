"""A cell as text: a table for terminals, and how this library compares with each other one."""

from collections.abc import Sequence

from fused_sd.bench.cell import Cell, Row
from fused_sd.measuring.text import size_text
from fused_sd.verify.promises import Sparsity

LINE = 100
NAME = 28
COLUMNS = (("ms", 10), ("p20-p80", 15), ("x floor", 9), ("memory", 10), ("loss", 9), ("dH", 9))
US = "fused_sd"
RIGHT = ("ok", "checked")
EVEN = 0.05  # times or peaks that differ by a smaller share are called equal
LEGEND = (
    "ms: median of forward and backward; p20-p80: three runs of five lie between; x floor: time",
    "divided by that of the bare GEMMs; memory: peak beyond the operands, gradients included;",
    "loss, dH, dW: relative errors against float64.  Of sparse gradients: entries kept a token,",
    "share of tokens whose gradient is dense, share of its L1 norm that is dropped.",
)


def is_ours(provider: str) -> bool:
    """Whether a provider is this library, in any of its settings."""
    return provider.split(",")[0] == US


def table_lines(cell: Cell) -> list[str]:
    """Return the rows that are right, fastest first, then the others with the reason."""
    right = [row for row in cell.rows if row.status in RIGHT]
    right.sort(key=lambda row: row.times.p50 if row.times else 0.0)
    header = f"{'':{NAME}}" + "".join(f"{name:>{width}}" for name, width in COLUMNS) + f"{'dW':>9}"
    lines = [header, *(_line(cell, row) for row in right)]
    for row in cell.rows:
        if row.status not in RIGHT:
            lines.append(f"{row.provider:{NAME}}  {row.status}: {row.reason}"[: LINE * 2])
    for row in cell.rows:
        if row.kept is not None:
            lines.append(f"{row.provider}: {_kept_text(row.kept)}")
    return lines


def _kept_text(kept: Sparsity) -> str:
    return (
        f"{kept.entries:.3g} entries a token, {percent(kept.dense_share)} dense, "
        f"{percent(kept.dropped_share)} dropped"
    )


def setting_line(cell: Cell, title: str | None = None) -> str:
    """Return a line that says what was measured; the title is the objective if none is given."""
    counted = "" if cell.counted == cell.tokens else f" ({cell.counted} count)"
    head = "head trained" if cell.trainable else "head frozen"
    floor = "no floor"
    if cell.floor is not None:
        floor = f"floor {cell.floor.u}u = {cell.floor.milliseconds:.4g} ms"
    sizes = f"{cell.tokens} tokens{counted} x {cell.hidden_size} x {cell.vocab}"
    return (
        f"{title or cell.objective}: {sizes}, "
        f"{cell.dtype}, {head}, entropy {cell.entropy:.2f}; {floor}"
    )


def verdict_lines(cell: Cell) -> list[str]:
    """Compare this library with each of the others: time, memory and the gradient's error."""
    ours = next((row for row in cell.rows if row.provider == US), None)
    if ours is None or ours.status not in RIGHT:
        why = "was not measured" if ours is None else f"was not measured: {ours.reason}"
        return [f"{US} {why}"]
    others = [row for row in cell.rows if row is not ours and row.times is not None]
    return [_too_busy(cell, ours, row) or _verdict(ours, row) for row in others]


def _too_busy(cell: Cell, ours: Row, theirs: Row) -> str | None:
    """Refuse to compare times of which one is below its floor; None: they can be compared."""
    took = {row.provider: row.times.p50 for row in (ours, theirs) if row.times is not None}
    for row in (ours, theirs):
        least = cell.least_milliseconds(row)
        if least is not None and took[row.provider] < least:
            both = ", ".join(f"{name} took {number(ms)} ms" for name, ms in took.items())
            return (
                f"the machine was too busy to tell: {both}, and the GEMMs alone that "
                f"{row.provider} needs took {number(least)} ms"
            )
    return None


def _verdict(ours: Row, theirs: Row) -> str:
    assert ours.times is not None
    assert theirs.times is not None
    assert ours.peak_bytes is not None
    assert theirs.peak_bytes is not None
    speed = theirs.times.p50 / ours.times.p50
    if abs(speed - 1) < EVEN:
        time = "is as fast as"
    elif speed > 1:
        time = f"is {speed:.2g} x faster than"
    else:
        time = f"is {1 / speed:.2g} x SLOWER than"
    share = theirs.peak_bytes / max(ours.peak_bytes, 1)
    if abs(share - 1) < EVEN:
        memory = "the same memory"
    elif share > 1:
        memory = f"1/{share:.2g} of the memory"
    else:
        memory = f"{1 / share:.2g} x MORE memory"
    return f"{US} {time} {theirs.provider}, with {memory}{_accuracy(ours, theirs)}"


def _accuracy(ours: Row, theirs: Row) -> str:
    """Compare the gradients' errors, if they differ by more than a factor of 2."""
    if ours.errors is None or theirs.errors is None or not ours.errors.dhidden:
        return ""
    share = theirs.errors.dhidden / ours.errors.dhidden
    if share > 2:
        return f" and 1/{share:.2g} of the gradient's error"
    return f" and {1 / share:.2g} x MORE gradient error" if 0 < share < 0.5 else ""


def _line(cell: Cell, row: Row) -> str:
    ratio, times = cell.ratio(row), row.times
    texts = [
        "-" if times is None else number(times.p50),
        "-" if times is None else f"{number(times.p20)}-{number(times.p80)}",
        "-" if ratio is None else f"{ratio:.2f}",
        memory(row.peak_bytes),
        *(percent(error) for error in (row.errors or (None, None, None))),
    ]
    widths = [*(width for _, width in COLUMNS), 9]
    return f"{row.provider[: NAME - 1]:{NAME}}" + "".join(
        f"{text:>{width}}" for text, width in zip(texts, widths)
    )


def number(milliseconds: float) -> str:
    """Format milliseconds with three digits, or without decimals from 100 on."""
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def memory(num_bytes: int | None) -> str:
    """Format bytes; "-" for None."""
    return "-" if num_bytes is None else size_text(num_bytes)


def percent(error: float | None) -> str:
    """Format a relative error in percent with two digits; "-" for None."""
    if error is None:
        return "-"
    return f"{100 * error:.2g}%" if abs(error) >= 1e-5 else "<.001%"


def report_lines(cell: Cell, title: str | None = None) -> Sequence[str]:
    """Return the setting, the table and the comparison of a cell."""
    return [setting_line(cell, title), "", *table_lines(cell), "", *verdict_lines(cell)]
