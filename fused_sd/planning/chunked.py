"""Memory of one chunked run: its workspaces and temporaries, by the engine's own layout.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, C tokens in a chunk,
                K entries of the support, W columns of a chunk's logits
"""

from collections.abc import Sequence
from typing import NamedTuple

from fused_sd.engine import layout as chunking
from fused_sd.engine.layout import Layout, Room, RunSize
from fused_sd.objectives.divergence import DivergenceObjective
from fused_sd.planning.objectives import PlannedObjective
from fused_sd.planning.workload import Parts, Workload, total
from fused_sd.terms.support import SIDES
from fused_sd.torch_kernels import near, sparse
from fused_sd.torch_kernels.row_blocks import rows_in_work
from fused_sd.torch_kernels.selection import BLOCK, has_short_list

WIDE = 4  # bytes of an fp32 number: of a logit in any operands' dtype, and of a sum
ID_BYTES = 8
PER_TOKEN = 48  # bytes of token weights, losses and other vectors over all tokens, roughly
# bytes for each entry of a truncated support: during the dot products, while the terms are
# computed, and while their gradient is written
DOTTING, COMPARING, WRITING = 28, 65, 37

# fp32 matrices as large as a block of rows that a softmax gradient holds at once in PyTorch; the
# kernels hold none
_SOFTMAX_BUFFERS = 2


class ChunkedRun(NamedTuple):
    """One pass over the chunks of some tokens."""

    has_gradient: bool  # whether it computes gradients
    layout: Layout
    tokens: int


def num_entries(objective: PlannedObjective) -> int:
    """Entries that a token's gradient w.r.t. logits has; 0: the whole vocabulary."""
    comparison = objective.comparison
    return 0 if comparison is None else DivergenceObjective(comparison).num_sparse_values


def whole_sides(objective: PlannedObjective) -> tuple[bool, bool]:
    """Whether all logits of the student, and all of the teacher, are computed."""
    if objective.comparison is None:
        return True, objective.has_teacher
    student, teacher = DivergenceObjective(objective.comparison).whole_sides
    return student, teacher and objective.has_teacher


def size_of(work: Workload, has_gradient: bool) -> RunSize:
    """The sizes that decide the workspaces of a run."""
    has_teacher = work.objective.has_teacher
    return RunSize(
        vocab=max(work.vocab, work.teacher_vocab if has_teacher else 0),
        sides=sum(whole_sides(work.objective)),
        logit_bytes=WIDE,
        operand_bytes=operand_bytes(work),
        has_dlogits=has_gradient,
        dweight_bytes=finished(work, 0)["fp32 dW"] if has_gradient else 0,
    )


def layout(work: Workload, size: RunSize, finishing: bool) -> Layout:
    """The chunk and the group that a run will choose.

    Args:
        finishing: whether the run computes gradients that backward only scales: it leaves memory
            for them.
    """
    if not finishing:
        size = size._replace(dweight_bytes=0)
    return chunking.choose_layout(size, work.active, _room(work, finishing), work.chunk_size)


def operand_bytes(work: Workload) -> int:
    """Bytes of an element of the GEMMs' operands: a CPU converts 16-bit operands to fp32."""
    return work.element if work.kind == "cuda" else WIDE


def _room(work: Workload, finishing: bool) -> Room:
    """What the engine's ``layout`` grants the workspaces."""
    if work.kind == "cpu":
        return Room(chunking.CPU_BUDGET, 0)
    if work.tensor_parallel > 1:  # ranks with unequal free memory must choose the same chunk
        return Room(chunking.GPU_BUDGET, 0)
    held = work.inputs_bytes + total(compacted(work))
    if finishing:
        held += total(finished(work, work.tokens))
    return chunking.room_beside(work.free_bytes - held)


def finished(work: Workload, num_tokens: int) -> Parts:
    """Gradients in fp32, as forward keeps them."""
    weight = WIDE * work.vocab * work.hidden_size if work.trained else 0
    return {"fp32 dH": WIDE * num_tokens * work.hidden_size, "fp32 dW": weight}


def widened(work: Workload) -> Parts:
    """fp32 copies of 16-bit heads, which a CPU makes."""
    if work.kind == "cuda" or work.element == WIDE:
        return {}
    own = work.vocab * work.hidden_size
    other = work.teacher_vocab * work.teacher_hidden_size
    if work.shared_head or not work.objective.has_teacher:
        other = 0
    return {"fp32 heads": WIDE * (own + other)}


def compacted(work: Workload) -> Parts:
    """Copies of the hidden states of kept tokens, if some tokens have weight 0."""
    return {} if work.active == work.tokens else dict(work.selected)


def run(work: Workload, size: RunSize, chosen: Layout, held: Parts) -> Sequence[Parts]:
    """Moments of a run: a chunk's logits are computed, its rows processed, a group accumulated."""
    workspaces = workspace(size, chosen)
    operand, widens = operand_bytes(work), operand_bytes(work) > work.element
    both = work.shared_head and size.sides == 2 and size.operand_bytes < size.logit_bytes
    states = operand * chosen.chunk * work.hidden_size
    stacked = 2 * states if both else 0
    copied = states * (2 if both else 1) if widens else 0
    group = operand * chosen.group * work.hidden_size if widens and size.has_dlogits else 0
    return [
        {**held, **workspaces, "hidden states of a chunk": stacked + copied},
        {**held, **workspaces, "row buffers": _row_bytes(work, size, chosen.chunk)},
        {**held, **workspaces, "hidden states of a group": group},
    ]


def workspace(size: RunSize, chosen: Layout) -> Parts:
    """Logits of a chunk, and gradients w.r.t. the logits of a group."""
    return {"logits and their gradients": chunking.workspace_bytes(size, chosen)}


def _row_bytes(work: Workload, size: RunSize, chunk: int) -> int:
    """Temporaries beside the logits: a top-k's on any device, other functions' on a CPU."""
    objective = work.objective
    block = rows_in_work(chunk, size.width) * size.width * WIDE
    if work.kind == "cuda":
        block = 0
    if objective.is_full and objective.comparison is not None:
        return near.num_buffers(objective.comparison.term) * block
    softmax = _SOFTMAX_BUFFERS * block if size.has_dlogits else 0
    support = objective.truncated
    if support is None:
        return softmax
    entries = chunk * compared(objective)
    return max(
        softmax + WRITING * entries,
        COMPARING * entries,
        _dot_product_bytes(work, chunk),
        _top_k_bytes(support.top_k, size, chunk, work.kind),
        _candidate_bytes(work, chunk),
    )


def compared(objective: PlannedObjective) -> int:
    """Number of entries of a truncated support."""
    return 0 if objective.truncated is None else objective.truncated.num_entries


def choosing_sides(objective: PlannedObjective) -> int:
    """Number of sides whose top-k forms the support."""
    support = objective.truncated
    return 0 if support is None else sum(map(support.chooses, SIDES))


def _dot_product_bytes(work: Workload, chunk: int) -> int:
    """Rows of the head that PyTorch gathers for a side without logits: two pieces at a time."""
    objective = work.objective
    others = 1 + objective.has_teacher - sum(whole_sides(objective))
    if work.kind == "cuda" or not others:
        return 0
    count = compared(objective)
    tokens = max(1, gathered_rows(work) // count)
    gathered = WIDE * work.hidden_size * count * min(chunk, 2 * tokens)
    return gathered + DOTTING * chunk * count


def gathered_rows(work: Workload) -> int:
    """Number of rows (D,) that PyTorch gathers at a time."""
    return min(sparse.LONGEST, max(1, sparse.GATHERED // work.hidden_size))


def _top_k_bytes(k: int, size: RunSize, chunk: int, kind: str) -> int:
    """Maxima of blocks; in PyTorch also the candidates' logits and their ids, twice."""
    if not has_short_list(k, size.width):
        return 0
    blocks = chunk * -(-size.width // BLOCK) * WIDE
    listed = 0 if kind == "cuda" else chunk * k * BLOCK * (2 * ID_BYTES + WIDE)
    return blocks + listed


def _candidate_bytes(work: Workload, chunk: int) -> int:
    """Candidates for a top-k: this rank's, and all ranks' with their ids and their order."""
    if work.tensor_parallel == 1 or not choosing_sides(work.objective):
        return 0
    assert work.objective.truncated is not None
    own = chunk * min(work.objective.truncated.top_k, work.vocab)
    pair = 2 * WIDE  # a logit and its id
    of_all = 2 * pair + 2 * WIDE + ID_BYTES
    return own * (pair + WIDE + ID_BYTES + work.tensor_parallel * of_all)
