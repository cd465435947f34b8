"""Row functions in Triton: ``fused_sd/torch_kernels/rows.py`` is the twin, with the same names.

One program of ``programs.py`` walks one row.  A KL, a cross entropy and a policy loss read their
rows twice, once for the normalisers and once for loss and gradient; a JSD, an entry clip or a token
clip needs its loss, or the sum of its derivatives, before the gradient, and reads them three times.

Dimension key:  C rows in a chunk, W columns
"""

from collections.abc import Collection

import torch
import triton
from torch import Tensor

from fused_sd.head.vocab_shard import WHOLE, VocabShard
from fused_sd.kernels.divergence import TERMS
from fused_sd.kernels.launching import launch
from fused_sd.kernels.programs import rows as programs
from fused_sd.kernels.tuning import launch_for
from fused_sd.terms.divergence import DivergenceTerm
from fused_sd.torch_kernels.rows import ROW_METRICS, Normalizers

READS_PADDING = True  # so that a row is read in pieces of 16 bytes, whatever its vocabulary
STATE = 8  # numbers that are kept of a pair of rows: five, in one sector of memory


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,)."""
    lse = logits.new_empty(logits.shape[0])
    _launch(programs.log_normalizer, logits, *_of(logits), lse, lse, HAS_ENTROPY=False)
    return lse


def lse_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row and its entropy in nats: (C,) each."""
    lse, entropy = (logits.new_empty(logits.shape[0]) for _ in range(2))
    _launch(programs.log_normalizer, logits, *_of(logits), lse, entropy, HAS_ENTROPY=True)
    return lse, entropy


def normalizers(student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE) -> Normalizers:
    """Log-sum-exps of both sides' rows, from one visit."""
    state = student.new_empty((student.shape[0], STATE))
    _launch(programs.normalizers, student, *_pair(student, teacher), state, STATE=STATE)
    if not shard.alone:
        _join_(state, shard)
    return Normalizers(state[:, 0] + state[:, 1], state[:, 2] + state[:, 3], state)


def divergence_(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    term: DivergenceTerm,
    entry_clip: float | None,
    row_weights: Tensor | None,
    cap: float | None,
    out: Tensor | None,
    shard: VocabShard = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Sum of a divergence's terms over the vocabulary and, with ``row_weights``, its gradient."""
    loss = torch.empty_like(normalizers.student)
    clipped = torch.zeros_like(loss)
    total = torch.empty_like(loss)
    pair = *_pair(student, teacher), normalizers.state
    settings = term.parameter, term.balance, 0.0 if entry_clip is None else entry_clip
    constants = {"DIVERGENCE": TERMS[term.name], "HAS_CLIP": entry_clip is not None, "STATE": STATE}
    ratio_share = None if entry_clip is not None else term.share_of_mean_ratio
    has_gradient = row_weights is not None and out is not None
    if not has_gradient or ratio_share is None:
        totals = loss, total, clipped
        _launch(programs.divergence, student, *pair, *totals, *settings, **constants)
        loss, total, clipped = shard.sum(*totals)
    if row_weights is not None and out is not None:
        _launch(
            programs.divergence_gradient,
            student,
            *(*pair, loss, total, row_weights, out, out.stride(0), *settings),
            *(ratio_share or 0.0, 1.0 if cap is None else 1 / cap),
            **constants,
            HAS_TOTAL=ratio_share is None,
            HAS_CAP=cap is not None,
            IN_PLACE=out.dtype == student.dtype,
        )
        if ratio_share is not None:
            [loss] = shard.sum(loss)
    return loss, clipped


def softmax_gradient_(
    logits: Tensor,
    normalizer: Tensor,
    constant: Tensor,
    slope: Tensor | None,
    cap: float | None,
    out: Tensor,
) -> None:
    """``out = exp(x) * (constant + slope * x)`` with ``x = logits - normalizer``; see the twin."""
    _launch(
        programs.softmax_gradient,
        logits,
        *(*_of(logits), normalizer, constant, constant if slope is None else slope),
        *(out, out.stride(0), 1.0 if cap is None else 1 / cap),
        HAS_SLOPE=slope is not None,
        HAS_CAP=cap is not None,
        IN_PLACE=out.dtype == logits.dtype,
    )


def row_metrics(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    names: Collection[str],
    shard: VocabShard = WHOLE,
) -> dict[str, Tensor]:
    """What a row of both sides says: one pass finds all that can be named; see the twin."""
    out = student.new_empty((len(ROW_METRICS), student.shape[0]))
    pair = *_pair(student, teacher), normalizers.state
    _launch(programs.row_metrics, student, *pair, out, out.stride(0), STATE=STATE)
    [out] = shard.sum(out)
    return {name: values for name, values in zip(ROW_METRICS, out) if name in names}


def _join_(state: Tensor, shard: VocabShard) -> None:
    """What is known of a pair of rows (C, STATE), of all ranks' columns."""
    anchor, log_scale = state[:, :4:2].clone(), state[:, 1:4:2]
    gap = state[:, 4] + (anchor[:, 0] - anchor[:, 1]) + (log_scale[:, 0] - log_scale[:, 1])
    top = shard.max(anchor)
    share = torch.exp((anchor - top) + log_scale)
    weighted = torch.where(share[:, 0] == 0, 0, share[:, 0] * gap)  # of the log-ratio of logits
    scale, weighted = shard.sum(share, weighted)
    log_scale = scale.log()
    state[:, :4:2], state[:, 1:4:2] = top, log_scale
    shift = (top[:, 0] - top[:, 1]) + (log_scale[:, 0] - log_scale[:, 1])
    state[:, 4] = weighted / scale[:, 0] - shift


def _launch(kernel, like: Tensor, *arguments, **constants) -> None:
    """One program for each row; what has one number for each row is read with stride 1."""
    chosen = launch_for(kernel.__name__, like.device)
    data, *dense = (
        argument.contiguous() if isinstance(argument, Tensor) and argument.dim() == 1 else argument
        for argument in arguments
    )
    options = {
        "BLOCK_V": min(chosen.block_v, triton.next_power_of_2(like.shape[1])),
        "num_warps": chosen.num_warps,
    }
    launch(kernel, like.shape[0], data, *dense, **constants, **options)


def _of(logits: Tensor) -> tuple[Tensor, int, int]:
    return logits, logits.stride(0), logits.shape[1]


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    return student, teacher, student.stride(0), teacher.stride(0), student.shape[1]
