"""Read and write a model's parameters where wrappers and shards stand in the way.

* **FSDP2 and ZeRO-3** split each parameter over the ranks: FSDP2 into a DTensor, ZeRO-3 into flat
  pieces (``ds_tensor``) beside a parameter that is empty outside of a forward.  Averaging is
  elementwise, so each rank averages its own shards (``local_shard``) and nothing is communicated.
  Student and teacher must be sharded alike, which ``check_same_layout`` ensures.
* **Gathered copies** stand beside the shards: FSDP2's root module stays whole after a forward,
  because backward would need it next, and ``reshard`` splits it before any parameter is read.
  ZeRO-3 keeps small parameters whole, and ``shard_was_written`` frees them to be gathered again.
* **A sharded module cannot be deep copied.**  Where ZeRO-3 splits parameters as they are made,
  ``copy_module`` copies one at a time.  Where hooks of FSDP2 or of DeepSpeed's engine would come
  along, it refuses: the caller makes the copy earlier, or builds a second sharded module.
* **DDP, DeepSpeed's engine and torch.compile** prefix the names of parameters and cannot be copied:
  ``unwrap``.

DeepSpeed is known by the attributes of its parameters, and never imported (read in 0.19).
"""

import copy
from collections.abc import Iterator
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from fused_sd.checks import fail
from fused_sd.teaching.closures import find_foreign

PASS_WEIGHTS = "pass weights=, a copy that is prepared as the student is"


def reshard(*modules: nn.Module) -> None:
    """Free the gathered parameters of FSDP2 modules, so that all parameters are shards.

    FSDP2 keeps its root gathered after a forward, for a backward that a teacher never runs.
    """
    for part in (part for module in modules for part in module.modules()):
        fsdp: Any = part
        if hasattr(part, "reshard"):
            fsdp.reshard()


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DDP, DeepSpeed's engine and torch.compile."""
    # by class or _modules: a PeftModel forwards unknown attributes to the model that it wraps
    while (
        isinstance(module, DistributedDataParallel)
        or hasattr(type(module), "zero_optimization_stage")
        or "_orig_mod" in module._modules
    ):
        module = next(module.children())
    return module


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers with their names; a tied parameter comes once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def check_apart(weights: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher that changes with the student: it shares a weight, or runs its parts."""
    own = {place for parameter in student.parameters() for place in _places(parameter)}
    for name, parameter in weights.named_parameters():
        if not own.isdisjoint(_places(parameter)):
            rule = "share no parameter and no memory with the student"
            fail("weights", rule, f"{name}, which does", "pass a copy")
    foreign = find_foreign(weights, student)
    if foreign is not None:
        rule = "have forwards and hooks that run its own parts"
        remedy = "make the teacher before the student is wrapped, or pass weights=, loaded anew"
        fail("weights", rule, f"{foreign}, a function that holds the student", remedy)


def _places(parameter: Tensor) -> Iterator[Any]:
    """Yield what tells whether two parameters are one: the object, and where its shard lies."""
    yield id(parameter)
    held: list[Any] = [shard(parameter)]
    while held:
        tensor = held.pop()
        if hasattr(tensor, "__tensor_flatten__"):  # a DTensor or a quantised weight holds others
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            held += [part for part in parts if isinstance(part, Tensor)]
        elif address := tensor.untyped_storage().data_ptr():  # 0: empty, or on the meta device
            yield str(tensor.device), address


def copy_module(module: nn.Module) -> nn.Module:
    """Deep copy a module, whose parameters may be sharded by ZeRO-3 already.

    Raises:
        ValueError: the copy would lack weights or share hooks with the module, or the module holds
            something that cannot be copied.
    """
    _check_copyable(module)
    try:
        with _DetachedCopies():
            made = copy.deepcopy(module)
    except (TypeError, AttributeError, PicklingError) as error:  # a lock, a file, a generator
        fail("student", "be copyable", f"{type(error).__name__}: {error}", PASS_WEIGHTS)
    for own, new in zip(module.parameters(), made.parameters()):
        if _is_zero(own):  # the copy is empty, and an ordinary parameter
            new.data = whole(shard(own), own)
            zero: Any = own
            zero.convert_to_zero_parameters([new])
    return made


class _DetachedCopies(TorchFunctionMode):
    """Copies without their graph what ``deepcopy`` refuses: results that a module has kept.

    A module may hold router logits of its last forward, the product of ``weight_norm``, or views of
    what PEFT ties.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _check_copyable(module: nn.Module) -> None:
    """Refuse a student whose deep copy would lack weights."""
    remedy = f"copy it before sharding, or {PASS_WEIGHTS}"
    for name, attribute in (("FSDP2", "reshard"), ("DeepSpeed", "ds_id")):
        if any(hasattr(part, attribute) for part in module.modules()):
            fail("student", "be whole to be copied", f"{name} modules", remedy)
    for name, tensor in module.named_parameters():
        if tensor.is_meta or shard(tensor).numel() == 0:
            got = "on the meta device" if tensor.is_meta else "empty"
            fail("student", "be whole to be copied", f"{name} {got}", remedy)


def check_same_layout(
    students: dict[str, Tensor], teachers: dict[str, Tensor], owner: str = "weights"
) -> None:
    """Check that both sides have the same names, shapes and shards."""
    if students.keys() != teachers.keys():
        other = min(students.keys() ^ teachers.keys())
        remedy = "pass a copy of it, or make a new teacher where its structure was changed"
        fail(owner, "be those of the same model", f"{other} on one side only", remedy)
    for name, student in students.items():
        teacher = teachers[name]
        if _layout(student) != _layout(teacher):
            both = (" ".join(map(str, _layout(tensor))) for tensor in (student, teacher))
            got = f"{name} {' and '.join(both)}"
            remedy = "shard both alike, or make a new teacher where the student was resized"
            fail(owner, "have the shapes and shards of the student's", got, remedy)


def shard(tensor: Any) -> Tensor:
    """Return what this rank holds: ZeRO-3's flat piece, or the tensor, which may be a DTensor."""
    if not _is_zero(tensor):
        return tensor
    piece = tensor.ds_tensor
    if piece.numel() == 0 or piece.dtype != tensor.dtype:
        got = f"{piece.numel()} elements of {piece.dtype}"
        remedy = 'set zero_optimization\'s offload_param.device to "none" or "cpu", and its '
        remedy += "zero_quantized_nontrainable_weights to false"
        fail("weights", f"lie in memory as {tensor.dtype} to be followed", got, remedy)
    return piece


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard as an ordinary tensor, or the tensor itself."""
    piece: Any = shard(tensor)
    return piece.to_local() if hasattr(piece, "to_local") else piece


def shard_was_written(tensor: Any) -> None:
    """Free ZeRO-3's gathered copies of a parameter, which no longer equal its shards."""
    if _is_zero(tensor):
        tensor.ds_secondary_tensor = None
        tensor.partition()


def whole(held: Any, like: Any) -> Tensor:
    """Gather the shards of all ranks, each of which must call this.

    Args:
        held: this rank's shard, of any dtype.
        like: the parameter that is sharded alike.
    """
    if hasattr(held, "full_tensor"):
        return held.full_tensor()
    if not _is_zero(like):
        return held
    world_size, device = like.ds_zero_partition_world_size, like.device
    gathered = held.new_empty(world_size, held.numel(), device=device)
    # the function for one output tensor has other names in other releases of PyTorch
    torch.distributed.all_gather(list(gathered), held.to(device), group=like.ds_process_group)
    return gathered.flatten()[: like.ds_numel].view(like.ds_shape)


def shard_like(value: Tensor, like: Any) -> Tensor:
    """Return this rank's shard of a whole tensor, or the value if it is a shard already.

    Args:
        value: a tensor that all ranks have.
        like: the parameter that is sharded alike.
    """
    if _layout(value) == _layout(like) or value.shape != getattr(like, "ds_shape", like.shape):
        return value
    if _is_zero(like):
        piece = shard(like).new_zeros(shard(like).shape, dtype=value.dtype)
        start = piece.numel() * like.ds_zero_partition_rank
        own = value.flatten()[start : start + piece.numel()]  # the last rank's piece is padded
        piece[: own.numel()] = own
        return piece
    if hasattr(like, "placements") and not hasattr(value, "placements"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Return a shard's shape and, for a DTensor, its placements and device mesh."""
    held = shard(tensor)
    shards = (getattr(held, name, None) for name in ("placements", "device_mesh"))
    return tuple(held.shape), *(part for part in shards if part is not None)


def _is_zero(tensor: Any) -> bool:
    return hasattr(tensor, "ds_tensor")
