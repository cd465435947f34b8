"""Count the instructions that each row program spends on a column, in code compiled for sm_90.

    PYTHONPATH=. python tests/support/count_instructions.py             prints a table
    PYTHONPATH=. python tests/support/count_instructions.py --json      prints JSON

A row program reads a row in a loop.  The machine code of the loop's body, divided by the columns
that a thread handles in one turn, is what a column of a pair of rows costs.  Nothing is launched
and no GPU is needed, but Triton's NVIDIA tools are, and a process without ``TRITON_INTERPRET``.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from compile_kernels import resources
from triton.backends.compiler import GPUTarget

from benchmarks.offline import compiling
from fused_sd import Jsd, MixedKl, SkewKl
from fused_sd.kernels import rows
from fused_sd.kernels.tuning import DEFAULT
from fused_sd.terms.divergence_term import divergence_term
from fused_sd.torch_kernels.rows import ROW_METRICS, RowGradient

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
WIDTH = 151952  # columns of rows that start at aligned addresses, as in a chunked run
COLUMNS_OF_A_THREAD = DEFAULT.block_v / (32 * DEFAULT.num_warps)
ENTROPIES = ("student_entropy", "teacher_entropy")
ALL_BUT_JSD = tuple(name for name in ROW_METRICS if name != "jsd")


def cases() -> dict[str, Callable[[], object]]:
    """What is counted: functions of ``kernels/rows.py``, each of which launches programs."""
    student, teacher = (torch.empty(512, WIDTH, device="meta") for _ in range(2))
    row = torch.empty(512, device="meta")
    out = torch.empty_like(student, dtype=torch.bfloat16)
    sides, gradient = rows.normalizers(student, teacher), RowGradient(row, None, out)

    def compare(divergence, names=(), entry_clip=None):
        given = student, teacher, sides, divergence_term(divergence), entry_clip, gradient
        return lambda: rows.divergence_(*given, names)

    def metrics(names):
        return lambda: rows.row_metrics(student, teacher, sides, names)

    return {
        "log_normalizer": lambda: rows.log_normalizer(student),
        "lse_and_entropy": lambda: rows.lse_and_entropy(student),
        "normalizers": lambda: rows.normalizers(student, teacher),
        "normalizers and largest": lambda: rows.normalizers(student, teacher, has_largest=True),
        "softmax_gradient": lambda: rows.softmax_gradient_(student, row, row, None, None, out),
        "reverse_kl": compare("reverse_kl"),
        "forward_kl": compare("forward_kl"),
        "mixed_kl": compare(MixedKl(0.5)),
        "jsd": compare(Jsd(0.5)),
        "jsd of beta 0.3": compare(Jsd(0.3)),
        "jsd of beta 0.01": compare(Jsd(0.01)),
        "skew_kl": compare(SkewKl()),
        "skew_kl of weight 0.1": compare(SkewKl(0.1)),
        "forward_kl, entry clip": compare("forward_kl", entry_clip=0.05),
        "metrics but jsd": metrics(ALL_BUT_JSD),
        "all metrics": metrics(ROW_METRICS),
        "reverse_kl, entropies": compare("reverse_kl", ENTROPIES),
        "reverse_kl, all metrics": compare("reverse_kl", ROW_METRICS),
        "jsd, all metrics": compare(Jsd(0.5), ROW_METRICS),
        "jsd of beta 0.3, all metrics": compare(Jsd(0.3), ROW_METRICS),
    }


def machine_code(cubin: bytes) -> list[tuple[str, str]]:
    """The lines of a program: (label, "") or (opcode, operands)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(DISASSEMBLER), "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)(.*?);"
    return [(label or opcode, operands) for label, opcode, operands in re.findall(pattern, listing)]


def main_loop(code: list[tuple[str, str]]) -> list[str]:
    """Opcodes of the loop over whole blocks: of the loops that load, the shorter one.

    The loop over what is left of a row also has the instructions that mask it.
    """
    at = {name: position for position, (name, _) in enumerate(code) if name.startswith(".")}
    loops = []
    for end, (opcode, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands)
        if opcode.startswith("BRA") and target and at[target.group()] < end:
            loops.append([op for op, _ in code[at[target.group()] : end + 1] if op[0] != "."])
    return min((loop for loop in loops if any(op.startswith("LDG") for op in loop)), key=len)


def count() -> list[dict[str, object]]:
    """The instructions a column and the resources of every launch of every case."""
    counted = []
    with compiling(GPUTarget("cuda", 90, 32)) as launched:
        for case, call in cases().items():
            launched.clear()
            call()
            for program, _, kernel in launched:
                loop, used = main_loop(machine_code(kernel.asm["cubin"])), resources(kernel)
                entry = {"case": case, "program": program, "instructions": len(loop)}
                entry["instructions"] /= COLUMNS_OF_A_THREAD
                entry |= {"registers": used["registers"], "spilled": used["spilled"]}
                counted.append(entry)
    return counted


if __name__ == "__main__":
    entries = count()
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(entries))
    else:
        for entry in entries:
            print(
                f"{entry['case']:30} {entry['program']:20} "
                f"{entry['instructions']:6.1f} a column, {entry['registers']:3} registers"
            )
