"""Memory of this library with ``gradient="sparse"`` and ``"auto"``: sparse values, and gradients of
dense rows.

How many entries a token keeps, and how many tokens are dense, depends on the policy; a plan assumes
both.  Without a dense token there is no fp32 sum of dweight.

Dimension key:  N tokens, A tokens with a weight, F dense tokens, D hidden size, V vocabulary
"""

from collections.abc import Sequence

from fused_sd.engine.gradients import DENSE_SHARE, MOST
from fused_sd.engine.layout import Layout, RunSize
from fused_sd.planning import chunked, fused
from fused_sd.planning.chunked import PER_TOKEN, WIDE, ChunkedRun
from fused_sd.planning.fused import ENTRY_BYTES
from fused_sd.planning.workload import Implementation, Parts, Workload, gemm_flops, total
from fused_sd.torch_kernels.row_blocks import rows_in_work

KEPT = 64  # entries of a token by default: a policy with an entropy of 0.6 nat keeps fewer
# bytes for each entry that may be selected: its id and value, which are held; while PyTorch chooses
# the entries of some rows; while it keeps the fewest of all rows; and, after the kernels have
# selected, while it is decided which rows stay sparse
SELECTED, CHOOSING, KEEPING, DECIDING = 12, 30, 46, 32


def runs(work: Workload) -> list[ChunkedRun]:
    """Forward's chunked run, and backward's over the dense tokens if it recomputes their logits."""
    first = ChunkedRun(True, _layout(work), work.active)
    if not _recomputes(work) or not dense_tokens(work):
        return [first]
    few = work._replace(active=dense_tokens(work))
    size = chunked.size_of(few, has_gradient=True)
    return [first, ChunkedRun(True, chunked.layout(few, size, finishing=True), few.active)]


def dense_tokens(work: Workload) -> int:
    """Number of tokens whose gradient is expected to be dense: F."""
    return round(work.active * work.dense_share)


def _layout(work: Workload) -> Layout:
    """The chunk and the group that forward will choose."""
    size = chunked.size_of(work, has_gradient=True)
    return chunked.layout(work, size, finishing=not _recomputes(work))


def _recomputes(work: Workload) -> bool:
    """Whether gradients of dense tokens are left to backward, which knows autograd's gradient."""
    return work.trained and not work.reduced


def _moments(work: Workload) -> Sequence[Parts]:
    if work.kept is None:
        return []
    size = chunked.size_of(work, has_gradient=True)
    chosen = _layout(work)
    kept = work.kept * (work.active - dense_tokens(work))
    entries = {"entries": ENTRY_BYTES * kept, "per-token values": PER_TOKEN * work.tokens}
    dense = {} if _recomputes(work) else _dense_gradients(work)
    copies = {**chunked.compacted(work), **chunked.widened(work)}
    held = {**entries, **dense, **copies}
    workspaces = chunked.workspace(size, chosen)
    joined = {"entries together": ENTRY_BYTES * kept, "dH together": dense.get("dense fp32 dH", 0)}
    moments = [
        *chunked.run(work, size, chosen, held),
        {**held, **workspaces, **_selection(work, size, min(chosen.group, work.active))},
        {**held, **workspaces, **joined},
    ]
    if len(runs(work)) == 2:
        dense = _dense_gradients(work)
        few = work._replace(active=dense_tokens(work))
        again = {**entries, **chunked.compacted(few), **chunked.widened(few)}
        moments += fused.form_gradients(few, size, chunked.layout(few, size, finishing=True), again)
    scaled = {"dense dH, scaled": dense.get("dense fp32 dH", 0)}
    moments += fused.from_entries(work, {**entries, **dense, **scaled}, kept, kept)
    return moments


def _dense_gradients(work: Workload) -> Parts:
    """Finished fp32 gradients of the dense tokens."""
    count = dense_tokens(work)
    gradients = chunked.finished(work, count)
    return {
        "dense fp32 dH": gradients["fp32 dH"],
        "fp32 dW": gradients["fp32 dW"] if count else 0,
    }


def _selection(work: Workload, size: RunSize, num_rows: int) -> Parts:
    """Entries selected from a group's rows, and PyTorch's copies of the rows in work."""
    places = min(MOST, work.vocab)
    selected = num_rows * places
    if work.kind == "cuda":
        return {"selection": (SELECTED + DECIDING) * selected}
    in_work = rows_in_work(num_rows, size.vocab) * (CHOOSING * places + 2 * WIDE * size.vocab)
    choosing = {"selection": SELECTED * selected, "row blocks": in_work}
    return max(choosing, {"selection": (SELECTED + KEEPING) * selected}, key=total)


def _gemms(work: Workload) -> float:
    logits = gemm_flops(work, *chunked.whole_sides(work.objective))
    dense = logits * (len(runs(work)) - 1) + gemm_flops(work, 1 + work.trained, 0)
    return logits + work.dense_share * dense


def _moments_of_auto(work: Workload) -> Sequence[Parts]:
    """Of what is assumed, and of the form that the run takes where its first tokens are dense."""
    return [*_moments(work), *_moments(all_dense(work))]


def _gemms_of_auto(work: Workload) -> float:
    return _gemms(all_dense(work) if work.dense_share > DENSE_SHARE else work)


def all_dense(work: Workload) -> Workload:
    """The same loss, with a dense gradient of every token."""
    return work._replace(dense_share=1.0)


SPARSE = Implementation("fused_sd, sparse", _moments, _gemms, "its own layout")
AUTO = Implementation("fused_sd, auto", _moments_of_auto, _gemms_of_auto, "its own layout")
