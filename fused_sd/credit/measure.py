"""Credit from hidden states and heads; the logits of all tokens are never held.

Dimension key:  B responses, T tokens of a response, D and D' hidden sizes, V vocabulary,
    K top tokens
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.credit.tokens import CreditMap, CreditRow, TokenCredit, TopToken
from fused_sd.head.projection import LMHead, as_head
from fused_sd.losses.divergence import divergence_loss
from fused_sd.losses.log_probs import entry_log_probs, token_log_probs
from fused_sd.terms.divergence import Jsd

Decode = Callable[[list[int]], str]
INCOMPLETE = "\ufffd"  # what decoders return for bytes that are no character yet
MAX_PIECES = 4  # a character has at most four bytes in UTF-8


class CreditMeasures(NamedTuple):
    """What both distributions say of each token, in nats; values of masked tokens mean nothing."""

    student_log_prob: Tensor  # (B, T)
    teacher_log_prob: Tensor  # (B, T)
    forward_kl: Tensor  # (B, T)
    reverse_kl: Tensor  # (B, T)
    student_entropy: Tensor  # (B, T)
    teacher_entropy: Tensor  # (B, T)
    student_top_ids: Tensor  # (B, T, K)
    student_top_log_probs: Tensor  # (B, T, K)
    teacher_top_ids: Tensor  # (B, T, K)
    teacher_top_log_probs: Tensor  # (B, T, K)

    def as_map(
        self,
        token_ids: Tensor,  # (B, T)
        mask: Tensor | None = None,  # (B, T)
        *,
        decode: Decode | None = None,
        captions: Sequence[str] | None = None,
        title: str = "Credit map",
    ) -> CreditMap:
        """These numbers with the tokens' texts; arguments as in ``credit_map``."""
        tensor_checks.check_leading("token_ids", token_ids, self.forward_kl.shape, "the measures")
        mask = torch.ones_like(token_ids) if mask is None else mask
        tensor_checks.check_leading("mask", mask, token_ids.shape, "token_ids")
        if captions is not None and len(captions) != len(token_ids):
            remedy = "give one caption for each response"
            checks.fail("captions", f"be {len(token_ids)} texts", len(captions), remedy)
        rows = []
        for n, ids in enumerate(token_ids):
            keep = mask[n].bool()
            measures = CreditMeasures(*(values[n][keep] for values in self))
            tokens = measures._tokens(
                ids[keep].tolist(), _placeholder if decode is None else decode
            )
            rows.append(CreditRow(tokens, "" if captions is None else captions[n]))
        return CreditMap(tuple(rows), title)

    def _tokens(self, ids: list[int], decode: Decode) -> tuple[TokenCredit, ...]:
        """The tokens of one response, of which these are the measures (T,) and (T, K)."""
        scalars = [values.tolist() for values in self[: len(NUMBERS)]]
        student, teacher = (
            _top_tokens(top_ids, log_probs, decode)
            for top_ids, log_probs in (self[6:8], self[8:10])
        )
        return tuple(
            TokenCredit(
                token_id, text, student_top=own, teacher_top=other, **dict(zip(NUMBERS, numbers))
            )
            for token_id, text, numbers, own, other in zip(
                ids, token_texts(ids, decode), zip(*scalars), student, teacher
            )
        )


NUMBERS = CreditMeasures._fields[:6]


def credit_map(
    student_hidden: Tensor,  # (B, T, D)
    student_head: Tensor | LMHead,  # (V, D)
    teacher_hidden: Tensor,  # (B, T, D')
    teacher_head: Tensor | LMHead,  # (V, D')
    token_ids: Tensor,  # (B, T)
    *,
    mask: Tensor | None = None,  # (B, T)
    temperature: float = 1.0,
    top: int = 3,
    decode: Decode | None = None,
    captions: Sequence[str] | None = None,
    title: str = "Credit map",
) -> CreditMap:
    """What the teacher says about each token of B responses.

    Args:
        student_hidden: states that enter the student's lm_head, at the positions that predict the
            tokens.
        student_head: its weight, or an ``LMHead``.
        teacher_hidden: the teacher's states for the same tokens.
        teacher_head: as student_head.
        token_ids: the responses.
        mask: tokens where it is 0 are left out.  None: all are shown.
        temperature: divides the logits of both sides.
        top: number of likeliest tokens kept of each distribution.
        decode: token ids to text, a tokenizer's ``decode``.  None: texts are the ids, ``#12``.
        captions: a line for each response.
        title: of the whole map.

    Returns:
        A row for each response.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a number is out of range.
    """
    measures = credit_measures(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        token_ids,
        mask=mask,
        temperature=temperature,
        top=top,
    )
    return measures.as_map(token_ids, mask, decode=decode, captions=captions, title=title)


@torch.no_grad()
def credit_measures(
    student_hidden: Tensor,  # (B, T, D)
    student_head: Tensor | LMHead,  # (V, D)
    teacher_hidden: Tensor,  # (B, T, D')
    teacher_head: Tensor | LMHead,  # (V, D')
    token_ids: Tensor,  # (B, T)
    *,
    mask: Tensor | None = None,  # (B, T)
    temperature: float = 1.0,
    top: int = 3,
) -> CreditMeasures:
    """The numbers of ``credit_map``, as tensors: for use inside a forward that owns the heads."""
    if student_hidden.dim() != 3:
        shape = tuple(student_hidden.shape)
        checks.fail("student_hidden", "be (B, T, D)", shape, "stack the responses, pad and mask")
    student, teacher = as_head(student_head), as_head(teacher_head)
    weights = None if mask is None else (mask != 0).float()
    # any divergence forms the metrics; this one is finite whatever either side excludes
    metrics = divergence_loss(
        student_hidden,
        student,
        teacher_hidden,
        teacher,
        divergence=Jsd(0.5),
        token_weights=weights,
        temperature=temperature,
        metrics=("forward_kl", "reverse_kl"),
    ).metrics
    sides = []
    for hidden, head in ((student_hidden, student), (teacher_hidden, teacher)):
        outside = token_ids >= head.num_tokens  # a vocabulary without the token excludes it
        sampled = token_log_probs(
            hidden,
            head,
            token_ids.masked_fill(outside, 0),
            temperature=temperature,
            entropy=True,
            token_weights=weights,
        )
        entries = entry_log_probs(hidden, head, top, temperature=temperature, token_weights=weights)
        assert sampled.entropy is not None  # asked for
        log_probs = sampled.log_probs.masked_fill(outside, -torch.inf)
        sides.append((log_probs, sampled.entropy, entries.token_ids, entries.log_probs))
    (log_prob, entropy, *own_top), (teacher_log_prob, teacher_entropy, *other_top) = sides
    return CreditMeasures(
        log_prob,
        teacher_log_prob,
        metrics["forward_kl"],
        metrics["reverse_kl"],
        entropy,
        teacher_entropy,
        *own_top,
        *other_top,
    )


def token_texts(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to a response.

    Tokens are decoded behind the one before them, so that leading spaces survive.  Where one
    character is spread over several tokens, the last of them has it and the others U+FFFD.
    """
    texts: list[str] = []
    known: list[int] = []  # the tokens of the last complete text
    pending: list[int] = []
    for token_id in token_ids:
        pending.append(token_id)
        before, after = decode(known), decode(known + pending)
        piece = after[len(before) :] if after.startswith(before) else decode(pending)
        if piece.endswith(INCOMPLETE) and len(pending) < MAX_PIECES:
            texts.append(INCOMPLETE)
        else:
            # what came before is marked already
            shown = piece.lstrip(INCOMPLETE) if len(pending) > 1 else piece
            texts.append(shown or INCOMPLETE)
            known, pending = pending, []
    return texts


def _top_tokens(
    ids: Tensor,  # (T, K)
    log_probs: Tensor,  # (T, K)
    decode: Decode,
) -> list[tuple[TopToken, ...]]:
    return [
        tuple(TopToken(token_id, decode([token_id]), prob) for token_id, prob in zip(row, probs))
        for row, probs in zip(ids.tolist(), log_probs.exp().tolist())
    ]


def _placeholder(ids: list[int]) -> str:
    return "".join(f"#{token_id}" for token_id in ids)
