"""SD-Zero's first phase: a model learns to revise its own responses, and to do so unasked.

``L_SRT = L_rev + L_gen``.  ``L_rev`` is the cross entropy of the revision, given the initial
response and its verdict; ``L_gen`` is that of the whole assistant turn.  Both terms read the same
tokens in the same order, so that one forward gives their sum: a token of the revision counts in
both means, a token before it only in the second.

The trainer is TRL's SFTTrainer with other data and another loss.  (The reasons for what it
overrides were read in TRL 1.16 and transformers 5.24.)

Dimension key:  B traces, L positions
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from fused_sd import LMHead, LossOutput, cross_entropy_loss
from fused_sd.checks import fail
from fused_sd.integrations.shared.chat_format import record_chat_format
from fused_sd.integrations.transformers import Request, attach
from fused_sd.integrations.trl.checkpoints import WholeCheckpoints
from fused_sd.integrations.trl.data_checks import check_config
from fused_sd.integrations.trl.sparse_gradients import certificate_means, certificate_sums
from fused_sd.integrations.trl.srt_config import SRTConfig
from fused_sd.integrations.trl.srt_data import (
    COLUMNS,
    TraceCollator,
    one_chat_format,
    token_counts,
    trace_dataset,
)
from fused_sd.integrations.trl.traces import Trace


class SRTTrainer(WholeCheckpoints, SFTTrainer):
    """Self-Revision Training on traces, without logits.

    Each term is a mean over its tokens in all micro-batches and processes of an optimizer step.

    The tokenizer remembers the chat template's arguments of the traces, and saves them with the
    model; ``SDZeroTrainer`` then writes its prompts with the same.

    Args:
        model: a causal language model or its name.
        args: the settings.
        train_dataset: traces.
        eval_dataset: traces that are held out.
        processing_class: the tokenizer.
        kwargs: further arguments of TRL's SFTTrainer: peft_config, callbacks, optimizers...

    Raises:
        ValueError: there is no trace, traces differ in the chat template's arguments, the model
            adds a router loss, or context or sequence parallelism cuts sequences.

    Examples:
        >>> from transformers import AutoTokenizer
        >>> from fused_sd.integrations.trl import SRTConfig, SRTTrainer, Trace
        >>> trace = Trace(
        ...     question=0, prompt="2 + 2 =", prompt_ids=(5, 6), initial_ids=(7,), phrase="Wrong.",
        ...     verdict_ids=(8,), revision_ids=(9, 10), initial_correct=False, initial_reward=0.0,
        ...     revision_reward=1.0,
        ... )
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
        >>> trainer = SRTTrainer(
        ...     "Qwen/Qwen2.5-0.5B-Instruct", SRTConfig("out"), [trace], processing_class=tokenizer
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names: ClassVar[list[str]] = ["trl", "srt"]
    _name = "SRT"
    # compute_loss divides by the token counts of all micro-batches; Trainer must not divide again.
    loss_is_scaled_for_ga: Any = True

    def __init__(
        self,
        model: Any,
        args: SRTConfig,
        train_dataset: Sequence[Trace],
        eval_dataset: Sequence[Trace] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("data_collator", "compute_loss_func", "compute_metrics", "formatting_func"):
            if kwargs.get(name) is not None:
                fail(name, "be left out", type(kwargs[name]).__name__, "traces have one loss")
        check_config(type(self).__name__, args, SRTConfig)
        multiple: Any = args.pad_to_multiple_of  # a number, once the configuration is made
        super().__init__(
            model,
            args,
            data_collator=TraceCollator(multiple),
            train_dataset=trace_dataset(train_dataset, args.max_length),
            eval_dataset=(
                None if eval_dataset is None else trace_dataset(eval_dataset, args.max_length)
            ),
            processing_class=processing_class,
            **kwargs,
        )
        # SFTTrainer adds a mixture of experts' router loss, which needs the model's own output.
        if self.aux_loss_enabled:
            remedy = "pass SRTConfig(router_aux_loss_coef=0.0)"
            fail("router_aux_loss_coef", "be 0", self.router_aux_loss_coef, remedy)
        # Both cut sequences between processes, and a request's positions are of whole sequences.
        parallel: Any = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            remedy = "leave out context and sequence parallelism"
            fail("parallelism_config", "keep sequences whole", "one that cuts them", remedy)
        # A model that the caller has prepared with accelerate needs its autocast passed on.
        trained: Any = self.model
        attach(trained, autocast=self.accelerator.autocast)
        self._sums: dict[str, Tensor | None] = {"train": None, "eval": None}
        chat_format = one_chat_format(train_dataset)
        if chat_format is not None:
            record_chat_format(self.processing_class, chat_format)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Dataset:
        """Leave the columns of ``trace_dataset`` alone.

        SFTTrainer's method would apply a chat template and tokenize, for the data it is made with
        as well as for data that is passed to ``evaluate``, which may be traces.
        """
        if isinstance(dataset, Dataset):
            return dataset
        return trace_dataset(dataset, self.args.max_length)

    def _set_signature_columns_if_needed(self) -> None:
        # SFTTrainer's columns lack those of traces, which Trainer would drop as unused.
        self._signature_columns: Any = list(COLUMNS)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of a step, and the number of tokens (2,) of each term in them.

        Trainer passes the second to ``compute_loss`` as ``num_items_in_batch``.  Its own count is
        of labels, which traces do not have, and is one number where two are needed.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.long, device=self.args.device)
        for batch in batches:
            counts += token_counts(batch).to(counts.device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return a micro-batch's share of the step's loss.

        Args:
            inputs: a batch of ``TraceCollator``.
            num_items_in_batch: (2,) tokens of both terms in the step; None: those in ``inputs``.
        """
        if return_outputs:
            fail("return_outputs", "be False", True, "there are no logits to return")
        counts = token_counts(inputs) if num_items_in_batch is None else num_items_in_batch
        # A position predicts the next token: masks and ids lose their first, states their last.
        masks = torch.stack([inputs["generation_mask"], inputs["revision_mask"]])[..., 1:]
        terms = {"joint": (1, 1), "generation": (1, 0), "revision": (0, 1)}[self.args.objective]
        shares = torch.tensor(terms, device=masks.device) / counts.clamp(min=1).double()
        weights = (masks * shares[:, None, None]).sum(0)  # (B, L - 1)
        token_ids = inputs["input_ids"][:, 1:]

        def compute(hidden: Tensor, head: LMHead) -> LossOutput:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            return cross_entropy_loss(
                hidden,
                head,
                token_ids,
                token_weights=weights.to(dtype),
                reduction="sum",
                **self.args.gradient_options,
            )

        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            fused_sd=Request(compute, slice(None, -1)),
        ).result
        self._observe(output, masks, inputs)
        loss = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The counts are of all processes, and DDP averages their gradients.
            loss = loss * self.accelerator.num_processes
        return loss

    @property
    def _phase(self) -> str:
        trained: Any = self.model
        return "train" if trained.training else "eval"

    def _observe(self, output: LossOutput, masks: Tensor, inputs: dict[str, Tensor]) -> None:
        """Add a batch's numbers to the sums that ``log`` reports.

        Sums, because a term's mean over several batches is not the mean of the batches' means.
        """
        phase = self._phase
        corrected = inputs["corrected"].double()
        of_gradient = corrected.new_zeros(5)
        if output.certificate is not None:
            of_gradient += certificate_sums(output.certificate)
        batch = torch.cat(
            [
                (output.token_loss * masks).double().sum((1, 2)),
                masks.sum((1, 2)).double(),
                corrected.sum()[None],
                corrected.new_tensor([len(corrected)]),
                inputs["attention_mask"].sum().double()[None],
                of_gradient,
            ]
        )
        so_far = self._sums[phase]
        self._sums[phase] = batch if so_far is None else so_far + batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the sums since the last call; SFTTrainer's ``log`` averages ``_metrics``."""
        phase, local = self._phase, self._sums[self._phase]
        if local is not None:
            sums = self.accelerator.gather(local[None]).sum(0).tolist()
            generation, revision, turns, revisions, corrected, traces, tokens, *of_gradient = sums
            metrics = {"corrected_fraction": corrected / traces, **certificate_means(of_gradient)}
            # With objective="revision" tokens before the revision have weight 0 and no loss.
            if self.args.objective != "revision":
                metrics["generation_loss"] = generation / turns
            metrics["revision_loss"] = revision / revisions
            if phase == "train":
                self._total_train_tokens += int(tokens)
                metrics["num_tokens"] = float(self._total_train_tokens)
            for name, value in metrics.items():
                self._metrics[phase][name] = [value]
            self._sums[phase] = None
        super().log(logs, start_time)
