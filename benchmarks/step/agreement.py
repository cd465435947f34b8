"""The check before timing: a trainer's loss and gradients against a float64 reference.

Both losses start from the same bf16 (or fp32) hidden states of the same backbone.  The
reference, ``fused_sd.reference``, forms whole logits in float64.

Dimension key:  B sequences, T response tokens, V vocabulary
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step.providers import JSD, TOP_K, Provider
from fused_sd import reference

NUM_TOKENS = 64  # few: float64 logits of both sides are held
# Largest errors of the loss (over the mean absolute loss of a token) and of the gradient (over its
# norm).  bf16 weights have bf16 gradients, whose rounding alone is some tenths of a per cent.
BOUNDS = {
    "float32": (1e-4, 1e-3),
    "bfloat16": (1e-2, 3e-2),
    # 16-bit logits round away much of a small divergence: only nonsense and a missing gradient fail
    "bfloat16, 16-bit logits": (0.5, 0.7),
}


class Agreement(NamedTuple):
    """How far one provider is from float64 on one batch.

    Attributes:
        loss, reference: The provider's and the reference's mean loss of a token.
        loss_error: Their distance over the mean absolute loss of a token.
        gradient_error: The norm of the error of all parameters' gradients over the gradients' norm.
        bounds: The largest ``loss_error`` and ``gradient_error`` that pass.
    """

    loss: float
    reference: float
    loss_error: float
    gradient_error: float
    bounds: tuple[float, float]

    @property
    def agrees(self) -> bool:
        # NaN compares false, so it does not pass
        return self.loss_error <= self.bounds[0] and self.gradient_error <= self.bounds[1]


def _sampled(student: Tensor, teacher: Tensor, batch: dict[str, Any]) -> Tensor:
    ids = batch["completion_ids"]
    return reference.sampled_k1(*(reference.token_log_prob(z, ids) for z in (student, teacher)))


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "topk": lambda student, teacher, _: reference.sdpo(student, teacher, alpha=JSD, k=TOP_K),
    "full": lambda student, teacher, _: reference.gkd(student, teacher, beta=JSD),
    "sampled": _sampled,
}


def bounds(provider: Provider, dtype: torch.dtype) -> tuple[float, float]:
    name = str(dtype).removeprefix("torch.")
    rounded = name == "bfloat16" and provider.logits_bits == 16
    return BOUNDS[f"{name}, 16-bit logits" if rounded else name]


def compare(
    trainer: Any, model: Any, batch: dict[str, Any], loss: Tensor, provider: Provider
) -> Agreement:
    """Compare a trainer's loss and gradients with float64; the gradients stay as they were.

    Call it between the trainer's backward and its optimizer step.
    """
    named = dict(model.named_parameters())
    measured = {name: parameter.grad for name, parameter in named.items()}
    model.zero_grad(set_to_none=True)
    student, teacher = _logits(trainer, model, batch)
    token_loss = OBJECTIVES[provider.objective](student, teacher, batch)
    expected = token_loss.mean()
    expected.backward()
    expected, token_loss = expected.detach(), token_loss.detach()
    difference = size = 0.0
    for name, parameter in named.items():
        exact, ours = parameter.grad, measured[name]
        assert exact is not None
        size += float(exact.double().square().sum())
        ours = torch.zeros_like(exact) if ours is None else ours
        difference += float((ours.double() - exact.double()).square().sum())
        parameter.grad = measured[name]
    return Agreement(
        loss=float(loss),
        reference=float(expected),
        loss_error=abs(float(loss) - float(expected)) / float(token_loss.abs().mean()),
        gradient_error=(difference / size) ** 0.5,
        bounds=bounds(provider, model.dtype),
    )


def _logits(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's float64 logits (B, T, V), as the trainer autocasts."""
    length = batch["completion_ids"].size(1)

    def logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with trainer.accelerator.autocast():
            states = model.base_model(input_ids, attention_mask, use_cache=False).last_hidden_state
        weight = model.get_output_embeddings().weight
        return reference.logits(states[:, -length - 1 : -1], weight)

    pairs = ("prompt", "completion")
    student = logits(
        torch.cat([batch[f"{part}_ids"] for part in pairs], 1),
        torch.cat([batch[f"{part}_mask"] for part in pairs], 1),
    )
    with torch.no_grad():
        teacher = logits(batch["teacher_input_ids"], batch["teacher_attention_mask"])
    return student, teacher
