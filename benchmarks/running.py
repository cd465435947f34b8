"""What the commands of the experiments share."""

import os
import time
import warnings


def quiet() -> None:
    """Silence the libraries, keep them offline, use one thread; call it before importing them."""
    from fused_sd.demo.model import quiet_and_offline

    quiet_and_offline()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
