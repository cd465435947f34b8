"""Block sizes of the row programs: measured ones for the GPUs in ``tuned.json``, else a default.

``python -m benchmarks.tune`` measures the candidates on the GPU at hand and writes the table.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("tuned.json")


class Launch(NamedTuple):
    """How a row program is launched."""

    block_v: int  # columns that it holds at a time
    num_warps: int


DEFAULT = Launch(2048, 8)  # two sides and their terms fit the registers
_forced: dict[str, Launch] = {}


def launch_for(program: str, device: torch.device) -> Launch:
    """The launch of a program on a device."""
    return _forced.get(program) or tuned(family_of(device)).get(program, DEFAULT)


@contextlib.contextmanager
def forced(program: str, launch: Launch) -> Iterator[None]:
    """Launch a program in one way, whatever the table says."""
    _forced[program] = launch
    try:
        yield
    finally:
        del _forced[program]


def family_of(device: torch.device) -> str:
    """The key of a device in the table: ``sm_90`` for every Hopper GPU, ``gfx942`` on ROCm."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def tuned(family: str) -> dict[str, Launch]:
    """The measured launches of a family of GPUs, by program."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    launches = table.get(family, {}).get("launches", {})
    return {program: Launch(*launch) for program, launch in launches.items()}
