"""The settings of SD-Zero's first phase."""

from dataclasses import dataclass, field

from trl import SFTConfig

from fused_sd.checks import check_one_of, fail
from fused_sd.integrations.trl.sparse_gradients import GradientSettings
from fused_sd.integrations.trl.srt_data import OBJECTIVES

# SFTConfig's settings that have no meaning for traces, with the values that leave them alone
UNREAD = {
    "packing": False,
    "eval_packing": None,
    "padding_free": False,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "loss_type": "nll",
    "label_smoothing_factor": 0.0,
    "dataset_kwargs": None,
    "truncation_mode": "keep_start",
}


@dataclass
class SRTConfig(GradientSettings, SFTConfig):
    """SRT's settings; defaults are those of SD-Zero's official script (arXiv 2604.12002).

    Raises:
        ValueError: a value is out of its range, or a setting of SFTConfig is given that has no
            meaning for traces.

    Examples:
        >>> from fused_sd.integrations.trl import SRTConfig
        >>> args = SRTConfig("out", objective="revision", num_train_epochs=1)
        >>> args.max_length, args.objective
        (32768, 'revision')
    """

    objective: str = field(
        default="joint",
        metadata={
            "help": "`joint`: the paper's sum of both terms; `generation`: the term of the whole "
            "turn; `revision`: the term of the revision."
        },
    )
    max_length: int | None = field(
        default=32768,
        metadata={"help": "Longer traces are left out, with a warning; none is ever cut."},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the traces."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Traces in a forward."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up, in steps or as a share of all."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay."})

    def __post_init__(self) -> None:
        for name, value in UNREAD.items():
            if getattr(self, name) != value:
                remedy = "which loss a token has follows from the objective"
                fail(name, f"be {value!r} for traces", repr(getattr(self, name)), remedy)
        super().__post_init__()
        check_one_of("objective", self.objective, OBJECTIVES)
