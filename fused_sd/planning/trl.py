"""TRL's chunked functions: buffers of a fixed size, and fp32 gradients beside their copies.

From reading ``trl/kernels/chunked_divergence.py`` and ``chunked_logprob.py`` at version 1.16.0.
Both walk tiles of 4096 tokens x 32768 vocabulary entries, whatever the vocabulary, project every
tile anew in backward, sum dH and dW in fp32 and round them at the end, while the tiles are still
held.  Without Triton the row functions are plain PyTorch and hold temporaries of a whole tile.

Dimension key:  A tokens with a weight, D hidden size, V vocabulary
"""

from collections.abc import Sequence

from fused_sd.planning.workload import Parts, Peer, Workload, gemm_flops

TOKEN_CHUNK, VOCAB_CHUNK = 4096, 32768
# of PyTorch's row functions, in fp32 tiles: counted on the CPU
TORCH_DIVERGENCE = {"forward_kl": 9.0, "reverse_kl": 9.0, "jsd": 10.0}
TORCH_LOG_PROBS = 7.25
DIVERGENCE_STATISTICS, LOG_PROB_STATISTICS = 18, 12  # fp32 numbers kept for a token


def _divergence(work: Workload) -> Sequence[Parts]:
    objective = work.objective
    if objective.support != "full" or objective.divergence not in TORCH_DIVERGENCE:
        return []
    if objective.entry_clip:
        return []
    return _tiles(
        work,
        {"tiles of logits": 2 * 4 * _rows(work) * VOCAB_CHUNK},
        TORCH_DIVERGENCE[objective.divergence],
        DIVERGENCE_STATISTICS,
        rounded=True,
    )


def _log_probs(work: Workload) -> Sequence[Parts]:
    if work.objective.is_divergence:
        return []
    tile = {"tiles of logits": work.element * _rows(work) * VOCAB_CHUNK}
    return _tiles(work, tile, TORCH_LOG_PROBS, LOG_PROB_STATISTICS, rounded=False)


def _rows(work: Workload) -> int:
    return min(work.active, TOKEN_CHUNK)


def _tiles(
    work: Workload, buffers: Parts, torch_tiles: float, statistics: int, *, rounded: bool
) -> Sequence[Parts]:
    """Backward's moments: a tile's rows, a tile's GEMMs, and the rounding at the end.

    Args:
        torch_tiles: fp32 tiles that the row function holds on the CPU.
        rounded: whether a tile's gradient is copied to the operands' dtype.
    """
    rows, width = _rows(work), min(work.vocab, VOCAB_CHUNK)
    wide = {
        "fp32 dH": 4 * work.active * work.hidden_size,
        "fp32 dW": 4 * work.vocab * work.hidden_size if work.trained else 0,
    }
    held = {
        **work.selected,
        **buffers,
        **wide,
        "statistics": 4 * statistics * work.active,
    }
    copy = work.element * rows if rounded and work.element < 4 else 0
    last = (work.vocab - 1) % VOCAB_CHUNK + 1  # columns of the last tile, which is still held
    narrow = {name.removeprefix("fp32 "): size * work.element // 4 for name, size in wide.items()}
    end = {**held, "tile in 16 bits": copy * last} | (narrow if work.element < 4 else {})
    if work.kind == "cuda":
        return [{**held, "tile in 16 bits": copy * width}, end]
    fp32 = 4 * (rows + work.hidden_size) * width if work.element < 4 else 0
    return [
        {**held, "row function": int(4 * torch_tiles * rows * width)},
        {**held, "tile in 16 bits": copy * width, "fp32 operands of a GEMM": fp32},
        end,
    ]


def _divergence_gemms(work: Workload) -> float:
    walks = 3 if work.objective.divergence == "jsd" else 2  # statistics, the mixture's, backward
    return gemm_flops(work, walks + 1 + work.trained, walks)


def _log_prob_gemms(work: Workload) -> float:
    return gemm_flops(work, 3 + work.trained, 1)


TRL_DIVERGENCE = Peer(
    "TRL chunked divergence", _divergence, _divergence_gemms, "TRL 1.16.0, read and counted"
)
TRL_LOG_PROBS = Peer(
    "TRL chunked log-probs", _log_probs, _log_prob_gemms, "TRL 1.16.0, read and counted"
)
