"""Liger-Kernel: fused linear JSD, chunked JSD, cross entropy, scaled cross entropy, GRPO.

Dimension key:  M tokens that count, D hidden size, V vocabulary
"""

import torch
from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers import formulas
from fused_sd.bench.providers.eager import no_compiler
from fused_sd.bench.providers.log_probs import from_log_probs
from fused_sd.bench.providers.provider import Build, labels, make_provider, why_broken

PACKAGE = "liger-kernel"
GRPO_ROWS = 4096  # tokens in a chunk of GRPO: a long response, as its default is one sequence
SCALED_SM90 = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"


def fused_jsd(problem: Problem) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=formulas.GKD_BETA[problem.objective])
    teacher = problem.teacher_hidden, problem.teacher_weight.detach()
    return lambda: loss(problem.hidden, problem.weight, *teacher, labels(problem))


def chunked_jsd(compiled: bool) -> Build:
    """Build the soft loss alone: by default half of the loss is the labels' cross entropy."""

    def build(problem: Problem) -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=formulas.GKD_BETA[problem.objective],
            compiled=compiled,
        )
        teacher = problem.teacher_hidden, problem.teacher_weight.detach()
        return lambda: loss(problem.hidden, problem.weight, *teacher, labels(problem))

    return build


def cross_entropy(problem: Problem) -> Loss:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(problem.weight, problem.hidden, labels(problem))


def scaled_log_probs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities as verl's fused_kernels_backend "liger" computes them, with entropy."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    function = LigerFusedLinearScaledCrossEntropyFunction.apply
    return -function(hidden, weight, token_ids, 1.0, -100, 1, True)[0]


def scaled_refusal(problem: Problem) -> str | None:
    """Why it cannot run a problem: on Hopper it needs its own CuTe kernel, without a fallback."""
    device = problem.hidden.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return why_broken(SCALED_SM90)
    return None


def grpo(problem: Problem) -> Loss:
    """Build GRPO with one token a sequence, because its advantages are one a sequence."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, chunk_size=GRPO_ROWS)
    token_ids, mask = problem.token_ids.unsqueeze(1), problem.mask.unsqueeze(1)
    old_log_probs = problem.old_log_probs.unsqueeze(1)
    return lambda: loss(
        problem.hidden.unsqueeze(1),
        problem.weight,
        token_ids,
        mask,
        problem.advantages,
        old_per_token_logps=old_log_probs,
    )[0]


LIGER_FUSED_JSD = make_provider(
    "Liger fused_linear_jsd",
    dict.fromkeys(formulas.GKD_BETA, fused_jsd),
    package=PACKAGE,
    module="liger_kernel.transformers.fused_linear_jsd",
    needs_gpu=True,
    note="fp32 logits from sm_80 on; dW summed over the chunks in its own dtype; masked tokens "
    "are computed; its row kernel is CuTe if cutlass is installed, else Triton",
)
CHUNKED_NOTE = (
    "logits and log-softmax in the operands' dtype; dW, for a frozen head too, summed over chunks "
    "of 1024 in its own dtype; masked tokens are computed"
)
LIGER_CHUNKED_JSD = make_provider(
    "Liger chunked JSD",
    dict.fromkeys(formulas.GKD_BETA, chunked_jsd(compiled=False)),
    package=PACKAGE,
    module="liger_kernel.chunked_loss",
    note=CHUNKED_NOTE,
)
LIGER_CHUNKED_JSD_COMPILED = make_provider(
    "Liger chunked JSD, compiled",
    dict.fromkeys(formulas.GKD_BETA, chunked_jsd(compiled=True)),
    package=PACKAGE,
    module="liger_kernel.chunked_loss",
    refusal=no_compiler,
    note=f"its default; {CHUNKED_NOTE}",
)
LIGER_CROSS_ENTROPY = make_provider(
    "Liger fused_linear_cross_entropy",
    {"cross_entropy": cross_entropy},
    package=PACKAGE,
    module="liger_kernel.transformers.fused_linear_cross_entropy",
    needs_gpu=True,
    note="logits in the operands' dtype; dW summed over the chunks in its own dtype; masked "
    "tokens are computed",
)
LIGER_SCALED = make_provider(
    "Liger scaled cross entropy",
    dict.fromkeys(
        ("token_log_probs", "grpo", "rlsd"), from_log_probs(scaled_log_probs, scaled_log_probs)
    ),
    package=PACKAGE,
    module="liger_kernel.ops",
    refusal=scaled_refusal,
    note='verl\'s backend "liger": a CuTe kernel on sm_90; elsewhere chunks of 512 with logits '
    "in the operands' dtype; the entropy comes with it",
)
LIGER_GRPO = make_provider(
    "Liger fused_linear_grpo",
    {"grpo": grpo},
    package=PACKAGE,
    module="liger_kernel.chunked_loss",
    refusal=no_compiler,
    note="logits in the operands' dtype; fp32 GEMMs in backward; masked tokens are computed",
)
