"""This library's memory: what ``walk_operator.py`` and ``workspace.py`` hold, by their own layout.

Forward forms the gradients where the loss is reduced or only the hidden states want one, and keeps
them in fp32; backward scales and rounds them.  Else nothing is kept, and backward walks again.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, C tokens in a chunk,
                W columns of a chunk's logits
"""

from collections.abc import Sequence

from fused_sd import chunking, rows
from fused_sd.chunking import Layout, WalkSize
from fused_sd.planning.workload import Parts, Peer, Workload, exact_gemms, gemm_flops, total
from fused_sd.support import BLOCK, has_short_list

LOGIT_BYTES = 4  # fp32, whatever the operands
ID_BYTES = 8
PER_TOKEN = 48  # weights, values and the other vectors of all tokens, roughly
COMPARING, WRITING = 65, 37  # bytes for each entry of a truncated support: at its terms, at the end

# buffers of some rows that PyTorch's row functions hold at once; the kernels hold none
_BUFFERS = {"forward_kl": 5, "reverse_kl": 5, "jsd": 6, "mixed_kl": 6}
_SOFTMAX_BUFFERS = 2


def layout(work: Workload) -> Layout:
    """The chunk and the group that the walk will choose."""
    return chunking.choose_layout(_size(work), work.active, _budget(work), work.chunk_size)


def walks(work: Workload) -> int:
    """2 where backward walks again, else 1."""
    return 2 if _recomputes(work) else 1


def _recomputes(work: Workload) -> bool:
    reduced = work.reduced and not work.objective.is_per_token
    return work.trained and not reduced


def _size(work: Workload) -> WalkSize:
    has_teacher = work.objective.has_teacher
    return WalkSize(
        vocab=max(work.vocab, work.teacher_vocab if has_teacher else 0),
        sides=1 + has_teacher,
        logit_bytes=LOGIT_BYTES,
        operand_bytes=_operand_bytes(work),
        forming=not _recomputes(work),
    )


def _operand_bytes(work: Workload) -> int:
    """On the CPU 16-bit operands are widened."""
    return work.element if work.kind == "cuda" else LOGIT_BYTES


def _budget(work: Workload) -> int:
    """For the workspaces, as ``chunking.budget_on`` sees it when the walk has its outputs."""
    if work.kind == "cpu":
        return chunking.CPU_BUDGET
    free = (
        work.free_bytes - work.inputs_bytes - total(_accumulators(work)) - total(_compacted(work))
    )
    return chunking.gpu_budget(free)


def _moments(work: Workload) -> Sequence[Parts]:
    held, taken = _accumulators(work), {**_compacted(work), **_widened(work)}
    size = _size(work)
    if not _recomputes(work):
        return [*_walk(work, size, {**held, **taken}), *_rounding(work, held)]
    forward = {"per-token values": PER_TOKEN * work.tokens, **taken}
    return [
        *_walk(work, size, forward),
        *_walk(work, size._replace(forming=True), {**held, **taken}),
        {**held, **(work.gradients if work.element < LOGIT_BYTES else {})},
    ]


def _accumulators(work: Workload) -> Parts:
    """The walk's outputs."""
    weight = LOGIT_BYTES * work.vocab * work.hidden_size if work.trained else 0
    return {
        "fp32 dH": LOGIT_BYTES * work.tokens * work.hidden_size,
        "fp32 dW": weight,
        "per-token values": PER_TOKEN * work.tokens,
    }


def _compacted(work: Workload) -> Parts:
    """Copies of the rows that have a weight, and the gradient of those alone."""
    if work.active == work.tokens:
        return {}
    wide = LOGIT_BYTES * work.active * work.hidden_size
    return {**work.selected, "dH of the selected rows": wide}


def _widened(work: Workload) -> Parts:
    """Heads in fp32 on the CPU."""
    if work.kind == "cuda" or work.element == LOGIT_BYTES:
        return {}
    own = work.vocab * work.hidden_size
    other = work.teacher_vocab * work.teacher_hidden_size
    if work.shared_head or not work.objective.has_teacher:
        other = 0
    return {"fp32 heads": LOGIT_BYTES * (own + other)}


def _walk(work: Workload, size: WalkSize, held: Parts) -> Sequence[Parts]:
    """A walk while it fills a chunk, looks at its rows, and carries a group on."""
    chosen = chunking.choose_layout(size, work.active, _budget(work), work.chunk_size)
    workspaces = {"logits and their gradients": chunking.workspace_bytes(size, chosen)}
    operand, widens = _operand_bytes(work), _operand_bytes(work) > work.element
    both = work.shared_head and size.sides == 2 and not size.in_place
    states = operand * chosen.chunk * work.hidden_size
    stacked = 2 * states if both else 0
    copied = states * (2 if both else 1) if widens else 0
    group = operand * chosen.group * work.hidden_size if widens and size.forming else 0
    return [
        {**held, **workspaces, "hidden states of a chunk": stacked + copied},
        {**held, **workspaces, "row function": _row_bytes(work, size, chosen.chunk)},
        {**held, **workspaces, "hidden states of a group": group},
    ]


def _row_bytes(work: Workload, size: WalkSize, chunk: int) -> int:
    """Temporaries of the row functions: of top-k on any device, of the others on the CPU."""
    objective = work.objective
    visited = min(chunk, max(1, rows.VISITED // size.width)) * size.width * LOGIT_BYTES
    if work.kind == "cuda":
        visited = 0
    if objective.support == "full" and objective.is_divergence:
        return _BUFFERS[objective.divergence] * visited
    softmax = _SOFTMAX_BUFFERS * visited if size.forming else 0
    if not objective.k:
        return softmax
    entries = chunk * objective.k
    if objective.remainder == "renormalize":
        softmax = 0  # nothing outside the entries has a gradient
    return max(
        softmax + WRITING * entries, COMPARING * entries, _top_k_bytes(objective.k, size, chunk)
    )


def _top_k_bytes(k: int, size: WalkSize, chunk: int) -> int:
    """Blocks' maxima, and candidates: their ids, the same within bounds, and their logits."""
    if not has_short_list(k, size.width):
        return 0
    blocks = chunk * -(-size.width // BLOCK) * LOGIT_BYTES
    return blocks + chunk * k * BLOCK * (2 * ID_BYTES + LOGIT_BYTES)


def _rounding(work: Workload, held: Parts) -> Sequence[Parts]:
    """Backward: each gradient is scaled and rounded while the sums are kept."""
    held = dict(held)
    if work.kind == "cpu" and work.element < LOGIT_BYTES:  # multiplies in fp32 first
        held["scaled in fp32"] = max(held["fp32 dW"], held["fp32 dH"])
    return [{**held, **work.gradients}]


def _gemms(work: Workload) -> float:
    again = gemm_flops(work, 1, 1) if _recomputes(work) else 0
    return exact_gemms(work) + again


FUSED_SD = Peer("fused_sd", _moments, _gemms, "its own layout")
