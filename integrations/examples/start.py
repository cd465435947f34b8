"""What the example scripts share: the command line, the model and the task."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import TrlParser

from fused_sd.integrations.examples.arithmetic import questions, reward

MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-1.7B")  # without and with thinking
# The configurations have the lengths of the official runs, thousands of tokens.  These tasks need
# few, and so small a model writes nothing useful beyond them.  Learning rates stay the official.
LENGTHS = (512, 4096)


@dataclass
class Script:
    """The arguments of an example beside those of the method's configuration."""

    model: str | None = field(default=None, metadata={"help": "A name or a folder."})
    thinking: bool = field(
        default=False, metadata={"help": "Take a model that thinks, and let it: long completions."}
    )
    num_questions: int = field(default=1000, metadata={"help": "Questions to train on."})
    lora_rank: int = field(default=0, metadata={"help": "0 trains all weights."})


def train(
    trainer: Any,
    config: Any,
    *,
    dataset: Callable[[int], Dataset] = questions,
    reward: Callable[..., Any] | None = reward,
    models: tuple[str, str] = MODELS,
    settings: dict[str, Any] | None = None,
    **given: Any,
) -> Any:
    """Train a method on a task, and save the model.

    Args:
        trainer, config: the method's classes.
        dataset: makes the task's dataset, with that many questions.
        reward: the task's reward function; None for a method that reads no rewards.
        models: the default models, without and with thinking.
        settings: of the configuration, other than its defaults.
        given: further arguments of the trainer.

    Returns:
        The trainer, after training.
    """
    parser = TrlParser([Script, config])  # type: ignore[list-item]
    defaults = {
        "output_dir": f"{trainer.__name__}-{dataset.__module__.rpartition('.')[2]}",
        "max_completion_length": LENGTHS[_thinks()],
        # Qwen3's template thinks unless it is told not to; Qwen2.5's does not read it
        "chat_template_kwargs": {"enable_thinking": _thinks()},
    }
    parser.set_defaults(**{**defaults, **(settings or {})})
    script, args = parser.parse_args_and_config()
    adapter = None
    if script.lora_rank:
        adapter = LoraConfig(r=script.lora_rank, target_modules="all-linear")
    made = trainer(
        script.model or models[script.thinking],
        **({} if reward is None else {"reward_funcs": reward}),
        args=args,
        train_dataset=dataset(script.num_questions),
        peft_config=adapter,
        **given,
    )
    made.train()
    made.save_model()
    return made


def _thinks() -> bool:
    """Read ``--thinking`` before the other arguments, whose defaults depend on it."""
    parser = HfArgumentParser(Script, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]
    script, *_ = parser.parse_args_into_dataclasses(sys.argv[1:], return_remaining_strings=True)
    return bool(script.thinking)
