"""Score how well a credit map blames tokens of errors that were planted in the responses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fused_sd.checks import check_one_of, check_positive_int, fail
from fused_sd.credit.tokens import VALUES, CreditRow


@dataclass(frozen=True)
class PlantedErrorScores:
    """Hold mean scores of the responses that have both planted and other tokens.

    Attributes:
        precision: share of the k most blamed tokens that was planted.
        recall: share of the planted tokens that is among the k most blamed.
        f1: harmonic mean of precision and recall, taken for each response and averaged.
        average_precision: mean of the precision at each planted token's rank; chance is the share
            of planted tokens.
        auroc: probability that a planted token is blamed more than another one; chance is 0.5.
        num_rows: number of responses scored.
        num_planted: number of planted tokens in those responses.
        num_tokens: number of tokens in those responses.
    """

    precision: float
    recall: float
    f1: float
    average_precision: float
    auroc: float
    num_rows: int
    num_planted: int
    num_tokens: int


def planted_error_scores(
    rows: Sequence[CreditRow],
    planted: Sequence[Sequence[bool]],
    *,
    k: int | None = None,
    value: str = "delta",
) -> PlantedErrorScores:
    """Measure how well a map finds planted errors.

    A token's blame is -delta, or the value itself for the other values.  Tokens are ranked within
    their response.  Tied tokens count as the mean over all orders of them.

    Args:
        rows: responses of a credit map.
        planted: for each response and token, whether the token belongs to a planted error.
        k: number of tokens to accuse in each response.  None: as many as were planted in it, which
            makes precision and recall equal.
        value: the number to rank by, one of ``VALUES``.

    Raises:
        ValueError: lengths disagree, a value is NaN, or no response has both kinds of token.

    Examples:
        >>> from fused_sd.credit import CreditRow, TokenCredit, planted_error_scores
        >>> def token(teacher_log_prob):
        ...     return TokenCredit(7, "x", -1.0, teacher_log_prob, 0.0, 0.0, 1.0, 1.0)
        >>> row = CreditRow((token(-1.0), token(-6.0), token(-0.5), token(-2.0)))
        >>> scores = planted_error_scores([row], [[False, True, False, False]])
        >>> scores.precision, scores.auroc  # the planted error is the token that is blamed most
        (1.0, 1.0)
    """
    check_one_of("value", value, VALUES)
    if k is not None:
        check_positive_int("k", k)
    if len(planted) != len(rows):
        fail("planted", f"have {len(rows)} responses as rows", len(planted), "give one mask a row")
    scores = []
    num_planted = num_tokens = 0
    for n, (row, mask) in enumerate(zip(rows, planted)):
        errors = [bool(entry) for entry in mask]
        if len(errors) != len(row.tokens):
            rule = f"have {len(row.tokens)} tokens as rows[{n}]"
            fail(f"planted[{n}]", rule, len(errors), "leave out masked tokens")
        count = sum(errors)
        if count in (0, len(errors)):
            continue
        sign = -1.0 if value == "delta" else 1.0
        blame = [sign * token.value(value) for token in row.tokens]
        if any(math.isnan(entry) for entry in blame):
            fail(f"rows[{n}]", f"have a {value} for each token", "NaN", "look at the states")
        ranked = _ranked_groups(blame, errors)
        accused = min(count if k is None else k, len(errors))
        hits = _expected_hits(ranked, accused)
        precision, recall = hits / accused, hits / count
        f1 = 2 * hits / (accused + count)
        scores.append((precision, recall, f1, _average_precision(ranked), _auroc(ranked)))
        num_planted += count
        num_tokens += len(errors)
    if not scores:
        remedy = "plant an error in a part of a response"
        fail("planted", "mark some tokens of a response and not all", "none such", remedy)
    precision, recall, f1, area, auroc = (sum(column) / len(scores) for column in zip(*scores))
    return PlantedErrorScores(
        precision, recall, f1, area, auroc, len(scores), num_planted, num_tokens
    )


# planted tokens and all tokens of each distinct blame, the largest blame first
Groups = list[tuple[int, int]]


def _ranked_groups(blame: Sequence[float], errors: Sequence[bool]) -> Groups:
    """Sort the tokens by blame and count those of equal blame together."""
    pairs = sorted(zip(blame, errors), key=lambda pair: -pair[0])
    groups = [[error for _, error in group] for _, group in groupby(pairs, key=lambda p: p[0])]
    return [(sum(group), len(group)) for group in groups]


def _expected_hits(groups: Groups, k: int) -> float:
    """Count planted tokens among the k most blamed; a group that k cuts counts in proportion."""
    hits = 0.0
    for planted, size in groups:
        taken = min(size, k)
        hits += planted * taken / size
        k -= taken
    return hits


def _average_precision(groups: Groups) -> float:
    """Sum, over the groups as thresholds, the gain in recall times the precision."""
    total = sum(planted for planted, _ in groups)
    found = seen = 0
    area = 0.0
    for planted, size in groups:
        found += planted
        seen += size
        area += planted / total * found / seen
    return area


def _auroc(groups: Groups) -> float:
    """Return the share of (planted, other) pairs in the right order; a tie counts half."""
    num_planted = sum(planted for planted, _ in groups)
    num_others = sum(size for _, size in groups) - num_planted
    right = 0.0
    others_below = num_others
    for planted, size in groups:
        others = size - planted
        others_below -= others
        right += planted * (others_below + others / 2)
    return right / (num_planted * num_others)
