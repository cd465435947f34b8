"""Memory of this library with dense gradients, or with the few exact entries of a support.

The engine chooses between three ways:

* The gradient of a token has few entries (a renormalised support): forward keeps those entries;
  backward gathers and sums rows of the head and of the hidden states.
* The loss is reduced, or the head has no gradient: forward computes the gradients and keeps them in
  fp32; backward scales and rounds them.
* Otherwise forward keeps no gradient, and backward computes the logits again.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, E entries of all
"""

from collections.abc import Sequence

from fused_sd.engine.layout import Layout, RunSize
from fused_sd.planning import chunked
from fused_sd.planning.chunked import ID_BYTES, PER_TOKEN, WIDE, ChunkedRun, num_entries
from fused_sd.planning.workload import Implementation, Parts, Workload, gemm_flops

COLUMN_BYTES = 4
ENTRY_BYTES = COLUMN_BYTES + WIDE


def runs(work: Workload) -> list[ChunkedRun]:
    """Forward's chunked run, and backward's if it computes the logits again."""
    first = ChunkedRun(not _recomputes(work), _layout(work), work.active)
    if not _recomputes(work):
        return [first]
    return [first, ChunkedRun(True, _backward(work)[1], work.active)]


def _layout(work: Workload) -> Layout:
    """The chunk and the group that forward will choose."""
    size = _size(work)
    return chunked.layout(work, size, size.has_dlogits)


def _recomputes(work: Workload) -> bool:
    """Whether backward computes the logits again."""
    reduced = work.reduced and not work.objective.is_per_token
    return work.trained and not reduced and not num_entries(work.objective)


def _size(work: Workload) -> RunSize:
    """The size of forward's run."""
    has_gradient = not _recomputes(work) and not num_entries(work.objective)
    return chunked.size_of(work, has_gradient)


def _backward(work: Workload) -> tuple[RunSize, Layout]:
    """Size and layout of the run in which backward recomputes the chunks."""
    size = chunked.size_of(work, has_gradient=True)
    return size, chunked.layout(work, size, finishing=True)


def _moments(work: Workload) -> Sequence[Parts]:
    size, chosen = _size(work), _layout(work)
    copies = {**chunked.compacted(work), **chunked.widened(work)}
    per_token = {"per-token values": PER_TOKEN * work.tokens}
    if num_entries(work.objective):
        return _moments_of_entries(work, size, chosen, copies)
    if not _recomputes(work):
        return [
            *form_gradients(work, size, chosen, {**per_token, **copies}),
            *_rounding(work, per_token),
        ]
    forward = {**per_token, **copies}
    rounded = work.gradients if work.element < WIDE else {}
    return [
        *chunked.run(work, size, chosen, forward),
        *form_gradients(work, *_backward(work), forward),
        {**per_token, **chunked.finished(work, work.tokens), **rounded},
    ]


def _moments_of_entries(
    work: Workload, size: RunSize, chosen: Layout, copies: Parts
) -> Sequence[Parts]:
    """Moments of a loss whose gradients have entries on a support only."""
    per_row = num_entries(work.objective)
    places, count = work.tokens * per_row, work.active * per_row
    held = {"per-token values": PER_TOKEN * work.tokens, "entries": ENTRY_BYTES * places}
    summing = {"norms": (WIDE + 1) * count, **chunked.workspace(size, chosen)}
    return [
        *chunked.run(work, size, chosen, {**held, **copies}),
        {**held, **copies, **summing},
        # each rank uses its own entries: an equal share if they are spread evenly
        *from_entries(work, held, places, count // work.tensor_parallel),
    ]


def form_gradients(work: Workload, size: RunSize, chosen: Layout, held: Parts) -> Sequence[Parts]:
    """Moments of a run that computes dense gradients and returns dhidden to its tokens."""
    selected = chunked.finished(work, work.active)
    moments = list(chunked.run(work, size, chosen, {**held, **selected}))
    if work.active < work.tokens:
        both = {"dH of the selected rows": selected["fp32 dH"], **chunked.workspace(size, chosen)}
        moments.append({**held, **chunked.finished(work, work.tokens), **both})
    return moments


def from_entries(work: Workload, held: Parts, places: int, used: int) -> Sequence[Parts]:
    """Moments of a backward that gathers rows for dhidden and then sums them for dweight.

    Args:
        places: slots for entries, over all tokens.
        used: slots that hold an entry.
    """
    dhidden = {"dH": work.hidden_bytes}
    if work.tensor_parallel > 1:  # summed over the ranks in fp32 before it is rounded
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
    """Bytes of PyTorch's sums of rows: one piece of sums, the next, and rows widened to fp32.

    Another piece of at most 8 MiB, for many entries that meet in one sum, is not counted.
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
    """The moment at which backward scales and rounds the fp32 gradients that forward kept."""
    held = {**held, **chunked.finished(work, work.tokens)}
    if work.kind == "cpu" and work.element < WIDE:  # a CPU multiplies into an fp32 copy first
        held["scaled in fp32"] = max(held["fp32 dW"], held["fp32 dH"])
    return [{**held, **work.gradients}]


def _gemms(work: Workload) -> float:
    student, teacher = chunked.whole_sides(work.objective)
    logits = gemm_flops(work, student, teacher)
    if num_entries(work.objective):
        return logits
    return logits * len(runs(work)) + gemm_flops(work, 1 + work.trained, 0)


FUSED_SD = Implementation("fused_sd", _moments, _gemms, "its own layout")
