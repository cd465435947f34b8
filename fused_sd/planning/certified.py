"""This library's memory with ``gradient="sparse"``: entries, and finished gradients of dense rows.

How many entries a token keeps, and how many tokens are dense, depends on the policy; both are the
plan's to assume.  Without a dense token there is no sum of the head's gradient in fp32.

Dimension key:  N tokens, A tokens with a weight, F dense tokens, D hidden size, V vocabulary
"""

from collections.abc import Sequence

from fused_sd.engine.gradients import MOST
from fused_sd.engine.layout import Layout, RunSize
from fused_sd.planning import chunked, fused
from fused_sd.planning.chunked import PER_TOKEN, WIDE, ChunkedRun
from fused_sd.planning.fused import ENTRY_BYTES
from fused_sd.planning.workload import Parts, Peer, Workload, gemm_flops
from fused_sd.torch_kernels import rows

KEPT = 64  # entries of a token where nothing is said: a policy of 0.6 nat keeps fewer
LISTED = 62  # bytes for each entry that PyTorch's selection may keep of a row; the kernels' 12
JUDGED = 32  # and when it is decided which rows stay sparse


def walked(work: Workload) -> list[ChunkedRun]:
    """Forward's walk, and backward's over the dense tokens where it walks them again."""
    first = ChunkedRun(True, layout(work), work.active)
    if not _again(work) or not dense_tokens(work):
        return [first]
    few = work._replace(active=dense_tokens(work))
    size = chunked.size_of(few, has_gradient=True)
    return [first, ChunkedRun(True, chunked.layout(few, size, finishing=True), few.active)]


def walks(work: Workload) -> int:
    """How many they are."""
    return len(walked(work))


def layout(work: Workload) -> Layout:
    """The chunk and the group that the walk will choose."""
    return chunked.layout(work, chunked.size_of(work, has_gradient=True), not _again(work))


def dense_tokens(work: Workload) -> int:
    """F."""
    return round(work.active * work.dense_share)


def _again(work: Workload) -> bool:
    """Whether the gradients of dense tokens wait for autograd's."""
    return work.trained and not work.reduced


def _moments(work: Workload) -> Sequence[Parts]:
    if work.kept is None:
        return []
    size = chunked.size_of(work, has_gradient=True)
    chosen = layout(work)
    kept = work.kept * (work.active - dense_tokens(work))
    entries = {"entries": ENTRY_BYTES * kept, "per-token values": PER_TOKEN * work.tokens}
    dense = {} if _again(work) else _dense(work)
    taken = {**chunked.compacted(work), **chunked.widened(work)}
    held = {**entries, **dense, **taken}
    spaces = chunked.workspace(size, chosen)
    twice = {"entries together": ENTRY_BYTES * kept, "dH together": dense.get("dense fp32 dH", 0)}
    moments = [
        *chunked.run(work, size, chosen, held),
        {**held, **spaces, **_selecting(work, size, min(chosen.group, work.active))},
        {**held, **spaces, **twice},
    ]
    if walks(work) == 2:
        dense = _dense(work)
        few = work._replace(active=dense_tokens(work))  # backward's walk finishes theirs
        again = {**entries, **chunked.compacted(few), **chunked.widened(few)}
        moments += fused.form_gradients(few, size, chunked.layout(few, size, finishing=True), again)
    scaled = {"dense dH, scaled": dense.get("dense fp32 dH", 0)}
    moments += fused.from_entries(work, {**entries, **dense, **scaled}, kept, kept)
    return moments


def _dense(work: Workload) -> Parts:
    """Finished gradients of the dense tokens."""
    count = dense_tokens(work)
    gradients = chunked.finished(work, count)
    return {
        "dense fp32 dH": gradients["fp32 dH"],
        "fp32 dW": gradients["fp32 dW"] if count else 0,
    }


def _selecting(work: Workload, size: RunSize, num_rows: int) -> Parts:
    """The entries of a group's rows, and some rows in fp32 with their magnitudes."""
    listed = num_rows * min(MOST, work.vocab)
    if work.kind == "cuda":
        return {"selection": (12 + JUDGED) * listed}
    visited = min(num_rows, max(1, rows.ROW_BLOCK_LOGITS // size.vocab)) * size.vocab
    return {"selection": LISTED * listed, "rows that are visited": 2 * WIDE * visited}


def _gemms(work: Workload) -> float:
    logits = gemm_flops(work, *chunked.whole_sides(work.objective))
    dense = logits * (walks(work) - 1) + gemm_flops(work, 1 + work.trained, 0)
    return logits + work.dense_share * dense


SPARSE = Peer("fused_sd, sparse", _moments, _gemms, "its own layout", shards=True)
