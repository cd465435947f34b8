"""How the Triton programs are launched: on which GPU, and with which block sizes.

Block sizes and warps of the programs that read whole rows are measured: ``tuned.json`` holds the
best ones by family of GPUs, and a program that it does not name is launched with a default.
``python -m benchmarks.tune`` measures the candidates on the GPU at hand and writes the table.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuned.json")


class Launch(NamedTuple):
    """Block size and warps of a program that reads whole rows."""

    block_v: int  # columns that a program reads at a time
    num_warps: int


DEFAULT = Launch(2048, 8)  # the registers hold this much of two sides and their terms
_forced: dict[str, Launch] = {}


def launch(program: Any, num_programs: int, data: Tensor, /, **arguments: Any) -> None:
    """Launch ``num_programs`` instances of a Triton program on the GPU that holds ``data``.

    Triton launches on the current GPU, which may be another one: a model that is spread over
    several GPUs has its head on the last.

    Args:
        program: a ``@triton.jit`` function.
        num_programs: size of the grid, which has one dimension; 0 launches nothing.
        data: any of the tensors that the program reads.
        arguments: the program's arguments and Triton's options (``num_warps``).  They are passed by
            keyword only, because two pointers that are swapped by position compile.
    """
    if num_programs:
        with torch.cuda.device_of(data):
            program[(num_programs,)](**arguments)


def launch_for(program: str, device: torch.device) -> Launch:
    """Block size and warps of a program, by its name, on a device."""
    return _forced.get(program) or tuned(family_of(device)).get(program, DEFAULT)


@contextlib.contextmanager
def forced(program: str, chosen: Launch) -> Iterator[None]:
    """Inside this context, use the given block size and warps for a program, by its name."""
    _forced[program] = chosen
    try:
        yield
    finally:
        del _forced[program]


def family_of(device: torch.device) -> str:
    """Key of a device in the table: ``sm_90`` for every Hopper GPU, ``gfx942`` on ROCm."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def tuned(family: str) -> dict[str, Launch]:
    """The measured launches of a family of GPUs, by the names of the programs."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    launches = table.get(family, {}).get("launches", {})
    return {program: Launch(*numbers) for program, numbers in launches.items()}
