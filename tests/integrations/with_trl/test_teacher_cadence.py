"""A teacher moves once for each batch of rollouts, however many optimizer steps it makes."""

import pytest
import torch
from method_pairs import GROUP, make
from transformers import TrainerCallback

RATE = 0.3
EMA = {"teacher_model_kind": "ema", "teacher_update_rate": RATE}
FOUR = {"per_device_train_batch_size": 1, "steps_per_generation": GROUP}


class Break(TrainerCallback):
    """Puts a NaN into the gradient of some steps; must come before the trainer's own callback."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.steps:
            next(iter(kwargs["model"].parameters())).grad[0, 0] = torch.nan


class Watch(TrainerCallback):
    """Keeps both sides' weights at the start and after each step, by global step."""

    def __init__(self, trainer):
        self.trainer, self.students, self.teachers = trainer, {}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        sides = self.trainer.model, self.trainer.teacher.module
        for module, kept in zip(sides, (self.students, self.teachers)):
            named = module.named_parameters()
            kept[state.global_step] = {name: p.detach().clone() for name, p in named}

    on_step_end = on_train_begin


def watch(folder, *, broken=(), resume=None, **settings):
    trainer = make("SDPO", folder, **{"max_steps": 8, **settings})
    trainer.callback_handler.callbacks.insert(0, Break(broken))
    trainer.add_callback(seen := Watch(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return seen


def assert_follows(seen, moves, share=RATE):
    """Only after these steps the teacher goes its share of the way to the student."""
    first, last = min(seen.teachers), max(seen.teachers)
    for step in range(first + 1, last + 1):
        for name, before in seen.teachers[step - 1].items():
            expected = before
            if step in moves:
                expected = torch.lerp(before, seen.students[step][name], share)
                assert not torch.equal(expected, before), (step, name)
            assert torch.allclose(seen.teachers[step][name], expected, rtol=0, atol=1e-15), step


@pytest.mark.parametrize(
    "settings, moves",
    [
        (FOUR, {4, 8}),
        # every rollout is trained on twice
        (
            {"per_device_train_batch_size": 2, "steps_per_generation": 2, "num_iterations": 2},
            {4, 8},
        ),
        # two batches of rollouts in each step
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2, "max_steps": 3}, {1, 2, 3}),
        # a batch ends within a step: 2, 4, 6 and 8 micro-steps of 3 a step
        (
            {
                "per_device_train_batch_size": 2,
                "steps_per_generation": 2,
                "gradient_accumulation_steps": 3,
                "max_steps": 3,
            },
            {1, 2, 3},
        ),
        ({**FOUR, "teacher_sync_steps": 2}, {8}),
    ],
)
def test_an_average_moves_when_a_batch_of_rollouts_is_finished(settings, moves, tmp_path):
    assert_follows(watch(tmp_path, **EMA, **settings), moves)


def test_a_synced_teacher_counts_batches_of_rollouts(tmp_path):
    seen = watch(tmp_path, teacher_model_kind="synced", teacher_sync_steps=2, **FOUR)
    assert_follows(seen, {8}, share=1.0)


@pytest.mark.parametrize(
    "broken, moves", [({1}, {4, 8}), ({4}, {4, 8}), ({1, 2, 3, 4}, {8}), ({8, 6, 7, 5}, {4})]
)
def test_steps_that_are_left_out_do_not_hold_the_others_back(broken, moves, tmp_path):
    seen = watch(tmp_path, broken=broken, **EMA, **FOUR)
    assert_follows(seen, moves)
    assert seen.trainer._teacher_callback.num_skipped == len(broken)


def test_a_student_that_took_a_bad_step_is_not_followed(tmp_path):
    settings = {**EMA, **FOUR, "skip_nonfinite_gradients": False}
    seen = watch(tmp_path, broken={6}, **settings)
    assert_follows(seen, {4})
    assert not all(weight.isfinite().all() for weight in seen.students[8].values())


@pytest.mark.parametrize("start, moves", [(4, {8, 12}), (6, {10})])
def test_a_resumed_run_moves_its_teacher_at_the_end_of_its_own_batches(start, moves, tmp_path):
    """TRL samples anew where a run is resumed, also in the middle of a batch."""
    settings = {**EMA, **FOUR, "save_strategy": "steps", "save_steps": 2}
    first = watch(tmp_path, **settings)
    folder = str(tmp_path / f"checkpoint-{start}")
    again = watch(tmp_path, resume=folder, **{**settings, "max_steps": 12})
    assert min(again.teachers) == start
    for name, weight in again.teachers[start].items():
        assert torch.equal(weight, first.teachers[start][name])
    assert_follows(again, moves)
