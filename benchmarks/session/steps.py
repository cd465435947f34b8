"""Steps of a session: commands with a time limit each, whose output is kept as it comes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

SHOWN = 180  # characters of a line on the screen; the file has all
TRIES = 3  # of a step that may be continued
LEAST = 1.0  # seconds that a step is worth starting for


class Step(NamedTuple):
    """A command, and what is done with it.

    Attributes:
        command: Arguments of Python, given the seconds that the step has.
        seconds: Its time limit, at most.
        log: The file to which its output is appended.
        good: Exit statuses that are no failure.
        continued: Whether a failure is followed by another try, which continues the first.
    """

    command: Callable[[float], Sequence[str]]
    seconds: float
    log: str
    good: tuple[int, ...] = (0,)
    continued: bool = False


class Session:
    """Runs steps until the time of the session is up.

    Args:
        folder: Where the logs go.
        environment: The environment of the commands.
        seconds: The time of all steps.
    """

    def __init__(self, folder: Path, environment: dict[str, str], seconds: float) -> None:
        self.folder, self.environment = folder, environment
        self.started = time.monotonic()
        self.seconds = seconds
        self.failed: list[str] = []

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        print(f"== {time.monotonic() - self.started:.0f} s  {text}", flush=True)

    def run(self, *lanes: Sequence[Step]) -> None:
        """Run lanes of steps side by side, the steps of each one after another."""
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, steps: Sequence[Step]) -> None:
        for step in steps:
            for _ in range(TRIES if step.continued else 1):
                seconds = min(step.seconds, self.left())
                arguments = step.command(seconds)
                name = " ".join(arguments)[:SHOWN]
                if seconds < LEAST:
                    self.say(f"no time for {name}")
                    return
                self.say(name)
                status = self._run(arguments, seconds, self.folder / step.log)
                self.say(f"exit status {status} of {name}")
                if status in step.good:
                    break
            else:
                self.failed.append(f"{status}: {name}")

    def _run(self, arguments: Sequence[str], seconds: float, log: Path) -> int | str:
        with log.open("a", encoding="utf-8") as file:
            print(f"$ python {' '.join(arguments)}", file=file, flush=True)
            with subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as process:
                timer = threading.Timer(seconds, _end, [process])
                timer.start()
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", file=file, flush=True)
                    print(line.rstrip()[:SHOWN], flush=True)
                status: int | str = process.wait()
                timer.cancel()
            if status == -signal.SIGKILL:
                status = f"killed after {seconds:.0f} s"
            print(f"exit status {status}", file=file)
        return status


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
