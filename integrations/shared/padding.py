"""Padded batches whose tokens all lie at the start of their rows.

TRL pads prompts on the left.  A causal model's states then depend on how much padding a row has,
and so on its neighbours, wherever the model

* counts positions from the first column (GPT-2, GPT-Neo, BioGPT, CTRL, XGLM, BART's decoder),
* groups tokens into blocks from there (DeepSeek-V4), or
* carries a state through the padding (RWKV, xLSTM).

Position ids would mend the first kind alone, and not every model takes them or counts from 0.  With
the padding behind the tokens, a causal model's states are those of the row alone, whatever it does
with positions.

Dimension key:  B sequences, L positions, W positions of the longest sequence
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_sd.checks import fail
from fused_sd.integrations.shared.probing import evaluating, probe_ids
from fused_sd.integrations.shared.self_check import is_whole
from fused_sd.integrations.transformers import (
    Request,
    completion_positions,
    hidden_states,
    unwrap,
)

# One number for each token: of which kind it is, such as text or image.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
NUM_TOKENS, NUM_PADDING = 8, 3  # of the sequence that is tried with and without padding
ROUNDING = 0.1  # a relative change below it may be a 16-bit model's rounding at other positions


def pad_behind(
    input_ids: Tensor, attention_mask: Tensor, length: int, more_inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Move a batch's padding behind its tokens.  Waits for the device once.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), 1 for tokens, 0 for padding.
        length: T, the number of positions at the end of each row that are completions.
        more_inputs: further arguments of the model; those in ``TOKEN_TYPES`` are (B, L).

    Returns:
        The model's arguments, with rows of W; and ``positions`` for a ``Request``, which selects
        the states (B, T, D) that predict the completions: at padding, any of the row's.

    Raises:
        ValueError: a completion has no prompt.
    """
    mask = attention_mask != 0
    longest, num_orphans = torch.stack([mask.sum(1).max(), count_orphans(mask, length)]).tolist()
    refuse_orphans(num_orphans, mask, length)
    width = max(longest, 1)  # a model runs on one position at least
    # a stable sort keeps the tokens in their order
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    # The states at padding get a gradient of 0.  Spread over the row, their sums do not queue up at
    # one place.
    places = order.argsort(dim=1)[:, completion_positions(length)] % width
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    per_token = {"input_ids": input_ids, "attention_mask": attention_mask}
    per_token |= {name: more_inputs[name] for name in TOKEN_TYPES if name in more_inputs}
    moved = {name: values.gather(1, order[:, :width]) for name, values in per_token.items()}
    # counted from the end, because prompt tuning puts virtual tokens before a row
    return {**more_inputs, **moved}, (rows, places - width)


def count_orphans(mask: Tensor, length: int) -> Tensor:
    """Return how many of the last ``length`` tokens have no token before them: () int64.

    Args:
        mask: (B, L) bool, whether there is a token.
    """
    # padded on the left, so that a prompt shorter than the completion can be looked up as well
    known = nn.functional.pad(mask, (length, 0))
    return (known[:, -length:] & ~known[:, completion_positions(length)]).sum()


def refuse_orphans(num_orphans: int, mask: Tensor, length: int) -> None:
    """Refuse completions without a prompt, whose first token no state predicts."""
    if num_orphans:
        fail(
            "attention_mask",
            f"have a token of the prompt before each completion of {length}",
            f"{num_orphans} without one in {tuple(mask.shape)}",
            "pass prompts that are not empty",
        )


def shift_by_padding(model: nn.Module, *, behind: bool = False) -> float:
    """Return by how much padding of a sequence changes its states, relative to their size.

    0 where that is no more than rounding.

    Args:
        model: a model that ``attach`` has seen; its parameters are whole.
        behind: pad behind the sequence, not before it.
    """
    ids = probe_ids(unwrap(model), 1, NUM_TOKENS)
    mask, states = torch.ones_like(ids), []
    with evaluating(model), torch.no_grad():
        for width in (0, NUM_PADDING):
            widths, end = ((0, width), -width or None) if behind else ((width, 0), None)
            output = model(
                input_ids=nn.functional.pad(ids, widths),
                attention_mask=nn.functional.pad(mask, widths),
                use_cache=False,
                fused_sd=Request(hidden_states, slice(None, end)),
            )
            states.append(output.result[:, -NUM_TOKENS:].float())
    alone, padded = states
    shift = float((padded - alone).norm() / alone.norm().clamp(min=1e-30))
    return shift if shift > ROUNDING else 0.0


def check_padding_behind(model: nn.Module) -> None:
    """Refuse a model that reads the padding behind a sequence, unless its parameters are sharded.

    Raises:
        ValueError: a row's states depend on its neighbours wherever it is padded.
    """
    if is_whole(model) and (shift := shift_by_padding(model, behind=True)):
        fail(
            type(unwrap(model)).__name__,
            "have states that padding behind a row does not change",
            f"a change of {shift:.0%}",
            "use a causal model that reads its attention_mask",
        )
