"""The recipes: composed on verl's own configuration, checked by its dataclasses and found by it."""

import copy
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import resources
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from recipes_config import RECIPES, composed
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.utils import need_critic, need_reference_policy, need_teacher_policy
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import DistillationConfig, FSDPActorConfig

from fused_sd import FULL_VOCABULARY, Comparison, Jsd, MixedKl, StudentTopK, TeacherTopK
from fused_sd.integrations.verl import ENGINES, VENDOR
from fused_sd.integrations.verl import trainer as module
from fused_sd.integrations.verl.config import FusedSDLossConfig
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig
from fused_sd.integrations.verl.trainer import SelfDistillationSync, self_distillation_config

# settings that verl fills in, or reads in an engine of its own
VERLS = {"global_batch_info", "loss_settings", "use_chunked_topk", "chunked_topk_chunk_size"}
METHODS = {
    # recipe: divergence, support, teacher, class of the context, rollouts of a prompt
    "sdpo": (Jsd(0.5), StudentTopK(100), "ema", "SiblingContext", 8),
    "opsd": ("forward_kl", FULL_VOCABULARY, "reference", "ReferenceContext", 1),
    "sd_zero": (MixedKl(0.5), TeacherTopK(64), "reference", "AttemptContext", 1),
    "rlsd": (None, None, "synced", "AnswerContext", 8),
    "opd": ("reverse_kl", StudentTopK(100), "worker_group", "SamePromptContext", 1),
}


@pytest.mark.parametrize("recipe", METHODS)
def test_a_recipe_is_the_method_that_its_name_says(recipe):
    divergence, support, teacher, context, num_rollouts = METHODS[recipe]
    config = composed(recipe)
    settings = self_distillation_config(config)
    loss = settings.loss
    assert loss.teacher == teacher
    assert type(settings.context).__name__ == context
    assert config.actor_rollout_ref.rollout.n == num_rollouts
    if recipe == "rlsd":
        assert loss.loss_settings.use_estimator
        assert loss.to_evidence().clip == (0.2, 0.2)
        assert (loss.clip_ratio_low, loss.clip_ratio_high, loss.rlsd_dual_clip) == (0.2, 0.28, 3.0)
    else:
        assert loss.loss_settings.use_topk
        assert loss.comparison.divergence == divergence
        assert loss.comparison.support == support


RUNS = {
    # recipe: learning rate, warm-up, prompt, response, temperature, top-p, top-k, correction
    "sdpo": (1e-5, 10, 2048, 8192, 1.0, 1, -1, "token"),
    "opsd": (5e-6, -1, 2048, 1024, 1.1, 0.95, 20, None),
    "sd_zero": (5e-6, 20, 2048, 6144, 1.0, 1, -1, None),
    "rlsd": (1e-6, -1, 16384, 4096, 1.0, 1, -1, None),
    "opd": (1e-6, -1, 2048, 8192, 1.0, 1, -1, None),  # which has no official run
}


@pytest.mark.parametrize("recipe", METHODS)
def test_a_recipe_is_the_official_run(recipe):
    config = composed(recipe)
    optim, rollout = config.actor_rollout_ref.actor.optim, config.actor_rollout_ref.rollout
    assert RUNS[recipe] == (
        optim.lr,
        optim.lr_warmup_steps,
        config.data.max_prompt_length,
        config.data.max_response_length,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        config.algorithm.rollout_correction.rollout_is,
    )
    assert optim.lr_scheduler_type == "constant"
    assert optim.weight_decay == (0 if recipe == "opsd" else 0.01)
    assert config.algorithm.rollout_correction.rollout_is_threshold == 2.0
    assert rollout.calculate_log_probs, "which the correction needs"
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert longest <= config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu


def test_sdpos_settings_for_feedback_are_the_official_runs():
    """As its first lines name them: 32 updates a batch, after which the teacher moves by 1 %."""
    text = (resources.files(RECIPES) / "sdpo.yaml").read_text()
    said = text[text.index("runs with feedback, add") : text.index("# The teacher moves")]
    config = composed("sdpo", *(word for word in said.split() if "=" in word))
    loss = self_distillation_config(config).loss
    assert loss.comparison == Comparison("reverse_kl", StudentTopK(20))
    assert (loss.ema_rate, loss.teacher_sync_steps, loss.importance_cap) == (0.01, 1, 2.0)
    actor = config.actor_rollout_ref.actor
    assert config.data.train_batch_size / actor.ppo_mini_batch_size * actor.ppo_epochs == 32
    assert (float(actor.optim.lr), actor.optim.lr_warmup_steps) == (1e-6, 0)


@pytest.mark.parametrize("recipe", METHODS)
def test_verl_accepts_a_recipe(recipe):
    config = composed(recipe)
    validate_config(
        config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    assert not need_critic(config)
    assert need_teacher_policy(config), "verl's workers are to build a distillation loss"
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor, FSDPActorConfig)
    assert actor.strategy == "fsdp2"
    assert isinstance(omega_conf_to_dataclass(config.algorithm), AlgoConfig)
    rollout = config.actor_rollout_ref.rollout
    assert actor.use_dynamic_bsz == rollout.log_prob_use_dynamic_bsz
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR == "fused_sd"
    model = config.actor_rollout_ref.model
    assert model.use_fused_kernels
    assert model.fused_kernel_options.impl_backend == "fused_sd"
    module.register()
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is SelfDistillationSync


def test_every_setting_can_be_overridden_without_a_plus():
    settings = composed("sdpo").distillation
    ours = {field.name for field in fields(SelfDistillationConfig)}
    assert ours <= set(settings)
    own = {field.name for field in fields(FusedSDLossConfig)} - VERLS
    assert own <= set(settings.distillation_loss)


def test_what_does_not_go_together_is_refused():
    loss = "distillation.distillation_loss"
    refused = {
        "not be a server": ("sdpo", f"{loss}.teacher=server"),
        "say what the teacher is shown": ("sdpo", "distillation.context=null"),
        'be "engine" for a divergence': ("sdpo", "distillation.scored_by=worker"),
        'be "live" or "reference" with scored_by="worker"': (
            "rlsd",
            "distillation.scored_by=worker",
        ),
        "be one of 'engine', 'worker'": ("rlsd", "distillation.scored_by=ray"),
        "be an enabled SelfDistillationConfig": ("sdpo", "distillation.enabled=false"),
        "max_prompt_length must be an integer": ("sdpo", "distillation.max_prompt_length=0"),
        "be left as it is": ("opsd", f"{loss}.ema_rate=0.1"),
    }
    for message, (recipe, override) in refused.items():
        more = [f"{loss}.support=teacher_topk"] if "server" in override else []
        with pytest.raises(Exception, match=message) as raised:
            self_distillation_config(composed(recipe, override, *more))
        assert "ValueError" in repr(raised.value) or isinstance(raised.value, ValueError)


def test_the_trainer_starts_no_teacher_server():
    """verl's own constructor and resource pools, without the workers."""
    config = composed("sdpo")
    before = copy.deepcopy(config)
    trainer = SelfDistillationSync(config)
    assert not trainer.use_teacher_policy
    assert trainer.trainer_mode == "sync", "verl's replay buffer and checkpoints ask for it"
    assert not config.distillation.enabled, "the rollout workers ask no server"
    assert trainer.config.distillation.enabled, "the training workers build a distillation loss"
    trainer._init_resource_pool_mgr()
    pools = trainer.resource_pool_manager.resource_pool_spec
    assert set(pools) == {"global_pool"}
    assert trainer.config.distillation == before.distillation


def test_main_ppo_composes_a_recipe_and_checks_it_before_ray_is_started():
    """The command of the recipes' first lines, with a strategy in which no teacher follows."""
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo", f"--config-path=pkg://{RECIPES}"),
        *("--config-name=rlsd", "actor_rollout_ref.model.path=model"),
        *("actor_rollout_ref.actor.strategy=fsdp", "hydra/job_logging=disabled"),
        *("hydra.output_subdir=null", "hydra.run.dir=."),
    ]
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 1
    said = "fused_sd: actor_rollout_ref.actor.strategy must be \"fsdp2\" for .*'synced' in the"
    assert re.search(said, run.stderr), run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    assert "ray init kwargs" not in run.stdout


def test_every_recipe_is_tested():
    names = {path.name for path in resources.files(RECIPES).iterdir()}
    recipes = {name.removesuffix(".yaml") for name in names if name.endswith(".yaml")}
    assert recipes == {*METHODS, "server", "self_distillation", "common"}


def test_the_example_has_what_the_recipes_read():
    from fused_sd.integrations.examples.verl_arithmetic import compute_score, split

    row = split(1, seed=0)[0]
    truth = row["reward_model"]["ground_truth"]
    right = compute_score(row["data_source"], f"It is {truth}.", truth, row["extra_info"])
    assert right == {"score": 1.0, "feedback": ""}
    wrong = compute_score(row["data_source"], f"It is {int(truth) + 1}.", truth)
    assert wrong == {"score": 0.0, "feedback": f"The result {int(truth) + 1} is too large."}
    assert row["extra_info"]["answer"].endswith(f"The answer is {truth}.")
    assert row["prompt"][-1]["role"] == "user"


def test_verl_loads_the_examples_reward_function():
    from verl.trainer.ppo.reward import get_custom_reward_fn

    path = "pkg://fused_sd.integrations.examples.verl_arithmetic"
    config = composed("sdpo", f"reward.custom_reward_function.path={path}")
    score = get_custom_reward_fn(config)(
        data_source="sums", solution_str="4", ground_truth="4", extra_info={}
    )
    assert score["score"] == 1.0


def test_verl_composes_the_manuals_commands_for_teacher_servers():
    page = Path(__file__).parents[3] / "docs" / "guides" / "verl.md"
    text = page.read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "loss_mode=forward_kl_topk" in line)
    overrides = [word for word in line.split() if "=" in word]
    with initialize_config_module("verl.trainer.config", version_base=None):
        own = compose("ppo_trainer", overrides)
    assert own.distillation.distillation_loss.loss_mode == "forward_kl_topk"
    assert "| `server` |" in text
    for config in (own, composed("server")):
        assert config.actor_rollout_ref.model.use_fused_kernels
        assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend == VENDOR
        assert config.actor_rollout_ref.model.external_lib == ENGINES


def test_the_server_recipe_is_a_distillation_of_verls():
    config = composed(
        "server",
        "distillation.teacher_models.teacher_model.model_path=teacher",
        "distillation.n_gpus_per_node=2",
    )
    settings = omega_conf_to_dataclass(config.distillation)
    assert type(settings) is DistillationConfig
    loss = settings.distillation_loss
    assert loss.comparison == Comparison("forward_kl", TeacherTopK(64))
    assert settings.teacher_models["default"].inference.engine_kwargs["vllm"]["max_logprobs"] == 64
    validate_config(
        config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    assert config.trainer.v1.trainer_mode == "sync", "verl's own trainer"
    own = {field.name for field in fields(FusedSDLossConfig)} - VERLS
    assert own <= set(config.distillation.distillation_loss)
