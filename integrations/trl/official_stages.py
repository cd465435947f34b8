"""The two stages of SD-Zero's official phase 1, string by string and token by token.

``split_traces`` makes stages of the traces as they were sampled.  The official code
(princeton-pli/Self-Distillation-Zero, ``prepare_data.py`` and ``sft.py``) makes them of texts:

* it cuts a loop of characters at the end of a response, and a revision's opening that answers a
  user, and encodes the text that is left again;
* it trains with another system message than it collects with;
* in the second stage the user's turn holds the problem, the initial response and the phrase, and
  the assistant's turn holds the revision alone.  Where traces are collected and in phase 2 the
  model reads response and phrase in its own turn;
* a response that was cut off gets an end token, too.

For the official run, collect with ``collection_prompt`` and
``TraceConfig(drop_sycophantic=False, trim_repeats=False)``, because texts are cleaned here.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from fused_sd.integrations.shared.revision_phrases import DELIMITER
from fused_sd.integrations.shared.sd_zero_prompts import Messages, problem_of, training_prompt
from fused_sd.integrations.trl.srt_stages import split_traces
from fused_sd.integrations.trl.trace_filters import trim_repeats
from fused_sd.integrations.trl.traces import Trace

END = "<|im_end|>"  # behind every response, whatever the model's end token is
YOU_ARE_RIGHT = r"you(?:'re| are)\s+(?:absolutely\s+)?right"
REPLY = re.compile(
    rf"(?:{YOU_ARE_RIGHT}\s+to\s+[^.!?\n]*[.!?]"
    rf"|(?:(?:yes|indeed)[,!.]?\s+)?{YOU_ARE_RIGHT}\s*[\u2014\-,:.]+"
    r"|thank\s+you\s+for[^.!?\n]*[.!?]"
    r"|great\s+question[^.!?\n]*?[.!?\u2014\-]"
    r"|(?:good|nice)\s+(?:catch|point|observation)[^.!?\n]*?[.!?\u2014\-])\s*",
    re.IGNORECASE,
)


def official_stages(
    traces: Sequence[Trace],
    tokenizer: PreTrainedTokenizerBase,
    num_revision_traces: int = 1000,
    *,
    task: str = "math",
    seed: int = 0,
) -> dict[str, list[Trace]]:
    """Return the traces of both stages for ``sequential_srt``, as the official code writes them.

    Args:
        traces: what ``collect_traces`` returned.
        tokenizer: encodes the texts; its chat template writes the prompts.
        num_revision_traces: of the second stage.
        task: "math" or "code", which have different system messages.
        seed: of the random order.

    Raises:
        ValueError: a stage is left without traces, or a prompt does not end with a user's text.
    """
    maker = _Maker(tokenizer, task)
    different: dict[tuple[str, str, str], Trace] = {}
    for trace in traces:
        different.setdefault(maker.texts(trace), trace)
    stages = split_traces(list(different.values()), num_revision_traces, seed=seed)
    return {
        "generation": [maker.generation(trace) for trace in stages["generation"]],
        "revision": [maker.revision(trace) for trace in stages["revision"]],
    }


def without_loop(text: str) -> str:
    """Reduce a block of 10 to 1500 characters that a text repeats until its end to one copy."""
    return "".join(trim_repeats(text, min_block=10, max_block=1500))


def without_reply(text: str) -> str:
    """Cut openings that answer a user; what follows then begins with a capital letter."""
    text = text.lstrip()
    kept = text
    while (opening := REPLY.match(kept)) is not None:
        kept = kept[opening.end() :].lstrip()
    return kept if kept == text else kept[:1].upper() + kept[1:]


class _Maker:
    """Writes traces in the official form."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
        self.tokenizer, self.task = tokenizer, task

    def texts(self, trace: Trace) -> tuple[str, str, str]:
        """Return the problem, the initial response and the revision, cleaned."""
        initial, revision = (
            without_loop(str(self.tokenizer.decode(list(ids), skip_special_tokens=True)))
            for ids in (trace.initial_ids, trace.revision_ids)
        )
        return problem_of(trace.prompt, self.task), initial, without_reply(revision)

    def generation(self, trace: Trace) -> Trace:
        """Return the first stage's trace: the assistant's turn holds everything."""
        problem, initial, revision = self.texts(trace)
        phrase = f"{DELIMITER}{trace.phrase}{DELIMITER}"
        return self._encoded(trace, problem, [initial, phrase, revision])

    def revision(self, trace: Trace) -> Trace:
        """Return the second stage's trace: the assistant's turn holds the revision alone."""
        problem, initial, revision = self.texts(trace)
        shown = DELIMITER.join((problem, initial, trace.phrase))
        return self._encoded(trace, shown, ["", "", revision])

    def _encoded(self, trace: Trace, shown: str, turn: Sequence[str]) -> Trace:
        """Return a trace of a user's text and the parts of the assistant's turn.

        As in TRL's SFTTrainer, prompt and turn are encoded as one text, and the tokens behind as
        many as the prompt has alone have loss.
        """
        messages: Messages = training_prompt(shown, self.task)
        prompt: Any = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            **(trace.chat_template_kwargs or {}),
        )
        whole = self._ids(prompt + self._ended("".join(turn)))
        # Where a token holds the end of one part and the beginning of the next, the line between
        # them is one token off: it decides about logged metrics alone.
        lengths = [len(self._ids(text)) for text in accumulate(turn[:2], initial=prompt)]
        first, second, third = (min(n, len(whole) - 1) for n in accumulate(lengths, max))
        return replace(
            trace,
            prompt=messages,
            prompt_ids=tuple(whole[:first]),
            initial_ids=tuple(whole[first:second]),
            verdict_ids=tuple(whole[second:third]),
            revision_ids=tuple(whole[third:]),
        )

    def _ended(self, text: str) -> str:
        text += END if END in self.tokenizer.get_vocab() else ""
        end = str(self.tokenizer.eos_token)
        return text if text.endswith(end) else text + end

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])
