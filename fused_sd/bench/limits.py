"""What ends a provider's measurement from outside: its time is up, or the device is lost."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class DeviceLost(RuntimeError):
    """A GPU that fails everything from now on, as after an illegal memory access.

    Attributes:
        provider: The name of the provider that ran last.
    """

    def __init__(self, provider: str, error: Exception) -> None:
        super().__init__(f"{provider} lost the device: {str(error).strip().splitlines()[0]}")
        self.provider = provider


class TimeUp(BaseException):
    """The time of a provider is up.

    It is no ``Exception``, so that a library that catches those lets it through.
    """


class TimeLimit:
    """The seconds that a provider may take; None: as many as it wants."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def check(self, ahead: float = 0.0) -> None:
        """Raise ``TimeUp`` if what takes ``ahead`` seconds would end after the deadline."""
        if self.deadline is not None and time.monotonic() + ahead > self.deadline:
            raise TimeUp(f"more than {self.seconds:g} s")


@contextmanager
def time_limit(seconds: float | None) -> Iterator[TimeLimit]:
    """Raise ``TimeUp`` inside this context when the seconds are over.

    In the main thread a signal interrupts Python code wherever it is, and a wait for another
    process, such as a compiler.  A single call into a library, such as a wait for a GPU, ends
    first; elsewhere only ``check`` raises.
    """
    limit = TimeLimit(seconds)
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield limit
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeUp(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield limit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
