"""What ``fused_sd verify`` holds the library to, and the sentence for each promise that breaks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_sd.verify import Result

LOSS_BOUND = {torch.float64: 1e-10}  # relative; other dtypes: 0.5 %, from a KL of 1e-5 on
GRADIENT_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}  # by norm; other dtypes: 0.3 %
DEFAULT_LOSS_BOUND, DEFAULT_GRADIENT_BOUND = 5e-3, 3e-3
FLOOR = 1e-6  # below which being worse than rounded logits is luck
