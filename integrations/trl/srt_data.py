"""Revision traces as training data: batches with a mask for each term, and plain SFT records.

Dimension key:  B traces, L positions
"""

import warnings
from collections.abc import Sequence
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
    """Pads traces on the right.

    Returns a batch of input_ids, attention_mask, generation_mask (the assistant's turn) and
    revision_mask, (B, L) each, and corrected (B,).
    """

    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        longest, multiple = int(lengths.max()), self.pad_to_multiple_of or 1
        longest = -(-longest // multiple) * multiple
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # any token, hidden by masks
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
    """What ``TraceCollator`` reads.  Longer traces are left out, with one warning.

    Raises:
        ValueError: no trace is left.
    """
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


def sft_dataset(traces: Sequence[Trace], objective: str = "joint") -> Dataset:
    """The same losses for any trainer of causal language models: input_ids and labels.

    A generation record has labels on the assistant's turn, a revision record on the revision,
    -100 elsewhere; "joint" has both of each trace.  A mean over the tokens of both kinds is not the
    sum of two means, so that training on them differs from ``SRTTrainer`` by the terms' weights.
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
    """(2,) tokens of the assistant's turns and of the revisions."""
    return torch.stack([batch["generation_mask"].sum(), batch["revision_mask"].sum()])
