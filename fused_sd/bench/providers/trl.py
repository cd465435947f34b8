"""TRL: the chunked functions of its trainers, and SDPO from the logits of all tokens.

Dimension key:  M tokens that count, D hidden size, V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers import formulas
from fused_sd.bench.providers.log_probs import LogProbs, from_log_probs
from fused_sd.bench.providers.provider import kept, make_provider

VOCAB_CHUNK = 32768  # what TRL's trainers pass


def chunked_divergence(problem: Problem) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta, teacher_weight = formulas.GKD_BETA[problem.objective], problem.teacher_weight.detach()

    def loss() -> Tensor:
        tokens = kept(problem)
        student, teacher = (tokens.hidden, problem.weight), (tokens.teacher_hidden, teacher_weight)
        return ChunkedDivergenceFunction.apply(*student, None, *teacher, None, beta)[0].mean()

    return loss


def log_probs_with(*outputs: str) -> LogProbs:
    """Return the function that computes log-probabilities together with the other outputs."""

    def log_probs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        arguments = hidden, weight, None, token_ids, 1.0, VOCAB_CHUNK, None, 1.0, outputs
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return log_probs


def sdpo(problem: Problem) -> Loss:
    """Build SDPOTrainer's loss from the model's logits, which accelerate converts to fp32."""
    from trl.experimental.sdpo.loss_utils import (
        compute_full_logit_self_distillation_loss,
        compute_topk_self_distillation_loss,
    )

    def loss() -> Tensor:
        tokens = kept(problem)
        student = F.linear(tokens.hidden, problem.weight).float()
        with torch.no_grad():
            teacher = F.linear(tokens.teacher_hidden, problem.teacher_weight).float()
        if problem.objective == "topk_tail":
            return compute_topk_self_distillation_loss(
                student,
                teacher,
                distillation_topk=formulas.TAIL_TOP_K,
                distillation_alpha=0.5,
                distillation_add_tail=True,
            ).mean()
        return compute_full_logit_self_distillation_loss(
            student, teacher, distillation_alpha=formulas.GKD_BETA[problem.objective]
        ).mean()

    return loss


TRL_DIVERGENCE = make_provider(
    "TRL chunked divergence",
    dict.fromkeys(formulas.GKD_BETA, chunked_divergence),
    package="trl",
    module="trl.kernels.chunked_divergence",
    note="DistillationTrainer's: fp32 logits on CUDA, projected again for JSD and for backward; "
    "the entropy comes with it",
)
# the outputs that SFTTrainer, GRPOTrainer and GRPOTrainer's reference model compute
SFT = log_probs_with("log_probs", "entropy", "is_top1")
GRPO = log_probs_with("log_probs", "entropy")
REFERENCE = log_probs_with("log_probs")
TRL_LOG_PROBS = make_provider(
    "TRL chunked log-probs",
    {
        **dict.fromkeys(formulas.POLICIES, from_log_probs(GRPO, REFERENCE)),
        "cross_entropy": from_log_probs(SFT, REFERENCE),
    },
    package="trl",
    module="trl.kernels.chunked_logprob",
    note="SFTTrainer's and GRPOTrainer's: logits in the operands' dtype, projected again for "
    "backward; the entropy comes with it",
)
TRL_SDPO = make_provider(
    "TRL SDPO",
    dict.fromkeys((*formulas.GKD_BETA, "topk_tail"), sdpo),
    package="trl",
    module="trl.experimental.sdpo.loss_utils",
    note="SDPOTrainer's: logits of all tokens in the operands' dtype, then fp32",
)
