"""The plugin in a Ray worker: registered there by verl's import alone."""

import plugin_dists
import pytest
import ray


@pytest.fixture(scope="module")
def dists(tmp_path_factory):
    """Ray with one CPU and workers that find our entry point."""
    folder = plugin_dists.write(tmp_path_factory.mktemp("dists"))
    environment = plugin_dists.environment(folder, VERL_ENGINE_VENDOR="fused_sd")
    names = ("PYTHONPATH", "VERL_ENGINE_VENDOR", "OMP_NUM_THREADS")
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {name: environment[name] for name in names}},
        log_to_driver=False,
    )
    yield folder
    ray.shutdown()


@ray.remote(num_cpus=1)
def registered_in_a_worker(loss_config):
    """What a worker has that only imported verl, and what a configuration becomes there."""
    import os
    import sys

    import verl

    assert verl.__version__
    plugin = sys.modules["fused_sd.integrations.verl.plugin"]
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    from verl.trainer.distillation.losses import get_distillation_loss_fn
    from verl.workers.engine import EngineRegistry

    return {
        "status": dict(plugin.STATUS),
        "engine": EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__,
        "loss": get_distillation_loss_fn(loss_config.loss_mode).__module__,
        "divergence": loss_config.comparison.divergence,
    }


def test_a_worker_registers_losses_and_engines_and_takes_the_drivers_settings(dists):
    from fused_sd import Jsd
    from fused_sd.integrations.verl.config import FusedSDLossConfig

    config = FusedSDLossConfig(divergence="jsd", beta=0.3)
    found = ray.get(registered_in_a_worker.remote(config), timeout=300)
    parts = ("losses", "fsdp", "megatron", "trainer")
    assert found["status"] == dict.fromkeys(parts, "registered")
    assert found["engine"] == "TeachingEngine"
    assert found["loss"] == "fused_sd.integrations.verl.losses"
    assert found["divergence"] == Jsd(0.3)
