"""``python -m benchmarks.session.card``: the GPU's state, and the versions of the libraries."""

import shutil
import subprocess

from fused_sd.cli import main

FIELDS = "name,driver_version,clocks.sm,power.draw,temperature.gpu,memory.free"

if __name__ == "__main__":
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv"], check=False)
    raise SystemExit(main(["env"]))
