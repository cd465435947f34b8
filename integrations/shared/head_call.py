"""Runs a function in the place of a model's head, inside the model's own forward.

A request's ``compute`` stands in for the forward of the head's module, so that everything before
the head is the model's own, and so that the hooks run which bring the head's weight: those of FSDP2
and ZeRO-3, which gather it, and accelerate's, which fetch a weight that is offloaded.  What the
model does after the head is not run: a forward hook ends the model's forward there.

(Read in torch 2.13, accelerate 1.15, DeepSpeed 0.19 and transformers 5.24.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fused_sd.checks import fail

Function = Callable[[Tensor], Any]
# Whose hooks do not change the logits.  transformers' hook keeps a copy, for output_hidden_states.
HOOKS_OF = ("torch.distributed.", "deepspeed.", "transformers.utils.output_capturing", __name__)
_installing = threading.Lock()


class _Answered(Exception):
    """Carries a function's result out of the model's forward."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


# torch.compile compiles what the model's forward calls, but traces neither locks nor threads
@torch.compiler.disable(recursive=False)
def call_in_place_of_head(head: nn.Module, function: Function, run_model: Callable[[], Any]) -> Any:
    """Run a model until it has called its head, and return what ``function`` returned there.

    Args:
        head: the module that the model calls for its logits.
        function: is called once, with the states that enter the head.
        run_model: calls the model's forward.

    Raises:
        ValueError: the forward ended without a call of the head, or the head has a hook that is
            not known to leave its logits as they are.
    """
    check_hooks(head)
    with _standing_in(head, function):
        try:
            run_model()
        except _Answered as answered:
            return answered.result
    fail(
        "model.forward",
        f"call the module of its output embeddings ({type(head).__name__})",
        "a forward that makes its logits otherwise",
        "use stock losses for this model",
    )


def call_inside(module: nn.Module, function: Callable[[], Any], states: Tensor) -> Any:
    """Return what ``function`` returns while accelerate's hook holds the weights of ``module``."""
    if not hasattr(module, "_hf_hook"):
        return function()
    with _standing_in(module, lambda _: function()):
        try:
            module(states)
        except _Answered as answered:
            return answered.result
    raise AssertionError("a module that is called runs its forward")


def forward_slot(module: nn.Module) -> str:
    """Return the attribute that holds a module's own forward.

    accelerate's ``add_hook_to_module`` moves it, and puts a function that runs the hook in the
    place of ``forward``.
    """
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def patched_forward(module: nn.Module) -> Any:
    """Return the forward that somebody has set on a module itself; None: its class's."""
    forward = module.__dict__.get(forward_slot(module))
    if isinstance(forward, _StandIn):  # a request is running
        forward = forward.previous
    # accelerate keeps the class's own forward as a bound method
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def check_hooks(head: nn.Module) -> None:
    """Refuse hooks that may change a head's logits, which a request never makes.

    A hook before the forward of ``head`` itself runs in a request as well, and may stay.
    """
    for part in head.modules():
        hooks = [part._forward_hooks, part._backward_hooks, part._backward_pre_hooks]
        hooks += [] if part is head else [part._forward_pre_hooks]
        for hook in (hook for kind in hooks for hook in kind.values()):
            owner = getattr(hook, "func", hook)  # of a functools.partial
            origin = getattr(owner, "__module__", None) or type(owner).__module__
            if not origin.startswith(HOOKS_OF):
                name = getattr(owner, "__qualname__", type(owner).__name__)
                fail(
                    "lm_head",
                    "have no hook that reads or changes its logits, which are never made",
                    f"{origin}.{name}",
                    "remove it with handle.remove()",
                )


class _StandIn:
    """The forward of a module while functions are to run in its place.

    Each thread has its own functions.  Calls by other threads, and calls that a function makes
    itself, run the forward that was there before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.slot = module, forward_slot(module)
        self.previous = module.__dict__.get(self.slot)
        self.waiting: dict[int, list[Function]] = {}
        self.num_users = 0
        self.answered: set[int] = set()
        # registered last, so that it runs after the hooks that FSDP2 and ZeRO-3 need
        self.handle = module.register_forward_hook(self._end_forward)
        setattr(module, self.slot, self)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = threading.get_ident()
        functions = self.waiting.get(thread)
        if not functions:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)
        if kwargs:
            fail(
                "lm_head",
                "be called with hidden states alone",
                ", ".join(kwargs),
                "leave out adapter_names, and hooks that add arguments",
            )
        result = tree_map(_without_view, functions.pop()(*args))
        self.answered.add(thread)
        return result

    @torch.compiler.disable
    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        thread = threading.get_ident()
        if thread in self.answered:
            self.answered.remove(thread)
            raise _Answered(output)

    def remove(self) -> None:
        self.handle.remove()
        if self.previous is None:
            delattr(self.module, self.slot)
        else:
            setattr(self.module, self.slot, self.previous)


@contextmanager
def _standing_in(module: nn.Module, function: Function) -> Iterator[None]:
    """Let a function answer the next call of a module by this thread."""
    thread = threading.get_ident()
    with _installing:
        found = module.__dict__.get(forward_slot(module))
        stand_in = found if isinstance(found, _StandIn) else _StandIn(module)
        functions = stand_in.waiting.setdefault(thread, [])
        depth = len(functions)
        functions.append(function)
        stand_in.num_users += 1
    try:
        yield
    finally:
        with _installing:
            del functions[depth:]  # where the model failed before it called its head
            stand_in.answered.discard(thread)
            stand_in.num_users -= 1
            if not stand_in.num_users:
                stand_in.remove()


def _without_view(value: Any) -> Any:
    """Copy an output that is a view of another tensor.

    FSDP2 hooks backward's gathering to a module's output tensors.  An in-place operation on a view
    drops the hook, and backward then reads a weight that is not there.
    """
    is_view = isinstance(value, Tensor) and value.requires_grad and value._is_view()
    return value.clone() if is_view else value
