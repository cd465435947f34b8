"""Steps of a tiny trainer, which are watched: of ours, and of TRL's that ours stands on."""

import torch
from footprint import Course, footprint, only_new_objects
from method_pairs import DATA, GROUP, make, model, rewards
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_pairs import TOKENIZER


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
    trainer = make(
        "SDPO",
        folder,
        student=small(),
        teacher_model_kind="ema",
        callbacks=[watch],
        **settings(steps),
    )
    return course("trainer", trainer, watch)


def train_by_trl(folder, steps, warm_up, every):
    """Train by TRL's own GRPO on the same questions."""
    watch = Watch(warm_up, every)
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings(steps),
    )
    given = {"train_dataset": DATA, "processing_class": TOKENIZER, "callbacks": [watch]}
    return course("TRL's trainer", GRPOTrainer(small(), rewards, args, **given), watch)


def small():
    return model(torch.float32, num_hidden_layers=1)


def settings(steps):
    """What both trainers are given."""
    return {
        "max_steps": steps,
        "max_completion_length": 4,
        "logging_steps": 100,  # TRL keeps each step's metrics until then, transformers every log
        "learning_rate": 1e-4,
    }


def course(name, trainer, watch):
    trainer.remove_callback(PrinterCallback)
    with only_new_objects():
        trainer.train()
    return Course(name, watch.at, watch.prints)
