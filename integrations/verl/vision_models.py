"""Mends what verl's forwards of vision-language models lack, on one model.

verl replaces the forwards of these classes (``apply_monkey_patch``).  Read in verl 0.9.1, and run
with transformers 5:

* They cannot run on token ids alone, as ``attach`` runs a model to compare its logits with rebuilt
  ones: the Qwen2-VL and GLM-4V families read positions, and under Ulysses all of them slice these.
* Without images they run the vision tower on zeros, so that every rank runs the same collectives,
  and take the mean of what it returns.  In the Qwen2-VL and GLM-4V families that must be a tensor,
  as in transformers 4.  A micro-batch of text fails, and with it any batch that verl fills up with
  synthetic samples.
"""

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PATCHES = "verl.models.transformers."
NEED_POSITIONS = ("qwen2_vl", "glm4v", "qwen3_vl", "qwen3_5")
NEED_TENSORS = ("qwen2_vl", "glm4v")


def mend_vision(model: PreTrainedModel) -> None:
    """Let a model with one of verl's forwards run without images, and without positions."""
    forward = type(model).forward
    family = forward.__module__.removeprefix(PATCHES)
    if family in NEED_TENSORS:
        tower: Any = model.model.visual
        tower.register_forward_hook(_features)
    if family not in NEED_POSITIONS:
        return

    @functools.wraps(forward)
    def positioned(
        self: PreTrainedModel, input_ids: Tensor, *, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        if position_ids is None:  # of whole sequences of text: time, height and width are the same
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = places.expand(4, *input_ids.shape)
        return forward(self, input_ids, position_ids=position_ids, **kwargs)

    model.forward = MethodType(positioned, model)


def _features(tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the vision tower's features alone, as transformers 4 did; verl takes both."""
    return getattr(output, "pooler_output", output)
