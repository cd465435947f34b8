"""Refuses data that makes no whole batch.

(What is said of TRL and Trainer was read in TRL 1.16 and transformers 5.24.)
"""

from collections.abc import Sized
from typing import Any

from fused_sd.checks import fail


class WholeBatches:
    """Overrides the methods of TRL's ``GRPOTrainer`` where the number of rows is known."""

    def get_train_dataloader(self) -> Any:
        """Refuse a dataset with fewer rows than a batch of rollouts has prompts.

        TRL's sampler drops what is left of an epoch, here all of it: Trainer then ends without a
        step, with a warning, or asks for ``max_steps``.
        """
        rows, size = self.train_dataset, self.args.generation_batch_size // self.num_generations
        if isinstance(rows, Sized) and len(rows) < size:
            rule = f"have a row for each of the {size} prompts of a batch of rollouts"
            remedy = (
                "repeat its rows, or make per_device_train_batch_size, gradient_accumulation_steps "
                "or steps_per_generation smaller, or num_generations larger"
            )
            fail("train_dataset", rule, f"{len(rows)} rows", remedy)
        return super().get_train_dataloader()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Refuse an evaluation whose batches cut groups of completions of one prompt in two.

        TRL checks the sizes only where ``eval_strategy`` evaluates during training.
        """
        if not self.model.training:
            size, count = self.num_generations_eval, self.accelerator.num_processes
            if len(inputs) * count % size:
                rule = f"hold whole groups of num_generations_eval={size} on {count} processes"
                remedy = "make it a multiple, or set num_generations_eval"
                fail("per_device_eval_batch_size", rule, f"a batch of {len(inputs)}", remedy)
        return super()._generate_and_score_completions(inputs)
