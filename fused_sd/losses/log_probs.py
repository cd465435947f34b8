"""Log-probabilities of chosen entries of each token's distribution.

Dimension key:  (...) tokens, D hidden size, V vocabulary, K entries
"""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.apply import walk
from fused_sd.engine.options import execution
from fused_sd.head.projection import LMHead, placed_head
from fused_sd.losses.token import check_tokens
from fused_sd.objectives.token import LogProbObjective


class TokenLogProbs(NamedTuple):
    """Log-probabilities in nats, differentiable; 0 for a token of weight 0."""

    log_probs: Tensor  # (...)
    entropy: Tensor | None  # (...), where asked for


class EntryLogProbs(NamedTuple):
    """Log-probabilities of K entries of each token's distribution, differentiable."""

    token_ids: Tensor  # (..., K) int64
    log_probs: Tensor  # (..., K) nats
    tail: Tensor | None  # (...) log-mass of all other entries, where asked for


def token_log_probs(
    hidden: Tensor,  # (..., D)
    head: Tensor | LMHead,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    token_weights: Tensor | None = None,  # (...)
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> TokenLogProbs:
    """Log-probability of each given token and, where asked for, the entropy of its distribution.

    Both are differentiable; backward walks the chunks again, so that nothing of the vocabulary's
    size is kept.

    Args:
        hidden: states that enter lm_head.
        head: lm_head's weight, or an ``LMHead``.
        token_ids: int64 ids.
        temperature: divides the logits.
        entropy: return the entropies too, nats.
        token_weights: only says which tokens to leave out: those of weight 0, whose values are 0.
        compact, backend, chunk_size, process_group, reduce_dhidden: as in ``divergence_loss``.

    Returns:
        fp32 values (fp64 for fp64 operands).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an id is not in the vocabulary (CPU).
    """
    lm_head = placed_head(head, process_group)
    shape = check_tokens(hidden, lm_head, token_ids, token_weights)
    checks.check_run("none", temperature)
    rows = LogProbObjective(1, False, False, bool(entropy))
    walked = walk(
        rows,
        (hidden, lm_head),
        None,
        [token_ids[..., None]],
        token_weights,
        temperature=temperature,
        reduced=False,
        execution=execution(
            "dense", None, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )
    values = walked.values
    entropies = values[:, 1].reshape(shape) if entropy else None
    return TokenLogProbs(values[:, 0].reshape(shape), entropies)


def entry_log_probs(
    hidden: Tensor,  # (..., D)
    head: Tensor | LMHead,  # (V, D)
    entries: Tensor | int,  # (..., K) or K
    *,
    tail: bool = False,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,  # (...)
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> EntryLogProbs:
    """Log-probabilities of K entries of each distribution: its own top-k, or given ids.

    With these a top-k divergence can be formed in two steps that never need both heads at once: the
    student's top-k first, the teacher at the student's ids next.  The ids are not differentiated.

    Args:
        entries: K, for the K most likely entries, or (..., K) int64 ids, distinct for each token.
        tail: return the log-mass of all other entries, from their own log-sum-exp.
        token_weights: as in ``token_log_probs``.
        hidden, head, temperature, compact, backend, chunk_size, process_group, reduce_dhidden: as
            in ``token_log_probs``.

    Returns:
        Ids, log-probabilities and tail; fp32 (fp64 for fp64 operands).

    Raises:
        ValueError: as ``token_log_probs``, or K exceeds the vocabulary, or ids repeat (CPU).
    """
    lm_head = placed_head(head, process_group)
    tensor_checks.check_hidden(hidden, "hidden", lm_head.weight, "head")
    shape = hidden.shape[:-1]
    tensor_checks.check_per_token("token_weights", token_weights, shape, hidden.device, "hidden")
    checks.check_run("none", temperature)
    inputs = []
    if isinstance(entries, Tensor):
        tensor_checks.check_entry_ids(entries, shape, hidden.device, lm_head.num_tokens)
        tensor_checks.check_distinct("entries", entries, token_weights)
        inputs = [entries.long()]
        k = entries.shape[-1]
    else:
        checks.check_positive_int("entries", entries)
        checks.check_support_size("entries", entries, lm_head.num_tokens)
        k = int(entries)
    walked = walk(
        LogProbObjective(k, not inputs, bool(tail), False),
        (hidden, lm_head),
        None,
        inputs,
        token_weights,
        temperature=temperature,
        reduced=False,
        execution=execution(
            "dense", None, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )
    ids = inputs[0] if inputs else walked.extras[0]
    return EntryLogProbs(
        ids.reshape(*shape, k),
        walked.values[:, :k].reshape(*shape, k),
        walked.values[:, k].reshape(shape) if tail else None,
    )
