"""verl's own command trains on the recipes: rollouts, rewards, teachers, updates, checkpoints."""

import os

import main_ppo_runs
import pytest
from main_ppo_runs import SAVED_AFTER, STEPS, Run

RECIPES = {
    "sdpo": ("distillation.distillation_loss.topk=20",),
    "sdpo, siblings": (
        "distillation.distillation_loss.topk=20",
        "distillation.feedback_key=null",
        "+distillation.context.include_environment_feedback=false",
    ),
    "rlsd": ("distillation.distillation_loss.teacher_sync_steps=2",),
    "opsd": ("actor_rollout_ref.rollout.n=1",),
    "sd_zero": ("actor_rollout_ref.rollout.n=1",),
    "opd": (
        "distillation.worker_group.model_path={folder}/teacher",
        "distillation.distillation_loss.topk=20",
    ),
}
QUICK = "sdpo"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main_ppo")
    main_ppo_runs.make_inputs(folder)
    return folder


@pytest.mark.parametrize("case", RECIPES)
def test_a_killed_run_resumes_where_it_was(case, inputs, tmp_path):
    if case != QUICK and not os.environ.get("FUSED_SD_TEST_FULL"):
        pytest.skip("a minute or two each: make test-full")
    for name in ("model", "teacher", "train.parquet", "test.parquet"):
        (tmp_path / name).symlink_to(inputs / name)
    recipe = case.split(",")[0]
    settings = [setting.format(folder=tmp_path) for setting in RECIPES[case]]
    killed = Run(recipe, tmp_path, "killed", *settings).kill_after(SAVED_AFTER + 1)
    resumed = Run(recipe, tmp_path, "resumed", *settings).wait()
    assert min(resumed) == SAVED_AFTER, "validated before it went on"
    assert max(resumed) == STEPS
    step = SAVED_AFTER + 1
    ours = ("actor/", "self_distillation/", "critic/")
    compared = [name for name in killed[step] if name.startswith(ours) and "perf" not in name]
    assert {"actor/loss", "actor/grad_norm"} <= set(compared)
    assert killed[step]["actor/grad_norm"] > 1e-4, "something was taught"
    # rows may come out of the queue in another order, and micro-batches then hold others
    for name in compared:
        assert resumed[step][name] == pytest.approx(killed[step][name], rel=5e-3, abs=1e-6), name
