"""verl: log-probabilities from its fused kernels, with its backends "torch" and "triton".

Dimension key:  M tokens that count, D hidden size, V vocabulary
"""

from torch import Tensor

from fused_sd.bench.problem import Problem
from fused_sd.bench.providers import formulas
from fused_sd.bench.providers.log_probs import from_log_probs
from fused_sd.bench.providers.provider import make_provider


def torch_backend(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(hidden, weight, token_ids)[0]


def triton_backend(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, token_ids, 1.0, "none")[0]


def triton_refusal(problem: Problem) -> str | None:
    """Why the Triton kernels cannot run a problem; None: they can."""
    size = problem.hidden.shape[1]
    return None if size % 128 == 0 else f"needs a hidden size divisible by 128, got {size}"


VERL_TORCH = make_provider(
    "verl torch",
    dict.fromkeys(formulas.POLICIES, from_log_probs(torch_backend, torch_backend)),
    package="verl",
    module="verl.utils.experimental.torch_functional",
    note="its default: chunks of 512 with logits in the operands' dtype, projected again for "
    "backward; dW summed over the chunks in its own dtype; the entropy comes with it",
)
VERL_TRITON = make_provider(
    "verl triton",
    dict.fromkeys(formulas.POLICIES, from_log_probs(triton_backend, triton_backend)),
    package="verl",
    module="verl.utils.kernel.linear_cross_entropy",
    needs_gpu=True,
    refusal=triton_refusal,
    note="fp32 logits in registers, projected again for backward by slices of the vocabulary "
    "whose dH is summed in its own dtype; dW for a frozen head too; the entropy comes with it",
)
