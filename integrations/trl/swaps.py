"""What the trainers that take the place of TRL's own have in common.

They keep TRL's losses, and so its forwards' inputs: rows padded on the left, without position ids
(read in TRL 1.16).  The methods' trainers move the padding; see ``shared/padding``.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from fused_sd.checks import fail
from fused_sd.integrations.shared.padding import shift_by_padding
from fused_sd.integrations.shared.self_check import is_whole
from fused_sd.integrations.transformers import attach, unwrap
from fused_sd.integrations.trl.data_checks import check_columns


def check_prompts(trainer: Any) -> None:
    """Refuse a dataset without prompts before the step in which TRL's trainer looks for them."""
    columns = getattr(trainer.train_dataset, "column_names", None)
    # an environment may write the prompts itself
    if columns is not None and not getattr(trainer, "environment_factories", None):
        check_columns(type(trainer).__name__, "train_dataset", columns)


def attach_or_warn(trainer: Any, models: Sequence[nn.Module]) -> bool:
    """Let a trainer's models answer requests; call it after TRL's ``__init__``.

    There accelerate may have prepared models, whose requests then need the autocast that is passed.
    A model whose states depend on its padding gets a warning: TRL's loss is wrong for it.

    Args:
        trainer: takes the place of one of TRL's.
        models: the student, and its teacher or reference.

    Returns:
        False, with a warning, where a model's head cannot be reproduced: TRL's own loss has to run.

    Raises:
        ValueError: the trainer's arguments ask for Liger's fused head.
    """
    name = type(trainer).__name__
    try:
        for model in models:
            attach(model, autocast=trainer.accelerator.autocast)
    except ValueError as error:
        warnings.warn(f"{name} runs TRL's own loss: {error}", stacklevel=3)
        return False
    if trainer.args.use_liger_kernel:
        _keep_ligers_head_out(trainer.args)
    for kind, model in {type(unwrap(model)).__name__: model for model in models}.items():
        shift = shift_by_padding(model) if is_whole(model) else 0.0  # a shard cannot run by itself
        if shift:
            warnings.warn(
                f"padding before a row changes the states of {kind} by {shift:.0%}, and TRL's "
                f"trainer, whose loss {name} reproduces, pads there without position ids: a row's "
                "loss depends on its neighbours. The methods' trainers of fused_sd, GRPOTrainer "
                "among them, move the padding; or train on rows of one length",
                stacklevel=3,
            )
    return True


def _keep_ligers_head_out(args: Any) -> None:
    """Leave Liger its kernels for the layers, as TRL's GRPOTrainer does.

    Trainer applies Liger when training starts.  Its fused head would replace the forward that
    ``attach`` installed.
    """
    kernels = args.liger_kernel_config or {}
    if kernels.get("fused_linear_cross_entropy"):
        fail(
            "liger_kernel_config",
            "leave the model's head alone",
            f"fused_linear_cross_entropy={kernels['fused_linear_cross_entropy']!r}",
            "leave it out: the loss reads the head itself",
        )
    args.liger_kernel_config = {**kernels, "fused_linear_cross_entropy": False}
