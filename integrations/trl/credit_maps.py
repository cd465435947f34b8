"""A callback that shows, while a trainer trains, what the teacher says about each token.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from fused_sd import LMHead
from fused_sd.checks import check_one_of, check_positive_int
from fused_sd.credit import (
    VALUES,
    CreditMap,
    CreditMeasures,
    credit_figure,
    credit_measures,
    html_page,
    plain_text,
    save_png,
)
from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
from fused_sd.integrations.transformers import attach, unwrap

NEEDED = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "teacher_input_ids",
    "teacher_attention_mask",
)


class CreditMapCallback(TrainerCallback):
    """Write a credit map of fresh rollouts every so many steps.

    ``step_000050.html`` shows rollouts of the student after 50 steps, ``step_000050.json`` is the
    same for ``python -m fused_sd credit``.  Weights & Biases and TensorBoard get it too, where the
    trainer reports to them.

        trainer.add_callback(CreditMapCallback(trainer, every=20))

    Args:
        trainer: one of TRL's self-distillation trainers or of ours.
        every: steps from one map to the next; the first is made before any step.
        num_sequences: rollouts on a map, at most; those that the teacher has a signal for.
        folder: where to write.  None: ``credit_maps`` in the trainer's ``output_dir``.
        value: what colours the tokens, one of ``fused_sd.credit.VALUES``.
        png: write pictures as well, with matplotlib.
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
        self._due: int | None = None  # the first step whose rollouts are shown next

    def on_generation_batch_built(self, args: Any, state: Any, **kwargs: Any) -> None:
        """TRL's event: rollouts and their teacher's contexts are ready."""
        step = state.global_step
        if self._due is None:
            self._due = -(-step // self.every) * self.every
        if step < self._due:
            return
        self._due = (step // self.every + 1) * self.every
        # on every process: the forward of a sharded model is collective
        shown = self._map(self.trainer._buffered_inputs[0], step)
        if state.is_world_process_zero and shown.rows:
            self._write(shown, Path(args.output_dir), step)
            self._report(shown, args, step)

    def _map(self, inputs: dict[str, Tensor], step: int) -> CreditMap:
        """The map of the first rollouts with a teacher's signal."""
        mask = inputs["completion_mask"]
        has_signal = mask.any(-1)
        if "self_distillation_mask" in inputs:
            has_signal = has_signal & (inputs["self_distillation_mask"] != 0)
        chosen = has_signal.nonzero()[:, 0][: self.num_sequences]
        count = len(chosen)
        if not count:  # a forward has to be made: other processes may have rollouts to show
            chosen = torch.zeros(1, dtype=torch.long, device=mask.device)
        batch = {name: inputs[name][chosen] for name in NEEDED}
        measures = self._measure(batch)
        captions = [f"step {step}, rollout {n}" for n in chosen.tolist()]
        if "rewards" in inputs:
            rewards = inputs["rewards"][chosen].tolist()
            captions = [f"{text}, reward {r:g}" for text, r in zip(captions, rewards)]
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
        """A forward of the teacher and one of the student."""
        trainer = self.trainer
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        with torch.no_grad(), self._acting_teacher() as teacher:
            attach(teacher, autocast=trainer.accelerator.autocast)
            is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
            outlives = is_sharded and unwrap(teacher) is not unwrap(trainer.model)
            forward = CompletionForward(
                teacher, batch["teacher_input_ids"], batch["teacher_attention_mask"], ids.size(1)
            )
            teacher_hidden, teacher_head = forward(with_head(outlives))

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

        with torch.no_grad(), _evaluating(trainer.model):
            attach(trainer.model, autocast=trainer.accelerator.autocast)
            forward = CompletionForward(
                trainer.model,
                torch.cat([batch["prompt_ids"], ids], 1),
                torch.cat([batch["prompt_mask"], mask], 1),
                ids.size(1),
            )
            measures: CreditMeasures = forward(compute)
        return measures

    @contextmanager
    def _acting_teacher(self) -> Iterator[nn.Module]:
        """The module that teaches, with the teacher's weights or adapter in place."""
        teacher = getattr(self.trainer, "teacher", None)
        if teacher is not None:
            with teacher.acting() as module:
                yield module
            return
        module = self.trainer.teacher_model
        with self.trainer._get_teacher_context_for_self_distillation(), _evaluating(module):
            yield module

    def _write(self, shown: CreditMap, output_dir: Path, step: int) -> None:
        folder = output_dir / "credit_maps" if self.folder is None else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"step_{step:06d}"
        page = html_page(shown, value=self.value)
        stem.with_suffix(".html").write_text(page, encoding="utf-8")
        stem.with_suffix(".json").write_text(shown.to_json(), encoding="utf-8")
        if self.png:
            save_png(shown, stem.with_suffix(".png"), value=self.value)

    def _report(self, shown: CreditMap, args: Any, step: int) -> None:
        if "wandb" in args.report_to:
            import wandb

            page = wandb.Html(html_page(shown, value=self.value), inject=False)
            wandb.log({"credit_map": page, "train/global_step": step})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                text = plain_text(shown, value=self.value)
                # indented lines are code in Markdown, where nothing is markup
                block = "\n".join(f"    {line}" for line in text.split("\n"))
                callback.tb_writer.add_text("credit_map", block, step)
                if self.png:
                    figure = credit_figure(shown, value=self.value)
                    callback.tb_writer.add_figure("credit_map", figure, step)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every part gets back the mode that it had."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _texts(ids: Tensor, mask: Tensor, decode: Any) -> list[str]:
    return [decode(row[keep].tolist()) for row, keep in zip(ids, mask.bool())]
