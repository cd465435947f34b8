"""Collect SD-Zero's revision traces into a file.  A run that was killed can be continued.

generate = transformers_generate(model, tokenizer, max_new_tokens=1024)
traces, counts = collect_traces(generate, dataset, reward, tokenizer, "traces.jsonl")
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fused_sd.checks import check_positive_int, fail
from fused_sd.integrations.shared.revision_phrases import phrases_for
from fused_sd.integrations.trl.data_checks import check_columns
from fused_sd.integrations.trl.generators import Generate
from fused_sd.integrations.trl.revise import Reviser, RewardFunction, TraceConfig
from fused_sd.integrations.trl.traces import (
    FORMAT,
    Collected,
    TraceCounts,
    counts_of,
    load_traces,
    read_records,
    start_file,
)

Report = Callable[[TraceCounts], None]


def collect_traces(
    generate: Generate,
    dataset: Sequence[Mapping[str, Any]],
    reward_func: RewardFunction,
    processing_class: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    config: TraceConfig | None = None,
    questions_per_batch: int = 64,
    max_traces: int | None = None,
    report: Report | None = None,
) -> Collected:
    """Sample, verify, revise and verify again, for each question that is not in the file yet.

    Args:
        generate: returns one completion for each of a list of prompts, all as token ids.
        dataset: rows with a "prompt" (text or messages); other columns go to the reward.
        reward_func: a reward function as TRL's.  It is called with prompts, completions and the
            dataset's columns, each with one entry for each completion, and returns numbers, or None
            for no verdict: such a response is not revised, and such a revision is no trace.  A
            revision is judged by itself, without the response before it.
        processing_class: the tokenizer.
        path: a JSONL file, which is created or continued.
        config: how traces are collected; None: ``TraceConfig()``.
        questions_per_batch: the number of questions in one call of ``generate``.  A killed run
            loses at most one batch.
        max_traces: stop after the batch that reaches this number.
        report: is called after each batch with the counts so far; ``print`` will do.

    Returns:
        All traces in the file, and their counts.

    Raises:
        ValueError: the file was made from another dataset, tokenizer or config; or a function
            returned something else than one answer for each completion.

    Examples:
        >>> from transformers import AutoTokenizer
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import collect_traces
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
        >>> def generate(prompts):  # as transformers_generate and vllm_generate make one
        ...     return [tokenizer("It is 7.").input_ids for _ in prompts]
        >>> traces, counts = collect_traces(generate, questions(2), reward, tokenizer, "new.jsonl")
        >>> counts.questions, counts.kept == len(traces)
        (2, True)
    """
    config = TraceConfig() if config is None else config
    if not isinstance(config, TraceConfig):
        fail("config", "be a TraceConfig", type(config).__name__, "pass config=TraceConfig(...)")
    if not hasattr(dataset, "__getitem__"):
        got = f"a {type(dataset).__name__}"
        fail(
            "dataset", "be a list of rows", got, "pass generate, dataset, reward_func in this order"
        )
    if len(dataset):
        check_columns("collect_traces", "dataset", dataset[0])
    check_positive_int("questions_per_batch", questions_per_batch)
    # The file says which phrases it holds, also those that the model's family has chosen.
    phrases = phrases_for(processing_class.name_or_path, config.correct_phrase, config.wrong_phrase)
    config = replace(config, correct_phrase=phrases.correct, wrong_phrase=phrases.wrong)
    path = Path(path)
    header = {
        "format": FORMAT,
        "config": asdict(config),
        "dataset": _fingerprint(dataset),
        "tokenizer": _fingerprint(
            [sorted(processing_class.get_vocab().items()), processing_class.chat_template]
        ),
    }
    start_file(path, header)
    records = read_records(path)
    counts = sum((counts_of(line) for line in records), TraceCounts())
    done = {line["question"] for line in records}
    left = [index for index in range(len(dataset)) if index not in done]
    reviser = Reviser(generate, reward_func, processing_class, config)
    for start in range(0, len(left), questions_per_batch):
        if max_traces is not None and counts.kept >= max_traces:
            break
        batch = left[start : start + questions_per_batch]
        lines = list(reviser.revise({index: dataset[index] for index in batch}))
        _append(path, lines)
        counts += sum(map(counts_of, lines), TraceCounts())
        if report is not None:
            report(counts)
    return load_traces(path)


def _append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines to the disk, before the next ones cost time.

    Raises:
        OSError: there is no room; what was written before stays, and an unfinished line is ignored.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        said = f"{error.strerror}; its earlier traces stay, and the same call goes on from them"
        raise OSError(error.errno, said, str(path)) from error


def _fingerprint(value: Iterable[Any]) -> str:
    """Return a short hash by which a continued run recognises its dataset and tokenizer."""
    digest = hashlib.sha256()
    for item in value:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
