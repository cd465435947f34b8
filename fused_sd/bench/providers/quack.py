"""QuACK (Dao-AILab): chunked linear cross entropy in CuTe."""

import torch

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers.provider import labels, make_provider


def cross_entropy(problem: Problem) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(problem.hidden, problem.weight, labels(problem))


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem: TMA needs aligned sizes.

    A vocabulary divisible by the tile of 128 pads the tokens itself on sm_90.
    """
    (num_tokens, hidden_size), vocab = problem.hidden.shape, problem.weight.shape[0]
    if problem.hidden.dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit operands, got {problem.hidden.dtype}"
    major, minor = torch.cuda.get_device_capability(problem.hidden.device)
    if major < 9:
        return f"needs a GPU of sm_90 or later, this is sm_{major}{minor}"
    if hidden_size % 8 or vocab % 8:
        return f"needs D and V divisible by 8, got {hidden_size} and {vocab}"
    if num_tokens % 8 and (vocab % 128 or (major, minor) != (9, 0)):
        return f"needs a number of tokens divisible by 8, got {num_tokens}"
    return None


QUACK = make_provider(
    "quack linear_cross_entropy",
    {"cross_entropy": cross_entropy},
    package="quack-kernels",
    module="quack.linear_cross_entropy",
    needs_gpu=True,
    refusal=refusal,
    note="chunks of 4096 with 16-bit logits, or 16-bit exponentials of fp32 logits where sm_90 "
    "and V % 128 = 0 allow it; fp32 dW; masked tokens are computed",
)
