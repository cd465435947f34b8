"""The output of ``fused_sd verify``: a table for terminals or Markdown, and the verdict."""

import math
import textwrap
from collections.abc import Sequence

import torch

import fused_sd
from fused_sd.engine.certificate import TOLERANCE
from fused_sd.measuring.environment import device_name, installed
from fused_sd.verify.choices import Choices
from fused_sd.verify.promises import Measured

GROUPS = ("fused_sd", "16-bit logits")
COLUMNS = ("loss", "dH", "dW", "worst")
LINE = 96
NAME_WIDTH, KL_WIDTH, WIDTH = 20, 6, 9  # with two spaces between the groups: 100
LEGEND = (
    "Errors relative to float64 on the same operands: of the loss, of the gradients w.r.t. hidden "
    "states (dH) and head (dW) by norm, and of the gradients' worst element.  16-bit logits: the "
    "same with logits rounded once.  KL: mean KL(teacher || student) of the tokens.  "
    f"sparse: gradient='sparse', which drops up to {TOLERANCE:.1%} of the logits' gradient."
)
KEPT = (
    "errors of losses and dense gradients within bounds and never above those of 16-bit logits, "
    "those of sparse gradients within their certificates, exactly 0 for a teacher equal to the "
    "student, equal bits in every run, no effect of NaN in a masked token"
)


def error_text(error: float, dtype: torch.dtype) -> str:
    """Format an error with two digits, in percent for 16-bit operands."""
    if not math.isfinite(error) or dtype not in (torch.bfloat16, torch.float16):
        return f"{error:.1e}"
    percent = 100 * error
    if percent < 0.001:
        return "<0.001 %" if percent else "0 %"
    return f"{percent:.{max(0, 1 - math.floor(math.log10(percent)))}f} %"


def legend_lines() -> list[str]:
    """Return the lines that explain the columns."""
    return [*textwrap.wrap(LEGEND, LINE), ""]


def cells(measured: Measured, dtype: torch.dtype) -> list[str]:
    """Return the cells of a row of the table."""
    errors = (*measured.fused, *measured.rounded)
    kl = "-" if measured.kl is None else f"{measured.kl:.0e}"
    return [measured.name, kl, *(error_text(error, dtype) for error in errors)]


def setting_lines(choices: Choices, top_logit: float, entropy: float) -> list[str]:
    """Return the lines that say on which device and operands the errors were measured."""
    sizes = f"{choices.num_tokens} tokens x {choices.hidden_size} x {choices.vocab}"
    versions = f"fused_sd {fused_sd.__version__}, torch {torch.__version__}"
    if choices.backend == "triton":
        versions += f", triton {installed('triton')}"
    return [
        f"{device_name(choices.device)}, {choices.dtype_name}, {choices.backend}; {versions}",
        f"{sizes}, seed {choices.seed}; mean largest logit {top_logit:.0f}, entropy "
        f"{entropy:.1f} nat",
    ]


def row_line(row: Sequence[str]) -> str:
    """Format a row for a terminal."""
    name, kl, *errors = row
    half = len(COLUMNS)
    sides = (
        "".join(f"{text:>{WIDTH}}" for text in side) for side in (errors[:half], errors[half:])
    )
    return f"{name:{NAME_WIDTH}}{kl:>{KL_WIDTH}}" + "  ".join(sides)


def header_lines() -> list[str]:
    """Return the two lines above the rows of a terminal."""
    groups = "  ".join(f"{name:>{WIDTH * len(COLUMNS)}}" for name in GROUPS)
    return [" " * (NAME_WIDTH + KL_WIDTH) + groups, row_line(["loss", "KL", *COLUMNS, *COLUMNS])]


def markdown_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the table in Markdown."""
    columns = ["loss", "KL", *COLUMNS, *(f"{name}, {GROUPS[1]}" for name in COLUMNS)]
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (columns, ruler, *rows)]


def verdict_lines(num_losses: int, broken: Sequence[str]) -> list[str]:
    """Return the verdict: every promise is kept, or the list of broken ones."""
    if broken:
        count = "1 promise is" if len(broken) == 1 else f"{len(broken)} promises are"
        return [f"BROKEN: {count} not kept.", *(f"  {line}" for line in broken)]
    count = "The loss keeps" if num_losses == 1 else f"All {num_losses} losses keep"
    return textwrap.wrap(f"OK.  {count} every promise: {KEPT}.", LINE)
