"""A callback that writes maps of what the teacher says about each token of fresh rollouts.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fused_sd import LMHead
from fused_sd.checks import check_one_of, check_positive_int
from fused_sd.credit import (
    VALUES,
    CreditMap,
    CreditMeasures,
    credit_measures,
    save_html,
    save_png,
)
from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
from fused_sd.integrations.shared.probing import evaluating
from fused_sd.integrations.transformers import attach
from fused_sd.integrations.trl.credit_reports import (
    REPORTERS,
    CreditReport,
    send,
    without_maps,
)
from fused_sd.integrations.trl.fused_grpo import images_of, model_inputs
from fused_sd.integrations.trl.teachers import teacher_head_is_resharded

NEEDED = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "teacher_input_ids",
    "teacher_attention_mask",
)


class CreditMapCallback(TrainerCallback):
    """Writes a credit map of fresh rollouts every few steps.

    ``step_000050.html`` shows rollouts of the student after 50 steps; ``step_000050.json`` holds
    the same for ``python -m fused_sd credit``.  Where the trainer reports to MLflow, SwanLab,
    TensorBoard, Trackio or Weights & Biases, the maps go there too.

    Args:
        trainer: a self-distillation trainer of TRL or of ``fused_sd.integrations.trl``.
        every: steps from one map to the next; the first is made before any step.
        num_sequences: the most rollouts on a map; only those with a teacher's context are shown.
        folder: where to write.  None: ``credit_maps`` in the trainer's ``output_dir``.
        value: what colours the tokens, one of ``fused_sd.credit.VALUES``.
        png: also write pictures, with matplotlib.

    Raises:
        ValueError: a value is out of its range.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions
        >>> from fused_sd.integrations.trl import CreditMapCallback, OPSDConfig, OPSDTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> trainer = OPSDTrainer(model, args=OPSDConfig("out"), train_dataset=questions(64))
        >>> trainer.add_callback(CreditMapCallback(trainer, every=20))
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Any,
        *,
        every: int = 50,
        num_sequences: int = 4,
        folder: str | Path | None = None,
        value: str = "delta",
        png: bool = False,
    ) -> None:
        check_positive_int("every", every)
        check_positive_int("num_sequences", num_sequences)
        check_one_of("value", value, VALUES)
        self.trainer, self.every, self.num_sequences = trainer, every, num_sequences
        self.folder = None if folder is None else Path(folder)
        self.value, self.png = value, png
        self._due: int | None = None  # the first step whose rollouts the next map may show

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say which of the trainer's trackers get no maps."""
        others = without_maps(self.trainer.callback_handler.callbacks)
        if others and state.is_world_process_zero:
            warnings.warn(
                f"credit maps go to {', '.join(REPORTERS)}, not to {', '.join(others)}; "
                "read them in the folder of CreditMapCallback",
                stacklevel=2,
            )

    def on_generation_batch_built(self, args: Any, state: Any, **kwargs: Any) -> None:
        """Make a map, if one is due, when rollouts and their teacher's contexts are ready.

        TRL's self-distillation trainers dispatch this event, which transformers does not know,
        after they have put the new batch into ``_buffered_inputs`` (read in 1.16).
        """
        step = state.global_step
        if self._due is None:
            self._due = -(-step // self.every) * self.every
        if step < self._due:
            return
        self._due = (step // self.every + 1) * self.every
        # On every process: the forward of a sharded model is collective.  One micro-batch of the
        # buffer is enough to show.
        shown = self._map(self.trainer._buffered_inputs[0], step)
        if state.is_world_process_zero and shown.rows:
            self._write(shown, Path(args.output_dir), step)
            callbacks = self.trainer.callback_handler.callbacks
            send(CreditReport(shown, self.value, self.png, step, callbacks))

    def _map(self, inputs: dict[str, Tensor], step: int) -> CreditMap:
        """Make the map of the first rollouts that have a teacher's context."""
        mask = inputs["completion_mask"]
        has_signal = mask.any(-1)
        if "self_distillation_mask" in inputs:
            has_signal = has_signal & (inputs["self_distillation_mask"] != 0)
        chosen = has_signal.nonzero()[:, 0][: self.num_sequences]
        count = len(chosen)
        # A process without such a rollout runs the forwards too, which may be collective.
        if not count:
            chosen = torch.zeros(1, dtype=torch.long, device=mask.device)
        rows = chosen.tolist()
        batch = {name: inputs[name][chosen] for name in NEEDED} | images_of(inputs, rows)
        measures = self._measure(batch)
        captions = [f"step {step}, rollout {n}" for n in chosen.tolist()]
        if "rewards" in inputs:
            rewards = inputs["rewards"][chosen].tolist()
            said = ["" if math.isnan(r) else f", reward {r:g}" for r in rewards]  # NaN: no verdict
            captions = [f"{text}{what}" for text, what in zip(captions, said)]
        decode = self.trainer.processing_class.decode
        shown = measures.as_map(
            batch["completion_ids"],
            batch["completion_mask"],
            decode=decode,
            captions=captions,
            title=f"Credit map, step {step}",
        )
        length = batch["completion_ids"].size(1)
        prompts = _texts(batch["prompt_ids"], batch["prompt_mask"], decode)
        teacher_prompts = _texts(
            batch["teacher_input_ids"][:, :-length],
            batch["teacher_attention_mask"][:, :-length],
            decode,
        )
        rows = [
            dataclasses.replace(row, student_prompt=own, teacher_prompt=other)
            for row, own, other in zip(shown.rows, prompts, teacher_prompts)
        ]
        return dataclasses.replace(shown, rows=tuple(rows[:count]))

    def _measure(self, batch: dict[str, Tensor]) -> CreditMeasures:
        """Run the teacher and then the student, and return the measures of each token."""
        trainer = self.trainer
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        with torch.no_grad(), self._acting_teacher() as teacher:
            # TRL's stock trainers have not attached their models.
            attach(teacher, autocast=trainer.accelerator.autocast)
            is_resharded = teacher_head_is_resharded(trainer, teacher, trainer.model)
            forward = CompletionForward(
                teacher,
                batch["teacher_input_ids"],
                batch["teacher_attention_mask"],
                ids.size(1),
                more_inputs=model_inputs(batch, "teacher_"),
            )
            teacher_hidden, teacher_head = forward(with_head(is_resharded))

        def compute(hidden: Tensor, head: LMHead) -> CreditMeasures:
            return credit_measures(
                hidden,
                head,
                teacher_hidden,
                teacher_head.beside(head),
                ids,
                mask=mask,
                temperature=trainer.temperature,
            )

        with torch.no_grad(), evaluating(trainer.model):
            attach(trainer.model, autocast=trainer.accelerator.autocast)
            forward = CompletionForward(
                trainer.model,
                torch.cat([batch["prompt_ids"], ids], 1),
                torch.cat([batch["prompt_mask"], mask], 1),
                ids.size(1),
                more_inputs=model_inputs(batch),
            )
            measures: CreditMeasures = forward(compute)
        return measures

    @contextmanager
    def _acting_teacher(self) -> Iterator[nn.Module]:
        """Yield the module that teaches, with the teacher's weights or adapter in place.

        Trainers of ``fused_sd.integrations.trl`` have a ``teacher``, TRL's have a ``teacher_model``
        and a method whose context switches its adapter.
        """
        teacher = getattr(self.trainer, "teacher", None)
        if teacher is not None:
            with teacher.acting() as module:
                yield module
            return
        module = self.trainer.teacher_model
        with self.trainer._get_teacher_context_for_self_distillation(), evaluating(module):
            yield module

    def _write(self, shown: CreditMap, output_dir: Path, step: int) -> None:
        folder = output_dir / "credit_maps" if self.folder is None else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"step_{step:06d}"
        save_html(shown, stem.with_suffix(".html"), value=self.value)
        stem.with_suffix(".json").write_text(shown.to_json(), encoding="utf-8")
        if self.png:
            save_png(shown, stem.with_suffix(".png"), value=self.value)


def _texts(ids: Tensor, mask: Tensor, decode: Any) -> list[str]:
    return [decode(row[keep].tolist()) for row, keep in zip(ids, mask.bool())]
