"""TRL: the chunked functions of its DistillationTrainer and GRPOTrainer, and SDPO over logits.

Dimension key:  M tokens that count, D hidden size, V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers import formulas
from fused_sd.bench.providers.provider import kept, make_provider

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
VOCAB_CHUNK = 32768  # what TRL's trainers pass
LOGGED = {"cross_entropy": ("log_probs", "entropy", "is_top1")}  # SFTTrainer's; else GRPOTrainer's


def chunked_divergence(problem: Problem) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta, teacher_weight = BETA[problem.objective], problem.teacher_weight.detach()

    def loss() -> Tensor:
        tokens = kept(problem)
        divergence, _ = ChunkedDivergenceFunction.apply(
            tokens.hidden,
            problem.weight,
            None,
            tokens.teacher_hidden,
            teacher_weight,
            None,
            beta,
        )
        return divergence.mean()

    return loss


def log_probs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, outputs: tuple[str, ...]
) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    arguments = hidden, weight, None, token_ids, 1.0, VOCAB_CHUNK, None, 1.0, outputs
    return ChunkedLogProbFunction.apply(*arguments)[0]


def chunked_log_probs(problem: Problem) -> Loss:
    outputs = LOGGED.get(problem.objective, ("log_probs", "entropy"))
    teacher_weight = problem.teacher_weight.detach()

    def loss() -> Tensor:
        tokens, teacher = kept(problem), None
        student = log_probs(tokens.hidden, problem.weight, tokens.token_ids, outputs)
        if problem.objective == "rlsd":
            states = tokens.teacher_hidden
            with torch.no_grad():
                teacher = log_probs(states, teacher_weight, tokens.token_ids, ("log_probs",))
        return formulas.policy(
            problem.objective, student, teacher, tokens.old_log_probs, tokens.advantages
        )

    return loss


def sdpo(problem: Problem) -> Loss:
    """SDPOTrainer's loss over the model's logits, which accelerate hands on in fp32."""
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
            student, teacher, distillation_alpha=BETA[problem.objective]
        ).mean()

    return loss


TRL_DIVERGENCE = make_provider(
    "TRL chunked divergence",
    dict.fromkeys(BETA, chunked_divergence),
    package="trl",
    module="trl.kernels.chunked_divergence",
    note="DistillationTrainer's: fp32 logits on CUDA, projected anew for JSD and backward; "
    "computes the entropy too",
)
TRL_LOG_PROBS = make_provider(
    "TRL chunked log-probs",
    dict.fromkeys(formulas.POLICIES, chunked_log_probs),
    package="trl",
    module="trl.kernels.chunked_logprob",
    note="GRPOTrainer's and SFTTrainer's: logits in the operands' dtype, projected anew in "
    "backward; computes the entropy too",
)
TRL_SDPO = make_provider(
    "TRL SDPO",
    dict.fromkeys((*BETA, "topk_tail"), sdpo),
    package="trl",
    module="trl.experimental.sdpo.loss_utils",
    note="SDPOTrainer's: logits of all tokens in the operands' dtype, then fp32",
)
