"""This library's memory: finished gradients, entries, or a second chunked.

Where a token's gradient has few entries, forward keeps those, and backward gathers and sums.  Else
it forms the gradients where the loss is reduced or only the hidden states want one, and keeps them
in fp32; backward scales and rounds them.  Otherwise nothing is kept, and backward walks again.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, E entries of all
"""

from collections.abc import Sequence

from fused_sd.engine.layout import Layout, RunSize
from fused_sd.planning import chunked
from fused_sd.planning.chunked import ID_BYTES, PER_TOKEN, WIDE, ChunkedRun, num_entries
from fused_sd.planning.workload import Parts, Peer, Workload, gemm_flops

COLUMN_BYTES = 4
ENTRY_BYTES = COLUMN_BYTES + WIDE


def layout(work: Workload) -> Layout:
    """The chunk and the group that the walk will choose."""
    size = _size(work)
    return chunked.layout(work, size, size.has_gradient)


def walked(work: Workload) -> list[ChunkedRun]:
    """Forward's walk, and backward's where it walks again."""
    first = ChunkedRun(not _recomputes(work), layout(work), work.active)
    return [first, ChunkedRun(True, _again(work)[1], work.active)] if _recomputes(work) else [first]


def walks(work: Workload) -> int:
    """2 where backward walks again, else 1."""
    return len(walked(work))


def _recomputes(work: Workload) -> bool:
    reduced = work.reduced and not work.objective.is_per_token
    return work.trained and not reduced and not num_entries(work.objective)


def _again(work: Workload) -> tuple[RunSize, Layout]:
    """Bytes held while backward recomputes the chunks."""
    size = chunked.size_of(work, has_gradient=True)
    return size, chunked.layout(work, size, finishing=True)


def _size(work: Workload) -> RunSize:
    has_gradient = not _recomputes(work) and not num_entries(work.objective)
    return chunked.size_of(work, has_gradient)


def _moments(work: Workload) -> Sequence[Parts]:
    size, chosen = _size(work), layout(work)
    taken = {**chunked.compacted(work), **chunked.widened(work)}
    per_token = {"per-token values": PER_TOKEN * work.tokens}
    if num_entries(work.objective):
        held = {**per_token, **_entries(work)}
        places, count = (
            tokens * num_entries(work.objective) for tokens in (work.tokens, work.active)
        )
        summing = {"norms": (WIDE + 1) * count, **chunked.workspace(size, chosen)}
        count //= work.tensor_parallel  # a rank's own of them, if they lie evenly
        return [
            *chunked.run(work, size, chosen, {**held, **taken}),
            {**held, **taken, **summing},
            *from_entries(work, held, places, count),
        ]
    if not _recomputes(work):
        return [
            *form_gradients(work, size, chosen, {**per_token, **taken}),
            *_rounding(work, per_token),
        ]
    again, chosen_again = _again(work)
    forward = {**per_token, **taken}
    return [
        *chunked.run(work, size, chosen, forward),
        *form_gradients(work, again, chosen_again, forward),
        {
            **per_token,
            **chunked.finished(work, work.tokens),
            **(work.gradients if work.element < WIDE else {}),
        },
    ]


def form_gradients(work: Workload, size: RunSize, chosen: Layout, held: Parts) -> Sequence[Parts]:
    """A walk that forms the gradients, and their way to the tokens that they belong to."""
    selected = chunked.finished(work, work.active)
    moments = list(chunked.run(work, size, chosen, {**held, **selected}))
    if work.active < work.tokens:
        both = {"dH of the selected rows": selected["fp32 dH"], **chunked.workspace(size, chosen)}
        moments.append({**held, **chunked.finished(work, work.tokens), **both})
    return moments


def _entries(work: Workload) -> Parts:
    count = work.tokens * num_entries(work.objective)
    return {"entries": ENTRY_BYTES * count}


def from_entries(work: Workload, held: Parts, places: int, used: int) -> Sequence[Parts]:
    """Backward: the hidden states' gradient is gathered, then the head's is summed.

    Args:
        places: for entries, of all tokens.
        used: those that hold one.
    """
    dhidden = {"dH": work.hidden_bytes}
    if work.tensor_parallel > 1:  # summed over the ranks before it is rounded
        dhidden = chunked.finished(work._replace(trained=False), work.tokens)
    moments = [
        {
            **held,
            **dhidden,
            "entries in their order": (1 + 2 * ID_BYTES) * places + (ID_BYTES + WIDE) * used,
            "sums": _sum_bytes(work, work.tokens, used, used),
        }
    ]
    if work.tensor_parallel > 1 and work.element < WIDE:
        moments.append({**held, **dhidden, "dH": work.hidden_bytes})
    if work.trained:
        moments.append(
            {
                **held,
                **work.gradients,
                "entries by column": (3 * ID_BYTES + 2 * WIDE) * places,
                "columns": (ID_BYTES + COLUMN_BYTES) * work.vocab,
                "sums": _sum_bytes(work, work.vocab, places, used),
            }
        )
    return moments


def _sum_bytes(work: Workload, num_sums: int, places: int, used: int) -> int:
    """What PyTorch's sums hold: a piece of them and the next, and rows that are widened first.

    Another piece, of 8 MiB at most, where many entries meet in one sum is left out.
    """
    if work.kind == "cuda":
        return 0
    rows = chunked.gathered_rows(work)
    piece = min(num_sums, max(1, rows * num_sums // max(num_sums, places)))
    following = min(piece, num_sums - piece)

    def bytes_of(sums: int) -> int:
        gathered = min(rows, used * sums // num_sums) if work.element < WIDE else 0
        both = max((WIDE + work.element) * gathered, WIDE * (gathered + sums))
        return work.hidden_size * both

    return max(bytes_of(piece), WIDE * work.hidden_size * piece + bytes_of(following))


def _rounding(work: Workload, held: Parts) -> Sequence[Parts]:
    """Backward: each gradient is scaled and rounded while the sums are kept."""
    held = {**held, **chunked.finished(work, work.tokens)}
    if work.kind == "cpu" and work.element < WIDE:  # multiplies in fp32 first
        held["scaled in fp32"] = max(held["fp32 dW"], held["fp32 dH"])
    return [{**held, **work.gradients}]


def _gemms(work: Workload) -> float:
    student, teacher = chunked.whole_sides(work.objective)
    logits = gemm_flops(work, student, teacher)
    if num_entries(work.objective):
        return logits
    return logits * walks(work) + gemm_flops(work, 1 + work.trained, 0)


FUSED_SD = Peer("fused_sd", _moments, _gemms, "its own layout", shards=True)
