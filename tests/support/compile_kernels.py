"""Compile every Triton program for GPUs that are absent, and print the resources that it takes.

    python tests/support/compile_kernels.py             prints a table for all targets
    python tests/support/compile_kernels.py cuda 90     prints JSON for one target

The launching functions of ``kernels/`` run on meta tensors, so that programs are compiled with the
argument types, strides and alignments of real launches; nothing is launched.  Each target needs a
process of its own without ``TRITON_INTERPRET``: a process either interprets or compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fused_sd import Jsd, SkewKl
from fused_sd.engine.gradients import MOST
from fused_sd.engine.layout import ALIGNMENT, workspace_width
from fused_sd.kernels import entries, rows, sparse
from fused_sd.terms.divergence import DIVERGENCES
from fused_sd.terms.divergence_term import DivergenceTerm, divergence_term
from fused_sd.torch_kernels.rows import EntryGradient, RowGradient
from fused_sd.torch_kernels.sparse import SparseValues

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TARGETS = ("cuda 80", "cuda 90", "cuda 100", "hip gfx942")
VOCABULARIES = (workspace_width(100278), 100279)  # padded as in a chunked run; aligned to nothing


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


class Compiled(NamedTuple):
    """A program compiled for one launch."""

    name: str
    arguments: dict[str, object]  # by keyword, with Triton's options
    aligned: bool  # whether rows of logits start at aligned addresses, as in a chunked run
    kernel: object


def compile_all(target: GPUTarget) -> list[Compiled]:
    """Run every launching function, and compile what it would launch."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_instead(self, *, grid, warmup=False, **arguments):
        kernel = run(self, grid=grid, warmup=True, **arguments)
        compiled.append(Compiled(self.fn.__name__, arguments, vocab % ALIGNMENT == 0, kernel))
        return kernel

    driver.set_active(AbsentDriver(target))
    JITFunction.run = compile_instead
    for vocab in VOCABULARIES:
        launch_rows(vocab)
        launch_entries(vocab)
        launch_sparse(vocab)
    return compiled


def launch_rows(vocab: int) -> None:
    """Call every function of ``kernels/rows.py`` in each of its forms."""
    student, teacher = (torch.empty(1024, vocab, device="meta") for _ in range(2))
    row = torch.empty(1024, device="meta")
    rows.log_normalizer(student)
    rows.lse_and_entropy(student)
    sides = rows.normalizers(student, teacher)
    rows.row_metrics(student, teacher, sides, rows.ROW_METRICS)
    narrow = torch.empty_like(student, dtype=torch.bfloat16)
    for out in (narrow, student):
        for slope in (None, row):
            rows.softmax_gradient_(student, row, row, slope, 30.0, out)
        for name in DIVERGENCES:
            pair = (student, teacher, sides, _term_of(name))
            for entry_clip in (None, 0.05):
                rows.divergence_(*pair, entry_clip, None)
                rows.divergence_(*pair, entry_clip, RowGradient(row, None, out))
    for divergence in (Jsd(0.01), SkewKl(0.1)):  # mixtures that nearly are one side
        term = divergence_term(divergence)
        rows.divergence_(student, teacher, sides, term, None, RowGradient(row, None, narrow))


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


def launch_sparse(vocab: int) -> None:
    """Call every function of ``kernels/sparse.py`` and ``kernels/selection.py``."""
    for dtype in (torch.bfloat16, torch.float32):
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


def resources(kernel) -> dict[str, object]:
    """Counts of registers, bytes spilled, function calls, barriers and 16-byte loads."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            dump = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
        ptx = kernel.asm["ptx"]
        return {
            "registers": int(found["REG"]),
            "spilled": int(found["STACK"]),
            "calls": len(re.findall(r"\bcall\b", ptx)),
            "barriers": len(re.findall(r"\b(bar|barrier)(\.cta)?\.sync", ptx)),
            "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        }
    assembly = kernel.asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None
        return int(found.group(1))

    return {
        "registers": count("vgpr_count"),
        "spilled": 4 * count("vgpr_spill_count"),
        "calls": assembly.count("s_swappc_b64"),
        "barriers": assembly.count("s_barrier"),
        "wide_loads": assembly.count("_load_dwordx4"),
    }


def describe(target: GPUTarget) -> list[dict[str, object]]:
    """The name and the resources of every compiled launch."""
    return [
        {
            "name": name,
            "in_place": bool(arguments.get("IN_PLACE")),
            "aligned": aligned,
            "shared": kernel.metadata.shared,
            **resources(kernel),
        }
        for name, arguments, aligned, kernel in compile_all(target)
    ]


def print_table() -> None:
    """Print the most that any variant of a program takes, for every target."""
    for target in TARGETS:
        command = [sys.executable, __file__, *target.split()]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        kernels = json.loads(run.stdout)
        for name in sorted({kernel["name"] for kernel in kernels}):
            variants = [kernel for kernel in kernels if kernel["name"] == name]
            most = {
                key: max(k[key] for k in variants) for key in ("registers", "shared", "spilled")
            }
            print(f"{target:12} {name:20} {len(variants):2} variants", *most.items())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_table()
    else:
        backend, arch = sys.argv[1:]
        wide = 32 if backend == "cuda" else 64
        print(json.dumps(describe(GPUTarget(backend, int(arch) if arch.isdigit() else arch, wide))))
