"""Whether a provider's step is the right one: its loss and gradients against float64 logits.

Both see the same bf16 (or fp32) hidden states, made by the same backbone; what differs is the head
and the loss, which here is ``fused_sd.reference`` in float64 from whole logits.

Dimension key:  B sequences, T response tokens, V vocabulary
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step.providers import EVIDENCE_MIX, JSD, TOP_K, Provider
from fused_sd import reference

NUM_TOKENS = 64  # of the batch that is compared: float64 logits of both sides are held
# of the loss, in units of the mean size of a token's; and of the gradient's norm.  bf16 weights
# have bf16 gradients, whose rounding alone is some tenths of a per cent
BOUNDS = {
    "float32": (1e-4, 1e-3),
    "bfloat16": (1e-2, 3e-2),
    # 16-bit logits lose much of a divergence of near equals: nonsense is refused, and no gradient
    "bfloat16, 16-bit logits": (0.5, 0.7),
}


class Agreement(NamedTuple):
    """How far one provider is from float64 on one batch.

    Attributes:
        loss, reference: means over the tokens.
        loss_error: their distance, in units of the mean absolute loss of a token.
        gradient_error: norm of the difference of all parameters' gradients over their norm.
        bounds: of the two errors.
        top_logit, forward_kl: of the batch: means over the tokens, KL(teacher || student) in nats.
    """

    loss: float
    reference: float
    loss_error: float
    gradient_error: float
    bounds: tuple[float, float]
    top_logit: float
    forward_kl: float

    @property
    def agrees(self) -> bool:
        # written so that NaN does not agree
        return self.loss_error <= self.bounds[0] and self.gradient_error <= self.bounds[1]


def _sampled(student: Tensor, teacher: Tensor, batch: dict[str, Any]) -> Tensor:
    ids = batch["completion_ids"]
    return reference.sampled_k1(*(reference.token_log_prob(z, ids) for z in (student, teacher)))


def _rlsd(student: Tensor, teacher: Tensor, batch: dict[str, Any]) -> Tensor:
    ids = batch["completion_ids"]
    own, known = (reference.token_log_prob(z, ids) for z in (student, teacher))
    advantages = batch["advantages"][:, None].expand(ids.shape)
    return reference.rlsd(own, known, advantages, mix=EVIDENCE_MIX)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "topk": lambda student, teacher, _: reference.sdpo(student, teacher, alpha=JSD, k=TOP_K),
    "full": lambda student, teacher, _: reference.gkd(student, teacher, beta=JSD),
    "sampled": _sampled,
    "rlsd": _rlsd,
}


def bounds(provider: Provider, dtype: torch.dtype) -> tuple[float, float]:
    name = str(dtype).removeprefix("torch.")
    rounded = name == "bfloat16" and provider.logits_bits == 16
    return BOUNDS[f"{name}, 16-bit logits" if rounded else name]


def compare(
    trainer: Any, model: Any, batch: dict[str, Any], loss: Tensor, provider: Provider
) -> Agreement:
    """Called between a trainer's backward and its optimiser; leaves the gradients as they were."""
    named = dict(model.named_parameters())
    own = {name: parameter.grad for name, parameter in named.items()}
    model.zero_grad(set_to_none=True)
    student, teacher = _logits(trainer, model, batch)
    token_loss = OBJECTIVES[provider.objective](student, teacher, batch)
    expected = token_loss.mean()
    expected.backward()
    expected, token_loss = expected.detach(), token_loss.detach()
    difference = size = 0.0
    for name, parameter in named.items():
        exact, ours = parameter.grad, own[name]
        assert exact is not None
        size += float(exact.double().square().sum())
        ours = torch.zeros_like(exact) if ours is None else ours
        difference += float((ours.double() - exact.double()).square().sum())
        parameter.grad = own[name]
    return Agreement(
        loss=float(loss),
        reference=float(expected),
        loss_error=abs(float(loss) - float(expected)) / float(token_loss.abs().mean()),
        gradient_error=(difference / size) ** 0.5,
        bounds=bounds(provider, model.dtype),
        top_logit=float(student.detach().amax(-1).mean()),
        forward_kl=float(reference.gkd(student, teacher, beta=0.0).detach().mean()),
    )


def _logits(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Student's and teacher's (B, T, V), float64, from the backbone as the trainer runs it."""
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
