"""Make waiting for the GPU an error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waits() -> Iterator[None]:
    """Fail inside this context if the host waits for the GPU; work before it is waited for.

    PyTorch warns the first time that the mode is set, after it has set it.  Where warnings are
    errors, that would leave the mode on for every later test.
    """
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
