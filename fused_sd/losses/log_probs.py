"""Log-probabilities of chosen entries of each token's distribution.

Dimension key:  (...) tokens, D hidden size, V vocabulary, K entries
"""

import dataclasses
from typing import NamedTuple, TypedDict

import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.apply import apply_objective
from fused_sd.engine.options import Options
from fused_sd.head.lm_head import Head, placed_head
from fused_sd.losses.token import check_tokens
from fused_sd.objectives.token import LogProbObjective


class LogProbOptions(TypedDict, total=False):
    """The keywords of ``LossOptions`` that mean something without a loss; see ``Options``."""

    token_weights: Tensor | None
    temperature: float
    compact: bool
    backend: str
    chunk_size: int | None
    process_group: "dist.ProcessGroup | None"
    reduce_dhidden: bool


class TokenLogProbs(NamedTuple):
    """Log-probabilities in nats, differentiable; 0 for a token of weight 0.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.randn(2, 3, 16), torch.randn(100, 16)
        >>> token_ids = torch.tensor([[3, 5, 8], [4, 6, 9]])
        >>> log_probs, entropy = fused_sd.token_log_probs(hidden, head, token_ids)
        >>> log_probs.sum(-1).shape  # the log-probability of each of two completions
        torch.Size([2])
        >>> entropy is None
        True
    """

    log_probs: Tensor  # (...)
    entropy: Tensor | None  # (...), where asked for


class EntryLogProbs(NamedTuple):
    """Log-probabilities of K entries of each token's distribution, differentiable.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> ids, log_s, _ = fused_sd.entry_log_probs(student, head, 3)  # the student's own top 3
        >>> _, log_t, tail = fused_sd.entry_log_probs(teacher, head, ids, tail=True)
        >>> log_t.shape, tail.shape
        (torch.Size([5, 3]), torch.Size([5]))
        >>> bool((log_s[:, :-1] >= log_s[:, 1:]).all())  # likeliest first
        True
    """

    token_ids: Tensor  # (..., K) int64
    log_probs: Tensor  # (..., K) nats
    tail: Tensor | None  # (...) log-mass of all other entries, where asked for


def token_log_probs(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    entropy: bool = False,
    **options: Unpack[LogProbOptions],
) -> TokenLogProbs:
    """Log-probability of each given token and, where asked for, the entropy of its distribution.

    Both are differentiable.  Backward runs the chunks again, so that nothing of the vocabulary's
    size is kept between forward and backward.

    Args:
        hidden: states that enter lm_head.
        head: lm_head's weight, or an ``LMHead``.
        token_ids: int64 ids.
        entropy: return the entropies too, nats.
        **options: token_weights, temperature, compact, backend, chunk_size, process_group,
            reduce_dhidden, as in ``divergence_loss``.  token_weights only say which tokens to leave
            out: those of weight 0, whose values are 0.

    Returns:
        fp32 values (fp64 for fp64 operands).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an id is not in the vocabulary (CPU).

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.zeros(2, 16), torch.randn(100, 16)  # states that know nothing
        >>> found = fused_sd.token_log_probs(hidden, head, torch.tensor([3, 5]), entropy=True)
        >>> found.log_probs.exp()
        tensor([0.0100, 0.0100])
        >>> found.entropy.exp().round()  # as undecided as between 100 tokens
        tensor([100., 100.])
    """
    checks.check_bool("entropy", entropy)
    chosen = _options("token_log_probs", options)
    lm_head = placed_head(head, "head", chosen.process_group)
    shape = check_tokens(hidden, lm_head, token_ids, chosen)
    objective = LogProbObjective(k=1, is_top_k=False, tail=False, entropy=entropy)
    side, inputs = (hidden, lm_head), [token_ids[..., None]]
    applied = apply_objective(objective, side, None, inputs, chosen.token_weights, chosen)
    values = applied.values
    entropies = values[:, 1].reshape(shape) if entropy else None
    return TokenLogProbs(values[:, 0].reshape(shape), entropies)


def entry_log_probs(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    entries: Tensor | int,  # (..., K) or K
    *,
    tail: bool = False,
    **options: Unpack[LogProbOptions],
) -> EntryLogProbs:
    """Log-probabilities of K entries of each distribution: its own top-k, or given ids.

    From these a top-k divergence can be computed in two steps that never need both heads at once:
    the student's top-k first, then the teacher at the student's ids.  The ids are not
    differentiated.

    Args:
        hidden, head: as in ``token_log_probs``.
        entries: K, for the K most likely entries, or (..., K) int64 ids, distinct for each token.
        tail: return the log-mass of all other entries, from their own log-sum-exp.
        **options: as in ``token_log_probs``.

    Returns:
        Ids, log-probabilities and tail; fp32 (fp64 for fp64 operands).

    Raises:
        ValueError: as ``token_log_probs``, or K exceeds the vocabulary, or ids repeat (CPU).

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.randn(5, 16), torch.randn(100, 16)
        >>> found = fused_sd.entry_log_probs(hidden, head, 3, tail=True)
        >>> total = found.log_probs.exp().sum(-1) + found.tail.exp()
        >>> torch.allclose(total, torch.ones(5))
        True
    """
    checks.check_bool("tail", tail)
    chosen = _options("entry_log_probs", options)
    token_weights = chosen.token_weights
    lm_head = placed_head(head, "head", chosen.process_group)
    tensor_checks.check_hidden(hidden, "hidden", lm_head.weight, "head")
    shape = hidden.shape[:-1]
    owner = shape, hidden.device, "hidden"
    tensor_checks.check_token_weights(token_weights, *owner, chosen.reduction)
    inputs = []
    if isinstance(entries, Tensor):
        given = shape, hidden.device, lm_head.num_tokens
        tensor_checks.check_entry_ids("entries", entries, *given, "hidden", "leave such ids out")
        tensor_checks.check_distinct("entries", entries, token_weights)
        inputs = [entries.long()]
        k = entries.shape[-1]
    else:
        checks.check_positive_int("entries", entries)
        if entries > lm_head.num_tokens:
            rule = f"be at most the vocabulary's {lm_head.num_tokens}"
            checks.fail("entries", rule, entries, "ask for fewer entries")
        k = int(entries)
    objective = LogProbObjective(k, is_top_k=not inputs, tail=tail, entropy=False)
    side = hidden, lm_head
    applied = apply_objective(objective, side, None, inputs, token_weights, chosen)
    ids = inputs[0] if inputs else applied.extras[0]
    return EntryLogProbs(
        ids.reshape(*shape, k),
        applied.values[:, :k].reshape(*shape, k),
        applied.values[:, k].reshape(shape) if tail else None,
    )


def _options(call: str, options: LogProbOptions) -> Options:
    """The options of a call whose values are returned per token."""
    return dataclasses.replace(Options.of(call, options, LogProbOptions), reduction="none")
