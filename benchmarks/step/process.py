"""One job in a process of its own; ``run`` starts it.

    python -m benchmarks.step.process '<a job as JSON>'

The process prints each finding as a marked line of JSON: an agreement, a cell, the longest
response, or that the provider is wrong.
"""

import json
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.step.plan import Job
from benchmarks.storage import ROOT
from fused_sd.demo.model import quiet_and_offline

MARK = "RESULT "  # libraries print to stdout, too
GRACE_SECONDS = 60.0  # a job may exceed its time by this: its own estimates are rough
Finding = dict[str, Any]


def run(job: Job, found: Callable[[Finding], None]) -> None:
    """Start the job, pass each finding to ``found``, and wait for the job's end."""
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
    warnings.filterwarnings("ignore")  # deprecations in the libraries
    from benchmarks.step.schedule import measure

    measure(Job.from_json(text), say)


if __name__ == "__main__":
    main(sys.argv[1])
