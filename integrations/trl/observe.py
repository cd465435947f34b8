"""The metrics that a method's trainer logs beside TRL's."""

from typing import Any

import torch
from torch import Tensor

from fused_sd import LossOutput
from fused_sd.integrations.trl.scores import masked_means
from fused_sd.integrations.trl.sparse_gradients import certificate_means, certificate_sums

QUANTILES = (0.05, 0.5, 0.95)


def record(trainer: Any, output: LossOutput, inputs: dict[str, Any]) -> None:
    """Append a micro-batch's numbers to the trainer's metrics: a collective call.

    Args:
        trainer: a ``SelfDistillationTrainer``.  TRL logs and clears its ``_metrics``.
        output: of the loss.
        inputs: the micro-batch.
    """
    mask = inputs["loss_mask"].float()
    metrics = {"loss": output.token_loss, **output.metrics}
    means = masked_means(metrics, mask, trainer.accelerator.gather)
    counts = torch.stack([mask.sum(), trainer.sampled_mask(inputs).sum().float()])
    active, whole = trainer.accelerator.gather(counts[None]).sum(0).tolist()
    means["active_token_fraction"] = active / max(whole, 1.0)
    gap = _evidence(output.metrics)
    if gap is not None:
        for quantile, value in zip(QUANTILES, _quantiles(trainer.accelerator, gap, mask)):
            means[f"evidence_q{round(100 * quantile):02d}"] = value
    if output.certificate is not None:
        sums = certificate_sums(output.certificate)[None]
        means.update(certificate_means(trainer.accelerator.gather(sums).sum(0).tolist()))
    if trainer.teacher is not None:
        means["teacher_age"] = float(trainer.teacher.age)
    means.update(trainer.scalar_metrics())
    means["skipped_steps"] = float(trainer._teacher_callback.num_skipped)
    phase = trainer._phase(trainer.model)
    for name, value in means.items():
        trainer._metrics[phase][f"self_distillation/{name}"].append(value)


def _evidence(metrics: dict[str, Tensor]) -> Tensor | None:
    """Return log P_T - log P_S of the sampled tokens (B, T), or None where it was not observed."""
    if "evidence" in metrics:
        return metrics["evidence"]
    student = metrics.get("student_log_prob")
    if student is not None and "teacher_log_prob" in metrics:
        return metrics["teacher_log_prob"] - student
    return None


def _quantiles(accelerator: Any, values: Tensor, mask: Tensor) -> list[float]:
    """Return the quantiles over the counted tokens of all processes; [] where there are none."""
    # Processes have different numbers of tokens, and gather needs equal shapes.
    counted = values[mask > 0].float()
    padded = accelerator.pad_across_processes(counted, pad_index=float("nan"))
    gathered = accelerator.gather(padded)
    gathered = gathered[gathered.isfinite()]
    if not gathered.numel():
        return []
    return gathered.quantile(gathered.new_tensor(QUANTILES)).tolist()
