"""TRL's distillation trainers with a teacher model, and ours, on the same tiny models."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import peft
import torch
from datasets import Dataset
from tiny_models import tiny_model
from trl.experimental.gkd import GKDConfig
from trl_pairs import TOKENIZER, VOCAB

ROWS, LENGTH = 3, 11
DATA = Dataset.from_dict(
    {
        "messages": [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in (("Solve 2 + 2.", "4"), ("Add 3 to 4, then 5.", "It is 12."))
        ]
        * 4
    }
)
DEFAULTS = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "seed": 1,
    "learning_rate": 1e-2,
    "max_steps": 2,
}


def build(seed, family="Qwen3", dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    settings = {"max_position_embeddings": 512, "tie_word_embeddings": False, **changes}
    return tiny_model(family, vocab=VOCAB, **settings).to(dtype)


def make(cls, folder, *, student=None, teacher=None, adapter=None, eval_dataset=None, **settings):
    """A trainer that has not trained yet."""
    settings = {"max_new_tokens": 5, "gradient_checkpointing": False, **settings}
    config = GKDConfig(output_dir=str(folder), **{**DEFAULTS, **settings})
    torch.manual_seed(1)
    return cls(
        build(0) if student is None else student,
        build(7, hidden_size=48) if teacher is None else teacher,
        args=config,
        train_dataset=DATA,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        peft_config=None if adapter is None else peft.LoraConfig(r=4, **adapter),
    )


def batch(rows=ROWS, length=LENGTH, labels=True):
    """What the collator makes: padding on the left, labels of the answers alone."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = torch.full_like(ids, -100)
    if labels:
        for row in range(rows):
            given[row, 4 + row % 3 :] = ids[row, 4 + row % 3 :]
    return {"input_ids": ids, "attention_mask": mask, "labels": given}


def loss_and_gradients(trainer, inputs, **given):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs, **given)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(stock, fused, tolerance=1e-5):
    """Same loss and gradients, each given as ``loss_and_gradients`` returns them."""
    (loss, gradients), (own_loss, own) = stock, fused
    assert abs(float(loss - own_loss)) <= tolerance * max(abs(float(loss)), 1.0)
    assert own.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        assert float((own[name] - gradient).abs().max()) <= tolerance * largest, name
