"""Installed distributions with entry points for verl, as folders to put on the path."""

import os
import pathlib
import sys
from textwrap import dedent

ROOT = pathlib.Path(__file__).parents[3]
OURS = "fused_sd.integrations.verl.plugin"

# other plugins, which misbehave if an environment variable tells them to
THIEF = """
    import os

    deed = os.environ.get("THIEF")
    if deed == "loss":
        from verl.trainer.distillation import losses

        def taken(config, distillation_config, model_output, data):
            raise NotImplementedError

        settings = losses.DistillationLossSettings(names="fused_sd_rlsd", use_topk=True)
        losses.register_distillation_loss(settings)(taken)
    elif deed in ("engine", "other engine"):
        from verl.workers.engine import BaseEngine, EngineRegistry

        vendor = "fused_sd" if deed == "engine" else "thief"

        @EngineRegistry.register("language_model", "fsdp2", "cuda", vendor)
        class Engine(BaseEngine):
            pass
    elif deed in ("version", "development"):
        import verl

        verl.__version__ = "0.8.0" if deed == "version" else "0.10.0.dev"
"""
BROKEN = """
    import os
    if os.environ.get("BROKEN"):
        import a_module_that_nobody_has
"""


def write(folder: pathlib.Path) -> pathlib.Path:
    """Distributions ``fused_sd``, ``thief`` and ``broken``; ``thief`` is loaded first."""
    for name, target in (("a_thief", "thief"), ("broken", "broken"), ("fused_sd", OURS)):
        info = folder / f"{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        plugin = name.removeprefix("a_")
        (info / "entry_points.txt").write_text(f"[verl.plugins]\n{plugin} = {target}\n")
    (folder / "thief.py").write_text(dedent(THIEF))
    (folder / "broken.py").write_text(dedent(BROKEN))
    return folder


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
    """The environment of a process that finds these distributions and this checkout."""
    cleaned = {k: v for k, v in os.environ.items() if not k.startswith("VERL_")}
    path = [str(folder), str(ROOT), str(ROOT / "tests" / "integrations" / "with_verl")]
    path += filter(None, [os.environ.get("PYTHONPATH")])  # another verl than the installed one
    return {**cleaned, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **more}


PYTHON = sys.executable
