"""flash-linear-attention: fused linear KL divergence."""

from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers.provider import kept, make_provider


def forward_kl(problem: Problem) -> Loss:
    from fla.modules import FusedKLDivLoss

    function, teacher_weight = FusedKLDivLoss(), problem.teacher_weight.detach()

    def loss() -> Tensor:
        tokens = kept(problem)
        return function(tokens.hidden, tokens.teacher_hidden, problem.weight, teacher_weight)

    return loss


FLA = make_provider(
    "fla fused_kl_div",
    {"forward_kl": forward_kl},
    package="fla-core",
    module="fla.modules",
    needs_gpu=True,
    note="at most 8 chunks of tokens with logits in the operands' dtype; dW by an fp32 GEMM",
)
