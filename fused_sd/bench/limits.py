"""What ends a provider's measurement from outside: its time is up, or the device is lost."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LEAST_SECONDS = 1e-3  # an alarm in 0 seconds would never ring


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
    """The seconds that a provider may take in all its turns; None: as many as it wants."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.left = math.inf if seconds is None else seconds  # when the turn begins
        self.started = time.monotonic()  # of the turn

    def check(self, ahead: float = 0.0) -> None:
        """Raise ``TimeUp`` if what takes ``ahead`` seconds would end too late."""
        if time.monotonic() - self.started + ahead > self.left:
            raise self.time_up()

    def time_up(self) -> TimeUp:
        """Return what ends the provider's measurement."""
        return TimeUp(f"more than {self.seconds:g} s")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count the seconds in this context, and raise ``TimeUp`` inside it when they are over.

        In the main thread a signal interrupts Python code wherever it is, and a wait for another
        process, such as a compiler.  A single call into a library, such as a wait for a GPU, ends
        first; elsewhere only ``check`` raises.
        """
        self.started = time.monotonic()
        try:
            with self._alarm():
                yield
        finally:
            self.left -= time.monotonic() - self.started

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        if self.seconds is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(signum: int, frame: FrameType | None) -> None:
            raise self.time_up()

        before = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, LEAST_SECONDS))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
