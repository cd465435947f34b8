"""Measure credit maps from hidden states and heads, without holding all tokens' logits.

Dimension key:  B responses, T tokens of a response, D the student's hidden size (D' the teacher's),
    V vocabulary, K top tokens
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import Jsd, LMHead, checks, divergence_loss, entry_log_probs, token_log_probs
from fused_sd.checks import tensors as tensor_checks
from fused_sd.credit.tokens import INCOMPLETE, CreditMap, CreditRow, TokenCredit, TopToken

Decode = Callable[[list[int]], str]
MAX_PIECES = 4  # a character has at most four bytes in UTF-8


class CreditMeasures(NamedTuple):
    """Hold both distributions' numbers for each token as tensors.

    Log-probabilities, divergences and entropies are in nats, fp32 (fp64 for fp64 states); ids are
    int64.  Values at masked tokens have no meaning.
    """

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
        """Return a map of these numbers and the tokens' texts.

        Args:
            token_ids, mask, decode, captions, title: as in ``credit_map``, with its errors.
        """
        tensor_checks.check_leading("token_ids", token_ids, self.forward_kl.shape, "the measures")
        mask = torch.ones_like(token_ids) if mask is None else mask
        tensor_checks.check_leading("mask", mask, token_ids.shape, "token_ids")
        if captions is not None and len(captions) != len(token_ids):
            remedy = "give one caption for each response"
            checks.fail("captions", f"be {len(token_ids)} texts", len(captions), remedy)
        decode = _placeholder if decode is None else decode
        rows = []
        for n, ids in enumerate(token_ids):
            keep = mask[n].bool()
            measures = CreditMeasures(*(values[n][keep] for values in self))
            tokens = measures._tokens(ids[keep].tolist(), decode)
            rows.append(CreditRow(tokens, "" if captions is None else captions[n]))
        return CreditMap(tuple(rows), title)

    def _tokens(self, ids: list[int], decode: Decode) -> tuple[TokenCredit, ...]:
        """Return the tokens of one response; ``self`` holds its measures, (T,) and (T, K)."""
        student_top, teacher_top = (_top_tokens(self[n], self[n + 1], decode) for n in (6, 8))
        columns = [values.tolist() for values in self[:6]]  # in the order of TokenCredit's fields
        texts = token_texts(ids, decode)
        return tuple(map(TokenCredit, ids, texts, *columns, student_top, teacher_top))


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
    """Measure how the teacher judges each token of B responses.

    Args:
        student_hidden: states that enter the student's head at the positions that predict the
            tokens, floating point.
        student_head: the student's head, as a weight or ``LMHead``.
        teacher_hidden: the teacher's states for the same tokens.
        teacher_head: the teacher's head, as a weight or ``LMHead``.
        token_ids: the responses, int64.
        mask: 0 where a token is left out.  None: all are kept.
        temperature: divides the logits of both sides.
        top: number of likeliest tokens to keep of each distribution.
        decode: turns token ids into text, as a tokenizer's ``decode`` does.  None: the texts are
            the ids, such as ``#12``.
        captions: a line for each response.
        title: the title of the map.

    Returns:
        A map with one row for each response.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a number is out of range.

    Examples:
        >>> import torch
        >>> from fused_sd.credit import credit_map
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 1, 4, 16), torch.randn(100, 16)
        >>> found = credit_map(student, head, teacher, head, torch.tensor([[3, 5, 8, 13]]))
        >>> [token.text for token in found.rows[0].tokens]  # or words, with decode=
        ['#3', '#5', '#8', '#13']
        >>> same = credit_map(student, head, student, head, torch.tensor([[3, 5, 8, 13]]))
        >>> [token.delta for token in same.rows[0].tokens]  # a teacher that knows no more
        [0.0, 0.0, 0.0, 0.0]
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
    """Return the numbers of ``credit_map`` as tensors.

    Sharded trainers have the heads at hand only inside a forward, where no text should be made:
    call this there and ``as_map`` on its result afterwards.

    Args:
        student_hidden, student_head, teacher_hidden, teacher_head, token_ids, mask: as in
            ``credit_map``.
        temperature, top: as in ``credit_map``.

    Raises:
        ValueError: as in ``credit_map``.
    """
    if student_hidden.dim() != 3:
        shape = tuple(student_hidden.shape)
        checks.fail("student_hidden", "be (B, T, D)", shape, "stack the responses, pad and mask")
    student, teacher = (
        head if isinstance(head, LMHead) else LMHead(head) for head in (student_head, teacher_head)
    )
    weights = None if mask is None else (mask != 0).float()
    # Only the metrics are used, and any divergence computes them.  The JSD is finite even where one
    # vocabulary lacks tokens of the other.
    metrics = divergence_loss(
        student_hidden,
        student,
        teacher_hidden,
        teacher,
        divergence=Jsd(0.5),
        token_weights=weights,
        temperature=temperature,
        reduction="sum",
        metrics=("forward_kl", "reverse_kl"),
    ).metrics
    sides = []
    for hidden, head in ((student_hidden, student), (teacher_hidden, teacher)):
        # a token outside this side's vocabulary has the log-probability -inf
        outside = token_ids >= head.num_tokens
        sampled = token_log_probs(
            hidden,
            head,
            token_ids.masked_fill(outside, 0),
            temperature=temperature,
            entropy=True,
            token_weights=weights,
        )
        entries = entry_log_probs(hidden, head, top, temperature=temperature, token_weights=weights)
        assert sampled.entropy is not None
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
    """Return the text that each token adds to a response.

    Each token is decoded together with the one before it, since decoders drop a leading space.
    Tokens that share the bytes of one character read "é(1/2)" and "é(2/2)"; bytes that make no
    character are U+FFFD.

    Args:
        token_ids: the response.
        decode: turns token ids into text.
    """
    texts: list[str] = []
    known: list[int] = []  # the tokens before the pending ones
    pending: list[int] = []  # the tokens whose bytes are not a character yet
    for token_id in token_ids:
        pending.append(token_id)
        before, after = decode(known), decode(known + pending)
        piece = after[len(before) :] if after.startswith(before) else decode(pending)
        if not piece.endswith(INCOMPLETE):
            texts += _shared_text(pending, piece, decode)
            known, pending = pending, []
        elif len(pending) == MAX_PIECES:  # then no character begins with the first of them
            texts.append(decode(pending[:1]))
            known, pending = pending[:1], pending[1:]
    return texts + [decode([token_id]) for token_id in pending]


def _shared_text(token_ids: list[int], text: str, decode: Decode) -> list[str]:
    """Return the texts of tokens that end with a character; only the last may have parts in it."""
    if len(token_ids) == 1:
        return [text]
    text = text.lstrip(INCOMPLETE)
    start = len(token_ids) - 1
    while start and decode(token_ids[start:]).lstrip() != text.lstrip():
        start -= 1
    count = len(token_ids) - start
    parts = [text] if count == 1 else [f"{text}({n}/{count})" for n in range(1, count + 1)]
    return [decode([token_id]) for token_id in token_ids[:start]] + parts


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
