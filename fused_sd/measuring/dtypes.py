"""Dtypes by the names that the command line and ``fused_sd.plan`` take."""

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
