"""Peers of one log-probability a token, or of a server's few: verl, cut-cross-entropy, QuACK.

From reading their sources; none but verl's divergence runs on a CPU.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary
"""

from collections.abc import Sequence

from fused_sd.planning.workload import Parts, Peer, Workload, gemm_flops

VERL_FORWARD_COLUMNS, VERL_BACKWARD_COLUMNS = 1024, 9504
QUACK_CHUNK = 4096
QUACK_TILES = (192, 256, 128, 64)


def _verl(work: Workload) -> Sequence[Parts]:
    """``utils/kernel/kernels.py`` at version 0.9.1.

    Forward keeps three statistics of every 1024 columns; backward holds the gradient of 9504
    columns of logits for all tokens at once, adds dH up in the operands' dtype, and forms dW for a
    frozen head too.
    """
    if work.objective.is_divergence or work.kind == "cpu" or work.hidden_size % 128:
        return []
    columns = -(-work.vocab // VERL_FORWARD_COLUMNS)
    dh = work.element * work.active * work.hidden_size
    return [
        {**work.selected, "statistics": 4 * work.active * (3 * columns + 6)},
        {
            **work.selected,
            "gradient of the logits": work.element * work.active * VERL_BACKWARD_COLUMNS,
            "dH": dh,
            "dH of some columns": dh,
            "dW": work.weight_bytes,
        },
        {"dH": dh + work.hidden_bytes, "dW": work.weight_bytes},
    ]


def _verl_megatron(work: Workload) -> Sequence[Parts]:
    """``trainer/distillation/megatron/losses.py`` at version 0.9.1, on every token of a shard.

    Forward holds shifted logits, their exponentials and the log-probabilities beside the logits;
    backward the kept probabilities and their gradient, and a rounded copy.
    """
    objective = work.objective
    given = objective.support == "ids" and not objective.has_teacher
    if not given or objective.divergence != "forward_kl":
        return []
    logits = work.tokens * work.vocab
    held = {"logits": work.element * logits}
    narrow = work.element * logits if work.element < 4 else 0
    backward = {"probabilities": 4 * logits, "gradient of the logits": 4 * logits + narrow}
    return [
        {**held, "log-probabilities and two more": 12 * logits},
        {**held, **backward},
        {"gradient of the logits": work.element * logits, **work.gradients, **work.gemm},
    ]


def _cce(work: Workload) -> Sequence[Parts]:
    """``cce_backward.py`` at version 25.1.1: nothing but the gradients, locks and an order."""
    if work.objective.name not in ("cross_entropy", "token_log_probs"):
        return []
    if work.kind == "cpu" or work.element != 2:
        return []
    return [
        {
            **work.gradients,
            "statistics": 16 * work.active,
            "order of the vocabulary": (4 + 8 + 4) * work.vocab,
        }
    ]


def _quack(work: Workload) -> Sequence[Parts]:
    """``linear_cross_entropy.py`` at version 0.6.5.

    Where V is divisible by 128 a chunk's logits are 16-bit exponentials with the offsets of their
    tiles, and a scaled copy of its hidden states; else 16-bit logits, of which the last chunk's
    are kept until backward adds them to dW.  dW is summed in fp32 and rounded in backward.
    """
    objective, vocab = work.objective, work.vocab
    if objective.name != "cross_entropy" or work.kind == "cpu" or work.element != 2:
        return []
    chunk = min(QUACK_CHUNK, work.tokens)
    logits = work.element * chunk * vocab
    wide = {"fp32 dW": 4 * vocab * work.hidden_size if work.trained else 0}
    if vocab % 128:
        several = work.tokens > QUACK_CHUNK
        held = {"logits": logits, "dH": work.hidden_bytes, **(wide if several else {})}
        return [held, {**held, **work.gradients}]
    tiles = vocab // next(size for size in QUACK_TILES if vocab % size == 0)
    states = work.element * chunk * work.hidden_size if work.trained else 0
    return [
        {
            **wide,
            "dH": work.hidden_bytes,
            "exponentials": logits,
            "offsets and sums": 8 * chunk * tiles + work.element * chunk * vocab // 64,
            "scaled hidden states": states,
        },
        {**wide, **work.gradients},
    ]


def _recomputing_gemms(work: Workload) -> float:
    return gemm_flops(work, 4, 1)


def _megatron_gemms(work: Workload) -> float:
    return gemm_flops(work, 2 + work.trained, 0, work.tokens)


def _cce_gemms(work: Workload) -> float:
    """If it skipped nothing; it skips the gradient of unlikely tokens."""
    return gemm_flops(work, 3 + work.trained, 0)


def _quack_gemms(work: Workload) -> float:
    return gemm_flops(work, 2 + work.trained, 0, work.tokens)


VERL = Peer("verl triton", _verl, _recomputing_gemms, "verl 0.9.1, read", shards=True)
VERL_MEGATRON = Peer(
    "verl Megatron top-k",
    _verl_megatron,
    _megatron_gemms,
    "verl 0.9.1, read and counted",
    shards=True,
)
CCE = Peer("cut-cross-entropy", _cce, _cce_gemms, "cut-cross-entropy 25.1.1, read")
QUACK = Peer("quack linear_cross_entropy", _quack, _quack_gemms, "QuACK 0.6.5, read")
