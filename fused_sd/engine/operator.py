"""The chunk loop: every fused loss is this one operator with another objective.

A chunk of hidden states becomes logits (``workspace.fill``), the objective turns the logits into
values and, where a gradient is wanted, into dlogits, and two GEMMs turn the dlogits of a group of
chunks into dhidden and dweight (``gradients.accumulate``).  Then the logits are forgotten: extra
memory is O(C V), never O(N V).  dlogits that are sparse, or that a tolerance allows to be, are kept
as a few values for each token instead (``gradients.py``).

``values`` are the objective's J numbers for each token, ``row_weights`` are their factors.  Tokens
of weight 0 are left out first (``kept_tokens.py``).  A chunk is as long as a memory budget allows,
and a group is the chunks that share the two GEMMs (``layout.py``).

Forward computes the gradient of ``sum(row_weights * values)`` at once where the row weights are
known: where the loss is reduced inside, they are the token weights.  Otherwise backward runs the
chunks again, with autograd's gradient as row weights (``backward.py``).

Dimension key:  N tokens, D hidden size, V vocabulary, J values of an objective for each token
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.engine.auto_gradients import AutoGradients
from fused_sd.engine.backend import Functions, choose_functions
from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.engine.gradients import CertifiedGradients, DenseGradients, SparseGradients
from fused_sd.engine.kept_tokens import KeptTokens
from fused_sd.engine.layout import Room, room_on
from fused_sd.engine.out_of_memory import explained
from fused_sd.engine.saved import Dense, Sparse, Wanted
from fused_sd.engine.workspace import Needs, Workspace
from fused_sd.head.lm_head import Shaping
from fused_sd.head.projection import Projection, accumulation_dtype
from fused_sd.head.vocab_shard import Shards, VocabShard
from fused_sd.settings import decode, setting
from fused_sd.torch_kernels.slices import slices


@setting
class RunSettings(NamedTuple):
    """How the chunks are run, beside the objective and the tensors."""

    student: Shaping
    teacher: Shaping | None
    reduced: bool
    compact: bool
    backend: str
    chunk_size: int | None
    tolerance: float | None  # of a certified sparse gradient; None: a dense one
    shards: Shards | None  # None: the vocabulary is whole here
    auto: bool = False  # whether the gradient is certified only where that pays


class GradientPlan(NamedTuple):
    """Which gradients a run computes, and in which form."""

    # "nothing": no gradient is wanted, or backward runs the chunks again to compute it
    kind: Literal["nothing", "dense", "sparse", "certified"]
    finished: Wanted  # which dense gradients forward finishes, so that backward only scales them


class Outputs(NamedTuple):
    """What the operator returns, flattened in this order; what is not computed is empty."""

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
    """The operator's outputs by name, or what autograd holds in their places."""
    dense, sparse = Dense(*flat[2:FIRST_SPARSE]), Sparse(*flat[FIRST_SPARSE:FIRST_EXTRA])
    return Outputs(flat[0], flat[1], dense, sparse, list(flat[FIRST_EXTRA:]))


def plan_gradients(
    objective: Objective, settings: RunSettings, wanted: Sequence[bool]
) -> GradientPlan:
    """Decide which gradients forward computes.

    Dense ones are computed only where backward can finish them by scaling.
    """
    nothing = (False, False, False)
    if not any(wanted):
        return GradientPlan("nothing", nothing)
    if objective.num_sparse_values:
        return GradientPlan("sparse", nothing)
    # one value a token and a frozen head: backward can scale each row of dhidden by itself
    hidden_only = tuple(wanted) == (True, False, False) and objective.num_values == 1
    hidden, weight, bias = wanted
    dense = (hidden, weight, bias) if settings.reduced or hidden_only else nothing
    if settings.tolerance is not None:
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
    text: str,  # objective and settings, encoded
    floats: list[float],
    ints: list[int],
    wanted: list[bool],  # gradients w.r.t. hidden, weight, bias
) -> list[Tensor]:
    """Run the chunks; returns ``Outputs``, flat."""
    objective: Objective
    settings: RunSettings
    objective, settings = decode(text, floats, ints)
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    plan = plan_gradients(objective, settings, wanted)
    sizes = hidden.numel(), weight.numel(), weight.shape[0]
    finished = [wide.itemsize * size * has for size, has in zip(sizes, plan.finished, strict=True)]
    room = Room(0, 0)
    if settings.chunk_size is None:  # asked for before anything waits for the device
        copied = [] if row_weights is None else [hidden, teacher_hidden, *inputs]
        reserved = sum(finished) + sum(0 if part is None else part.nbytes for part in copied)
        room = room_on(hidden.device, reserved, settings.shards is None)
    kept = KeptTokens(row_weights, settings.compact)
    if row_weights is None:
        row_weights = hidden.new_ones((num_tokens, 1), dtype=wide)
    hidden, row_weights = kept.select(hidden), kept.select(row_weights)
    inputs = [kept.select(tensor) for tensor in inputs]

    # fp16: divide the weights by their maximum so that dlogits do not underflow; multiply back in
    # fp32 at the end
    weight_scale = row_weights.abs().amax().clamp(min=1e-30) if _has_fp16_dlogits(hidden) else None
    scaled = row_weights if weight_scale is None else row_weights / weight_scale
    if settings.student.factor != 1:  # between the products of states and head and the logits
        scaled = scaled * settings.student.factor
    student = Projection(hidden, weight, bias, settings.student)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        assert settings.teacher is not None
        states = kept.select(teacher_hidden)
        teacher = Projection(states, teacher_weight, teacher_bias, settings.teacher, other=student)
    functions = choose_functions(settings.backend, hidden.device, wide)
    vocab = student.vocab if teacher is None else max(student.vocab, teacher.vocab)
    shard = VocabShard(settings.shards, vocab)
    needs = Needs(
        objective.whole_sides,
        plan.kind in ("dense", "certified"),
        finished[1],
        room,
        settings.chunk_size,
    )
    workspace = Workspace(student, teacher, needs, functions.sparse.entry_logits, shard)
    with explained(workspace.size, workspace.layout):
        shape = num_tokens, objective.num_sparse_values
        gradients = _gradients(plan, settings, workspace, functions, shape)
        start, stop = 0, hidden.shape[0]
        found = [_by_token(objective, hidden, 0)]  # values and extras of every chunk
        while start < stop:
            group = slice(start, min(start + gradients.tokens_that_fit(), stop))
            for at in slices(group.start, group.stop, workspace.layout.chunk):
                chunk = Chunk(
                    *workspace.fill(at, gradients.first_row + at.start - group.start),
                    sparse=gradients.sparse_buffers(at),
                    columns=workspace.width if functions.rows.READS_PADDING else workspace.vocab,
                    width=workspace.width,
                    inputs=[tensor[at] for tensor in inputs],
                    row_weights=None if plan.kind == "nothing" else scaled[at],
                    cap=settings.student.cap,
                    functions=functions,
                    shard=shard,
                    known_top_k={},
                )
                values, extras = objective(chunk)
                found.append([values, *extras])
            gradients.accumulate(group)
            start = group.stop

        values, *extras = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept.clear_(values)
        total = (row_weights * values).sum()
        dense, sparse = gradients.finish(kept)
    if weight_scale is not None:
        of_sparse = sparse.values, sparse.dropped_mass, sparse.norm, sparse.dropped
        for gradient in (*dense, *of_sparse):
            gradient *= weight_scale
    restored = [kept.restored(buffer) for buffer in (values, *extras)]
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
    objective, settings = decode(text, floats, ints)
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    plan = plan_gradients(objective, settings, wanted)
    total = hidden.new_empty((), dtype=wide)
    values, *extras = _by_token(objective, hidden, num_tokens)
    sparse = Sparse.none(total)
    sizes: list[Any] = [num_tokens, weight.shape[0], weight.shape[0]]
    if plan.kind in ("sparse", "certified"):
        num_values = num_tokens * objective.num_sparse_values
        by_token = {
            name: getattr(sparse, name).new_empty(num_tokens)
            for name in ("kept", "norm", "dropped")
        }
        if plan.kind == "certified":  # with sizes that are known at run time only
            size = torch.library.get_ctx().new_dynamic_size
            num_values, num_dense = size(), size()
            sizes = [num_dense, *(size() if is_wanted else 0 for is_wanted in plan.finished[1:])]
            by_token["dropped_mass"] = total.new_empty(num_tokens)
            by_token["mean_row"] = total.new_empty(weight.shape[1])
            by_token["dense_tokens"] = sparse.dense_tokens.new_empty(num_dense)
        sparse = sparse._replace(
            columns=sparse.columns.new_empty(num_values),
            values=total.new_empty(num_values),
            starts=sparse.starts.new_empty(num_tokens + 1),
            **by_token,
        )
    trailing: list[tuple[int, ...]] = [(hidden.shape[1],), (weight.shape[1],), ()]
    dense = [
        total.new_empty((size, *rest) if is_wanted else 0)
        for is_wanted, size, rest in zip(plan.finished, sizes, trailing, strict=True)
    ]
    return Outputs(total, values, Dense(*dense), sparse, extras).flat()


def _gradients(
    plan: GradientPlan,
    settings: RunSettings,
    workspace: Workspace,
    functions: Functions,
    shape: tuple[int, int],  # tokens, and sparse values of each
) -> DenseGradients:
    """The form in which a run keeps its gradients."""
    if plan.kind == "sparse":
        return SparseGradients(workspace, *shape)
    if plan.kind != "certified":
        return DenseGradients(workspace, plan.finished)
    assert settings.tolerance is not None
    is_cuda = workspace.student.hidden.is_cuda
    if not settings.auto and is_cuda and torch.cuda.is_current_stream_capturing():
        checks.fail(
            "gradient",
            "be 'dense' or 'auto' under CUDA graph capture",
            "'sparse'",
            "how many values and dense rows there are must be read from the device",
        )
    form = AutoGradients if settings.auto else CertifiedGradients
    return form(workspace, functions, plan.finished, settings.tolerance, settings.reduced)


def _has_fp16_dlogits(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == torch.float16 and hidden.shape[0] > 0


def _by_token(objective: Objective, hidden: Tensor, num_tokens: int) -> list[Tensor]:
    """Memory like that of the values and extras of so many tokens."""
    wide = accumulation_dtype(hidden.dtype)
    buffers = [hidden.new_empty((num_tokens, objective.num_values), dtype=wide)]
    for is_ids, trailing in objective.extras():
        dtype = torch.int64 if is_ids else wide
        buffers.append(hidden.new_empty((num_tokens, *trailing), dtype=dtype))
    return buffers
