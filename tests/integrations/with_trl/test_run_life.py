"""A training run's life: one batch, evaluations, resuming, and what is left of the model."""

import copy

import pytest
import torch
from method_pairs import DATA, GROUP, make, model


def test_one_whole_batch_is_enough_for_a_run(tmp_path):
    batch = {"per_device_train_batch_size": 2 * GROUP, "max_steps": 3}
    trainer = make(
        "OPSD", tmp_path, student=model(torch.float32), data=DATA.select([0, 1]), **batch
    )
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("size, generations, fits", [(6, 4, False), (3, 2, False), (6, 2, True)])
def test_an_evaluation_that_cuts_groups_is_refused(size, generations, fits, tmp_path):
    sizes = {"per_device_eval_batch_size": size, "num_generations_eval": generations}
    trainer = make("SDPO", tmp_path, student=model(torch.float32), **sizes)
    rows = DATA.select(range(3))
    if fits:
        assert torch.isfinite(torch.tensor(trainer.evaluate(rows)["eval_loss"]))
        return
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="per_device_eval_batch_size must hold whole groups"):
            evaluate(rows)


@pytest.mark.parametrize("is_first", [True, False], ids=["first trainer", "second trainer"])
def test_a_copy_of_the_model_runs_its_own_weights(is_first, tmp_path):
    student = model(torch.float32)
    if not is_first:
        make("GRPO", tmp_path, student=student)
    trained = make("SDPO", tmp_path, student=student).model
    copied, ids = copy.deepcopy(trained), torch.tensor([[5, 6, 7]])
    assert torch.equal(copied(input_ids=ids).logits, trained(input_ids=ids).logits)
    before = trained(input_ids=ids).logits
    with torch.no_grad():
        copied.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(copied(input_ids=ids).logits, before)
    assert torch.equal(trained(input_ids=ids).logits, before)


def test_a_forward_that_the_user_has_set_stays(tmp_path):
    student, calls = model(torch.float32), []
    own = student.forward

    def forward(*args, **kwargs):
        calls.append(True)
        return own(*args, **kwargs)

    student.forward = forward
    make("SDPO", tmp_path, student=student)
    calls.clear()
    student(input_ids=torch.tensor([[5, 6, 7]]))
    assert calls == [True]


@pytest.mark.parametrize("method", ["SDPO", "RLCSD", "SDPG"])
def test_a_resumed_run_ends_where_the_whole_run_does(method, tmp_path):
    """Weights, teacher, random numbers and what a method draws by itself."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    runs = [make(method, tmp_path, student=model(torch.float32), **settings) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    states = []
    for run in runs:
        with run.teacher.acting() as module:
            teacher = {f"teacher.{name}": p.clone() for name, p in module.named_parameters()}
        states.append({**teacher, **dict(run.model.named_parameters())})
    for name, weight in states[0].items():
        # Adam turns the rounding of a gradient near 0 into a step of another size
        assert (states[1][name] - weight).abs().max() < 1e-4, name
