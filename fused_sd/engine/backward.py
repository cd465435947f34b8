"""The walk's derivative: gradients that forward left, scaled, gathered or formed anew.

Where forward left finished gradients, backward only scales them, out of place, so that a second
backward is right.  Sparse values take any factor for each token: the hidden states' gradient is
gathered from the head, the head's is summed from the hidden states, and both are rounded once.
Otherwise backward runs the chunks again with autograd's gradient as ``row_weights``.

Dimension key:  N tokens, F of them with a dense gradient, D hidden size, V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sd.engine.backend import choose_functions
from fused_sd.engine.chunk import Objective
from fused_sd.engine.operator import Options, plan_gradients, structured
from fused_sd.engine.saved import Dense, Sparse
from fused_sd.head.projection import accumulation_dtype
from fused_sd.head.vocab_shard import VocabShard
from fused_sd.settings import decode, encode
from fused_sd.torch_kernels.sparse import SparseValues


@torch.library.custom_op("fused_sd::sparse_gradients", mutates_args=())
def sparse_gradients(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    teacher: list[Tensor],  # what a second walk needs: states, head and perhaps its bias
    inputs: list[Tensor],  # of that walk
    formed: list[Tensor],  # ``Dense`` and ``Sparse``
    factor: Tensor,  # () or (N,): of the tokens' gradients
    text: str,  # rows and options, encoded
    floats: list[float],
    ints: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients by hidden states, weight and bias in their dtypes; (0,) where not wanted."""
    rows: Objective
    options: Options
    rows, options = decode(text, floats, ints)
    dense, sparse = Dense(*formed[:3]), Sparse(*formed[3:])
    factors, tokens = factor.expand(hidden.shape[0]).contiguous(), sparse.dense_tokens
    dense_rows, head_factor = dense.dhidden, factor if factor.dim() == 0 else None
    if any(plan_gradients(rows, options, wanted).dense):
        dense_rows = dense_rows * factors[tokens, None] if wanted[0] else dense_rows
    elif tokens.numel():
        row_weights = torch.zeros_like(factors)
        row_weights[tokens] = factors[tokens]
        shards = options.shards
        if shards is not None:
            shards = shards._replace(reduce_dhidden=False)  # with the entries' part, below
        settings = options._replace(reduced=True, tolerance=None, shards=shards)
        again = encode((rows, settings))
        sides = hidden, weight, bias, *teacher, *[None] * (3 - len(teacher))
        walked = torch.ops.fused_sd.chunked_run(
            *sides, row_weights[:, None], inputs, *again, wanted
        )
        dense = structured(walked).dense
        dense_rows = dense.dhidden[tokens] if wanted[0] else dense_rows

    wide = accumulation_dtype(hidden.dtype)
    functions = choose_functions(options.backend, hidden.device, wide).sparse
    dropped_mass = sparse.dropped_mass if sparse.mean_row.numel() else None
    entries = SparseValues(sparse.columns, sparse.values, sparse.starts, dropped_mass)
    dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
    if wanted[0]:
        centre = None if dropped_mass is None else sparse.mean_row
        shard = VocabShard(options.shards, weight.shape[0])
        dtype = wide if shard.reduce_dhidden else hidden.dtype
        dhidden = functions.gather_sum(entries, weight, centre, factors, dtype)
        if tokens.numel():
            dhidden[tokens] = dense_rows.to(dhidden.dtype)
        if shard.reduce_dhidden:
            shard.sum_(dhidden)
            dhidden = dhidden.to(hidden.dtype)
    # Dropped mass goes to dhidden only: over dweight it did not reduce the error, and Adam
    # would turn each tiny value into a full-size step
    heads = [(hidden, dense.dweight, weight.dtype)] if wanted[1] else []
    if bias is not None and wanted[2]:
        heads.append((hidden.new_ones((hidden.shape[0], 1)), dense.dbias[:, None], bias.dtype))
    summed = []
    for states, base, dtype in heads:
        given = base if base.numel() else None, head_factor if base.numel() else None
        summed.append(
            functions.segment_sum(entries, states, weight.shape[0], factors, *given, dtype)
        )
    if wanted[1]:
        dweight = summed.pop(0)
    if wanted[2]:
        dbias = summed.pop()[:, 0].contiguous()
    return [dhidden, dweight, dbias]


@sparse_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: list[Tensor],
    inputs: list[Tensor],
    formed: list[Tensor],
    factor: Tensor,
    text: str,
    floats: list[float],
    ints: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    likes = zip((hidden, weight, bias), wanted, strict=True)
    return [
        like.new_empty(like.shape) if is_wanted and like is not None else hidden.new_empty(0)
        for like, is_wanted in likes
    ]


def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what backward needs: finished gradients, entries, or what another walk needs."""
    *tensors, row_inputs, text, floats, ints, wanted = inputs
    rows, options = decode(text, floats, ints)
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large
    ctx.options, ctx.wanted, ctx.num_inputs = options, wanted, len(row_inputs)
    ctx.gradient_plan = plan_gradients(rows, options, wanted)
    hidden, weight, bias = tensors[:3]
    ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
    outputs = structured(output)
    at_hand = any(ctx.gradient_plan.dense)
    if ctx.gradient_plan.kind in ("entries", "certified"):
        ctx.spec = text, floats, ints
        again = ctx.gradient_plan.kind == "certified" and not at_hand
        teacher = [tensor for tensor in tensors[3:6] if again and tensor is not None]
        more = list(row_inputs) if again else []
        ctx.counts = len(teacher), len(more)
        formed = *outputs.dense, *outputs.sparse
        ctx.save_for_backward(hidden, weight, bias, tensors[6], *teacher, *more, *formed)
    elif at_hand:
        ctx.save_for_backward(*outputs.dense)
    elif any(wanted):
        replayed, chosen = rows.replay(outputs.extras)
        ctx.spec = encode((replayed, options._replace(reduced=True)))
        ctx.save_for_backward(*tensors, *row_inputs, *chosen)


def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradients by hidden states, weight and bias; by nothing else."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_sd losses must not be differentiated twice, got create_graph=True: a second "
            "derivative would need the logits; use the plain PyTorch loss for it"
        )
    row_weights = grads[0] if ctx.options.reduced else grads[1]
    gradients: Sequence[Tensor | None] = [None, None, None]
    if any(ctx.wanted) and row_weights is not None:
        if ctx.gradient_plan.kind in ("entries", "certified"):
            gradients = _from_entries(ctx, row_weights)
        elif ctx.gradient_plan.kind == "dense":
            # one number, or one for each token, which only the rows of dhidden can follow
            gradients = [
                _rounded(gradient, row_weights, dtype)
                for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ]
        else:
            gradients = _run_again(ctx, row_weights)
    gradients = [
        gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True)
    ]
    settings = [None] * 4
    return (*gradients, None, None, None, None, [None] * ctx.num_inputs, *settings)


def _from_entries(ctx: Any, row_weights: Tensor) -> list[Tensor]:
    hidden, weight, bias, old_upstream, *others = ctx.saved_tensors
    num_teacher, num_inputs = ctx.counts
    teacher, others = others[:num_teacher], others[num_teacher:]
    if row_weights.dim():
        row_weights = _masked(row_weights, old_upstream)[:, 0]
    formed: list[Tensor] = torch.ops.fused_sd.sparse_gradients(
        *(hidden, weight, bias, teacher, others[:num_inputs], others[num_inputs:], row_weights),
        *ctx.spec,
        ctx.wanted,
    )
    return formed


def _run_again(ctx: Any, row_weights: Tensor) -> list[Tensor]:
    *tensors, old_upstream = ctx.saved_tensors[:7]
    inputs = list(ctx.saved_tensors[7:])
    row_weights = _masked(row_weights, old_upstream)
    walked = torch.ops.fused_sd.chunked_run(*tensors, row_weights, inputs, *ctx.spec, ctx.wanted)
    formed = zip(structured(walked).dense, ctx.dtypes, strict=True)
    return [_rounded(gradient, None, dtype) for gradient, dtype in formed]


def _rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Scale and round at once: a wide copy of the head's gradient would double its memory."""
    if factor is None or dtype is None or not gradient.numel():
        return gradient.to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _masked(gradient: Tensor, weights: Tensor | None) -> Tensor:
    """The gradient by the values, 0 for the tokens that the forward walk left out."""
    return gradient if weights is None else torch.where(weights != 0, gradient, 0)
