"""Trainers whose rollouts a real vLLM samples, on a tiny model with random weights."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from trl_pairs import TOKENIZER

DATA = Dataset.from_dict(
    {
        "prompt": ["Solve 2 + 2.", "Add 3 to 4, then 5."] * 4,
        "privileged_context": ["It is 4.", "It is 12, of course."] * 4,
    }
)
GROUP = 4


def save_model(folder: Path) -> Path:
    """Save what vLLM and the trainers load.

    vLLM's attention on a CPU has no head smaller than 32.  The output head is not tied to the
    embedding: vLLM 0.31 packs a tied head for the CPU once, and keeps it when weights are loaded.
    """
    sizes = {"head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False}
    torch.manual_seed(0)
    tiny_model("Qwen3", vocab=len(TOKENIZER), **sizes).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def rewards(prompts: list[Any], **_: Any) -> list[float]:
    """Every second rollout succeeds."""
    return [float(index % 2) for index in range(len(prompts))]


def make(
    cls: type,
    config: type,
    home: Path,
    *,
    dtype: torch.dtype = torch.float32,
    adapter: LoraConfig | None = None,
    **settings: Any,
) -> Any:
    """A trainer that has not trained yet."""
    defaults = {
        "output_dir": str(home / "out"),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "use_vllm": True,
        "per_device_train_batch_size": GROUP,
        "num_generations": GROUP,
        "max_completion_length": 12,
        "disable_tqdm": True,
        "seed": 1,
        "learning_rate": 1e-2,
        "max_steps": 2,
        # Else vLLM's log-probabilities are those of the cut softmax, and the trainer's are not.
        "top_p": 1.0,
        "top_k": 0,
    }
    trainer = cls(
        AutoModelForCausalLM.from_pretrained(home, dtype=dtype),
        reward_funcs=rewards,
        args=config(**{**defaults, **settings}),
        train_dataset=DATA,
        processing_class=TOKENIZER,
        peft_config=adapter,
    )
    trainer.current_gradient_accumulation_steps = 1  # what training sets
    trainer.model.train()
    return trainer


def sample(trainer: Any, rows: int = GROUP) -> dict[str, Any]:
    """A batch of rollouts, all of one prompt."""
    return trainer._generate_and_score_completions(list(trainer.train_dataset.select([0] * rows)))


def move(trainer: Any, scale: float = 0.2, *, named: str = "") -> None:
    """Change the trainer's weights, or those with a word in their names, as if it had trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if named in name:
                parameter += scale * torch.randn_like(parameter)


def gap(inputs: dict[str, Any]) -> float:
    """How far the engine's log-probabilities are from the trainer's, on average."""
    difference = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    return float(difference[inputs["completion_mask"].bool()].abs().mean())


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def assert_same(one: Any, other: Any, inputs: dict[str, Any]) -> None:
    """Two trainers with the same weights have the same loss and gradients, in fp32."""
    (loss, truth), (own_loss, own) = (loss_and_gradients(t, inputs) for t in (one, other))
    assert float((own_loss - loss).abs()) <= 1e-5 * max(float(loss.abs()), 1.0)
    assert own.keys() == truth.keys()
    largest = max(float(gradient.abs().max()) for gradient in truth.values())
    assert largest > 0
    for name, gradient in truth.items():
        assert float((own[name] - gradient).abs().max()) <= 1e-5 * largest, name
