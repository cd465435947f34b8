"""SD-Zero's revision traces, and the files that hold them.

A trace is one assistant turn: an initial response, a phrase that says whether the response was
right, and a revision that is right.  Tokens stay as they were sampled.

A file is JSONL.  Its first line says what was collected and how; each further line holds one
question.  A last line without a line end was cut off when its run was killed, and is ignored.

Reference:
    SD-Zero (arXiv 2604.12002), section 2.1.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from fused_sd.checks import fail

Tokens = tuple[int, ...]
FORMAT = "fused_sd traces 1"
MOST_TOKENS = 2**31  # in any vocabulary


@dataclass(frozen=True)
class Trace:
    """One assistant turn that revises itself: initial response, verdict, revision.

    Attributes:
        question: the index of its row in the dataset.
        prompt: text or chat messages.
        prompt_ids: the prompt's tokens, up to where the assistant begins.
        initial_ids: the first response without its end token.
        phrase: the verdict.
        verdict_ids: the verdict's tokens, with a blank line on both sides.
        revision_ids: the second response as sampled; ends with the end token, unless it was cut.
        initial_correct: whether the first response was right.
        initial_reward, revision_reward: what the reward function returned.
        chat_template_kwargs: arguments of the chat template that wrote the prompt; None: the prompt
            is text, or nobody knows.  A file has them in its first line.

    Raises:
        ValueError: prompt or revision has no token.

    Examples:
        >>> from fused_sd.integrations.trl import Trace
        >>> trace = Trace(
        ...     question=0, prompt="2 + 2 =", prompt_ids=(5, 6), initial_ids=(7,), phrase="Wrong.",
        ...     verdict_ids=(8,), revision_ids=(9, 10), initial_correct=False, initial_reward=0.0,
        ...     revision_reward=1.0,
        ... )
        >>> trace.input_ids, trace.revision_start
        ((5, 6, 7, 8, 9, 10), 4)
    """

    question: int
    prompt: str | list[dict[str, Any]]
    prompt_ids: Tokens
    initial_ids: Tokens
    phrase: str
    verdict_ids: Tokens
    revision_ids: Tokens
    initial_correct: bool
    initial_reward: float | None
    revision_reward: float | None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "revision_ids"):
            if not getattr(self, name):
                fail(name, "hold at least one token", "none", "leave this trace out")

    @property
    def input_ids(self) -> Tokens:
        return self.prompt_ids + self.initial_ids + self.verdict_ids + self.revision_ids

    @property
    def revision_start(self) -> int:
        return len(self.prompt_ids) + len(self.initial_ids) + len(self.verdict_ids)


@dataclass
class TraceCounts:
    """How many responses were sampled, and what became of them."""

    questions: int = 0
    initial: int = 0
    initial_correct: int = 0
    revisions: int = 0
    revisions_correct: int = 0
    revisions_of_wrong: int = 0
    corrected: int = 0  # right revisions of wrong responses
    kept: int = 0
    empty: int = 0  # right revisions without a token before the end
    sycophantic: int = 0
    duplicates: int = 0
    generated_tokens: int = 0
    undecided: int = 0  # responses and revisions without a verdict, which nothing else counts

    def __add__(self, other: "TraceCounts") -> "TraceCounts":
        names = (item.name for item in fields(self))
        return TraceCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def initial_accuracy(self) -> float:
        return _ratio(self.initial_correct, self.initial)

    @property
    def revision_accuracy(self) -> float:
        return _ratio(self.revisions_correct, self.revisions)

    @property
    def correction_rate(self) -> float:
        """P(revision right | initial response wrong)."""
        return _ratio(self.corrected, self.revisions_of_wrong)

    def __str__(self) -> str:
        return (
            f"{self.questions} questions, {self.kept} traces; right at first "
            f"{self.initial_accuracy:.1%}, revised {self.revision_accuracy:.1%}, corrected "
            f"{self.correction_rate:.1%}; {self.generated_tokens} tokens"
        )


class Collected(NamedTuple):
    """Traces, and the counts of all questions in their file."""

    traces: list[Trace]
    counts: TraceCounts


def load_traces(path: str | os.PathLike[str]) -> Collected:
    """Return the traces of a file that ``collect_traces`` wrote; an unfinished line is ignored.

    Raises:
        ValueError: ``collect_traces`` did not write the file.

    Examples:
        >>> from transformers import AutoTokenizer
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import collect_traces, load_traces
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
        >>> def generate(prompts):
        ...     return [tokenizer("It is 7.").input_ids for _ in prompts]
        >>> collected = collect_traces(generate, questions(2), reward, tokenizer, "kept.jsonl")
        >>> load_traces("kept.jsonl") == collected
        True
    """
    records = read_records(Path(path))
    with _as_written(path):
        chat_format = _header(Path(path))["config"]["chat_template_kwargs"]
        traces = [_trace(kept, chat_format) for record in records for kept in record["traces"]]
        counts = sum((counts_of(record) for record in records), TraceCounts())
    return Collected(traces, counts)


def record(question: int, traces: Iterable[Trace], counts: TraceCounts) -> dict[str, Any]:
    """Return the line of one question, as a dict."""
    kept = [asdict(trace) for trace in traces]
    for trace in kept:
        del trace["chat_template_kwargs"]
    return {"question": question, "counts": asdict(counts), "traces": kept}


def counts_of(line: Mapping[str, Any]) -> TraceCounts:
    """Return the counts in a question's line."""
    counts = line["counts"]
    if any(type(count) is not int or count < 0 for count in counts.values()):
        raise TypeError(f"counts of question {line['question']!r} are no numbers")
    return TraceCounts(**counts)


def chat_format_of(prompt: Any, chat_template_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the chat template's arguments for a prompt of messages, and None for a text."""
    return None if isinstance(prompt, str) else dict(chat_template_kwargs)


def _trace(kept: Mapping[str, Any], chat_template_kwargs: Mapping[str, Any]) -> Trace:
    values: dict[str, Any] = {
        name: tuple(value) if name.endswith("_ids") else value for name, value in kept.items()
    }
    for name, value in values.items():
        if name.endswith("_ids") and not all(
            type(n) is int and 0 <= n < MOST_TOKENS for n in value
        ):
            raise TypeError(f"{name} of question {values.get('question')!r} are no tokens")
    chat_format = chat_format_of(values["prompt"], chat_template_kwargs)
    return Trace(**values, chat_template_kwargs=chat_format)


def start_file(path: Path, header: Mapping[str, Any]) -> None:
    """Write the header of a new file; check an old file's, and cut off its unfinished line.

    Raises:
        ValueError: the old file's traces were collected in another way or from other data.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    # A run that was killed while it wrote the header has left a beginning of it.
    if not whole and json.dumps(header).encode().startswith(content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return
    found, wanted = _header(path), json.loads(json.dumps(header))
    differences = [
        f"{name} {old!r} instead of {new!r}" for name, old, new in _differences(found, wanted)
    ]
    if differences:
        fail(
            "path",
            "be a file of the same traces",
            f"{path} with {'; '.join(differences)}",
            "choose another file, or collect as before",
        )
    os.truncate(path, whole)


def _differences(found: Any, wanted: Any) -> list[tuple[str, Any, Any]]:
    """Return the settings in which two headers differ, with both values."""
    pairs = []
    for name in sorted({*found, *wanted}):
        old, new = found.get(name), wanted.get(name)
        if name == "config" and isinstance(old, dict):
            pairs += _differences(old, new)
        elif old != new:
            pairs.append((name, old, new))
    return pairs


def _header(path: Path) -> dict[str, Any]:
    """Return a file's header; refuse a file of another format."""
    with path.open("rb") as file:
        line = file.readline()
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        fail("path", f"be a file of {FORMAT!r}", str(path), "pass one that collect_traces wrote")
    assert isinstance(header, dict)
    return header


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a file, without an unfinished last line."""
    _header(path)
    with path.open("rb") as file:
        lines = file.readlines()[1:]
    with _as_written(path):
        records = [json.loads(line) for line in lines if line.endswith(b"\n")]
        for found in records:
            counts_of(found)
            found["question"], found["traces"]
    return records


@contextmanager
def _as_written(path: str | os.PathLike[str]) -> Iterator[None]:
    """Refuse a file whose lines have not what ``record`` writes."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        fail("path", "hold what collect_traces wrote", f"{path} ({error!r})", "collect it again")


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
