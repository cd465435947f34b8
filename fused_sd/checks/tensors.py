"""Checks of a caller's tensors: shapes, dtypes, devices, and which of them may have a gradient.

Values are read on the CPU alone, where reading does not wait for a device.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fused_sd import checks

LARGEST_LOG_PROB = 1e-3  # of a server's; what is above 0 by more than its rounding is an error
LEAVE_OUT = "give a token that does not count the value 0"
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REAL = (*FLOATING, *INTEGER, torch.bool)
DTYPE_RULES = {
    FLOATING: "be float64, float32, bfloat16 or float16",
    INTEGER: "be integers",
    REAL: "be real numbers",
    (torch.bool,): "be booleans",
}


def check_tensor(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        got, remedy = type(value).__name__, "convert it with torch.as_tensor"
        if isinstance(value, nn.Module):
            got, remedy = f"the module {got}", "pass LMHead.of(model), or its weight"
        checks.fail(argument, "be a tensor", got, remedy)
    if type(value).__name__ == "DTensor":
        checks.fail(
            argument,
            "be a plain tensor",
            "a DTensor",
            "call the loss inside the forward of the module that owns it, where FSDP2 has gathered "
            "it, or pass full_tensor(); of a head that ranks share, to_local() and process_group",
        )
    if value.is_nested or value.is_quantized or value.layout is not torch.strided:
        got = "nested" if value.is_nested else f"{value.layout} {value.dtype}"
        remedy = "dequantise it" if value.is_quantized else "pass a padded or dense one"
        checks.fail(argument, "be a dense tensor", f"a {got} one", remedy)


def check_dtype(argument: str, tensor: Tensor, legal: tuple[torch.dtype, ...], remedy: str) -> None:
    """Refuse a dtype that is none of a row of ``DTYPE_RULES``."""
    if tensor.dtype not in legal:
        checks.fail(argument, DTYPE_RULES[legal], tensor.dtype, remedy)


def check_integers(argument: str, tensor: Tensor) -> None:
    """Refuse what cannot be token ids or places."""
    if tensor.dtype not in INTEGER:
        checks.fail(argument, "be integer token ids", tensor.dtype, "pass int64 ids")


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be checked: reading them waits for no device and is not traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_head(weight: object, bias: object = None, argument: str = "weight") -> None:
    """Check a head's weight (V, D), under the name that the caller gave it, and bias (V,)."""
    check_tensor(argument, weight)
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        checks.fail(
            argument,
            "be floating point",
            weight.dtype,
            "a quantised head has no gradient here: dequantise it, or keep lm_head unquantised",
        )
    check_dtype(argument, weight, FLOATING, "convert it")
    if weight.dim() != 2:
        checks.fail(argument, "be (V, D)", tuple(weight.shape), "pass lm_head.weight")
    if weight.numel() == 0:
        checks.fail(
            argument,
            "have at least one row and column",
            tuple(weight.shape),
            "under ZeRO-3 or FSDP call the loss where the weight is gathered",
        )
    if bias is not None:
        check_tensor("bias", bias)
        assert isinstance(bias, Tensor)
        if bias.shape != weight.shape[:1]:
            checks.fail(
                "bias",
                f"be (V,) with V = {weight.shape[0]} as weight",
                tuple(bias.shape),
                "pass lm_head.bias",
            )
        check_same(bias, "bias", weight, "weight")


def check_shards(shard_sizes: object) -> None:
    """Check the numbers of rows of the ranks that share a head; a rank may hold none."""
    if shard_sizes is None:
        return
    remedy = "list the rows that each rank holds, in rank order"
    if not isinstance(shard_sizes, tuple | list) or not shard_sizes:
        checks.fail("shard_sizes", "be a tuple of integers", repr(shard_sizes), remedy)
    for size in shard_sizes:
        checks.check_whole("shard_sizes", size, remedy)


def check_shaping(vocab: int, logit_scale: object, softcap: object, valid_vocab: object) -> None:
    """Check what a head does to its logits."""
    checks.check_positive("logit_scale", logit_scale)
    if softcap is not None:
        checks.check_positive("softcap", softcap, "pass None for no soft-cap")
    if valid_vocab is not None and (type(valid_vocab) is not int or not 0 < valid_vocab <= vocab):
        checks.fail(
            "valid_vocab",
            f"be an integer from 1 to V = {vocab}",
            repr(valid_vocab),
            "pass the tokenizer's size, or None; with a rank's rows of the head shard_sizes too",
        )


def check_device(argument: str, tensor: Tensor, device: torch.device, owner: str) -> None:
    """Check that a tensor is on the device of what it belongs to."""
    if tensor.device != device:
        checks.fail(argument, f"be on {device} as {owner}", tensor.device, f"move it to {device}")


def check_same(a: Tensor, name_a: str, b: Tensor, name_b: str) -> None:
    """Check that two tensors share a device and, outside autocast, a dtype."""
    if a.device != b.device:
        checks.fail(
            name_a, f"be on {b.device} as {name_b}", a.device, f"move it with .to({name_b}.device)"
        )
    if a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type):
        checks.fail(
            name_a,
            f"be {b.dtype} as {name_b}",
            a.dtype,
            "cast one of them, or call the loss under torch.autocast",
        )


def check_hidden(hidden: object, name: str, weight: Tensor, head_name: str) -> None:
    """Check that hidden states fit a head's weight."""
    check_tensor(name, hidden)
    assert isinstance(hidden, Tensor)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        remedy = "pass the states that enter lm_head"
        if hidden.dim() and hidden.shape[-1] == weight.shape[0]:  # a vocabulary is the larger side
            is_turned = weight.shape[0] < weight.shape[1]
            remedy += (
                f", and {head_name} as (V, D), not its transpose" if is_turned else ", not logits"
            )
        checks.fail(
            name,
            f"be (..., D) with D = {weight.shape[1]} as {head_name} {tuple(weight.shape)}",
            tuple(hidden.shape),
            remedy,
        )
    check_dtype(name, hidden, FLOATING, "convert it")
    check_same(hidden, name, weight, head_name)


def check_teacher(name: str, tensor: Tensor | None, student: Tensor | None = None) -> None:
    """Check that the teacher needs no gradient; a tensor shared with the student may need one."""
    if tensor is None or tensor is student:
        return
    if tensor.requires_grad and torch.is_grad_enabled():
        checks.fail(
            name,
            "not require a gradient: the teacher is a constant of the loss",
            "requires_grad=True",
            "run the teacher under torch.no_grad(), or detach its tensors",
        )


def check_reverse_mode(tensors: Iterable[Tensor | None]) -> None:
    """Refuse what is not plain reverse-mode differentiation: it would find no derivative, or 0.

    Args:
        tensors: all that a loss reads.
    """
    got = None
    if torch._C._are_functorch_transforms_active():
        got = "a transform of torch.func (grad, vmap, jvp, jacrev, ...)"
    elif any(t is not None and unpack_dual(t).tangent is not None for t in tensors):
        got = "a tensor with a forward-mode tangent"
    if got is not None:
        checks.fail(
            "a loss of fused_sd",
            "be differentiated by backward or torch.autograd.grad",
            got,
            "use one of them, or the plain PyTorch loss",
        )


def check_leading(argument: str, tensor: object, shape: Sequence[int], owner: str) -> None:
    """Check that a tensor has one value for each token."""
    check_tensor(argument, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.shape != torch.Size(shape):
        checks.fail(
            argument,
            f"be {tuple(shape)}, one value for each token of {owner}",
            tuple(tensor.shape),
            "select the same positions on both",
        )


def check_per_token(
    argument: str, tensor: Tensor | None, shape: Sequence[int], device: torch.device, owner: str
) -> None:
    """Check a tensor of one real number for each token that is a constant of the loss."""
    if tensor is None:
        return
    check_leading(argument, tensor, shape, owner)
    is_log = argument.endswith("log_probs")
    remedy = "pass natural logarithms" if is_log else "pass floats"
    check_dtype(argument, tensor, FLOATING if is_log else REAL, remedy)
    check_device(argument, tensor, device, owner)
    if tensor.requires_grad and torch.is_grad_enabled():
        checks.fail(
            argument,
            "not require a gradient: it is a constant of the loss",
            "requires_grad=True",
            f"pass {argument}.detach()",
        )


def broadcast(argument: str, tensor: Tensor, shape: Sequence[int], owner: str) -> Tensor:
    """Return a tensor of one number for each token, or for several tokens, as one for each."""
    try:
        return tensor.broadcast_to(tuple(shape))
    except RuntimeError:
        rule = f"broadcast to {tuple(shape)}, the tokens of {owner}"
        checks.fail(argument, rule, tuple(tensor.shape), "give one number a token or a sequence")


def check_hints(
    argument: str, tensor: object, legal: tuple[torch.dtype, ...], advantages: Tensor
) -> None:
    """Check K values for each token of the advantages, of a legal dtype."""
    check_tensor(argument, tensor)
    assert isinstance(tensor, Tensor)
    check_dtype(argument, tensor, legal, "convert it")
    shape = advantages.shape
    if tensor.dim() != len(shape) + 1 or tensor.shape[:-1] != shape:
        rule, got = f"be (..., K) with the tokens {tuple(shape)}", tuple(tensor.shape)
        checks.fail(argument, rule, got, "give K values for each token of advantages")
    check_device(argument, tensor, advantages.device, "advantages")


def check_token_weights(
    weights: Tensor | None, shape: Sequence[int], device: torch.device, owner: str, reduction: str
) -> None:
    """Check the weight of each token; on the CPU also the values."""
    check_per_token("token_weights", weights, shape, device, owner)
    if weights is None or not is_readable(weights):
        return
    _check_values("token_weights", weights, weights.isfinite(), "be finite", LEAVE_OUT)
    if reduction == "mean":
        rule = 'be at least 0 with reduction="mean", which divides by their sum'
        _check_values("token_weights", weights, weights >= 0, rule, 'pass reduction="sum"')


def check_token_values(name: str, values: Tensor, weights: Tensor | None) -> None:
    """On the CPU, refuse values of a token that counts which are not numbers of their kind.

    Args:
        name: of the argument; one that ends in "log_probs" holds natural logarithms, "mix" shares.
        values: (...) one for each token.
        weights: (...) of the tokens; None: all count.
    """
    if not is_readable(values):
        return
    values = values.detach()
    is_legal, rule = values.isfinite(), "be finite wherever the token has a weight"
    remedy = "give positions that carry no token the weight 0"
    if name.endswith("log_probs"):
        is_legal = values <= LARGEST_LOG_PROB  # not of NaN
        rule = "be natural logarithms of probabilities, at most 0"
        remedy = "take the log of probabilities, the log_softmax of logits"
    elif name == "mix":
        is_legal, rule = (values >= 0) & (values <= 1), "lie in [0, 1] wherever the token counts"
    if weights is not None:
        is_legal |= weights == 0
    _check_values(name, values, is_legal, rule, remedy)


def check_mask(argument: str, mask: object) -> None:
    """Check a mask; on the CPU also that its values are finite and at least 0."""
    check_tensor(argument, mask)
    assert isinstance(mask, Tensor)
    check_dtype(argument, mask, REAL, "pass booleans, integers or floats")
    if is_readable(mask):
        is_legal = mask.isfinite() & (mask >= 0)
        _check_values(argument, mask, is_legal, "be finite and at least 0", LEAVE_OUT)


def _check_values(argument: str, values: Tensor, is_legal: Tensor, rule: str, remedy: str) -> None:
    if not is_legal.all():
        checks.fail(argument, rule, values[~is_legal][0].item(), remedy)


def check_ids(
    argument: str,
    ids: object,
    shape: Sequence[int],
    device: torch.device,
    vocab: int,
    weights: Tensor | None,
    owner: str,
) -> None:
    """Check token ids; on the CPU also that ids of tokens with a weight are in the vocabulary."""
    check_leading(argument, ids, shape, owner)
    assert isinstance(ids, Tensor)
    check_integers(argument, ids)
    check_device(argument, ids, device, owner)
    if is_readable(ids):
        outside = (ids < 0) | (ids >= vocab)
        if weights is not None:
            outside &= weights != 0
        if outside.any():
            checks.fail(
                argument,
                f"lie in [0, {vocab}) wherever the token has a weight",
                int(ids[outside][0]),
                "give positions that carry no token the weight 0",
            )


def check_entry_ids(
    argument: str,
    ids: object,
    shape: Sequence[int],
    device: torch.device,
    vocab: int,
    owner: str,
    remedy: str = "mark padding with a negative id",
) -> None:
    """Check sets of token ids (..., K), of which negative ids are padding."""
    check_tensor(argument, ids)
    assert isinstance(ids, Tensor)
    check_integers(argument, ids)
    if ids.dim() != len(shape) + 1 or ids.shape[:-1] != torch.Size(shape) or ids.shape[-1] < 1:
        checks.fail(
            argument,
            f"be (..., K) with leading shape {tuple(shape)} as {owner} and K >= 1",
            tuple(ids.shape),
            "give one set of ids for each token",
        )
    check_device(argument, ids, device, owner)
    if is_readable(ids) and ids.numel() and int(ids.max()) >= vocab:
        checks.fail(argument, f"lie below V = {vocab}", int(ids.max()), remedy)


def check_teacher_entries(ids: Tensor, log_probs: object, weights: Tensor | None) -> None:
    """Check a teacher's log-probabilities (..., K) of given ids; on the CPU also their values.

    Values are not checked of padding (a negative id) and of tokens of weight 0.
    """
    check_tensor("teacher_log_probs", log_probs)
    assert isinstance(log_probs, Tensor)
    if log_probs.shape != ids.shape:
        checks.fail(
            "teacher_log_probs",
            f"be {tuple(ids.shape)} as teacher_token_ids",
            tuple(log_probs.shape),
            "give one log-probability for each id",
        )
    check_dtype("teacher_log_probs", log_probs, FLOATING, "pass natural logarithms")
    check_device("teacher_log_probs", log_probs, ids.device, "teacher_token_ids")
    check_teacher("teacher_log_probs", log_probs)
    if is_readable(log_probs):
        wrong = ~(log_probs.detach() <= LARGEST_LOG_PROB) & (ids >= 0)  # NaN is wrong, too
        if weights is not None:
            wrong &= (weights != 0)[..., None]
        if wrong.any():
            checks.fail(
                "teacher_log_probs",
                "be natural logarithms of probabilities, at most 0",
                float(log_probs.detach()[wrong][0]),
                "take the log_softmax of logits, the log of probabilities; -inf marks padding",
            )


def check_distinct(argument: str, ids: Tensor, weights: Tensor | None) -> None:
    """Check that ids (..., K) do not repeat and are not padding; read on the CPU only."""
    if not is_readable(ids):
        return
    ordered = ids.sort(-1).values
    wrong = (ordered[..., 1:] == ordered[..., :-1]).any(-1) | (ids < 0).any(-1)
    if weights is not None:
        wrong = wrong & (weights != 0)
    if wrong.any():
        checks.fail(
            argument,
            "be distinct ids of the vocabulary for each token",
            ids[wrong][0].tolist(),
            "leave out the repeated and the negative ones",
        )
