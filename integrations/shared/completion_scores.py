"""Forwards over prompt and completion, and what most losses take from one.

``CompletionForward`` is a forward that has not run yet.  ``log_probs`` and ``with_head`` each
return a ``compute`` to run it with: a function that is called with hidden states and head inside
the model's forward.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fused_sd import LMHead, TokenLogProbs, token_log_probs
from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import Compute
from fused_sd.integrations.shared.packing import check_packing, pack_completions
from fused_sd.integrations.shared.padding import pad_behind
from fused_sd.integrations.transformers import Request, completion_positions


@dataclass(frozen=True, eq=False)
class CompletionForward:
    """A forward over prompts and completions that has not run yet.

    Attributes:
        model: a model that ``attach`` has seen, or a wrapper around one.
        input_ids, attention_mask: (B, L).
        length: T, the length of the padded completions at the end of each row.
        padding_free: run the backbone on one row without padding.
        keeps_padding: run it on the rows as they are, as TRL's trainers do.  Otherwise padding is
            moved behind the tokens: see ``padding``.
        more_inputs: further arguments of the model, such as ``pixel_values``.

    The states at padding are those of some other token, so that ``compute`` has to give them
    weight 0.
    """

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor
    length: int
    padding_free: bool = False
    keeps_padding: bool = False
    more_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, compute: Compute) -> Any:
        """Run the model, and return what ``compute`` returns for the completions' states (B, T, D).

        Raises:
            ValueError: something has replaced the forward that ``attach`` installed, images are to
                be packed, or a completion has no prompt.
        """
        positions = completion_positions(self.length)
        if self.padding_free:
            if self.more_inputs:
                # the places of image tokens follow from the padded rows, and position ids from them
                got = ", ".join(self.more_inputs)
                fail("padding_free", "be False for batches with images", got, "leave it out")
            check_packing(self.model)
            packed = pack_completions(self.input_ids, self.attention_mask, self.length)
            inputs = packed.inputs(self.model)
            request = Request(compute, packed.index[:, positions])
        elif self.keeps_padding:
            inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
            inputs.update(self.more_inputs)
            request = Request(compute, positions)
        else:
            inputs, places = pad_behind(
                self.input_ids, self.attention_mask, self.length, self.more_inputs
            )
            request = Request(compute, places)
        output = self.model(**inputs, use_cache=False, fused_sd=request)
        # Trainer applies Liger when training starts, after ``attach``: its fused head replaces the
        # instance's forward, swallows unknown keywords and returns logits.
        if not hasattr(output, "result"):
            fail(
                "model.forward",
                "be the one that attach gave it, or call it",
                f"another, which returned {type(output).__name__}",
                "for use_liger_kernel, which replaces it when training starts, set "
                'liger_kernel_config={"fused_linear_cross_entropy": False}; otherwise attach last',
            )
        return output.result


def log_probs(
    token_ids: Tensor, mask: Tensor, temperature: float, *, entropy: bool = False
) -> Callable[[Tensor, LMHead], TokenLogProbs]:
    """Return a ``compute`` for the log-probabilities (B, T) of the completion.

    Args:
        token_ids: (B, T).
        mask: (B, T), 0 where no log-probability is needed.
        temperature: divides the logits.
        entropy: also compute the entropy (B, T).
    """

    def compute(hidden: Tensor, head: LMHead) -> TokenLogProbs:
        return token_log_probs(
            hidden, head, token_ids, temperature=temperature, entropy=entropy, token_weights=mask
        )

    return compute


def with_head(outlives_forward: bool) -> Callable[[Tensor, LMHead], Any]:
    """Return a ``compute`` that returns the hidden states and their head.

    Args:
        outlives_forward: copy the head's weight.  FSDP and ZeRO-3 shard it again when this forward
            ends, while the loss reads it later, in the student's forward.
    """

    def compute(hidden: Tensor, head: LMHead) -> tuple[Tensor, "HeldHead"]:
        if outlives_forward:
            bias = None if head.bias is None else head.bias.detach().clone()
            head = dataclasses.replace(head, weight=head.weight.detach().clone(), bias=bias)
        return hidden, HeldHead(head)

    return compute


class HeldHead:
    """Carries a head out of a forward.

    Wrappers go through the tuples and dicts that a forward returns, FSDP1 and DDP through
    dataclasses too.  accelerate's autocast casts all 16-bit tensors that it finds to fp32, which
    would copy the weight and hide that both sides share it.  Other objects are left alone.
    """

    def __init__(self, head: LMHead) -> None:
        self.head = head

    def beside(self, student: LMHead) -> LMHead:
        """Return the head for a loss in the student's forward, where ``student`` is live.

        Teacher and student share one weight where the teacher is live or a LoRA adapter.  The loss
        recognises that by the weight's identity, and then needs no second head.  Another teacher's
        head is detached, since a loss refuses a teacher that requires a gradient.
        """
        head = self.head
        if head.weight is student.weight:
            return student
        bias = None if head.bias is None else head.bias.detach()
        return dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
