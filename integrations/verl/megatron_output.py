"""Megatron's ``output_processor``: per-token outputs in place of the output layer's logits.

Megatron-Core 0.18 and later call an ``output_processor`` instead of the output layer if they are
given one.  Ours computes log-probabilities, entropy and the distillation loss of each token from
hidden states and this rank's rows of the output layer's weight.

Dimension key:  S sequence on this context-parallel rank, B batch (1 where sequences are packed),
                H hidden size, V vocabulary, R tensor-parallel ranks, K entries sent by a server
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor
from verl.utils.model import CausalLMOutputForPPO
from verl.workers.config import DistillationLossConfig

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.verl.token_outputs import token_outputs

DISTILLATION_COLUMNS = ("distillation_losses", "student_mass", "teacher_mass")


@dataclass(frozen=True, eq=False)
class OutputProcessor:
    """An ``output_processor`` for one micro-batch of verl's.

    Its jagged tensors are (sequences, length, ...), with one row for each of the student's tokens.

    Args:
        pack: packs a jagged tensor into (B, S, ...) as verl packs the labels.
        needed: jagged; rows where it is 0 cost nothing and are 0 in the outputs.
        num_tokens: size of the vocabulary without the entries that Megatron pads it with.
        log_probs, entropy: whether to compute them.
        loss_config: settings of a distillation from a server's entries; None: no distillation.
        teacher: jagged ``teacher_token_ids`` and ``teacher_log_probs`` (..., K), and
            ``old_log_probs`` if the batch has them.
    """

    pack: Callable[[Tensor], Tensor]
    needed: Tensor
    num_tokens: int
    log_probs: bool = True
    entropy: bool = False
    loss_config: DistillationLossConfig | None = None
    teacher: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names, in verl's words, of the columns that the returned ``log_probs`` holds.

        verl's fused forward unpacks only ``log_probs`` and ``entropy`` and gathers them over the
        context-parallel ranks; other fields of the output are lost.  It keeps trailing dimensions,
        so everything that a distillation loss needs travels as columns of ``log_probs``.
        """
        names = ("log_probs",) if self.log_probs else ()
        return names if self.loss_config is None else (*DISTILLATION_COLUMNS, *names)

    def __call__(
        self,
        *,
        hidden_states: Tensor,  # (S, B, H), or (S / R, B, H) with sequence parallelism
        output_layer: Any,
        output_weight: Tensor | None,  # (V / R, H) if tied to the embeddings
        labels: Tensor,  # (B, S)
        context: Any,
        config: Any,
        scale_logits: Callable[[Tensor], Tensor] | None = None,
        **_unread: object,
    ) -> CausalLMOutputForPPO:
        """Compute the columns: ``log_probs`` is (B, S, columns) and ``entropy`` is (B, S)."""
        _check_layer(output_layer, config)
        group = output_layer.tp_group
        if config.sequence_parallel:
            # the output layer's own forward would gather; so must its replacement
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        teacher: dict[str, Any] = {
            name: self._packed(jagged, labels) for name, jagged in self.teacher.items()
        }
        outputs = token_outputs(
            hidden_states.transpose(0, 1),
            _head(output_layer, output_weight, self.num_tokens, scale_logits),
            labels,
            loss_config=self.loss_config,
            token_weights=self._packed(self.needed, labels),
            temperature=context.temperature,
            log_probs=self.log_probs,
            entropy=self.entropy,
            process_group=group if group.size() > 1 else None,
            # Each rank has its vocabulary rows' part of the states' gradient.  The gather above
            # adds the parts up in its backward; without it the output layer would have done so.
            reduce_dhidden=not config.sequence_parallel,
            **teacher,
        )
        columns = torch.stack([outputs[name] for name in self.columns], -1)
        return CausalLMOutputForPPO(log_probs=columns, entropy=outputs.get("entropy"))

    def _packed(self, jagged: Tensor, labels: Tensor) -> Tensor:
        packed = self.pack(jagged)
        if packed.shape[:2] != labels.shape:
            fail(
                "teacher tensors",
                f"be packed as the labels {tuple(labels.shape)}",
                tuple(packed.shape),
                "give them one row for each token of the sequences",
            )
        return packed


def _check_layer(layer: Any, config: Any) -> None:
    """Refuse an output layer whose forward or backward does more than the loss reproduces."""
    if getattr(type(layer), "forward", None) is not ColumnParallelLinear.forward:
        fail(
            "the model's output_layer",
            "be Megatron's ColumnParallelLinear, whose forward the loss replaces",
            type(layer).__qualname__,
            "pass use_fused_kernels=False",
        )
    if config.defer_embedding_wgrad_compute:
        # ColumnParallelLinear.forward stores its inputs for a later weight gradient; it never runs
        fail(
            "defer_embedding_wgrad_compute",
            "be off: the loss forms the output layer's gradient itself",
            True,
            "turn it off",
        )


def _head(
    layer: Any,
    weight: Tensor | None,
    num_tokens: int,
    scale_logits: Callable[[Tensor], Tensor] | None,
) -> LMHead:
    """Describe this rank's rows of the head, and what the model does to their product.

    Megatron gives ``scale_logits`` as a function that multiplies by a constant: its value at 1 is
    that constant.
    """
    own: Tensor = layer.weight if weight is None else weight
    scale = (
        1.0 if scale_logits is None else float(scale_logits(torch.ones((), dtype=torch.float64)))
    )
    rows, num_ranks = own.shape[0], layer.tp_group.size()
    return LMHead(
        own,
        bias=layer.bias,
        logit_scale=scale,
        valid_vocab=min(num_tokens, rows * num_ranks),
        shard_sizes=(rows,) * num_ranks if num_ranks > 1 else None,
    )
