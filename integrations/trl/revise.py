"""How a batch of questions becomes revision traces: sample, verify, revise, verify again.

Sampled tokens are kept as they are.  They are decoded for the reward and the filters only, and
never encoded again, since that could give other tokens than the model sampled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from fused_sd.checks import check_positive_int
from fused_sd.integrations.shared.returned import entries, rewards
from fused_sd.integrations.shared.revision_phrases import phrase_ids, phrases_for, without_end
from fused_sd.integrations.trl.generators import Generate
from fused_sd.integrations.trl.trace_filters import before_stop, is_sycophantic, trim_repeats
from fused_sd.integrations.trl.traces import Trace, TraceCounts, chat_format_of, record

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class TraceConfig:
    """How traces are collected; defaults are those of the official code's script.

    Attributes:
        num_initial: the number of initial responses to each question.  The paper has 1.
        num_revisions: the number of revisions of each initial response.
        revise_correct: revise right responses too, as in the paper.
        correct_phrase, wrong_phrase: what the model reads after its response; None: the official
            phrase for the model's family, by the tokenizer's name or folder.
        reward_threshold: a response is right if its reward is above this, and wrong if it is not;
            without a verdict it is neither, and is left out.
        stop_strings: a response ends before the first of these, and is judged without what follows.
            The official code's further ones are the end tokens of its models.
        drop_sycophantic: leave out revisions that open by answering a user ("You're right").
            The official code cuts off such openings, which would split tokens.
        trim_repeats: reduce a block that a response repeats until its end to one copy.  Blocks are
            of tokens; the official code's are of characters.
        chat_template_kwargs: arguments of the chat template, as ``{"enable_thinking": False}``.
        source: describes what generates (model, temperature); a file is continued only from the
            same source.

    Raises:
        ValueError: a number is not positive.

    Examples:
        >>> from fused_sd.integrations.trl import TraceConfig
        >>> paper = TraceConfig(num_initial=1, num_revisions=1, revise_correct=True)
        >>> paper.reward_threshold
        0.5
    """

    num_initial: int = 3
    num_revisions: int = 3
    revise_correct: bool = False
    correct_phrase: str | None = None
    wrong_phrase: str | None = None
    reward_threshold: float = 0.5
    stop_strings: Sequence[str] = ("<|im_start|>", "Question:")
    drop_sycophantic: bool = True
    trim_repeats: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        check_positive_int("num_initial", self.num_initial)
        check_positive_int("num_revisions", self.num_revisions)


@dataclass
class _Response:
    """A sampled response and its verdict."""

    question: int
    ids: list[int]
    reward: float
    correct: bool


@dataclass
class Reviser:
    """Makes trace records from questions."""

    generate: Generate
    reward_func: RewardFunction
    tokenizer: PreTrainedTokenizerBase
    config: TraceConfig

    def revise(self, rows: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return one record for each question.

        Args:
            rows: the dataset's rows by their index.
        """
        config = self.config
        prompts = {index: self._prompt_ids(row["prompt"]) for index, row in rows.items()}
        tally = {index: TraceCounts(questions=1) for index in rows}
        traces: dict[int, list[Trace]] = {index: [] for index in rows}

        asked = [index for index in rows for _ in range(config.num_initial)]
        answers = self._respond(rows, [prompts[index] for index in asked], asked, tally)
        initials = [answer for answer in answers if answer is not None]
        for initial in initials:
            tally[initial.question].initial += 1
            tally[initial.question].initial_correct += initial.correct
            # The turn goes on after the response, so that its end token has to go.
            initial.ids = self._cut(without_end(self.tokenizer, initial.ids))
        chosen = [
            initial
            for initial in initials
            if config.revise_correct or not initial.correct
            for _ in range(config.num_revisions)
        ]
        contexts = [
            prompts[initial.question] + initial.ids + self._verdict(initial.correct)
            for initial in chosen
        ]
        revisions = self._respond(rows, contexts, [initial.question for initial in chosen], tally)
        for initial, revision in zip(chosen, revisions, strict=True):
            if revision is None:
                continue
            index = initial.question
            count = tally[index]
            count.revisions += 1
            count.revisions_correct += revision.correct
            count.revisions_of_wrong += not initial.correct
            count.corrected += revision.correct and not initial.correct
            if not revision.correct:
                continue
            trace = self._kept(index, rows[index], prompts[index], initial, revision, count)
            if trace in traces[index]:
                count.duplicates += 1
            elif trace is not None:
                traces[index].append(trace)
                count.kept += 1
        return [record(index, traces[index], tally[index]) for index in rows]

    def _kept(
        self,
        index: int,
        row: Mapping[str, Any],
        prompt_ids: list[int],
        initial: _Response,
        revision: _Response,
        count: TraceCounts,
    ) -> Trace | None:
        """Return the trace of a right revision, or None if a filter drops it."""
        body = without_end(self.tokenizer, revision.ids)
        if not body:
            count.empty += 1
            return None
        if self.config.drop_sycophantic and is_sycophantic(self._text(body)):
            count.sycophantic += 1
            return None
        return Trace(
            question=index,
            prompt=row["prompt"],
            prompt_ids=tuple(prompt_ids),
            initial_ids=tuple(initial.ids),
            phrase=self._phrase(initial.correct),
            verdict_ids=tuple(self._verdict(initial.correct)),
            revision_ids=tuple(self._cut(body) + revision.ids[len(body) :]),
            initial_correct=initial.correct,
            initial_reward=initial.reward,
            revision_reward=revision.reward,
            chat_template_kwargs=chat_format_of(row["prompt"], self.config.chat_template_kwargs),
        )

    def _respond(
        self,
        rows: Mapping[int, Mapping[str, Any]],
        contexts: list[list[int]],
        questions: list[int],
        tally: Mapping[int, TraceCounts],
    ) -> list[_Response | None]:
        """Sample a response to each context, and verify it; None where there is no verdict."""
        if not contexts:
            return []
        remedy = "keep the order and leave none out"
        sampled = entries("generate", self.generate(contexts), len(contexts), remedy=remedy)
        completions = [list(ids) for ids in sampled]
        for index, ids in zip(questions, completions, strict=True):
            tally[index].generated_tokens += len(ids)
        stops = self.config.stop_strings
        completions = [before_stop(ids, stops, self._raw_text) for ids in completions]
        chosen = [rows[index] for index in questions]
        columns = {name: [row[name] for row in chosen] for name in chosen[0] if name != "prompt"}
        texts = [self._text(ids) for ids in completions]
        given = self.reward_func(
            prompts=[row["prompt"] for row in chosen],
            completions=[
                text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
                for row, text in zip(chosen, texts, strict=True)
            ],
            **columns,
        )
        found: list[_Response | None] = []
        verdicts = rewards("reward_func", given, len(contexts))
        for index, ids, reward in zip(questions, completions, verdicts, strict=True):
            tally[index].undecided += reward is None
            is_right = reward is not None and reward > self.config.reward_threshold
            found.append(None if reward is None else _Response(index, ids, reward, is_right))
        return found

    def _prompt_ids(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        encoded: Any = self.tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self.config.chat_template_kwargs,
        )
        return list(encoded["input_ids"])

    def _phrase(self, correct: bool) -> str:
        given = self.config.correct_phrase, self.config.wrong_phrase
        return phrases_for(self.tokenizer.name_or_path, *given).after(correct)

    def _verdict(self, correct: bool) -> list[int]:
        return phrase_ids(self.tokenizer, self._phrase(correct))

    def _cut(self, ids: list[int]) -> list[int]:
        return trim_repeats(ids) if self.config.trim_repeats else ids

    def _raw_text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
