"""The walk over chunks of tokens: every fused loss is this operator with other row functions.

A chunk's hidden states become logits, an objective turns them into its values and, where a gradient
is wanted, into dlogits; two GEMMs turn the dlogits of a few chunks into the gradients w.r.t. hidden
states and head, and the logits are forgotten.  Extra memory is O(C V), never O(N V).  A
gradient that has few entries, or may be cut to few (``gradients.py``), is kept as those instead.

The gradient is that of ``sum(row_weights * values)``.  Where the loss is reduced inside,
``row_weights`` is the token weights; otherwise it is 1 where a token has a weight.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, J values of a row
                function for each token, K entries of a row
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.engine.backend import choose_functions
from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.engine.gradients import CertifiedGradients, DenseGradients, SparseGradients
from fused_sd.engine.kept_tokens import KeptTokens
from fused_sd.engine.saved import Dense, Sparse
from fused_sd.engine.workspace import Workspace
from fused_sd.head.projection import Projection, Shaping, accumulation_dtype
from fused_sd.head.vocab_shard import Shards, VocabShard
from fused_sd.settings import decode, setting
from fused_sd.torch_kernels.slices import slices


@setting
class Options(NamedTuple):
    """How the walk runs, beside its tensors."""

    student: Shaping
    teacher: Shaping | None
    reduced: bool
    compact: bool
    backend: str
    chunk_size: int | None
    tolerance: float | None  # of a certified sparse gradient; None: a dense one
    shards: Shards | None  # None: the vocabulary is whole here


class GradientPlan(NamedTuple):
    """Which gradients a walk forms, and how."""

    kind: Literal["nothing", "dense", "entries", "certified"]
    dense: tuple[bool, bool, bool]  # by hidden, weight, bias: those that backward only scales


class Outputs(NamedTuple):
    """What the operator returns, in this order and flattened; what is not formed is empty."""

    total: Tensor  # (), sum(row_weights * values)
    values: Tensor  # (N, J)
    dense: Dense
    sparse: Sparse
    extras: list[Tensor]  # each (N, ...)

    def flat(self) -> list[Tensor]:
        return [self.total, self.values, *self.dense, *self.sparse, *self.extras]


FIRST_SPARSE = 2 + len(Dense._fields)
FIRST_EXTRA = FIRST_SPARSE + len(Sparse._fields)


def structured(flat: Sequence[Any]) -> Outputs:
    """The operator's outputs, or what autograd knows of them, by their names."""
    dense, sparse = Dense(*flat[2:FIRST_SPARSE]), Sparse(*flat[FIRST_SPARSE:FIRST_EXTRA])
    return Outputs(flat[0], flat[1], dense, sparse, list(flat[FIRST_EXTRA:]))


def plan_gradients(rows: Objective, options: Options, wanted: Sequence[bool]) -> GradientPlan:
    """What a walk forms: of whole rows, what backward can reach by scaling it."""
    nothing = (False, False, False)
    if not any(wanted):
        return GradientPlan("nothing", nothing)
    if rows.num_entries:
        return GradientPlan("entries", nothing)
    hidden_only = tuple(wanted) == (True, False, False) and rows.num_values == 1
    hidden, weight, bias = wanted
    dense = (hidden, weight, bias) if options.reduced or hidden_only else nothing
    if options.tolerance is not None:
        return GradientPlan("certified", dense)
    return GradientPlan("dense" if any(dense) else "nothing", dense)


@torch.library.custom_op("fused_sd::chunked_run", mutates_args=())
def chunked_run(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor | None,  # (N, D')
    teacher_weight: Tensor | None,  # (V', D')
    teacher_bias: Tensor | None,  # (V',)
    row_weights: Tensor | None,  # (N, J) or (N, 1); None: ones
    inputs: list[Tensor],  # each (N, ...)
    text: str,  # rows and options, encoded
    floats: list[float],
    ints: list[int],
    wanted: list[bool],  # gradients by hidden, weight, bias
) -> list[Tensor]:
    """Walk; returns ``Outputs``, flat."""
    rows: Objective
    options: Options
    rows, options = decode(text, floats, ints)
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    if row_weights is None:
        row_weights = hidden.new_ones((num_tokens, 1), dtype=wide)
    kept_tokens = KeptTokens(row_weights, options.compact)
    formed = plan_gradients(rows, options, wanted)
    hidden, row_weights = kept_tokens.select(hidden), kept_tokens.select(row_weights)
    inputs = [kept_tokens.select(tensor) for tensor in inputs]

    # fp16: divide the weights by their maximum so that dlogits do not underflow; multiply back in
    # fp32 at the end
    unit = row_weights.abs().amax().clamp(min=1e-30) if _fp16_gradient(hidden) else None
    student = Projection(hidden, weight, bias, options.student)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        assert options.teacher is not None
        teacher_hidden = kept_tokens.select(teacher_hidden)
        teacher = Projection(
            teacher_hidden, teacher_weight, teacher_bias, options.teacher, other=student
        )
    stop = hidden.shape[0]
    values, *extras = _by_token(rows, hidden, stop)
    functions = choose_functions(options.backend, hidden.device, wide)
    sizes = hidden.numel(), weight.numel(), weight.shape[0]
    vocab = max(student.vocab, teacher.vocab if teacher is not None else 0)
    shard = VocabShard(options.shards, vocab)
    workspace = Workspace(
        student,
        teacher,
        rows.whole_sides,
        functions.sparse.entry_logits,
        formed.kind in ("dense", "certified"),
        wide.itemsize * sum(itertools.compress(sizes, formed.dense)),
        options.chunk_size,
        shard,
    )
    gradients: DenseGradients
    if formed.kind == "entries":
        gradients = SparseGradients(workspace, num_tokens, rows.num_entries)
    elif formed.kind == "certified":
        assert options.tolerance is not None
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            checks.fail(
                "gradient",
                "be 'dense' under CUDA graph capture",
                "'sparse'",
                "how many entries and dense rows there are must be read from the device",
            )
        settings = formed.dense, options.tolerance, options.reduced
        gradients = CertifiedGradients(workspace, functions, *settings)
    else:
        gradients = DenseGradients(workspace, formed.dense)

    start = 0
    while start < stop:
        group = slice(start, min(start + gradients.tokens_that_fit(), stop))
        for at in slices(group.start, group.stop, workspace.layout.chunk):
            scaled = row_weights[at] if unit is None else row_weights[at] / unit
            chunk = Chunk(
                *workspace.fill(at, gradients.first_row + at.start - group.start),
                gradients.entries(at),
                workspace.width if functions.rows.READS_PADDING else workspace.vocab,
                workspace.width,
                [tensor[at] for tensor in inputs],
                None if formed.kind == "nothing" else scaled,
                options.student,
                functions,
                shard,
            )
            values[at], chunk_extras = rows(chunk)
            for buffer, extra in zip(extras, chunk_extras, strict=True):
                buffer[at] = extra
        gradients.accumulate(group)
        start = group.stop

    kept_tokens.clear_(values)
    total = (row_weights * values).sum()
    dense, sparse = gradients.finish(kept_tokens)
    if unit is not None:
        scaled_too = sparse.values, sparse.dropped_mass, sparse.norm, sparse.dropped
        for gradient in (*dense, *scaled_too):
            gradient *= unit
    restored = [kept_tokens.restored(buffer) for buffer in (values, *extras)]
    return Outputs(total, restored[0], dense, sparse, restored[1:]).flat()


@chunked_run.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    row_weights: Tensor | None,
    inputs: list[Tensor],
    text: str,
    floats: list[float],
    ints: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    rows, options = decode(text, floats, ints)
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    formed = plan_gradients(rows, options, wanted)
    total = hidden.new_empty((), dtype=wide)
    values, *extras = _by_token(rows, hidden, num_tokens)
    sparse = Sparse.none(total)
    sizes: list[Any] = [num_tokens, weight.shape[0], weight.shape[0]]
    if formed.kind in ("entries", "certified"):
        num_entries = num_tokens * rows.num_entries
        by_token = {
            name: getattr(sparse, name).new_empty(num_tokens)
            for name in ("kept", "norm", "dropped")
        }
        if formed.kind == "certified":  # whose sizes depend on what is in the gradient
            size = torch.library.get_ctx().new_dynamic_size
            num_entries, num_dense = size(), size()
            sizes = [num_dense, *(size() if is_formed else 0 for is_formed in formed.dense[1:])]
            by_token["dropped_mass"] = total.new_empty(num_tokens)
            by_token["mean_row"] = total.new_empty(weight.shape[1])
            by_token["dense_tokens"] = sparse.dense_tokens.new_empty(num_dense)
        sparse = sparse._replace(
            columns=sparse.columns.new_empty(num_entries),
            values=total.new_empty(num_entries),
            starts=sparse.starts.new_empty(num_tokens + 1),
            **by_token,
        )
    trailing: list[tuple[int, ...]] = [(hidden.shape[1],), (weight.shape[1],), ()]
    dense = [
        total.new_empty((size, *rest) if is_formed else 0)
        for is_formed, size, rest in zip(formed.dense, sizes, trailing, strict=True)
    ]
    return Outputs(total, values, Dense(*dense), sparse, extras).flat()


def _fp16_gradient(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == torch.float16 and hidden.shape[0] > 0


def _by_token(rows: Objective, hidden: Tensor, num_tokens: int) -> list[Tensor]:
    """Memory for values and extras of so many tokens."""
    wide = accumulation_dtype(hidden.dtype)
    buffers = [hidden.new_empty((num_tokens, rows.num_values), dtype=wide)]
    for is_ids, trailing in rows.extras():
        dtype = torch.int64 if is_ids else wide
        buffers.append(hidden.new_empty((num_tokens, *trailing), dtype=dtype))
    return buffers
