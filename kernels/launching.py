"""The one place that starts programs."""

import torch
from torch import Tensor


def launch(program, num_programs: int, data: Tensor, *arguments, **constants) -> None:
    """Start so many programs, whose first argument is the data, on the GPU that holds it.

    Triton launches on the current GPU, which need not be that one: a model spread over GPUs has its
    head on the last.
    """
    if num_programs:
        with torch.cuda.device_of(data):
            program[(num_programs,)](data, *arguments, **constants)
