"""SDPO's trust-region teacher, which lies between a reference and the student.

The teacher's logits are a weighted sum of two products, ``(1 - r) h W^T + r h' W'^T``.  That sum is
itself one product: of the concatenated states ``[(1 - r) h, r h']`` and the concatenated head
``[W, W']``.  So the mixture is an ordinary pair of states and head, every loss takes it without
knowing about trust regions, and the logits are never held.

Dimension key:  (...) tokens, D the student's hidden size, R the reference's, V vocabulary
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import fail
from fused_sd.checks import tensors as tensor_checks
from fused_sd.head.lm_head import LMHead, as_head
from fused_sd.head.projection import accumulation_dtype

StatesAndHead = tuple[Tensor, LMHead]


def trust_region_states(
    reference_hidden: Tensor,  # (..., R)
    reference_head: Tensor | LMHead,  # (V, R)
    student_hidden: Tensor,  # (..., D)
    student_head: Tensor | LMHead,  # (V, D)
    rate: float,
) -> tuple[Tensor, LMHead]:
    """Return states and a head whose logits are ``(1 - rate) reference + rate student``.

    Their softmax is the normalised geometric mean ``reference^(1 - rate) student^rate``.  If both
    sides share one head, the states are averaged.  Otherwise the states and the heads' weights are
    concatenated, which copies both weights once per call.

    Args:
        reference_hidden: states that enter the reference's head, floating point.
        reference_head: the reference's head.
        student_hidden: the student's states for the same tokens, in the same dtype.
        student_head: the student's head, over the same vocabulary and in the same dtype.
        rate: the student's share in [0, 1]; 0 gives the reference and 1 the student, exactly.

    Returns:
        Hidden states in the given dtype, (..., D) with a shared head or (..., R + D), and their
        head.  Neither requires a gradient.

    Raises:
        ValueError: vocabularies, dtypes or shapes differ, a head has a soft-cap, or ``rate`` is
            out of range.

    Reference:
        https://arxiv.org/abs/2601.20802, trust-region teacher.

    Examples:
        >>> import torch, fused_sd
        >>> reference, reference_head = torch.randn(4, 8), torch.randn(100, 8)
        >>> student, head = torch.randn(4, 16), torch.randn(100, 16)
        >>> sides = reference, reference_head, student, head
        >>> hidden, mixed = fused_sd.trust_region_states(*sides, rate=0.3)
        >>> logits = mixed.logit_scale * hidden @ mixed.weight.T
        >>> wanted = 0.7 * reference @ reference_head.T + 0.3 * student @ head.T
        >>> torch.allclose(logits, wanted, atol=1e-4)
        True
    """
    checks.check_unit_interval("rate", rate)
    reference_side = reference_hidden, as_head(reference_head, "reference_head")
    sides = reference_side, (student_hidden, as_head(student_head, "student_head"))
    _check_sides(*sides)
    if rate in (0, 1):
        hidden, head = sides[int(rate)]
        return hidden.detach(), _detached(head)
    (reference, before), (student, now) = (
        (hidden.detach(), _detached(head)) for hidden, head in sides
    )
    wide = accumulation_dtype(reference.dtype)
    if _is_shared(before, now):
        return torch.lerp(reference.to(wide), student.to(wide), rate).to(reference.dtype), before
    shares = (1 - rate) * before.logit_scale, rate * now.logit_scale
    # Divide both shares by the larger one and multiply the logits by it instead: the states of the
    # larger share stay as they are, and those of the other side are rounded once.
    scale = max(shares)
    parts = [(h.to(wide) * (c / scale)).to(h.dtype) for h, c in zip((reference, student), shares)]
    bias = None
    for head, share in zip((before, now), shares):
        if head.bias is not None:
            term = head.bias.to(wide) * (share / scale)
            bias = term if bias is None else bias + term
    weight = torch.cat([before.weight, now.weight], dim=1)
    bias = None if bias is None else bias.to(weight.dtype)
    head = dataclasses.replace(now, weight=weight, bias=bias, logit_scale=scale)
    return torch.cat(parts, -1), head


def _check_sides(reference: StatesAndHead, student: StatesAndHead) -> None:
    """Check that both sides can be mixed: linear heads, one vocabulary, same tokens and dtypes."""
    for name, (hidden, head) in zip(("reference", "student"), (reference, student)):
        tensor_checks.check_hidden(hidden, f"{name}_hidden", head.weight, f"{name}_head")
        if head.softcap is not None:
            fail(
                f"{name}_head",
                "have no soft-cap, which is not linear in the states",
                head.softcap,
                'use an average of weights, Teacher(kind="ema"), for this model',
            )
    (states, before), (student_states, now) = reference, student
    vocabularies = [(head.weight.shape[0], head.num_tokens) for head in (before, now)]
    if vocabularies[0] != vocabularies[1]:
        got = f"{vocabularies[0]} and {vocabularies[1]} rows and tokens"
        rule = "have the vocabulary of student_head"
        fail("reference_head", rule, got, "cut both to the same rows")
    if states.shape[:-1] != student_states.shape[:-1]:
        got = f"{tuple(states.shape)} and {tuple(student_states.shape)}"
        rule = "be (..., R) at the tokens of student_hidden"
        fail("reference_hidden", rule, got, "select the same ones")
    if states.dtype != student_states.dtype or before.weight.dtype != now.weight.dtype:
        got = f"{states.dtype} and {student_states.dtype}"
        rule = "have the dtype of student_hidden, and its head too"
        fail("reference_hidden", rule, got, "cast one side")


def _is_shared(before: LMHead, now: LMHead) -> bool:
    """Whether both heads are the same memory, so that only the states differ."""

    def place(tensor: Tensor | None) -> Any:
        return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())

    return (place(before.weight), place(before.bias), before.logit_scale) == (
        place(now.weight),
        place(now.bias),
        now.logit_scale,
    )


def _detached(head: LMHead) -> LMHead:
    bias = None if head.bias is None else head.bias.detach()
    return dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
