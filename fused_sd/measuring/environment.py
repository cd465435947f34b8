"""The environment for bug reports: versions, GPUs, and the backend that ``"auto"`` chooses."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

import fused_sd
from fused_sd.engine.backend import choose_functions
from fused_sd.head.projection import accumulation_dtype

DISTRIBUTIONS = (
    "triton",
    "transformers",
    "trl",
    "peft",
    "verl",
    "liger-kernel",
    "flash-attn",
    "numpy",
)
ABSENT = "not installed"


def installed(distribution: str) -> str:
    """Return a distribution's version from its metadata: importing a trainer is slow or fails."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ABSENT


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the kind of CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"


def chosen_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend, "triton" or "torch", that runs operands of a dtype on a device.

    Args:
        backend: the losses' argument: "auto", "triton" or "torch".
        device: of the operands.
        dtype: of hidden states and head.

    Raises:
        ValueError: the backend cannot run there.
    """
    rows = choose_functions(backend, device, accumulation_dtype(dtype)).rows
    return "triton" if rows.__name__.startswith("fused_sd.kernels") else "torch"


def driver_version() -> str:
    """Return the NVIDIA driver's version; PyTorch knows only the CUDA it was built with."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = run.stdout.split()
    return lines[0] if lines else "unknown"


def environment() -> dict[str, str]:
    """Return every fact by its name, in the order of the report."""
    facts = {
        "fused_sd": fused_sd.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda build": torch.version.cuda or torch.version.hip or "none",
    }
    facts |= {name: installed(name) for name in DISTRIBUTIONS}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    for index in gpus:
        major, minor = torch.cuda.get_device_capability(index)
        facts[f"gpu {index}"] = f"{torch.cuda.get_device_name(index)} (capability {major}.{minor})"
    if gpus:
        facts["driver"] = driver_version()
    else:
        facts["gpu"] = "none"
    for name, dtype in (("bf16, fp16, fp32", torch.bfloat16), ("fp64", torch.float64)):
        facts[f"backend auto ({name})"] = _auto_backend(dtype)
    return facts


def environment_text(facts: dict[str, str]) -> str:
    """Format the facts, one a line."""
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {value}" for name, value in facts.items())


def _auto_backend(dtype: torch.dtype) -> str:
    """The backend that "auto" chooses on this machine, or why it fails."""
    try:
        return chosen_backend("auto", default_device(), dtype)
    except Exception as error:  # the report of a broken installation must not fail itself
        return f"fails: {error}"
