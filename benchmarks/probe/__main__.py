"""``python -m benchmarks.probe``: measure the parts one after another.

A part that fails says so, and the next one runs.

Exit status: 0; 1 if a part failed; 2 for wrong use.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.probe.parts import PARTS
from benchmarks.probe.probe import Probe
from fused_sd import checks
from fused_sd.bench.measure import forget, synchronize
from fused_sd.measuring.environment import default_device, device_name, environment

DONE, FAILED, MISUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe")
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    add("--out", type=Path, help="file to which the lines are appended")
    add("--resume", action="store_true", help="skip the parts that --out holds whole")
    add("--tiny", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    device = default_device()
    try:
        names = options.parts.split(",")
        for name in names:
            checks.check_one_of("--parts", name, tuple(PARTS))
        if device.type == "cpu" and not options.tiny:
            checks.fail("--tiny", "be given where there is no GPU", "none", "pass it")
    except ValueError as error:
        print(f"benchmarks.probe: {error}", file=sys.stderr)
        return MISUSED
    whole = whole_parts(options.out) if options.resume else set()
    probe = Probe(device, options.tiny, lambda line: write(options.out, line))
    probe.say(part="environment", device=device_name(device), tiny=options.tiny, **environment())
    return run([name for name in names if name not in whole], probe)


def run(names: Sequence[str], probe: Probe) -> int:
    """Measure the named parts and return the exit status."""
    status = DONE
    for name in names:
        started = time.perf_counter()
        try:
            forget(probe.device)
            PARTS[name](probe)
            synchronize(probe.device)
        except Exception as error:
            status = FAILED
            traceback.print_exc()
            probe.say(part=name, failed=f"{type(error).__name__}: {error}"[:400])
        else:
            probe.say(part=name, whole=True, seconds=time.perf_counter() - started)
    return status


def write(path: Path | None, facts: dict[str, Any]) -> None:
    """Print a measurement and append it to the file."""
    line = json.dumps(facts)
    print(line, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            print(line, file=file)


def whole_parts(path: Path | None) -> set[str]:
    """Return the names of the parts that a file holds to their end."""
    if path is None or not path.exists():
        return set()
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["part"] for line in lines if line.get("whole")}


if __name__ == "__main__":
    raise SystemExit(main())
