"""Compile every Triton program for GPUs that are absent, and print the resources that it takes.

    PYTHONPATH=. python tests/support/compile_kernels.py             prints a table for all targets
    PYTHONPATH=. python tests/support/compile_kernels.py cuda 90     prints JSON for one target

Each target needs a process of its own without ``TRITON_INTERPRET`` (``benchmarks/offline.py``).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.offline import compiling, launch_all
from fused_sd.engine.layout import ALIGNMENT, workspace_width

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TARGETS = ("cuda 80", "cuda 90", "cuda 100", "hip gfx942")
VOCABULARIES = (workspace_width(100278), 100279)  # padded as in a chunked run; aligned to nothing


class Compiled(NamedTuple):
    """A program compiled for one launch."""

    name: str
    arguments: dict[str, object]  # by keyword, with Triton's options
    aligned: bool  # whether rows of logits start at aligned addresses, as in a chunked run
    kernel: object


def compile_all(target: GPUTarget) -> list[Compiled]:
    """Run every launching function, and compile what it would launch."""
    compiled: list[Compiled] = []
    for vocab in VOCABULARIES:
        aligned = vocab % ALIGNMENT == 0
        with compiling(target) as found:
            launch_all(vocab)
        compiled += [Compiled(name, given, aligned, kernel) for name, given, kernel in found]
    return compiled


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
