"""Steps with an infinite gradient in fp16: the gradient scaler leaves them out and goes on."""

import peft
import pytest
import torch
from method_pairs import make, model
from transformers import TrainerCallback

SCALE = 1024.0


class Watch(TrainerCallback):
    """Notes the scale, the scheduler's steps and a copy of the trained weights after each step."""

    def __init__(self, trainer):
        self.trainer, self.scales, self.weights = trainer, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.scales.append(self.trainer.accelerator.scaler.get_scale())
        named = self.trainer.model.named_parameters()
        self.weights.append({n: p.detach().clone() for n, p in named if p.requires_grad})


def scaled_run(folder, clip, *, unscales=True, broken=(0,), **settings):
    """Two steps with a scaler, of which some micro-batches have an infinite gradient.

    Args:
        unscales: whether Trainer's norm divides the gradients by the scale, as it does on a GPU;
            otherwise the optimizer's step does.
    """
    trainer = make("SDPO", folder, student=model(torch.float32), max_grad_norm=clip, **settings)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    if unscales:
        accelerator.unscale_gradients = lambda: [
            accelerator.scaler.unscale_(one.optimizer) for one in accelerator._optimizers
        ]
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    calls = []

    def overflow(gradient):
        calls.append(True)
        return gradient * torch.inf if len(calls) - 1 in broken else gradient

    weight.register_hook(overflow)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    named = trainer.model.named_parameters()
    before = {n: p.detach().clone() for n, p in named if p.requires_grad}
    trainer.train()
    return trainer, before, watch


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_step_is_left_out_and_the_scale_halved(clip, unscales, skip, tmp_path):
    settings = {"skip_nonfinite_gradients": skip, "teacher_update_rate": 0.5}
    trainer, before, watch = scaled_run(tmp_path, clip, unscales=unscales, **settings)
    assert watch.scales == [SCALE / 2, SCALE / 2]
    first, second = watch.weights
    assert all(torch.equal(first[name], weight) for name, weight in before.items())
    assert any(not torch.equal(second[name], weight) for name, weight in before.items())
    assert all(weight.isfinite().all() for weight in second.values())
    assert trainer._teacher_callback.num_skipped == 1
    teacher = dict(trainer.teacher.module.named_parameters())
    assert any(not torch.equal(teacher[name], weight) for name, weight in before.items())


def test_one_micro_batch_spoils_its_step_alone(tmp_path):
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {"gradient_accumulation_steps": 2, "peft_config": adapter}
    _, before, watch = scaled_run(tmp_path, 0.0, broken=(3,), **settings)
    assert watch.scales == [SCALE, SCALE / 2]
    first, second = watch.weights
    assert any(not torch.equal(first[name], weight) for name, weight in before.items())
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


def test_a_norm_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_grad_norm must be a number, got None; 0 clips"):
        make("SDPO", tmp_path, max_grad_norm=None)
