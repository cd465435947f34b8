"""TRL's GRPOTrainer with log-probabilities and entropies from the library's own loss head.

    from fused_sd.integrations.trl import FusedGRPOTrainer as GRPOTrainer

Arguments, configuration, rollouts, rewards, loss and logged names are TRL's.  Its loss, the old
policy and the reference model read log-probabilities from one method alone,
``_get_per_token_logps_and_entropies`` (TRL 1.12 to 1.16), which is replaced here.

Dimension key:  B sequences, L positions, T completion tokens
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from fused_sd import LMHead, TokenLogProbs, token_log_probs
from fused_sd.integrations.shared.as_it_was import left_as_it_was
from fused_sd.integrations.shared.completion_scores import CompletionForward
from fused_sd.integrations.shared.padding import TOKEN_TYPES, check_padding_behind
from fused_sd.integrations.transformers import attach, unwrap
from fused_sd.integrations.trl.swaps import attach_or_warn, check_prompts

# The model's arguments beside ids and mask that TRL's batches hold, where a model has them.
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)
COUNTS = ("num_images", "num_tiles")  # of each row: how TRL deals out images, and no model's input


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, without logits and with fp32 log-probabilities in every dtype.

    Two things are left to TRL's own computation: a model whose head cannot be reproduced, with a
    warning, and a loss with a router's auxiliary loss, which reads more than log-probabilities.

    Examples:
        >>> from trl import GRPOConfig
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import FusedGRPOTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = GRPOConfig("out", loss_type="dr_grpo", num_generations=4)
        >>> trainer = FusedGRPOTrainer(model, reward, args, questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

    _fused = False
    is_swap: ClassVar[bool] = True
    """Whether it stands for TRL's trainer, whose inputs and fallback it keeps; no method does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        forward = None if self.is_swap else _own_forward(*args[:1], **kwargs)
        with left_as_it_was(*args, **kwargs):
            super().__init__(*args, **kwargs)
            model: Any = self.model
            # After TRL's __init__, which may have prepared the reference model.
            models = [model] if self.ref_model is None else [model, self.ref_model]
            if self.is_swap:
                check_prompts(self)
                self._fused = attach_or_warn(self, models)
                return
            # TRL's loss head, which no method reads, keeps the model's forward in a closure: a deep
            # copy of the model would run the weights of the original.
            vars(unwrap(model)).pop("forward", None)
            if forward is not None:
                vars(unwrap(model))["forward"] = forward
            for one in models:
                check_padding_behind(attach(one, autocast=self.accelerator.autocast))
            self._fused = True

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **fields: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Score completions, some rows at a time.

        Args:
            input_ids, attention_mask: (B, L).
            logits_to_keep: T.
            batch_size: rows of one forward; None: all.
            compute_entropy: return entropies too.
            compute_aux_loss: return the auxiliary loss of a mixture of experts.
            fields: images and token types of the batch.

        Returns:
            Log-probabilities (B, T), entropies (B, T) or None, auxiliary loss or None.
        """
        if compute_aux_loss or not self._fused:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **fields,
            )
        batch = {name: value for name, value in fields.items() if value is not None}
        batch.update(input_ids=input_ids, attention_mask=attention_mask)
        parts = [
            self._score(model, rows, logits_to_keep, compute_entropy)
            for rows in row_slices(batch, batch_size or len(input_ids))
        ]
        log_probs = torch.cat([part.log_probs for part in parts])
        entropies = [part.entropy for part in parts if part.entropy is not None]
        return log_probs, torch.cat(entropies) if entropies else None, None

    def _score(
        self, model: nn.Module, batch: dict[str, Any], length: int, entropy: bool
    ) -> TokenLogProbs:
        """Return log-probabilities and entropies of the last ``length`` tokens of each row."""
        ids, mask = batch["input_ids"], batch["attention_mask"]

        def compute(hidden: Tensor, head: LMHead) -> TokenLogProbs:
            return token_log_probs(
                hidden,
                head,
                ids[:, -length:],
                entropy=entropy,
                temperature=self.temperature,
                token_weights=mask[:, -length:],
            )

        own = ("input_ids", "attention_mask", *COUNTS)
        more = {name: value for name, value in batch.items() if name not in own}
        forward = CompletionForward(
            model, ids, mask, length, keeps_padding=self.is_swap, more_inputs=more
        )
        return forward(compute)


def _own_forward(model: Any = None, **_: Any) -> Any:
    """Return the forward that is set on a model's instance; None: its class's, or no model yet."""
    return vars(unwrap(model)).get("forward") if isinstance(model, nn.Module) else None


def model_inputs(batch: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the arguments of a model that a batch holds beside ids and mask.

    Args:
        batch: images, and token types for each sequence of the batch.
        prefix: of the names of the token types: ``"teacher_"`` for the teacher's sequences.
    """
    images = {name: batch[name] for name in IMAGE_INPUTS if batch.get(name) is not None}
    types = {name: batch.get(f"{prefix}{name}") for name in TOKEN_TYPES}
    return images | {name: value for name, value in types.items() if value is not None}


def row_slices(batch: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Split a batch into parts of at most ``size`` rows, each with the images of its rows."""
    num_rows = len(batch["input_ids"])
    if size >= num_rows:
        yield batch
        return
    # A list for each row; without ``num_images`` there are no images to deal out.
    by_row = split_pixel_values_by_grid(batch)
    for start in range(0, num_rows, size):
        part = {name: values[start : start + size] for name, values in by_row.items()}
        yield unsplit_pixel_values_by_grid(part)


def images_of(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return the images and token types of some of a batch's rows, under the names they have."""
    teachers = (f"teacher_{name}" for name in TOKEN_TYPES)
    names = (*IMAGE_INPUTS, *TOKEN_TYPES, *teachers, *COUNTS)
    found = {name: batch[name] for name in names if batch.get(name) is not None}
    by_row = split_pixel_values_by_grid(found)
    chosen = {
        name: [values[row] for row in rows] if isinstance(values, list) else values[list(rows)]
        for name, values in by_row.items()
    }
    return unsplit_pixel_values_by_grid(chosen)
