"""TRL's DistillationTrainer with the library's own divergence.

    from fused_sd.integrations.trl import FusedDistillationTrainer as DistillationTrainer

TRL's trainer (1.12 to 1.16) makes no logits either.  This one differs in what it computes with: a
divergence that stays exact where student and teacher are nearly equal, autocast for both models'
layers, and every head that ``attach`` can reproduce.  Arguments, configuration, rollouts, tools,
images and logged names are TRL's.

Dimension key:  B sequences, T completion tokens
"""

from typing import Any

import torch
from torch import Tensor, nn
from trl import DistillationTrainer

from fused_sd.integrations.shared.completion_scores import CompletionForward
from fused_sd.integrations.trl.fused_grpo import model_inputs
from fused_sd.integrations.trl.model_teacher import ModelTeacherMixin


class FusedDistillationTrainer(ModelTeacherMixin, DistillationTrainer):
    """TRL's DistillationTrainer with the library's own divergence.

    Examples:
        >>> from trl import DistillationConfig
        >>> from fused_sd.integrations.examples.arithmetic import questions
        >>> from fused_sd.integrations.trl import FusedDistillationTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args, dataset = DistillationConfig("out"), questions(64).select_columns("prompt")
        >>> teacher = model  # or a larger model with the same vocabulary
        >>> trainer = FusedDistillationTrainer(model, teacher, args=args, train_dataset=dataset)
        >>> trainer.train()  # doctest: +SKIP
    """

    model: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the generalised JSD's mean over the accumulated batch's own tokens.

        TRL counts the tokens of the generated completions itself, and divides by the number of
        processes because their gradients are averaged.
        """
        if not self._fused:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs["completion_mask"]  # (B, T)
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        student = CompletionForward(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.size(1),
            keeps_padding=True,
            more_inputs=model_inputs(inputs),
        )
        output = self._divergence(
            student,
            mask.float(),
            beta=self.beta,
            temperature=self.temperature,
            metrics=("student_entropy",),
        )
        self._log_entropy(output.metrics["student_entropy"], mask)
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            whole = inputs["num_items_in_batch"].clamp(min=1.0)
            num_items_in_batch = whole / self.accelerator.num_processes
        if num_items_in_batch is None:
            num_items_in_batch = mask.sum().clamp(min=1)
        loss = output.loss / num_items_in_batch
        return (loss, None) if return_outputs else loss

    def _log_entropy(self, entropy: Tensor, mask: Tensor) -> None:
        """Log the student's mean entropy over all processes' tokens, in nats."""
        sums = torch.stack([entropy.sum(), mask.sum().to(entropy.dtype)])
        total, count = self.accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append(total / count if count else 0.0)
