"""The walk over chunks of tokens: every fused loss is this one operator with other row functions.

A chunk's hidden states become logits, a row function turns them into its values and, where a
gradient is wanted, overwrites them with the gradient by themselves; two GEMMs carry that on to the
hidden states and the head, and the chunk is forgotten.  Extra memory is O(C V), never O(N V).

The gradient is that of ``sum(upstream * values)``.  Where the loss is reduced inside, ``upstream``
is the token weights and forward keeps the finished gradients, which backward only scales (out of
place, so that a second backward is right).  Otherwise backward walks again with autograd's gradient
as ``upstream``.

Dimension key:  N tokens, A tokens with a weight, C tokens in a chunk, D hidden size, V vocabulary,
                J values that a row function returns for each token
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sd import specs
from fused_sd.active import ActiveTokens
from fused_sd.backend import choose_rows
from fused_sd.chunk import Chunk, RowFunction
from fused_sd.chunking import chunk_rows, chunk_size_for, workspace_width
from fused_sd.heads import (
    LMHead,
    Projection,
    Shaping,
    accumulation_dtype,
    matmul,
    matmul_add_,
)


class Walked(NamedTuple):
    """What the walk returns, with the tokens flattened to N."""

    total: Tensor  # (), sum(upstream * values); differentiable when the loss is reduced inside
    values: Tensor  # (N, J); differentiable when it is not
    extras: list[Tensor]  # (N, ...), detached; 0 for a token without a weight


def walk(
    rows: RowFunction,
    student: tuple[Tensor, LMHead],
    teacher: tuple[Tensor, LMHead] | None,
    inputs: list[Tensor],  # each (..., rest)
    token_weights: Tensor | None,  # (...)
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    reduced: bool,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Walked:
    """Apply a row function to the logits of all tokens, differentiably.

    Args:
        rows: the row function.
        student: hidden states (..., D) and head, differentiated.
        teacher: hidden states (..., D') and head, constants.
        inputs: what the row function needs for each token.
        token_weights: the weight of each token's value; a token of weight 0 is left out.
        temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        reduced: whether ``total`` is differentiable, or ``values`` are.
        compact: drop tokens of weight 0 before any GEMM, which waits for their number once.
        backend: "auto", "triton" or "torch".
        chunk_size: tokens in a chunk; None: by memory.
    """
    hidden, weight, bias = student[1].operands(student[0])
    t_hidden = t_weight = t_bias = t_shaping = None
    if teacher is not None:
        t_hidden, t_weight, t_bias = teacher[1].operands(teacher[0])
        t_shaping = teacher[1].shaping(teacher_temperature)
        t_hidden, t_weight = t_hidden.detach(), t_weight.detach()
        t_bias = None if t_bias is None else t_bias.detach()
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    ]
    options = Options(
        student[1].shaping(temperature), t_shaping, reduced, compact, backend, chunk_size
    )
    wide = accumulation_dtype(hidden.dtype)
    upstream = None
    if token_weights is not None:
        weights = token_weights.detach().to(wide).reshape(-1)
        upstream = (weights if reduced else (weights != 0).to(wide))[:, None]
    flat = torch.ops.fused_sd.walk(
        hidden,
        weight,
        bias,
        t_hidden,
        t_weight,
        t_bias,
        upstream,
        [_flat(tensor, student[0].shape[:-1]) for tensor in inputs],
        *specs.encode((rows, options)),
        wanted,
    )
    total, values, extras = flat[0], flat[1], [extra.detach() for extra in flat[5:]]
    return (
        Walked(total, values.detach(), extras)
        if reduced
        else Walked(total.detach(), values, extras)
    )


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(..., rest) as (N, rest), integers as int64."""
    flat = tensor.detach().reshape(shape.numel(), *tensor.shape[len(shape) :])
    return flat if flat.is_floating_point() else flat.long()


@specs.setting
class Options(NamedTuple):
    """How the walk runs, beside its tensors."""

    student: Shaping
    teacher: Shaping | None
    reduced: bool
    compact: bool
    backend: str
    chunk_size: int | None


@torch.library.custom_op("fused_sd::walk", mutates_args=())
def _walk(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor | None,  # (N, D')
    teacher_weight: Tensor | None,  # (V', D')
    teacher_bias: Tensor | None,  # (V',)
    upstream: Tensor | None,  # (N, J) or (N, 1); None: ones
    inputs: list[Tensor],  # each (N, ...)
    text: str,  # rows and options, encoded
    floats: list[float],
    ints: list[int],
    wanted: list[bool],  # gradients by hidden, weight, bias
) -> list[Tensor]:
    """Total, values, the three gradients (empty where not formed), extras."""
    rows: RowFunction
    options: Options
    rows, options = specs.decode(text, floats, ints)
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    if upstream is None:
        upstream = hidden.new_ones((num_tokens, 1), dtype=wide)
    outputs = _outputs(rows, hidden, weight, bias, _formed(options, rows, wanted))
    active = ActiveTokens(upstream, options.compact)
    hidden, upstream = active.select(hidden), active.select(upstream)
    inputs = [active.select(tensor) for tensor in inputs]
    forming = any(tensor.numel() for tensor in outputs[2:5])

    # an fp16 gradient is formed from weights near 1 and scaled where there is room for it
    unit = upstream.abs().amax().clamp(min=1e-30) if _fp16_gradient(hidden) else None
    student = Projection(hidden, weight, bias, options.student)
    teacher = None
    width = workspace_width(weight.shape[0])
    if teacher_hidden is not None and teacher_weight is not None:
        assert options.teacher is not None
        teacher = Projection(
            active.select(teacher_hidden), teacher_weight, teacher_bias, options.teacher
        )
        width = workspace_width(max(weight.shape[0], teacher.vocab))
    size = options.chunk_size or chunk_size_for(width, hidden.device, sides=2 if teacher else 1)
    size = max(1, min(size, hidden.shape[0]))
    workspaces = [hidden.new_empty((size, width), dtype=wide)]
    if teacher is not None:
        workspaces.append(torch.empty_like(workspaces[0]))
    row_functions = choose_rows(options.backend, hidden.device, wide)
    selected = [active.buffer(tensor, at) for at, tensor in enumerate(outputs)]
    _, values, dhidden, dweight, dbias, *extras = selected

    for at in chunk_rows(hidden.shape[0], size):
        count = at.stop - at.start
        scaled = upstream[at] if unit is None else upstream[at] / unit
        chunk = Chunk(
            student.logits(at, workspaces[0][:count]),
            None if teacher is None else teacher.logits(at, workspaces[1][:count]),
            [tensor[at] for tensor in inputs],
            scaled if forming else None,
            options.student,
            student.dtype,
            row_functions,
        )
        values[at], chunk_extras, dlogits = rows(chunk)
        for buffer, extra in zip(extras, chunk_extras, strict=True):
            buffer[at] = extra
        if dlogits is None:
            continue
        dlogits = dlogits[:, : student.vocab]
        if dhidden.numel():
            matmul(dlogits, student.weight, dhidden[at])
        if dweight.numel():
            matmul_add_(dweight, dlogits.t(), student.chunk(at))
        if dbias.numel():
            dbias += dlogits.sum(0, dtype=wide)

    if unit is not None:
        for gradient in (dhidden, dweight, dbias):
            gradient *= unit
    values.masked_fill_(active.dead(values), 0)
    outputs[0].copy_((upstream * values).sum())
    for place, (output, buffer) in enumerate(zip(outputs, selected, strict=True)):
        active.restore(output, buffer, place)
    return outputs


@_walk.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    upstream: Tensor | None,
    inputs: list[Tensor],
    text: str,  # rows and options, encoded
    floats: list[float],
    ints: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    rows, options = specs.decode(text, floats, ints)
    return _outputs(rows, hidden, weight, bias, _formed(options, rows, wanted))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, row_inputs, text, floats, ints, wanted = inputs
    rows, options = specs.decode(text, floats, ints)
    ctx.reduced, ctx.wanted, ctx.num_inputs = options.reduced, wanted, len(row_inputs)
    ctx.recompute = wanted != _formed(options, rows, wanted)
    hidden, weight, bias = tensors[:3]
    ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
    if ctx.recompute:
        replayed, chosen = rows.replay(output[5:])
        ctx.spec = specs.encode((replayed, options._replace(reduced=True)))
        ctx.save_for_backward(*tensors, *row_inputs, *chosen)
    else:
        ctx.save_for_backward(*output[2:5])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_sd losses must not be differentiated twice, got create_graph=True: a second "
            "derivative would need the logits; use the plain PyTorch loss for it"
        )
    upstream = grads[0] if ctx.reduced else grads[1]
    gradients: list[Tensor | None] = [None, None, None]
    if any(ctx.wanted) and upstream is not None:
        if ctx.recompute:
            *tensors, old_upstream = ctx.saved_tensors[:7]
            upstream = _masked(upstream, old_upstream)
            formed = torch.ops.fused_sd.walk(
                *tensors,
                upstream,
                list(ctx.saved_tensors[7:]),
                *ctx.spec,
                ctx.wanted,
            )[2:5]
        else:
            # one number, or one for each token, which only the rows of dhidden can follow
            formed = [upstream * gradient for gradient in ctx.saved_tensors]
        gradients = [
            gradient.to(dtype) if wanted else None
            for gradient, dtype, wanted in zip(formed, ctx.dtypes, ctx.wanted, strict=True)
        ]
    settings = [None] * 4
    return (*gradients, None, None, None, None, [None] * ctx.num_inputs, *settings)


_walk.register_autograd(_backward, setup_context=_setup_context)


def _masked(gradient: Tensor, weights: Tensor | None) -> Tensor:
    """The gradient by the values, 0 for the tokens that the forward walk left out."""
    return gradient if weights is None else torch.where(weights != 0, gradient, 0)


def _formed(options: Options, rows: RowFunction, wanted: list[bool]) -> list[bool]:
    """Which gradients this walk forms: those that backward can reach by scaling them."""
    hidden_only = wanted == [True, False, False] and rows.num_values == 1
    return wanted if options.reduced or hidden_only else [False, False, False]


def _fp16_gradient(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype == torch.float16 and hidden.shape[0] > 0


def _outputs(
    rows: RowFunction, hidden: Tensor, weight: Tensor, bias: Tensor | None, formed: list[bool]
) -> list[Tensor]:
    """The operator's outputs, all zero."""
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    shapes: list[tuple[int, ...]] = [(), (num_tokens, rows.num_values)]
    for tensor, is_formed in zip((hidden, weight, bias), formed, strict=True):
        shapes.append(tuple(tensor.shape) if is_formed and tensor is not None else (0,))
    outputs = [hidden.new_zeros(shape, dtype=wide) for shape in shapes]
    for is_ids, trailing in rows.extras():
        dtype = torch.int64 if is_ids else wide
        outputs.append(hidden.new_zeros((num_tokens, *trailing), dtype=dtype))
    return outputs
