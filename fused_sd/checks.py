"""What a caller must satisfy, and the wording of every error.

A message says the rule, the value and the remedy.  Only shapes, dtypes, devices and Python numbers
are read; values of tensors are read on the CPU alone, where reading does not wait for a device.
"""

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fail(argument: str, rule: str, got: object, remedy: str) -> None:
    """Raise the one kind of error that a caller sees."""
    raise ValueError(f"{argument} must {rule}, got {got}; {remedy}")


def check_number(argument: str, value: object, rule: str, ok: bool, remedy: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not ok:
        fail(argument, rule, repr(value), remedy)


def check_positive(argument: str, value: object, remedy: str = "pass 1.0 to leave it out") -> None:
    ok = isinstance(value, int | float) and 0 < value < math.inf
    check_number(argument, value, "be a finite number above 0", ok, remedy)


def check_finite(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and -math.inf < value < math.inf
    check_number(argument, value, "be a finite number", ok, remedy)


def check_non_negative(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and 0 <= value < math.inf
    check_number(argument, value, "be a finite number of at least 0", ok, remedy)


def check_unit_interval(argument: str, value: object) -> None:
    ok = isinstance(value, int | float) and 0 <= value <= 1
    check_number(argument, value, "lie in [0, 1]", ok, "it is the share of one of two parts")


def check_positive_int(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        fail(argument, "be an integer of at least 1", repr(value), "pass the number of entries")


def check_beta(beta: object) -> None:
    if isinstance(beta, int | float) and beta in (0, 1):
        name = "forward_kl" if beta == 0 else "reverse_kl"
        fail(
            "beta",
            "lie in the open interval (0, 1)",
            repr(beta),
            f'the divergence tends to 0 there: pass divergence="{name}", the KL that is meant',
        )
    ok = isinstance(beta, int | float) and 0 < beta < 1
    check_number(
        "beta", beta, "lie in the open interval (0, 1)", ok, "0.5 weighs both sides equally"
    )


def check_one_of(argument: str, value: object, legal: Collection[str]) -> None:
    if value not in legal:
        fail(
            argument, f"be one of {', '.join(map(repr, legal))}", repr(value), "choose one of them"
        )


def check_divergence_name(divergence: object) -> None:
    if divergence in ("jsd", "generalized_jsd"):
        fail("divergence", "carry its beta", repr(divergence), "pass Jsd(beta)")
    if divergence in ("mixed", "mixed_kl"):
        fail("divergence", "carry its weight", repr(divergence), "pass MixedKl(forward_weight)")
    if divergence not in ("forward_kl", "reverse_kl"):
        fail(
            "divergence",
            'be "forward_kl", "reverse_kl", Jsd(beta) or MixedKl(forward_weight)',
            repr(divergence),
            "forward is KL(teacher||student), reverse is KL(student||teacher)",
        )


def check_tensor(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(argument, "be a tensor", type(value).__name__, "convert it with torch.as_tensor")
    if type(value).__name__ == "DTensor":
        fail(
            argument,
            "be a plain tensor",
            "a DTensor",
            "call the loss inside the forward of the module that owns it, where FSDP2 has gathered "
            "it, or pass full_tensor()",
        )


def check_head(
    weight: object, bias: object, logit_scale: object, softcap: object, valid_vocab: object
) -> None:
    check_tensor("weight", weight)
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        fail(
            "weight",
            "be floating point",
            weight.dtype,
            "a quantised head has no gradient here: dequantise it, or keep lm_head unquantised",
        )
    if weight.dtype not in FLOATING:
        fail("weight", "be float64, float32, bfloat16 or float16", weight.dtype, "convert it")
    if weight.dim() != 2:
        fail("weight", "be (V, D)", tuple(weight.shape), "pass lm_head.weight")
    if weight.numel() == 0:
        fail(
            "weight",
            "have at least one row and column",
            tuple(weight.shape),
            "under ZeRO-3 or FSDP call the loss where the weight is gathered",
        )
    if bias is not None:
        check_tensor("bias", bias)
        assert isinstance(bias, Tensor)
        if bias.shape != weight.shape[:1]:
            fail(
                "bias",
                f"be (V,) with V = {weight.shape[0]} as weight",
                tuple(bias.shape),
                "pass lm_head.bias",
            )
        check_same(bias, "bias", weight, "weight")
    check_positive("logit_scale", logit_scale)
    if softcap is not None:
        check_positive("softcap", softcap, "pass None for no soft-cap")
    if valid_vocab is not None and (
        not isinstance(valid_vocab, int) or not 0 < valid_vocab <= weight.shape[0]
    ):
        fail(
            "valid_vocab",
            f"be an integer from 1 to V = {weight.shape[0]}",
            repr(valid_vocab),
            "pass the tokenizer's size, or None",
        )


def check_same(a: Tensor, name_a: str, b: Tensor, name_b: str) -> None:
    """Same device, and same dtype but for autocast, which settles it."""
    if a.device != b.device:
        fail(
            name_a, f"be on {b.device} as {name_b}", a.device, f"move it with .to({name_b}.device)"
        )
    if a.dtype != b.dtype and not torch.is_autocast_enabled(a.device.type):
        fail(
            name_a,
            f"be {b.dtype} as {name_b}",
            a.dtype,
            "cast one of them, or call the loss under torch.autocast",
        )


def check_hidden(hidden: object, name: str, weight: Tensor, head_name: str) -> None:
    """Hidden states that fit a head's weight."""
    check_tensor(name, hidden)
    assert isinstance(hidden, Tensor)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        fail(
            name,
            f"be (..., D) with D = {weight.shape[1]} as {head_name} {tuple(weight.shape)}",
            tuple(hidden.shape),
            "pass the states that enter lm_head, not logits",
        )
    if hidden.dtype not in FLOATING:
        fail(name, "be float64, float32, bfloat16 or float16", hidden.dtype, "convert it")
    check_same(hidden, name, weight, head_name)


def check_teacher(name: str, tensor: Tensor | None, student: Tensor | None = None) -> None:
    """The teacher is a constant; a tensor that it shares with the student may be live."""
    if tensor is None or tensor is student:
        return
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(
            name,
            "not require a gradient: the teacher is a constant of the loss",
            "requires_grad=True",
            f"run the teacher under torch.no_grad(), or pass {name}.detach()",
        )


def check_leading(argument: str, tensor: object, shape: Sequence[int], owner: str) -> None:
    """One value for each token."""
    check_tensor(argument, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.shape != torch.Size(shape):
        fail(
            argument,
            f"be {tuple(shape)}, one value for each token of {owner}",
            tuple(tensor.shape),
            "select the same positions on both",
        )


def check_per_token(
    argument: str, tensor: Tensor | None, shape: Sequence[int], device: torch.device, owner: str
) -> None:
    """A real number for each token, a constant of the loss."""
    if tensor is None:
        return
    check_leading(argument, tensor, shape, owner)
    if tensor.is_complex():
        fail(argument, "be real", tensor.dtype, "pass floats")
    if tensor.device != device:
        fail(argument, f"be on {device} as {owner}", tensor.device, f"move it to {device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        fail(
            argument,
            "not require a gradient: it is a constant of the loss",
            "requires_grad=True",
            f"pass {argument}.detach()",
        )


def check_ids(
    argument: str,
    ids: object,
    shape: Sequence[int],
    device: torch.device,
    vocab: int,
    weights: Tensor | None,
    owner: str,
) -> None:
    """A token id for each token; on the CPU also that those with a weight are in the vocabulary."""
    check_leading(argument, ids, shape, owner)
    assert isinstance(ids, Tensor)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        fail(argument, "be integer token ids", ids.dtype, "pass int64 ids")
    if ids.device != device:
        fail(argument, f"be on {device} as {owner}", ids.device, f"move it to {device}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (ids < 0) | (ids >= vocab)
        if weights is not None:
            outside &= weights != 0
        if outside.any():
            fail(
                argument,
                f"lie in [0, {vocab}) wherever the token has a weight",
                int(ids[outside][0]),
                "give positions that carry no token the weight 0",
            )


def check_entry_ids(ids: object, shape: Sequence[int], device: torch.device, vocab: int) -> None:
    """Sets of token ids: (..., K) int64, negative ids being padding."""
    check_tensor("token ids", ids)
    assert isinstance(ids, Tensor)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        fail("token ids", "be integers", ids.dtype, "pass int64 ids")
    if ids.dim() != len(shape) + 1 or ids.shape[:-1] != torch.Size(shape) or ids.shape[-1] < 1:
        fail(
            "token ids",
            f"be (..., K) with leading shape {tuple(shape)} and K >= 1",
            tuple(ids.shape),
            "give one set of ids for each token",
        )
    if ids.device != device:
        fail("token ids", f"be on {device}", ids.device, f"move them to {device}")
    on_cpu = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and ids.numel() and int(ids.max()) >= vocab:
        fail(
            "token ids", f"lie below V = {vocab}", int(ids.max()), "mark padding with a negative id"
        )


def check_teacher_entries(ids: Tensor, log_probs: object) -> None:
    """A teacher's log-probabilities of given ids."""
    check_tensor("teacher_log_probs", log_probs)
    assert isinstance(log_probs, Tensor)
    if log_probs.shape != ids.shape:
        fail(
            "teacher_log_probs",
            f"be {tuple(ids.shape)} as teacher_token_ids",
            tuple(log_probs.shape),
            "give one log-probability for each id",
        )
    if log_probs.dtype not in FLOATING:
        fail("teacher_log_probs", "be floating point", log_probs.dtype, "pass natural logarithms")
    check_teacher("teacher_log_probs", log_probs)
    if log_probs.device.type == "cpu" and not torch.compiler.is_compiling() and log_probs.numel():
        largest = float(log_probs.detach().nan_to_num(-math.inf).max())
        if largest > 1e-3 and math.isfinite(largest):
            fail(
                "teacher_log_probs",
                "be natural logarithms of probabilities, at most 0",
                largest,
                "take the log_softmax of logits, the log of probabilities",
            )


def check_vocabularies(
    student: int,
    teacher: int,
    infinite_if_student_smaller: bool,
    infinite_if_teacher_smaller: bool,
) -> None:
    """A KL is infinite where its first argument has mass on ids that the other side lacks."""
    if student < teacher and infinite_if_student_smaller:
        fail(
            "teacher_head",
            f"have no tokens beyond the student's {student} for a KL from the teacher",
            teacher,
            f"the KL is infinite on them: pass LMHead(weight, valid_vocab={student}) there",
        )
    if teacher < student and infinite_if_teacher_smaller:
        fail(
            "student_head",
            f"have no tokens beyond the teacher's {teacher} for a KL from the student",
            student,
            f"the KL is infinite on them: pass LMHead(weight, valid_vocab={teacher}) there",
        )


def check_support_size(name: str, k: int, vocab: int) -> None:
    if k > vocab:
        fail(
            f"{name}.k",
            f"be at most the vocabulary's {vocab}",
            k,
            "use FULL_VOCABULARY to compare every entry",
        )


def check_ratio_clip(ratio_clip: object) -> None:
    ok = (
        isinstance(ratio_clip, Sequence)
        and len(ratio_clip) == 2
        and all(isinstance(c, int | float) and c >= 0 for c in ratio_clip)
        and ratio_clip[0] <= 1
    )
    if not ok:
        fail(
            "ratio_clip",
            "be (low, high) with 0 <= low <= 1 and high >= 0",
            repr(ratio_clip),
            "the ratio is clipped to [1 - low, 1 + high]; pass None for no clip",
        )


def check_backend_choice(backend: object) -> None:
    check_one_of("backend", backend, ("auto", "triton", "torch"))


def check_reduction(reduction: object) -> None:
    check_one_of("reduction", reduction, ("sum", "mean", "none"))


def check_metrics(metrics: object, legal: Collection[str]) -> None:
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        fail("metrics", "be a sequence of names", repr(metrics), f"pass ({metrics!r},)")
    assert isinstance(metrics, Iterable)
    for name in metrics:
        check_one_of("metrics", name, legal)


def check_distinct(argument: str, ids: Tensor, weights: Tensor | None) -> None:
    """Ids (..., K) that do not repeat and are not padding; read on the CPU only."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ordered = ids.sort(-1).values
    wrong = (ordered[..., 1:] == ordered[..., :-1]).any(-1) | (ids < 0).any(-1)
    if weights is not None:
        wrong = wrong & (weights != 0)
    if wrong.any():
        fail(
            argument,
            "be distinct ids of the vocabulary for each token",
            ids[wrong][0].tolist(),
            "leave out the repeated and the negative ones",
        )


def check_evidence(has_evidence: bool, has_states: bool, has_log_probs: bool) -> None:
    """Evidence has one teacher, and a teacher has a use."""
    if has_states and has_log_probs:
        fail(
            "teacher",
            "be given once",
            "teacher and teacher_log_probs",
            "pass its states and head, or its log-probabilities",
        )
    if has_evidence and not (has_states or has_log_probs):
        fail(
            "evidence",
            "come with a teacher",
            "none",
            "pass teacher=(hidden, head) or teacher_log_probs",
        )
    if not has_evidence and (has_states or has_log_probs):
        fail("teacher", "come with evidence", "none", "pass evidence=Evidence(...)")


def check_kl(coefficient: object, estimator: object, has_reference: bool) -> None:
    check_non_negative("kl_coefficient", coefficient, "pass 0 for no KL")
    if estimator in ("kl", "k1_direct", "direct"):
        fail(
            "kl_estimator",
            "not differentiate log_prob - reference directly: its gradient does not depend on the "
            "reference",
            repr(estimator),
            "pass 'k1' (sg(d) log_prob), 'k2' or 'k3'",
        )
    check_one_of("kl_estimator", estimator, ("k1", "k2", "k3"))
    if bool(coefficient) != has_reference:
        fail(
            "reference_log_probs",
            "come together with kl_coefficient > 0",
            f"kl_coefficient={coefficient!r}, reference {'given' if has_reference else 'missing'}",
            "pass both or neither",
        )
