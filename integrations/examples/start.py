"""What the example scripts share: the command line, the model and the task."""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from transformers import AutoTokenizer
from trl import TrlParser

from fused_sd.integrations.examples.arithmetic import questions, reward


@dataclass
class Script:
    """The arguments of an example beside those of the method's configuration."""

    model: str = field(default="Qwen/Qwen3-1.7B", metadata={"help": "A name or a folder."})
    num_questions: int = field(default=1000, metadata={"help": "Sums to train on."})
    lora_rank: int = field(default=0, metadata={"help": "0 trains all weights."})


def train(trainer: Any, config: Any, *, rewarded: bool = True, **given: Any) -> Any:
    """Train a method on sums, and save the model.

    Args:
        trainer, config: the method's classes.
        rewarded: whether to pass the task's reward function.
        given: further arguments of the trainer.

    Returns:
        The trainer, after training.
    """
    kinds: Any = [Script, config]
    parser = TrlParser(kinds)
    parser.set_defaults(output_dir=f"{trainer.__name__}-sums")
    script, args = parser.parse_args_and_config()
    adapter = None
    if script.lora_rank:
        adapter = LoraConfig(r=script.lora_rank, target_modules="all-linear")
    made = trainer(
        script.model,
        **({"reward_funcs": reward} if rewarded else {}),
        args=args,
        train_dataset=questions(script.num_questions),
        processing_class=AutoTokenizer.from_pretrained(script.model, padding_side="left"),
        peft_config=adapter,
        **given,
    )
    made.train()
    made.save_model()
    return made
