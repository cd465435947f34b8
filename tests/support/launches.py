"""What a loss would launch on a GPU, and how often it would wait for it, counted without one.

Every operation of PyTorch that computes something is one kernel, and so is every Triton program.
Views, empty memory and the GEMMs are left out.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_sd.engine import backward, operator, workspace
from fused_sd.head import projection

FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "_unsafe_view")
WAITS = {"nonzero", "_local_scalar_dense", "is_nonzero", "unique_dim", "_unique2", "masked_select"}
WAITS |= {"item"}
INDEXING = {"index", "index_put", "index_put_"}  # by a mask they wait for the number of elements
INSIDE: dict[Any, Callable[..., Any]] = {
    torch.ops.fused_sd.chunked_run.default: operator.chunked_run._init_fn,
    torch.ops.fused_sd.sparse_gradients.default: backward.sparse_gradients._init_fn,
}


class Launches(TorchDispatchMode):
    """Counts kernels and waits by name while it is active, inside the library's operators too."""

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.is_paused = False
        from fused_sd.kernels import entries, rows, selection, sparse  # they need Triton

        for module in (entries, rows, selection, sparse):
            monkeypatch.setattr(module, "launch", self._program(module.launch))
        for module in (projection, workspace):
            for name in ("matmul", "matmul_add_"):
                monkeypatch.setattr(module, name, self._unseen(getattr(module, name)))
        monkeypatch.setattr(torch.Tensor, "tolist", self._counted_to_list(torch.Tensor.tolist))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INSIDE:
            with self:
                return INSIDE[func](*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not self.is_paused and not func.is_view and name not in FREE:
            self.kernels[name] += 1
            by_mask = name in INDEXING and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            if name in WAITS or by_mask:
                self.waits[name] += 1
        return func(*args, **kwargs)

    def _counted_to_list(self, to_list: Callable[..., Any]) -> Callable[..., Any]:
        """On a CPU it dispatches nothing."""

        def counted(tensor: Any) -> Any:
            self.waits["tolist"] += not self.is_paused
            return self._unseen(to_list)(tensor)

        return counted

    def _program(self, launch: Callable[..., None]) -> Callable[..., None]:
        def counted(program: Any, *args: Any, **kwargs: Any) -> None:
            self.kernels[program.__name__] += 1
            self._unseen(launch)(program, *args, **kwargs)

        return counted

    def _unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._paused():
                return function(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before
