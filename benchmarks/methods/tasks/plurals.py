"""Plurals with a verdict: ``The plural of "cat" is "`` is continued by ``cats"``.

The model is SmolLM2.  Sampled at temperature 1, about a third of its answers are right, so that
every method has something to learn from.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.tasks.task import Question, Task
from fused_sd.demo import task as demo
from fused_sd.demo.model import load, model_directory
from fused_sd.demo.words import plural

NUM_HELD_OUT, NUM_VALIDATION = 60, 20
MAX_RESPONSE = 5
VERSION = 1
LORA_RANK = 16
PROMPT = 'The plural of "{word}" is "'
HINT_MARKS = re.compile(r"->|reference|solution|correct|wrong|rephrase", re.IGNORECASE)
TEMPLATES = {
    "hinted": {"reprompt_template": "{privileged}{prompt}"},
    "sibling": {
        "solution_template": "{successful_previous_attempt}",
        "reprompt_template": "{prompt}{solution}\n{feedback}{prompt}",
    },
    "verdict": {},
}


def is_right(prompt: str, response: str) -> bool:
    """Return whether the response up to its quotation mark is exactly the plural."""
    word = prompt.split('"')[1]
    return response.split('"')[0] == plural(word)


def _examples(word: str, others: Sequence[str], rng: random.Random) -> str:
    """Return four other words' questions with their answers."""
    shown = rng.sample([other for other in others if other != word], 4)
    return "".join(f'{PROMPT.format(word=other)}{plural(other)}".\n' for other in shown)


def make(base: int = 0) -> Task:
    """Return the demo's words as a task; some of its training words are the validation part.

    There is one base model and one split, whatever ``base`` is.
    """
    split = demo.split_words(NUM_HELD_OUT)
    rng = random.Random(demo.SPLIT_SEED)

    def make_question(word: str) -> Question:
        bare, right = PROMPT.format(word=word), plural(word)
        examples = _examples(word, split.train, rng)
        return Question(bare, solution=examples, answer=f'{bare}{right}".\n', response=f'{right}"')

    parts = {
        "train": split.train[NUM_VALIDATION:],
        "validation": split.train[:NUM_VALIDATION],
        "held_out": split.held_out,
    }
    return Task(
        name="plurals",
        base=base,
        questions={name: [make_question(word) for word in words] for name, words in parts.items()},
        load=_load,
        is_right=is_right,
        is_leaking=lambda response: HINT_MARKS.search(response) is not None,
        max_response=MAX_RESPONSE,
        templates=TEMPLATES,
        lora_rank=LORA_RANK,
    )


def _load(cache: Path) -> tuple[Any, Any]:
    return load(model_directory(cache), "cpu")
