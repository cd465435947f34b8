"""The derivative of the chunked run: saved gradients are scaled, sparse values are summed, or the
chunks are run again.

* Where forward finished dense gradients, backward only scales them.  It does so out of place, so
  that a second backward is right.
* Sparse values allow any factor for each token: dhidden is gathered from the head's rows, dweight
  is summed from the hidden states, and both are rounded once.
* Otherwise backward runs the chunks again, with autograd's gradient as row weights.

Dimension key:  N tokens, F of them with a dense gradient, D hidden size, V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sd.engine.backend import choose_functions
from fused_sd.engine.chunk import Objective
from fused_sd.engine.operator import RunSettings, plan_gradients, structured
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
    teacher: list[Tensor],  # what a second run needs: states, head and perhaps its bias
    inputs: list[Tensor],  # of that run
    saved: list[Tensor],  # ``Dense`` and ``Sparse``
    grad_output: Tensor,  # () or (N,): factor of the tokens' gradients
    text: str,  # objective and settings, encoded
    floats: list[float],
    ints: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients w.r.t. hidden states, weight and bias in their dtypes; (0,) where not wanted."""
    objective: Objective
    settings: RunSettings
    objective, settings = decode(text, floats, ints)
    dense, sparse = Dense(*saved[:3]), Sparse(*saved[3:])
    factors, tokens = grad_output.expand(hidden.shape[0]).contiguous(), sparse.dense_tokens
    dense_rows, head_factor = dense.dhidden, grad_output if grad_output.dim() == 0 else None
    if any(plan_gradients(objective, settings, wanted).finished):
        dense_rows = dense_rows * factors[tokens, None] if wanted[0] else dense_rows
    elif tokens.numel():
        row_weights = torch.zeros_like(factors)
        row_weights[tokens] = factors[tokens]
        shards = settings.shards
        if shards is not None:  # the ranks' parts are added below, with those of the sparse values
            shards = shards._replace(reduce_dhidden=False)
        again = encode((objective, settings._replace(reduced=True, tolerance=None, shards=shards)))
        sides = hidden, weight, bias, *teacher, *[None] * (3 - len(teacher))
        run = torch.ops.fused_sd.chunked_run
        dense = structured(run(*sides, row_weights[:, None], inputs, *again, wanted)).dense
        dense_rows = dense.dhidden[tokens] if wanted[0] else dense_rows

    wide = accumulation_dtype(hidden.dtype)
    functions = choose_functions(settings.backend, hidden.device, wide).sparse
    dropped_mass = sparse.dropped_mass if sparse.mean_row.numel() else None
    values = SparseValues(sparse.columns, sparse.values, sparse.starts, dropped_mass)
    dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
    if wanted[0]:
        mean_row = None if dropped_mass is None else sparse.mean_row
        shard = VocabShard(settings.shards, weight.shape[0])
        dtype = wide if shard.reduce_dhidden else hidden.dtype
        dhidden = functions.gather_sum(values, weight, mean_row, factors, dtype)
        if tokens.numel():
            dhidden[tokens] = dense_rows.to(dhidden.dtype)
        if shard.reduce_dhidden:
            shard.sum_(dhidden)
            dhidden = dhidden.to(hidden.dtype)
    # Dropped mass goes to dhidden only.  Spreading it over dweight did not reduce its error, and
    # Adam turns each tiny value into a full-size step.
    heads = [(hidden, dense.dweight, weight.dtype)] if wanted[1] else []
    if bias is not None and wanted[2]:
        heads.append((hidden.new_ones((hidden.shape[0], 1)), dense.dbias[:, None], bias.dtype))
    summed = []
    for states, base, dtype in heads:
        given = base if base.numel() else None, head_factor if base.numel() else None
        summed.append(
            functions.segment_sum(values, states, weight.shape[0], factors, *given, dtype)
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
    saved: list[Tensor],
    grad_output: Tensor,
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


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Save what backward needs: finished gradients, sparse values, or what a second run needs."""
    *tensors, objective_inputs, text, floats, ints, wanted = inputs
    objective, settings = decode(text, floats, ints)
    ctx.set_materialize_grads(False)  # zeros in place of absent gradients would be as large as them
    ctx.settings, ctx.wanted, ctx.num_inputs = settings, wanted, len(objective_inputs)
    ctx.plan = plan_gradients(objective, settings, wanted)
    hidden, weight, bias = tensors[:3]
    ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
    outputs = structured(output)
    is_finished = any(ctx.plan.finished)
    if ctx.plan.kind in ("sparse", "certified"):
        ctx.encoded = text, floats, ints
        again = ctx.plan.kind == "certified" and not is_finished
        teacher = [tensor for tensor in tensors[3:6] if again and tensor is not None]
        more = list(objective_inputs) if again else []
        ctx.counts = len(teacher), len(more)
        saved = *outputs.dense, *outputs.sparse
        ctx.save_for_backward(hidden, weight, bias, tensors[6], *teacher, *more, *saved)
    elif is_finished:
        ctx.save_for_backward(*outputs.dense)
    elif any(wanted):
        replayed, chosen = objective.replay(outputs.extras)
        ctx.encoded = encode((replayed, settings._replace(reduced=True)))
        ctx.save_for_backward(*tensors, *objective_inputs, *chosen)


def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Return the gradients w.r.t. hidden states, weight and bias, and None for all other inputs."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_sd losses must not be differentiated twice, got create_graph=True: a second "
            "derivative would need the logits; use the plain PyTorch loss for it"
        )
    grad_output = grads[0] if ctx.settings.reduced else grads[1]
    if grad_output is not None and _is_batched(grad_output):
        raise RuntimeError(
            "fused_sd losses must be differentiated by one gradient at a time, got a batch of them "
            "(is_grads_batched=True, or vectorize=True): call torch.autograd.grad for each"
        )
    gradients: Sequence[Tensor | None] = [None, None, None]
    if any(ctx.wanted) and grad_output is not None:
        if ctx.plan.kind in ("sparse", "certified"):
            gradients = _from_sparse_values(ctx, grad_output)
        elif ctx.plan.kind == "dense":
            # one factor, or one for each token, which only the rows of dhidden can have
            gradients = [
                _rounded(gradient, grad_output, dtype)
                for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ]
        else:
            gradients = _run_again(ctx, grad_output)
    gradients = [
        gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True)
    ]
    settings = [None] * 4
    return (*gradients, None, None, None, None, [None] * ctx.num_inputs, *settings)


def _is_batched(gradient: Tensor) -> bool:
    """Whether a tensor stands for several, as under vmap or autograd's own older form of it."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def _from_sparse_values(ctx: Any, grad_output: Tensor) -> list[Tensor]:
    hidden, weight, bias, row_weights, *others = ctx.saved_tensors
    num_teacher, num_inputs = ctx.counts
    teacher, others = others[:num_teacher], others[num_teacher:]
    if grad_output.dim():
        grad_output = _masked(grad_output, row_weights)[:, 0]
    gradients: list[Tensor] = torch.ops.fused_sd.sparse_gradients(
        *(hidden, weight, bias, teacher, others[:num_inputs], others[num_inputs:], grad_output),
        *ctx.encoded,
        ctx.wanted,
    )
    return gradients


def _run_again(ctx: Any, grad_output: Tensor) -> list[Tensor]:
    saved = ctx.saved_tensors  # read once: a checkpoint hands each tensor out once
    *tensors, row_weights = saved[:7]
    inputs = list(saved[7:])
    grad_output = _masked(grad_output, row_weights)
    flat = torch.ops.fused_sd.chunked_run(*tensors, grad_output, inputs, *ctx.encoded, ctx.wanted)
    dense = zip(structured(flat).dense, ctx.dtypes, strict=True)
    return [_rounded(gradient, None, dtype) for gradient, dtype in dense]


def _rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Scale and round in one pass: a wide copy of dweight would double its memory."""
    if factor is None or dtype is None or not gradient.numel():
        return gradient.to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _masked(grad_output: Tensor, row_weights: Tensor | None) -> Tensor:
    """The gradient w.r.t. the values, 0 for the tokens that forward left out."""
    return grad_output if row_weights is None else torch.where(row_weights != 0, grad_output, 0)
