"""Batches without padding: all sequences lie in one row, and each attends to itself alone.

Packing saves the work on padding, which is much of the work on a ragged batch.  The row's position
ids start again from 0 at each sequence, and transformers finds the sequences by them
(``masking_utils.find_packed_sequence_indices``, read in 5.24).  ``flash_attention_2`` works on each
sequence alone.  ``sdpa`` and ``eager`` build a mask of (N, N): attention on a row that is many
times longer than its sequences costs more there than padding would.

Dimension key:  B sequences, L positions, N tokens that are no padding, D hidden size
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.padding import count_orphans, refuse_orphans
from fused_sd.integrations.shared.probing import evaluating, probe_ids, product_precision
from fused_sd.integrations.transformers import ATTACHMENT, Request, unwrap

SHAPE = 3, 5  # number and length of the sequences that a model has to keep apart
FLOOR = 1e-4  # allowed relative difference: the order of additions in fp32; a leak is near 1
REMEDY = "leave out padding_free for this model, or load it with another attn_implementation"


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch in one row.

    Attributes:
        input_ids: (1, N).
        position_ids: (1, N), counted from 0 in each sequence.
        index: (B, L), the place of each token in the row; 0 for padding.
        boundaries: (number of sequences + 1,) int32, the start of each sequence, and N.
        longest: the length of the longest sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    index: Tensor
    boundaries: Tensor
    longest: int

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments that a model is called with."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if "flash" in attention_of(model):
            # Without the boundaries every layer derives them from the position ids, which waits for
            # the device each time.  Other attentions do not take these arguments.
            inputs.update(cu_seq_lens_q=self.boundaries, cu_seq_lens_k=self.boundaries)
            inputs.update(max_length_q=self.longest, max_length_k=self.longest)
        return inputs


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Put the tokens of a padded batch in one row.  Waits for the device once or twice.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 1 for tokens, 0 for padding.  Padding may be on both sides of a
            sequence, but not inside.  A batch of padding alone keeps one token, so that a model can
            run: on sharded models all ranks have to.

    Raises:
        ValueError: shapes differ, or a sequence has padding inside.
    """
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        fail(
            "attention_mask",
            "be (B, L) like input_ids",
            f"{tuple(attention_mask.shape)} for {tuple(input_ids.shape)}",
            "pass the mask of the padded batch",
        )
    if input_ids.numel() == 0:
        fail("input_ids", "hold a token", tuple(input_ids.shape), "leave the forward out")
    mask = attention_mask != 0
    starts = mask & ~nn.functional.pad(mask, (1, 0))[:, :-1]
    count, holes = torch.stack([mask.sum(), (starts.sum(1) > 1).sum()]).tolist()
    if holes:
        fail(
            "attention_mask",
            "be 1 on one stretch of each sequence",
            f"{holes} with padding inside",
            "move padding to the ends",
        )
    if not count:
        mask, starts = mask.clone(), starts.clone()
        mask[0, 0] = starts[0, 0] = True
    places = mask.flatten().nonzero()[:, 0]
    index = mask.flatten().cumsum(0).sub(1).mul(mask.flatten()).view_as(mask)
    # the number of tokens before each one in its sequence
    position = mask.cumsum(1).flatten()[places] - 1
    lengths = mask.sum(1)[mask.any(1)]
    boundaries = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    row = input_ids.flatten()[places]
    return Packed(row[None], position[None], index, boundaries, int(lengths.max()))


def pack_completions(input_ids: Tensor, attention_mask: Tensor, length: int) -> Packed:
    """Pack sequences whose last ``length`` tokens are completions.

    Raises:
        ValueError: as ``pack``, or a completion has no prompt: a completion's first token is
            predicted by the state of the prompt's last token.
    """
    packed, mask = pack(input_ids, attention_mask), attention_mask != 0
    refuse_orphans(int(count_orphans(mask, length)), mask, length)
    return packed


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention implementation that a model runs.

    transformers has no public attribute for it (5.24).
    """
    return str(unwrap(model).config.get_text_config()._attn_implementation)


def check_packing(model: nn.Module) -> None:
    """Compare a few sequences' states in one row and in several, once for each attention.

    A model that ignores position ids when it builds its mask lets packed sequences attend to each
    other, and nothing in its config says so.  The check calls the wrapped model, which gathers
    sharded weights: it is a collective call.

    Args:
        model: a model that ``attach`` has seen.

    Raises:
        ValueError: the model mixes sequences that share a row.
    """
    inner = unwrap(model)
    if ATTACHMENT not in inner.__dict__:
        fail("model", "answer requests", type(inner).__name__, "call attach(model) first")
    attachment, attention = inner.__dict__[ATTACHMENT], attention_of(model)
    if attention in attachment.packs_with:
        return
    (packed, eps), (alone, _) = _states_packed_and_alone(model)
    leak = float("inf")
    if packed.shape == alone.shape:
        # Each feature is compared to its own size: a few are far larger than the others and would
        # hide a leak into the rest.
        sizes = alone.square().mean(0, keepdim=True).sqrt().clamp(min=1e-30)
        leak = float(((packed - alone) / sizes).square().mean().sqrt())
    bound = max(FLOOR, 16 * eps)
    if not leak <= bound:
        fail(
            f"{type(inner).__name__} with {attention} attention",
            f"keep sequences that share a row apart, to {bound:.1e} of their states",
            f"a difference of {leak:.1e}",
            REMEDY,
        )
    attachment.packs_with.add(attention)


def _states_packed_and_alone(model: nn.Module) -> list[tuple[Tensor, float]]:
    """Return states (N, D) of the same tokens, and their precision: from one row, from several."""
    ids = probe_ids(unwrap(model), *SHAPE)
    mask = torch.ones_like(ids)
    calls = [pack(ids, mask).inputs(model), {"input_ids": ids, "attention_mask": mask}]
    with evaluating(model), torch.no_grad():
        return [
            model(**inputs, use_cache=False, fused_sd=Request(_states_and_precision)).result
            for inputs in calls
        ]


def _states_and_precision(hidden: Tensor, head: LMHead) -> tuple[Tensor, float]:
    return hidden.flatten(0, 1).float(), product_precision(hidden, head)
