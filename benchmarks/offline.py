"""Compile every Triton program for a GPU that is absent.

The launching functions of ``kernels/`` run on meta tensors, so that programs are compiled with the
argument types, strides and alignments of real launches; nothing is launched.  The process must not
have ``TRITON_INTERPRET``: it either interprets or compiles.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fused_sd import Jsd, SkewKl
from fused_sd.engine.gradients import MOST
from fused_sd.engine.layout import workspace_width
from fused_sd.kernels import entries, rows, sparse
from fused_sd.terms.divergence import DIVERGENCES
from fused_sd.terms.divergence_term import DivergenceTerm, divergence_term
from fused_sd.torch_kernels.rows import EntryGradient, RowGradient
from fused_sd.torch_kernels.sparse import SparseValues

DTYPES = (torch.bfloat16, torch.float32)


class AbsentDriver:
    """A driver for Triton's launcher that names a GPU which is not attached."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Compilation(NamedTuple):
    """A program compiled for one launch."""

    name: str
    arguments: dict[str, Any]  # by keyword, with Triton's options
    kernel: Any


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Compilation]]:
    """Compile for the target, instead of launching, inside this context; yields what was compiled.

    The process keeps the absent GPU: nothing can be launched in it afterwards.
    """
    compiled: list[Compilation] = []
    run = JITFunction.run

    def compile_instead(self: Any, *, grid: Any, warmup: bool = False, **arguments: Any) -> Any:
        kernel = run(self, grid=grid, warmup=True, **arguments)
        compiled.append(Compilation(self.fn.__name__, arguments, kernel))
        return kernel

    driver.set_active(AbsentDriver(target))
    JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        JITFunction.run = run


def launch_all(vocab: int, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Call every launching function, with operands and gradients of the given dtypes."""
    launch_rows(vocab, dtypes)
    launch_entries(vocab)
    launch_sparse(vocab, dtypes)


def launch_rows(vocab: int, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Call every function of ``kernels/rows.py`` in each of its forms."""
    student, teacher = (torch.empty(1024, vocab, device="meta") for _ in range(2))
    row = torch.empty(1024, device="meta")
    rows.log_normalizer(student)
    rows.lse_and_entropy(student)
    sides = rows.normalizers(student, teacher)
    rows.row_metrics(student, teacher, sides, rows.ROW_METRICS)
    for dtype in dtypes:
        out = student if dtype == student.dtype else torch.empty_like(student, dtype=dtype)
        for slope in (None, row):
            rows.softmax_gradient_(student, row, row, slope, 30.0, out)
        for name in DIVERGENCES:
            pair = (student, teacher, sides, _term_of(name))
            for entry_clip in (None, 0.05):
                rows.divergence_(*pair, entry_clip, None)
                rows.divergence_(*pair, entry_clip, RowGradient(row, None, out))
        for divergence in (Jsd(0.01), SkewKl(0.1)):  # mixtures that nearly are one side
            term = divergence_term(divergence)
            rows.divergence_(student, teacher, sides, term, None, RowGradient(row, None, out))


def _term_of(name: str) -> DivergenceTerm:
    definition = DIVERGENCES[name]
    return divergence_term(name if definition.setting is None else definition.setting())


def launch_entries(vocab: int) -> None:
    """Call every function on chosen entries, of rows as wide as a chunk's."""
    logits = torch.empty(1024, workspace_width(vocab), device="meta")
    row, narrow = torch.empty(1024, device="meta"), torch.empty_like(logits, dtype=torch.bfloat16)
    for k in (1, 100):
        columns = torch.empty(1024, k, dtype=torch.int64, device="meta")
        found, rest = entries.take_out_(logits, columns)
        for name in DIVERGENCES:
            term = _term_of(name)
            for entry_clip in (None, 0.05):
                entries.compare_entries(found, found, None, term, entry_clip)
                entries.compare_entries(found, found, (rest, rest), term, entry_clip)
        given = EntryGradient(columns, found, found, row)
        for out in (narrow, logits):
            rows.softmax_gradient_(logits, row, row, None, 30.0, out, given)


def launch_sparse(vocab: int, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Call every function of ``kernels/sparse.py`` and ``kernels/selection.py``."""
    for dtype in dtypes:
        hidden = torch.empty(1024, 4096, dtype=dtype, device="meta")
        weight = torch.empty(vocab, 4096, dtype=dtype, device="meta")
        gradient = torch.empty(1024, workspace_width(vocab), dtype=dtype, device="meta")
        selection = sparse.select(gradient[:, :vocab], 2.0**-8, MOST)
        is_dense = torch.empty(1024, dtype=torch.bool, device="meta")
        sparse.compact(sparse.trim(selection, torch.empty((), device="meta"), is_dense), 65536)
        sparse.entry_logits(hidden, weight, torch.empty(1024, 64, dtype=torch.int64, device="meta"))
        wide = torch.empty(4096, device="meta")
        factor = torch.empty(1024, device="meta")
        columns = torch.empty(65536, dtype=torch.int32, device="meta")
        starts = torch.empty(1025, dtype=torch.int64, device="meta")
        values = SparseValues(columns, torch.empty(65536, device="meta"), starts, factor)
        sparse.gather_sum(values, weight, wide, factor, dtype)
        base = torch.empty(vocab, 4096, device="meta"), torch.empty((), device="meta")
        sparse.segment_sum(values, hidden, vocab, factor, *base, dtype)
    for k in (20, 100, 1024):  # short to long lists
        sparse.top_k(torch.empty(1024, workspace_width(vocab), device="meta"), k)
