"""What a whole configuration is refused for, before anything is started, and what it may do."""

from types import SimpleNamespace

import pytest
from recipes_config import composed

from fused_sd.integrations.verl import TRAINER_MODES, trainer
from fused_sd.integrations.verl.data_checks import check_feedback, check_reference
from fused_sd.integrations.verl.run_checks import BeforeRun, check_run

ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
LOSS, CORRECTION = "distillation.distillation_loss", "algorithm.rollout_correction"
VARIABLE = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR"
SERVER = (
    "distillation.teacher_models.teacher_model.model_path=teacher",
    "distillation.n_gpus_per_node=2",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("VERL_ENGINE_VENDOR", raising=False)


@pytest.mark.parametrize("recipe", ["sdpo", "opsd", "sd_zero", "rlsd", "server"])
def test_the_recipes_pass(recipe):
    check_run(composed(recipe, *(SERVER if recipe == "server" else ())))


@pytest.mark.parametrize(
    "recipe, settings, message",
    [
        ("sdpo", ["trainer.use_v1=false"], "trainer.use_v1 must be True with SelfDistillationCon"),
        *(
            ("sdpo", [f"trainer.v1.trainer_mode={mode}"], f"shows the teacher .* got '{mode}'; set")
            for mode in ("sync", "colocate_async", "separate_async")
        ),
        ("sdpo", [f"{VARIABLE}=null"], "VERL_ENGINE_VENDOR must be fused_sd where .* got None"),
        ("sdpo", [f"{VARIABLE}=ascend"], "VERL_ENGINE_VENDOR must be fused_sd .* got 'ascend'"),
        ("sdpo", SERVER, "distillation.teacher_models must be left out .* got teacher"),
        ("opsd", ["distillation.reference_key=null"], "name what ReferenceContext shows, got None"),
        ("rlsd", ["distillation.reference_key=null"], "name what AnswerContext shows, got None"),
        (
            "sdpo",
            ["distillation.feedback_key=null", "actor_rollout_ref.rollout.n=1"],
            "distillation.context must have a successful sibling or feedback to show",
        ),
        (
            "sdpo",
            [
                "distillation.feedback_key=null",
                "+distillation.context.use_successful_as_teacher=false",
            ],
            "distillation.context must have a successful sibling or feedback to show",
        ),
        ("sdpo", [f"{ACTOR}.strategy=fsdp"], "strategy must be \"fsdp2\" for .*'ema' in the train"),
        ("rlsd", [f"{ACTOR}.strategy=fsdp"], "strategy must be \"fsdp2\" for .*'synced' in the tr"),
        (
            "opsd",
            [f"{ACTOR}.strategy=fsdp", "actor_rollout_ref.model.lora_adapter_path=phase1"],
            "strategy must be \"fsdp2\" for .*'reference' in the train",
        ),
        (
            "opd",
            [f"{LOSS}.teacher=live", "distillation.worker_group.model_path=null"],
            "distillation.context must show the teacher more .* SamePromptContext",
        ),
        ("sdpo", [f"{ACTOR}.grad_clip=0.5"], r"grad_clip must be left at 1.0.*set .*clip_grad=0.5"),
        ("opsd", [f"{ACTOR}.strategy=megatron"], 'be "fsdp2" or "fsdp" for .* got \'megatron\''),
        ("sdpo", [f"{MODEL}.use_fused_kernels=false"], "use_fused_kernels must be True for a loss"),
        (
            "server",
            [f"{MODEL}.fused_kernel_options.impl_backend=triton", *SERVER],
            "impl_backend must be fused_sd for a loss .* got 'triton'",
        ),
        ("server", [f"{ACTOR}.strategy=veomni", *SERVER], "strategy must be fsdp or fsdp2 or mega"),
        ("server", [f"{MODEL}.external_lib=null", *SERVER], "register fused_sd's engines in the w"),
        (
            "server",
            [f"{MODEL}.external_lib=own", f"{LOSS}.loss_mode=forward_kl_topk", *SERVER],
            "external_lib must register fused_sd's engines .*got 'own', and VERL_ENGINE_VENDOR is",
        ),
        ("sdpo", [f"{ACTOR}.entropy_coeff=0.01"], "entropy_coeff must be left .* got 0.01; leave"),
        ("rlsd", [f"{ACTOR}.use_kl_loss=true"], "use_kl_loss must be left at its default with los"),
        ("sdpo", [f"{ACTOR}.policy_loss.loss_mode=gspo"], "loss_mode must be left .* got 'gspo'"),
        ("sdpo", ["critic.enable=true"], "critic.enable must be left at its default with loss_mo"),
        (
            "sdpo",
            ["critic.enable=null", "algorithm.adv_estimator=gae"],
            "critic.enable must be left at its default",
        ),
        ("sdpo", ["algorithm.use_kl_in_reward=true"], "use_kl_in_reward must be left at its defa"),
        ("sdpo", [f"{CORRECTION}.bypass_mode=true"], "rollout_is must be null with bypass_mode="),
        (
            "rlsd",
            [f"{CORRECTION}.bypass_mode=true", f"{CORRECTION}.rollout_rs=token_k1"],
            "rollout_rs must be null with bypass_mode=True",
        ),
        (
            "sdpo",
            ["actor_rollout_ref.rollout.calculate_log_probs=false"],
            "calculate_log_probs must be True with algorithm.rollout_correction.rollout_is",
        ),
        (
            "rlsd",
            [
                "actor_rollout_ref.rollout.calculate_log_probs=false",
                f"{CORRECTION}.bypass_mode=true",
            ],
            "calculate_log_probs must be True with algorithm.rollout_correction.bypass_mode",
        ),
        ("sdpo", [f"{CORRECTION}.rollout_is=tokens"], "(?i)invalid rollout_is"),
        ("sdpo", [f"{CORRECTION}.rollout_rs=token_k1"], "rollout_rs_threshold"),
        # a server that is told to send fewer entries than the loss reads: verl's own check
        (
            "server",
            [
                *SERVER,
                "+distillation.teacher_models.teacher_model.inference.engine_kwargs.vllm="
                "{max_logprobs: 20}",
            ],
            r"max_logprobs \(20\) must be >= distillation_loss topk \(64\)",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(recipe, settings, message):
    with pytest.raises(Exception, match=message) as raised:
        check_run(composed(recipe, *settings))
    assert "ValueError" in repr(raised.value) or isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    "recipe, settings",
    [
        # verl's reference worker without a loss of its own
        ("rlsd", [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0"]),
        # with the policy loss verl reads its settings
        ("sdpo", [f"{LOSS}.use_task_rewards=true", f"{ACTOR}.entropy_coeff=0.01"]),
        ("sdpo", [f"{CORRECTION}.rollout_is=sequence", f"{CORRECTION}.rollout_is_threshold=0.5_2"]),
        ("sdpo", [f"{CORRECTION}.rollout_is=null", f"{CORRECTION}.bypass_mode=true"]),
        ("opsd", [f"{ACTOR}.strategy=fsdp"]),
        ("sdpo", ["distillation.feedback_key=null"]),
        ("sdpo", ["actor_rollout_ref.rollout.n=1"]),
        ("sdpo", ["trainer.v1.trainer_mode=a_trainer_of_the_users"]),
        ("sdpo", ["distillation.enabled=false", "trainer.use_v1=false"]),
        (
            "rlsd",
            [
                f"{LOSS}.teacher=live",
                f"{LOSS}.teacher_sync_steps=1",
                "distillation.scored_by=worker",
                f"{MODEL}.use_fused_kernels=false",
                f"{ACTOR}.strategy=fsdp",
            ],
        ),
        ("server", [f"{MODEL}.external_lib=[own, fused_sd.integrations.verl.engines]", *SERVER]),
    ],
)
def test_what_goes_together_passes(recipe, settings):
    check_run(composed(recipe, *settings))


def test_a_variable_in_the_environment_is_enough(monkeypatch):
    config = composed("server", f"{MODEL}.external_lib=null", *SERVER)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "fused_sd")
    check_run(config)


def test_the_trainers_check_the_run():
    assert set(trainer.TRAINERS) == set(TRAINER_MODES)
    for kind in trainer.TRAINERS.values():
        with pytest.raises(ValueError, match="entropy_coeff must be left at its default"):
            kind(composed("sdpo", f"{ACTOR}.entropy_coeff=0.01"))


def test_a_callback_stops_with_the_message_alone():
    with pytest.raises(SystemExit, match=r"^fused_sd: distillation\.reference_key must name what"):
        BeforeRun().on_job_start(composed("opsd", "distillation.reference_key=null"))
    wrong = composed("sdpo", f"{LOSS}.ema_rate=2")
    with pytest.raises(SystemExit, match=r"^fused_sd: ema_rate must lie in \[0, 1\], got 2; it is"):
        BeforeRun().on_job_start(wrong)


ROW = {"prompt": [], "reward_model": {"ground_truth": "2"}, "extra_info": '{"answer": 2}'}


def test_a_reference_that_no_row_has_is_found_in_the_dataset():
    dataset = SimpleNamespace(dataframe=[ROW])
    for key in (None, "reward_model.ground_truth", "reward_model", "extra_info.answer"):
        check_reference(dataset, key)
    check_reference(SimpleNamespace(), "solution")  # no dataset of verl's
    with pytest.raises(ValueError, match="must lead to a value, got solution; a row has prompt, "):
        check_reference(dataset, "solution")
    with pytest.raises(ValueError, match=r"got reward_model\.answer; a row has ground_truth"):
        check_reference(dataset, "reward_model.answer")


def test_the_trainers_check_the_dataset_before_verl_starts_its_workers(monkeypatch):
    def load(self):
        self.train_dataset = SimpleNamespace(dataframe=[{"extra_info": {"index": 0}}])

    monkeypatch.setattr(trainer.PPOTrainerSync, "_init_dataloader", load)
    with pytest.raises(ValueError, match=r"got extra_info\.answer; a row has index"):
        trainer.SelfDistillationSync(composed("opsd"))._init_dataloader()


def test_a_feedback_key_that_nobody_knows_is_told_of(caplog):
    said = [{"reward_extra_info": {"acc": 1, "feedback": ""}}, None, {}]
    check_feedback(said, "feedback")
    check_feedback(said, None)
    assert not caplog.records
    rule = "feedback_key must be in the reward function's result, got 'hint', and the function"
    with pytest.raises(ValueError, match=f"{rule} returns acc, feedback; return it for every"):
        check_feedback(said, "hint")
    check_feedback([{"reward_extra_info": {"feedbak": "no"}}], "feedback")
    assert "the reward function returns feedbak; set distillation.feedback_key=null" in caplog.text
