"""Revision traces as training data: batches with a mask for each term, or plain SFT records.

Dimension key:  B traces, L positions
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from fused_sd.checks import check_one_of, fail
from fused_sd.integrations.trl.traces import Trace

OBJECTIVES = ("joint", "generation", "revision")
COLUMNS = ("input_ids", "generation_start", "revision_start", "corrected")


@dataclass
class TraceCollator:
    """Makes batches of traces, padded on the right.

    A batch has input_ids, attention_mask, generation_mask (1 on the assistant's turn) and
    revision_mask (1 on the revision), each (B, L), and corrected (B,), whether the initial response
    was wrong.

    Args:
        pad_to_multiple_of: L is a multiple of this; None: no padding but to the longest trace.
    """

    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        longest, multiple = int(lengths.max()), self.pad_to_multiple_of or 1
        longest = -(-longest // multiple) * multiple
        # padding is any token, since the masks hide it
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for ids, row in zip(input_ids, rows, strict=True):
            ids[: len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        place = torch.arange(longest)
        is_token = place < lengths[:, None]
        batch = {"input_ids": input_ids, "attention_mask": is_token.long()}
        for name in ("generation", "revision"):
            starts = torch.tensor([row[f"{name}_start"] for row in rows])
            batch[f"{name}_mask"] = (is_token & (place >= starts[:, None])).long()
        batch["corrected"] = torch.tensor([row["corrected"] for row in rows])
        return batch


def trace_dataset(traces: Sequence[Trace], max_length: int | None = None) -> Dataset:
    """Return the dataset that ``TraceCollator`` reads.

    Args:
        max_length: longer traces are left out, with one warning; None: no limit.

    Raises:
        ValueError: no trace is left.
    """
    remedy = "pass load_traces(path).traces"
    if not isinstance(traces, Iterable) or isinstance(traces, str):
        fail("traces", "be a list of Trace", f"a {type(traces).__name__}", remedy)
    for n, trace in enumerate(traces):
        if not isinstance(trace, Trace):
            got = f"a {type(trace).__name__} in place {n} of a {type(traces).__name__}"
            fail("traces", "be a list of Trace", got, remedy)
    kept = [t for t in traces if max_length is None or len(t.input_ids) <= max_length]
    if len(kept) < len(traces):
        warnings.warn(
            f"{len(traces) - len(kept)} of {len(traces)} traces are longer than "
            f"max_length={max_length} and left out",
            stacklevel=3,
        )
    if not kept:
        fail(
            "traces",
            "hold one of at most max_length tokens",
            f"{len(traces)} traces and max_length={max_length}",
            "sample more responses, or raise max_length",
        )
    return Dataset.from_dict(
        {
            "input_ids": [trace.input_ids for trace in kept],
            "generation_start": [len(trace.prompt_ids) for trace in kept],
            "revision_start": [trace.revision_start for trace in kept],
            "corrected": [not trace.initial_correct for trace in kept],
        }
    )


def one_chat_format(traces: Sequence[Trace]) -> dict[str, Any] | None:
    """Return the chat template's arguments of all traces; None where no trace knows its own.

    Raises:
        ValueError: two traces differ.
    """
    known = [t.chat_template_kwargs for t in traces if t.chat_template_kwargs is not None]
    for other in known:
        if other != known[0]:
            got, remedy = f"{known[0]!r} and {other!r}", "collect all in one chat format"
            fail("traces", "agree in chat_template_kwargs", got, remedy)
    return dict(known[0]) if known else None


def sft_dataset(traces: Sequence[Trace], objective: str = "joint") -> Dataset:
    """Return records of input_ids and labels, for any trainer of causal language models.

    A generation record has labels on the assistant's turn, a revision record on the revision; other
    labels are -100.  A mean over the tokens of both kinds is not the sum of two means, so that the
    two terms have other weights than in ``SRTTrainer``.

    Args:
        objective: "generation", "revision", or "joint" for both records of each trace.

    Raises:
        ValueError: the objective is none of these.

    Examples:
        >>> from fused_sd.integrations.trl import Trace, sft_dataset
        >>> trace = Trace(
        ...     question=0, prompt="2 + 2 =", prompt_ids=(5, 6), initial_ids=(7,), phrase="Wrong.",
        ...     verdict_ids=(8,), revision_ids=(9, 10), initial_correct=False, initial_reward=0.0,
        ...     revision_reward=1.0,
        ... )
        >>> sft_dataset([trace], "revision")[0]["labels"]
        [-100, -100, -100, -100, 9, 10]
    """
    check_one_of("objective", objective, OBJECTIVES)
    rows = []
    for trace in traces:
        starts = {"generation": len(trace.prompt_ids), "revision": trace.revision_start}
        for name, start in starts.items():
            if objective in ("joint", name):
                ids = list(trace.input_ids)
                rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return Dataset.from_list(rows)


def token_counts(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens of the assistant's turns and of the revisions, (2,)."""
    return torch.stack([batch["generation_mask"].sum(), batch["revision_mask"].sum()])
