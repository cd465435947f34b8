"""Fresh imports of verl with plugins installed, each in a fork.

``python plugin_worker.py DISTS`` imports verl's dependencies and then forks for each case, so that
a case costs only the import of verl.  DISTS is the folder of ``plugin_dists.write``.  The output is
a JSON object of the cases' results, or of the traceback of a case that raised.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import sys
import traceback
import warnings

warnings.simplefilter("ignore")

# slow to import, and independent of verl's plugins
PRELOADED = (
    "accelerate",
    "datasets",
    "fastapi",
    "hydra",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "pandas",
    "peft",
    "ray",
    "tensordict",
    "torch.distributed.fsdp",
    "transfer_queue",
    "transformers.modeling_utils",
    "uvicorn",
)
CASES = {}


def case(**environment):
    """Mark a function as a case, which runs with these variables in a fresh process."""

    def note(function):
        CASES[function.__name__] = (function, environment)
        return function

    return note


def state():
    """Return what the plugin registered, and which engines verl chooses."""
    from verl.trainer.distillation.losses import DISTILLATION_SETTINGS_REGISTRY
    from verl.workers.engine import EngineRegistry

    from fused_sd.integrations.verl import plugin

    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    strategies = ("fsdp", "fsdp2", "megatron")
    engines = [EngineRegistry.get_engine_cls("language_model", name) for name in strategies]
    losses = {
        name: (settings.use_topk, settings.use_estimator)
        for name, settings in DISTILLATION_SETTINGS_REGISTRY.items()
        if name.startswith("fused_sd")
    }
    return {
        "status": plugin.STATUS,
        "engines": [engine.__name__ for engine in engines],
        "value_engine": EngineRegistry.get_engine_cls("value_model", "fsdp").__name__,
        "losses": losses,
    }


@case(VERL_ENGINE_VENDOR="fused_sd", THIEF="other engine")
def engines_asked_for():
    """Another plugin's engine under another vendor does not disturb."""
    import verl

    assert "fused_sd.integrations.verl.plugin" in sys.modules, verl.__version__
    return state()


@case()
def engines_not_asked_for():
    import verl

    imported = [name for name in sys.modules if name.startswith("verl.workers.engine.")]
    return {"verl": verl.__version__, "engines_imported": imported, **state()}


@case(VERL_ENGINE_VENDOR="fused_sd")
def configuration_first():
    from fused_sd.integrations.verl.config import FusedSDLossConfig

    return {"loss_mode": FusedSDLossConfig().loss_mode, **state()}


@case(VERL_ENGINE_VENDOR="fused_sd")
def engine_first():
    from fused_sd.integrations.verl.engine import FusedSDEngine

    return {"name": FusedSDEngine.__name__, **state()}


@case(VERL_ENGINE_VENDOR="fused_sd")
def losses_first():
    from fused_sd.integrations.verl.losses import topk_loss

    return {"name": topk_loss.__name__, **state()}


@case(VERL_USE_EXTERNAL_PLUGINS="none")
def plugins_switched_off():
    """The settings' class registers the losses that verl did not load."""
    import verl.trainer.distillation.losses as registry

    before = "fused_sd_topk" in registry.DISTILLATION_LOSS_REGISTRY
    from fused_sd.integrations.verl.config import FusedSDLossConfig

    return {"before": before, "after": FusedSDLossConfig().loss_settings.use_topk}


@case(VERL_ENGINE_VENDOR="fused_sd")
def imported_again():
    import verl

    from fused_sd.integrations.verl import plugin

    before = state()
    importlib.reload(plugin)
    plugin.register()
    del sys.modules["fused_sd.integrations.verl.plugin"]
    importlib.import_module("fused_sd.integrations.verl.plugin")
    return {"verl": verl.__version__, "before": before, "after": state()}


@case(VERL_USE_EXTERNAL_PLUGINS="fused_sd,thief", THIEF="loss")
def another_has_a_loss():
    import verl.trainer.distillation.losses as registry

    from fused_sd.integrations.verl import plugin

    names = [name for name in registry.DISTILLATION_LOSS_REGISTRY if name.startswith("fused_sd")]
    return {"status": plugin.STATUS["losses"], "names": names}


@case(VERL_ENGINE_VENDOR="fused_sd", THIEF="engine")
def another_has_an_engine():
    return state()


@case(VERL_ENGINE_VENDOR="fused_sd")
def doctor_all_well():
    return doctored()


@case()
def doctor_without_engines():
    return doctored()


@case(VERL_USE_EXTERNAL_PLUGINS="none", VERL_ENGINE_VENDOR="fused_sd")
def doctor_switched_off():
    return doctored()


@case(VERL_ENGINE_VENDOR="fused-sd", VERL_ENGINE_DEVICE="gpu")
def doctor_of_misspelt_variables():
    return doctored()


@case(VERL_ENGINE_VENDOR="fused_sd", THIEF="development")
def doctor_of_a_development_verl():
    return doctored()


@case(VERL_ENGINE_VENDOR="fused_sd")
def doctor_without_a_dependency():
    sys.modules["uvicorn"] = None
    return doctored()


@case(VERL_USE_EXTERNAL_PLUGINS="fused_sd,broken", BROKEN="1")
def doctor_broken_plugin():
    return doctored()


@case()
def doctor_without_entry_point():
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(sys.argv[1])]
    return doctored(hide=True)


@case(VERL_ENGINE_VENDOR="fused_sd")
def doctor_without_megatron():
    for name in [name for name in sys.modules if name.startswith("megatron")]:
        del sys.modules[name]
    sys.modules["megatron"] = None
    return doctored()


@case(VERL_ENGINE_VENDOR="fused_sd", THIEF="loss")
def doctor_another_has_a_loss():
    return doctored()


@case(VERL_ENGINE_VENDOR="fused_sd")
def doctor_broken_itself():
    class Refuses:
        def find_spec(self, name, path=None, target=None):
            if name == "fused_sd.integrations.verl.engine":
                raise ImportError("not today")

    sys.meta_path.insert(0, Refuses())
    return doctored()


@case(VERL_ENGINE_VENDOR="fused_sd", THIEF="version")
def doctor_of_another_verl():
    from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY

    names = [name for name in DISTILLATION_LOSS_REGISTRY if name.startswith("fused_sd")]
    return {**doctored(), "losses": names}


def doctored(hide=False):
    """Return the doctor's output and exit status."""
    import importlib.metadata

    if hide:
        importlib.metadata.entry_points = lambda **_: ()
    from fused_sd.integrations.verl.__main__ import main

    sys.argv[1:] = ["doctor"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = main()
    return {"status": status, "said": said.getvalue()}


def run(function, environment):
    """Run a case in a fork and return its result."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        logged = io.StringIO()
        logging.getLogger().addHandler(logging.StreamHandler(logged))
        try:
            result = {"logged": None, **function()}
            result["logged"] = logged.getvalue()
        except BaseException:
            result = {"raised": traceback.format_exc()}
        with os.fdopen(write, "w") as stream:
            json.dump(result, stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    print(json.dumps({name: run(*case) for name, case in CASES.items()}))
