"""The walk over chunks of tokens: every fused loss is this operator with other row functions.

A chunk's hidden states become logits, a row function turns them into its values and, where a
gradient is wanted, into the gradient by themselves; two GEMMs carry that of a few chunks on to the
hidden states and the head, and they are forgotten.  Extra memory is O(C V), never O(N V).

The gradient is that of ``sum(upstream * values)``.  Where the loss is reduced inside, ``upstream``
is the token weights and forward keeps the finished gradients, which backward only scales (out of
place, so that a second backward is right).  Otherwise backward walks again with autograd's gradient
as ``upstream``.

Dimension key:  N tokens, D hidden size, V vocabulary, J values of a row function for each token
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sd import specs
from fused_sd.active import ActiveTokens
from fused_sd.backend import choose_rows
from fused_sd.chunk import Chunk, RowFunction
from fused_sd.chunking import slices
from fused_sd.heads import Projection, Shaping, accumulation_dtype
from fused_sd.workspace import Workspace


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
    if teacher_hidden is not None and teacher_weight is not None:
        assert options.teacher is not None
        teacher_hidden = active.select(teacher_hidden)
        teacher = Projection(
            teacher_hidden, teacher_weight, teacher_bias, options.teacher, other=student
        )
    selected = [active.buffer(tensor, at) for at, tensor in enumerate(outputs)]
    _, values, dhidden, dweight, dbias, *extras = selected
    workspace = Workspace(student, teacher, forming, options.chunk_size)
    row_functions = choose_rows(options.backend, hidden.device, wide)
    columns = workspace.width if row_functions.READS_PADDING else workspace.vocab

    for group in slices(0, hidden.shape[0], workspace.layout.group):
        for at in slices(group.start, group.stop, workspace.layout.chunk):
            scaled = upstream[at] if unit is None else upstream[at] / unit
            logits, teacher_logits, dlogits = workspace.fill(at, group.start)
            chunk = Chunk(
                logits,
                teacher_logits,
                columns,
                [tensor[at] for tensor in inputs],
                scaled if forming else None,
                dlogits,
                options.student,
                row_functions,
            )
            values[at], chunk_extras = rows(chunk)
            for buffer, extra in zip(extras, chunk_extras, strict=True):
                buffer[at] = extra
        workspace.carry(group, dhidden, dweight, dbias)
    if hidden.shape[0] == 0:
        dweight.zero_()

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
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large
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
            formed = ctx.saved_tensors
        for place, (gradient, dtype) in enumerate(zip(formed, ctx.dtypes, strict=True)):
            if ctx.wanted[place]:
                # one number, or one for each token, which only the rows of dhidden can follow
                factor = None if ctx.recompute else upstream
                gradients[place] = _rounded(gradient, factor, dtype)
    settings = [None] * 4
    return (*gradients, None, None, None, None, [None] * ctx.num_inputs, *settings)


_walk.register_autograd(_backward, setup_context=_setup_context)


def _rounded(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scale and round at once: a wide copy of the head's gradient would double its memory."""
    if factor is None:
        return gradient.to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


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
    """The operator's outputs: all zero, but for the head's gradient, which is written whole."""
    num_tokens, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    shapes: list[tuple[int, ...]] = [(), (num_tokens, rows.num_values)]
    for tensor, is_formed in zip((hidden, weight, bias), formed, strict=True):
        shapes.append(tuple(tensor.shape) if is_formed and tensor is not None else (0,))
    outputs = [
        hidden.new_empty(shape, dtype=wide) if place == 3 else hidden.new_zeros(shape, dtype=wide)
        for place, shape in enumerate(shapes)
    ]
    for is_ids, trailing in rows.extras():
        dtype = torch.int64 if is_ids else wide
        outputs.append(hidden.new_zeros((num_tokens, *trailing), dtype=dtype))
    return outputs
