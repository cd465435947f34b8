"""OPSD: forward KL to the initial model that has read the reference solution."""

from dataclasses import dataclass, field

from fused_sd import LossOutput, opsd_loss
from fused_sd.checks import fail
from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.trl.config import check_bounds
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.divergence_trainer import (
    DivergenceConfig,
    DivergenceTrainer,
    StatesAndHead,
)
from fused_sd.integrations.trl.trainer import Inputs, Options


@dataclass
class OPSDConfig(DivergenceConfig):
    """OPSD's settings; defaults are the paper's (arXiv 2601.18734, v3) and its code's sampling.

    For the official script of March 2026 pass ``distillation_alpha=0.5, entry_clip=None,
    learning_rate=2e-4`` and a ``peft_config`` of rank 64.

    Examples:
        >>> from fused_sd.integrations.trl import OPSDConfig
        >>> OPSDConfig("out").entry_clip
        0.05
        >>> march = OPSDConfig("out", distillation_alpha=0.5, entry_clip=None, learning_rate=2e-4)
        >>> march.num_generations
        1
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    max_completion_length: int | None = field(
        default=1024, metadata={"help": "Tokens to sample at most."}
    )
    temperature: float = field(
        default=1.1, metadata={"help": "Of the samples; divides both sides' logits, too."}
    )
    top_p: float = field(default=0.95, metadata={"help": "Mass of the tokens to sample from."})
    top_k: int = field(default=20, metadata={"help": "Number of tokens to sample from."})
    max_reprompt_len: int = field(
        default=20000, metadata={"help": "Longest teacher prompt in tokens."}
    )
    reprompt_template: str = field(
        default=templates.OPSD,
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    distillation_alpha: float = field(
        default=0.0, metadata={"help": "0: KL(t||s), 1: KL(s||t), between: Jensen-Shannon."}
    )
    distillation_topk: int | None = field(
        default=None, metadata={"help": "Entries of the teacher's support; None: all."}
    )
    distillation_add_tail: bool = field(
        default=False, metadata={"help": "One bucket for all other entries, or renormalise."}
    )
    entry_clip: float | None = field(
        default=0.05, metadata={"help": "Bound of each vocabulary entry's term; None: no bound."}
    )
    loss_type: str = field(default="bnpo", metadata={"help": "Average of the token losses."})
    teacher_model_kind: str = field(
        default="base",
        metadata={"help": "`base`: the initial weights; OPSD's author found others unstable."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_bounds(self, "entry_clip")
        if self.distillation_add_tail and self.distillation_topk is None:
            fail(
                "distillation_add_tail",
                "be False over the full vocabulary, which leaves no tail",
                True,
                "pass distillation_topk as well",
            )


class OPSDTrainer(PrivilegedPrompt, DivergenceTrainer):
    """OPSD (arXiv 2601.18734); the dataset's ``privileged_context`` is the reference solution.

    Rewards are not needed; where functions are given, their values are logged.

    Examples:
        >>> from peft import LoraConfig
        >>> from fused_sd.integrations.examples.arithmetic import questions
        >>> from fused_sd.integrations.trl import OPSDConfig, OPSDTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> lora = LoraConfig(r=64, target_modules="all-linear")
        >>> args, dataset = OPSDConfig("out"), questions(64)
        >>> trainer = OPSDTrainer(model, args=args, train_dataset=dataset, peft_config=lora)
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = OPSDConfig
    _name = "OPSD"
    needs_rewards = False
    needs_privileged = True

    def further_metrics(self, inputs: Inputs) -> tuple[str, ...]:
        clipped = () if self.args.entry_clip is None else ("entry_clip_fraction",)
        return (*super().further_metrics(inputs), *clipped)

    def divergence(
        self, student: StatesAndHead, teacher: StatesAndHead, inputs: Inputs, options: Options
    ) -> LossOutput:
        return opsd_loss(
            *student,
            *teacher,
            beta=self.args.to_divergence(),
            entry_clip=self.args.entry_clip,
            top_k=self.args.distillation_topk,
            remainder="tail" if self.args.distillation_add_tail else "renormalize",
            **options,
        )
