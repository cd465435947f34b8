"""Steps of a tiny trainer, which are watched."""

import torch
from footprint import Course, footprint, only_new_objects
from method_pairs import make, model
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Takes a footprint every few steps, after the warm-up."""

    def __init__(self, warm_up, every):
        self.warm_up, self.every = warm_up, every
        self.at, self.prints = [], []

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step >= self.warm_up and (step - self.warm_up) % self.every == 0:
            self.at.append(step)
            self.prints.append(footprint())


def train(folder, steps, warm_up, every):
    """Train by SDPO, with a moving average as the teacher."""
    watch = Watch(warm_up, every)
    student = model(torch.float32, num_hidden_layers=1)
    trainer = make(
        "SDPO",
        folder,
        student=student,
        teacher_model_kind="ema",
        max_steps=steps,
        max_completion_length=4,
        logging_steps=100,  # TRL keeps each step's metrics until then, and transformers every log
        learning_rate=1e-4,
        callbacks=[watch],
    )
    with only_new_objects():
        trainer.train()
    return Course("trainer", watch.at, watch.prints)
