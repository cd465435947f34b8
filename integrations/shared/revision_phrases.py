"""Phrases that SD-Zero writes after a response, once it is known whether the response was right.

They are those of the official code (arXiv 2604.12002), which has some for Qwen and some for OLMo
models.  A phrase stands between two delimiters.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

DELIMITER = "\n\n"
CORRECT_PHRASE = "Let me rephrase the above solution."
WRONG_PHRASE = "Wait, this response is wrong. Let me correct it."  # for Qwen models, and others
OLMO_WRONG_PHRASE = "Wrong. I need to redo all."
PAPER_WRONG_PHRASE = "Wait, this response is not correct, let me start over."  # of no default


class Phrases(NamedTuple):
    """What follows a right response, and what follows a wrong one."""

    correct: str
    wrong: str

    def after(self, is_correct: bool) -> str:
        """Return the phrase that follows a response."""
        return self.correct if is_correct else self.wrong


QWEN = Phrases(CORRECT_PHRASE, WRONG_PHRASE)
# in the order in which the official code looks for them in a model's name
FAMILIES = {"qwen": QWEN, "olmo": Phrases(CORRECT_PHRASE, OLMO_WRONG_PHRASE)}


def phrases_for(
    model: str | PretrainedConfig, correct: str | None = None, wrong: str | None = None
) -> Phrases:
    """Return the phrases of a model's family; those of Qwen for a family that has none.

    The official code looks for the family in the model's name alone.  Here the configuration's
    ``model_type`` decides where it names a family, because a trained model's folder may be called
    anything.

    Args:
        model: a configuration, or the name or folder of a model.
        correct, wrong: phrases to take instead of the family's.
    """
    if isinstance(model, str):
        family = _family(_model_type(model), model)
    else:
        family = _family(model.model_type, model._name_or_path)
    return Phrases(
        family.correct if correct is None else correct, family.wrong if wrong is None else wrong
    )


def _family(*texts: str) -> Phrases:
    found = [FAMILIES[name] for text in texts for name in FAMILIES if name in text.lower()]
    return found[0] if found else QWEN


@functools.lru_cache
def _model_type(folder: str) -> str:
    """Return the model type in a folder's configuration; empty where there is none."""
    path = Path(folder) / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(found.get("model_type", ""))


def phrase_ids(tokenizer: PreTrainedTokenizerBase, phrase: str) -> list[int]:
    """Return the tokens of a phrase and its delimiters.

    Both phases use them: the teacher of the second reads what the first has trained on.
    """
    text = f"{DELIMITER}{phrase}{DELIMITER}"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def without_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Return a response without the special tokens at its end."""
    special = set(tokenizer.all_special_ids)
    length = len(ids)
    while length and ids[length - 1] in special:
        length -= 1
    return list(ids[:length])
