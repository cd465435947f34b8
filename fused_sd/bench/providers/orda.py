"""ORDA: chunked Triton kernels for KL distillation, with its cross entropies switched off."""

from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers.provider import labels, make_provider

VARIANTS: dict[str, tuple[str, float | None]] = {
    "forward_kl": ("forward", None),
    "reverse_kl": ("reverse", None),
    "jsd": ("skew_js", 0.5),
}


def distillation(problem: Problem) -> Loss:
    from orda_kernel import SeparateTeacher, TiedTeacher, distillation_loss

    variant, beta = VARIANTS[problem.objective]
    # chosen here because its default falls back to the logits of all tokens with a warning
    backend = "triton" if problem.hidden.is_cuda else "torch"
    teacher: TiedTeacher | SeparateTeacher
    if problem.teacher_weight is problem.weight:
        teacher = TiedTeacher(hidden=problem.teacher_hidden, mode="frozen")
    else:
        teacher = SeparateTeacher(problem.teacher_hidden, problem.teacher_weight)

    def loss() -> Tensor:
        return distillation_loss(
            problem.hidden,
            problem.weight,
            labels(problem),
            teacher,
            student_ce_weight=0.0,
            teacher_ce_weight=0.0,
            kl_weight=1.0,
            kl_divergence=variant,
            kl_beta=beta,
            backend=backend,
        ).loss

    return loss


ORDA = make_provider(
    "orda-kernel",
    dict.fromkeys(VARIANTS, distillation),
    package="orda-kernel",
    module="orda_kernel",
    note="chunks with logits in the operands' dtype; on the CPU whole logits; masked tokens are "
    "computed",
)
