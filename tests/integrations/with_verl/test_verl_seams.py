"""What the adapter relies on inside verl, by name; see tests/integrations/test_seams.py.

    PYTHONPATH=.:tests/support python tests/integrations/with_verl/test_verl_seams.py --record

adds the version of verl that is imported to ``verl_seams.json``.
"""

import inspect
import sys
from pathlib import Path

import pytest
from seam_record import compare, overridden, record, seen

from fused_sd.integrations.verl import plugin
from fused_sd.integrations.verl import seams as declared
from fused_sd.integrations.verl.teachers import TeachingEngine
from fused_sd.integrations.verl.trainer import TRAINERS

RECORD = Path(__file__).with_name("verl_seams.json")
TRAINER = "verl.trainer.ppo.v1.trainer_base"
WORKERS = "verl.workers.engine_workers"
# neither called nor overridden: who calls ours, and who writes what ours reads
RELIED_ON = {
    "AgentLoopWorkerTQ._agent_loop_postprocess": "verl.trainer.ppo.v1.agent_loop_tq",
    "AgentLoopWorkerTQ._run_prompt": "verl.trainer.ppo.v1.agent_loop_tq",
    "ActorRolloutRefWorker.init_model": WORKERS,
    "EngineTrainModeCtx": "verl.workers.engine.fsdp.transformer_impl",
    "FSDPEngine.forward_backward_batch": "verl.workers.engine.fsdp.transformer_impl",
    "PPOTrainer._compute_ref_log_prob": TRAINER,
    "PPOTrainer._step_once": TRAINER,
    "PPOTrainer._update_actor": TRAINER,
    "TrainingWorker.train_batch": WORKERS,
    "TrainingWorker.train_mini_batch": WORKERS,
    "_select_fsdp2_wrap_targets": "verl.utils.fsdp_utils",
    "apply_monkey_patch": "verl.models.transformers.monkey_patch",
    "compute_topk_loss": "verl.trainer.distillation.losses",
    "construct_minimal_padding_template": "verl.trainer.ppo.padding_utils",
    "distillation_loss": "verl.trainer.distillation.losses",
    "distillation_ppo_loss": "verl.trainer.distillation.losses",
}


def seams():
    """Name and code of everything that the adapter declares, overrides or relies on."""
    pairs = [pair for part in wanted() for pair in declared.names(part)]
    pairs += [(module, name) for name, module in RELIED_ON.items()]
    found = {name: declared.find(module, name) for module, name in pairs}
    found = {name: getattr(code, "__func__", code) for name, code in found.items()}
    for cls in ours():
        found.update(overridden(cls, ("verl.",)))
    return {name: code for name, code in found.items() if has_source(code)}


def wanted():
    return [part for part in declared.SEAMS if plugin.STATUS[part] != plugin.NO_MEGATRON]


def ours():
    if "megatron" in wanted():
        from fused_sd.integrations.verl.megatron_engine import FusedSDMegatronEngine

        return [TeachingEngine, FusedSDMegatronEngine, *TRAINERS.values()]
    return [TeachingEngine, *TRAINERS.values()]


def has_source(code):
    return inspect.isclass(code) or inspect.isfunction(inspect.unwrap(code))


@pytest.mark.parametrize("name", sorted({*seen(RECORD), *seams()}))
def test_verl_is_as_it_was(name):
    compare(name, seams, RECORD)


@pytest.mark.parametrize("part", wanted())
def test_the_declared_seams_are_in_verl(part):
    assert declared.missing(part) == []


def test_what_is_overridden_is_declared():
    names = {name.rpartition(".")[2] for part in wanted() for _, name in declared.names(part)}
    found = {name.rpartition(".")[2] for cls in ours() for name in overridden(cls, ("verl.",))}
    assert found <= names, "add it to seams.SEAMS: a verl without it must not be trained with"


def test_a_method_that_verl_renamed_keeps_the_part_from_being_registered(monkeypatch):
    gone = {"verl.trainer.ppo.v1.trainer_base": ("PPOTrainer._former", "register_trainer")}
    monkeypatch.setitem(declared.SEAMS, "trainer", gone)
    monkeypatch.setitem(plugin.STATUS, "trainer", "")
    plugin.try_to_register("trainer")
    assert (
        "without verl.trainer.ppo.v1.trainer_base.PPOTrainer._former;" in plugin.STATUS["trainer"]
    )


@pytest.mark.parametrize("module", ["verl.trainer.former", "verl.former.former"])
def test_a_module_that_verl_moved_is_missing(monkeypatch, module):
    monkeypatch.setitem(declared.SEAMS, "losses", {module: ("name",)})
    assert declared.missing("losses") == [f"{module}.name"]


def test_what_verl_itself_misses_is_named(monkeypatch):
    def fails(module, name):
        raise ModuleNotFoundError("No module named 'cachetools'", name="cachetools")

    monkeypatch.setattr(declared, "find", fails)
    with pytest.raises(ModuleNotFoundError, match="cachetools"):
        declared.check("losses")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("the only argument is --record")
    record(seams(), RECORD)
