"""One provider on one model, in a process of its own; started by ``run``.

    python -m benchmarks.step.process '<a job as JSON>'

prints a marked line of JSON as soon as something is known: an agreement, a cell, the longest
response, or that the provider is wrong.
"""

import json
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.step.plan import Job
from fused_sd.demo.model import quiet_and_offline

MARK = "RESULT "  # libraries print as well
ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 60.0  # beyond what a job was given: its own estimates are rough
Finding = dict[str, Any]


def run(job: Job, found: Callable[[Finding], None]) -> None:
    """Start the job, pass on what it finds, and wait for its end."""
    command = [sys.executable, "-m", "benchmarks.step.process", job.to_json()]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
        ) as process:
            limit = None if job.seconds is None else job.seconds + GRACE_SECONDS
            timer = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
            timer.daemon = True
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    found(json.loads(line.removeprefix(MARK)))
            code = process.wait()
            timer.cancel()
        if code != 0:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["nothing was said"]
            found({"failed": f"exit status {code}: {last[0][:400]}"})


def say(finding: Finding) -> None:
    print(MARK + json.dumps(finding), flush=True)


def main(text: str) -> None:
    quiet_and_offline()  # before the libraries are imported
    warnings.filterwarnings("ignore")  # their deprecations are not the reader's concern
    from benchmarks.step.schedule import measure

    measure(Job.from_json(text), say)


if __name__ == "__main__":
    main(sys.argv[1])
