"""TRL's GKDTrainer without logits.

    from fused_sd.integrations.trl import FusedGKDTrainer as GKDTrainer

Arguments, configuration, generation by student or teacher, and the loss's average are TRL's (read
in TRL 1.12 to 1.16).

Dimension key:  B sequences, L positions
"""

from typing import Any

from torch import Tensor, nn
from trl.experimental.gkd import GKDTrainer

from fused_sd.integrations.shared.completion_scores import CompletionForward
from fused_sd.integrations.trl.model_teacher import ModelTeacherMixin


class FusedGKDTrainer(ModelTeacherMixin, GKDTrainer):
    """TRL's GKDTrainer, without logits.

    An evaluation that asks for the student's logits, for ``compute_metrics``, runs TRL's own loss.

    Examples:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer
        >>> from trl.experimental.gkd import GKDConfig
        >>> from fused_sd.integrations.trl import FusedGKDTrainer as GKDTrainer
        >>> turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        >>> dataset, args = Dataset.from_list([{"messages": turns}]), GKDConfig("out", beta=0.5)
        >>> model = teacher = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> tokenizer = AutoTokenizer.from_pretrained(model)
        >>> given = {"args": args, "train_dataset": dataset, "processing_class": tokenizer}
        >>> trainer = GKDTrainer(model, teacher, **given)
        >>> trainer.train()  # doctest: +SKIP
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the generalised JSD's mean over the tokens that have a label.

        TRL divides by the number of labels in the whole accumulated batch, which Trainer counts
        before completions are generated.  Both temperatures are 1: ``temperature`` is generation's.
        """
        if return_outputs or not self._fused:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids = inputs["input_ids"]
        mask = inputs["labels"][:, 1:] != -100  # (B, L - 1), of the tokens that are predicted
        forward = CompletionForward(
            model, ids, inputs["attention_mask"], ids.size(1) - 1, keeps_padding=True
        )
        total = self._divergence(forward, mask.float(), beta=self.beta).loss
        if num_items_in_batch is None:
            return total / mask.sum().clamp(min=1)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
