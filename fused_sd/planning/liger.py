"""Liger-Kernel's divergences: chunks of tokens, gradients formed in forward, dW in 16 bits.

From reading ``ops/fused_linear_jsd.py`` and ``chunked_loss/fused_linear_distillation.py`` at
version 0.8.5; the chunked loss was counted on the CPU too.  Both compute masked tokens.

Dimension key:  N tokens, D hidden size, V vocabulary, C tokens in a chunk
"""

from collections.abc import Sequence

from fused_sd.planning.workload import Parts, Peer, Workload, gemm_flops

CHUNK = 1024  # of the chunked loss, which divides the tokens into N // 1024 chunks
# matrices (C, V) in fp32 that one chunk of fused_linear_jsd leaves to the next, by their names in
# its loop, and those of the expression that makes the gradient
LEFT, MAKING = 6, 2
# matrices (C, V) of the chunked loss in the operands' dtype: at the divergence, and when the second
# dW is made (two of them are returned with the loss)
COUNTED = {"forward_kl": (7, 5), "reverse_kl": (8, 7), "jsd": (17, 11)}


def _is_plain(work: Workload) -> bool:
    objective = work.objective
    return (
        objective.divergence in COUNTED
        and objective.support == "full"
        and not objective.entry_clip
        and work.teacher_hidden_size == work.hidden_size
        and work.teacher_vocab == work.vocab
    )


def _fused_jsd(work: Workload) -> Sequence[Parts]:
    """Before Blackwell its chunks are N / ceil(V / D) tokens, rounded up to a power of 2."""
    if not _is_plain(work) or work.kind == "cpu":
        return []
    parts = -(-work.vocab // work.hidden_size)
    chunk = min(1 << (-(-work.tokens // parts) - 1).bit_length(), work.tokens)
    matrix = 4 * chunk * work.vocab
    return [
        {
            **work.gradients,
            "logits and their losses": LEFT * matrix,
            "gradient of the logits": MAKING * matrix,
        }
    ]


def _chunked_jsd(work: Workload) -> Sequence[Parts]:
    if not _is_plain(work):
        return []
    terms, at_head = COUNTED[work.objective.divergence]
    chunk = -(-work.tokens // max(1, work.tokens // CHUNK))
    matrix = work.element * chunk * work.vocab
    dw = {"dW": work.weight_bytes}  # of a frozen head too
    widened = 4 * work.vocab * work.hidden_size
    gemm = {"dW in the GEMM": widened if work.kind == "cpu" and work.element == 2 else 0}
    dh = {"dH": work.hidden_bytes}
    return [
        {**dw, **dh, "logits and terms": terms * matrix},
        {**dw, **dh, **gemm, "logits and terms": at_head * matrix, "dW of a chunk": dw["dW"]},
        {**dw, "dH": 2 * work.hidden_bytes},
    ]


def _fused_gemms(work: Workload) -> float:
    return gemm_flops(work, 2 + work.trained, 1, work.tokens)


def _chunked_gemms(work: Workload) -> float:
    return gemm_flops(work, 3, 1, work.tokens)


LIGER_FUSED_JSD = Peer("Liger fused_linear_jsd", _fused_jsd, _fused_gemms, "Liger 0.8.5, read")
LIGER_CHUNKED_JSD = Peer(
    "Liger chunked JSD", _chunked_jsd, _chunked_gemms, "Liger 0.8.5, read and counted"
)
