"""Count how often a GPU's host would wait for the device, and what it would launch, on a CPU.

A wait is an operation whose result the host must have: a number, or a shape that depends on values.
Programs of Triton are counted where a launching function calls ``launch``; what the interpreter
does for them is not.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

READS = {"item", "_local_scalar_dense", "nonzero", "masked_select"}
LAUNCH_NOTHING = {"item", "detach", "empty", "new_empty", "empty_like", "empty_strided"}


class HostWaits(TorchDispatchMode):
    """Inside this context, counts the waits and the launches by name.

    Args:
        monkeypatch: pytest's fixture.
        modules: kernels whose name ``launch`` launches a Triton program.
    """

    def __init__(self, monkeypatch, *modules):
        super().__init__()
        self.waits, self.launches, self.is_active = Counter(), Counter(), False
        to_list = torch.Tensor.tolist  # of a tensor on the CPU it dispatches nothing

        def counted_to_list(tensor):
            self.waits["tolist"] += self.is_active
            return to_list(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted_to_list)
        for module in modules:
            monkeypatch.setattr(module, "launch", self._counted(module.launch))

    def _counted(self, launch):
        def counted_launch(program, *given, **arguments):
            self.launches[program.__name__] += self.is_active
            is_active, self.is_active = self.is_active, False
            with _disable_current_modes():
                launch(program, *given, **arguments)
            self.is_active = is_active

        return counted_launch

    def __enter__(self):
        self.is_active = True
        return super().__enter__()

    def __exit__(self, *error):
        self.is_active = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in READS or by_mask:
            self.waits[name] += 1
        if not function.is_view and name not in LAUNCH_NOTHING:
            self.launches[name] += 1
        return function(*args, **(kwargs or {}))
