"""Read and write a model's parameters where wrappers and shards stand in the way.

* **FSDP2** splits each parameter into shards (DTensors).  Averaging is elementwise, so each rank
  averages its own shards (``local_shard``) and nothing is communicated.  Student and teacher must
  be sharded alike, which ``check_same_layout`` ensures.
* **FSDP2's root module** stays gathered after a forward, because backward would need it next.  A
  teacher never runs backward, so the root would show whole tensors beside the student's shards:
  ``reshard`` splits them again before any parameter is read.
* **A sharded module cannot be deep copied**, so ``check_copyable`` refuses it.  The caller makes
  the copy before sharding, or builds a second sharded module.
* **ZeRO-3** leaves parameters empty outside of a forward: there is nothing to average.
* **DDP and torch.compile** prefix the names of parameters and cannot be copied: ``unwrap``.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_sd.checks import fail


def reshard(*modules: nn.Module) -> None:
    """Free the gathered parameters of FSDP2 modules, so that all parameters are shards.

    FSDP2 keeps its root gathered after a forward, for a backward that a teacher never runs.
    """
    for part in (part for module in modules for part in module.modules()):
        fsdp: Any = part
        if hasattr(part, "reshard"):
            fsdp.reshard()


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DDP and torch.compile."""
    # not hasattr: a PeftModel forwards unknown attributes to the model that it wraps
    while isinstance(module, DistributedDataParallel) or "_orig_mod" in module._modules:
        module = next(module.children())
    return module


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers with their names; a tied parameter comes once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def check_copyable(student: nn.Module) -> None:
    """Refuse a student whose deep copy would lack weights."""
    remedy = "copy it before sharding, or pass weights=, a copy that is prepared as the student is"
    if any(hasattr(part, "reshard") for part in student.modules()):
        fail("student", "be whole to be copied", "FSDP2 modules", remedy)
    for name, tensor in student.named_parameters():
        if tensor.is_meta or tensor.numel() == 0:
            got = "on the meta device" if tensor.is_meta else "empty, as ZeRO-3 leaves it"
            fail("student", "be whole to be copied", f"{name} {got}", remedy)


def check_same_layout(
    students: dict[str, Tensor], teachers: dict[str, Tensor], owner: str = "weights"
) -> None:
    """Check that both sides have the same names, shapes and shards."""
    if students.keys() != teachers.keys():
        other = min(students.keys() ^ teachers.keys())
        fail(owner, "be those of the same model", f"{other} on one side only", "pass a copy of it")
    for name, student in students.items():
        teacher = teachers[name]
        if _layout(student) != _layout(teacher):
            both = (" ".join(map(str, _layout(tensor))) for tensor in (student, teacher))
            got = f"{name} {' and '.join(both)}"
            fail(owner, "have the shapes and shards of the student's", got, "shard both alike")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor's shape and, for a DTensor, its placements and device mesh."""
    shards = (getattr(tensor, name, None) for name in ("placements", "device_mesh"))
    return tuple(tensor.shape), *(part for part in shards if part is not None)


def local_shard(tensor: Any) -> Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
