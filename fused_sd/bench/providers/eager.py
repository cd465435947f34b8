"""PyTorch without any kernel: the logits of all tokens, then the formula; eager or compiled.

Dimension key:  M tokens that count, D hidden size, V vocabulary
"""

import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers import formulas
from fused_sd.bench.providers.provider import Build, Kept, kept, make_provider

Project = Callable[[Tensor, Tensor], Tensor]  # (M, D), (V, D) -> fp32 logits (M, V)


def trainers_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits of a GEMM in the model's dtype, converted to fp32, as trainers do."""
    return F.linear(hidden, weight).float()


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits of an fp32 GEMM."""
    return F.linear(hidden.float(), weight.float())


def loss_of(
    objective: str, project: Project, tokens: Kept, weight: Tensor, teacher_weight: Tensor
) -> Tensor:
    """Return the mean loss over the tokens, from the logits of all of them."""
    student = project(tokens.hidden, weight)
    if objective in formulas.DIVERGENCES:
        with torch.no_grad():
            teacher = project(tokens.teacher_hidden, teacher_weight)
        return formulas.divergence(objective, student, teacher)
    log_probs, teacher_log_probs = formulas.selected(student, tokens.token_ids), None
    if objective == "rlsd":
        with torch.no_grad():
            teacher = project(tokens.teacher_hidden, teacher_weight)
            teacher_log_probs = formulas.selected(teacher, tokens.token_ids)
    return formulas.policy(
        objective, log_probs, teacher_log_probs, tokens.old_log_probs, tokens.advantages
    )


def eager(project: Project) -> Build:
    """Build the eager loss with one of the two ways to compute logits."""

    def build(problem: Problem) -> Loss:
        return lambda: loss_of(
            problem.objective, project, kept(problem), problem.weight, problem.teacher_weight
        )

    return build


def compiled(problem: Problem) -> Loss:
    """Compile ``loss_of`` for this problem's shapes alone.

    The compiler keeps a few variants of a function; after that it silently runs the function
    uncompiled.  ``measure_cell`` therefore drops the variants of earlier problems.
    """
    function = torch.compile(loss_of, dynamic=False)
    return lambda: function(
        problem.objective, trainers_logits, kept(problem), problem.weight, problem.teacher_weight
    )


def no_compiler(problem: Problem) -> str | None:
    """Why a problem cannot be compiled here: on a CPU Inductor needs a C++ compiler."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    if problem.hidden.is_cuda or any(shutil.which(name) for name in names if name):
        return None
    return "torch.compile needs a C++ compiler: install g++, or name one in CXX"


OBJECTIVES = (*formulas.DIVERGENCES, *formulas.POLICIES)
EAGER = make_provider(
    "eager",
    dict.fromkeys(OBJECTIVES, eager(trainers_logits)),
    note="logits of all tokens in the operands' dtype, then fp32, as in trainers",
)
EAGER_FP32 = make_provider(
    "eager, fp32 logits",
    dict.fromkeys(OBJECTIVES, eager(fp32_logits)),
    note="fp32 logits of all tokens from fp32 GEMMs of upcast operands",
)
COMPILED = make_provider(
    "torch.compile",
    dict.fromkeys(OBJECTIVES, compiled),
    refusal=no_compiler,
    note="the eager function, logits in the operands' dtype; compiled for one shape",
)
