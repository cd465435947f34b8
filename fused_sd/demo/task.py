"""Define the task, to continue ``cat ->`` by ``cats``: prompts, verdicts, feedback and the split.

The feedback is what only the teacher reads: worked examples of other words.  It never contains the
word that is asked, nor a held-out word.
"""

import random
from dataclasses import dataclass

from fused_sd.demo.words import NOUNS, plural

SPLIT_SEED = 1234  # the same split for all seeds of training, so that they can be compared


@dataclass(frozen=True)
class Split:
    """Hold the words to train on, and the words that training never sees."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def split_words(num_held_out: int = 60) -> Split:
    """Return the fixed split of the nouns.

    Raises:
        ValueError: ``num_held_out`` is 0 or more than half of the nouns.
    """
    if not 1 <= num_held_out <= len(NOUNS) // 2:
        raise ValueError(
            f"num_held_out must be between 1 and {len(NOUNS) // 2} (half of the list), "
            f"got {num_held_out}; pass 60 for the demo's own split"
        )
    words = list(NOUNS)
    random.Random(SPLIT_SEED).shuffle(words)
    return Split(train=tuple(words[num_held_out:]), held_out=tuple(words[:num_held_out]))


def question(word: str) -> str:
    """Return the bare prompt, which does not say that a plural is wanted."""
    return f"{word} ->"


def feedback(word: str, split: Split, rng: random.Random, num_examples: int = 4) -> str:
    """Return worked examples, one on each line, of training words other than ``word``."""
    others = [other for other in split.train if other != word]
    examples = rng.sample(others, num_examples)
    return "".join(f"{question(example)} {plural(example)}\n" for example in examples)


def is_right(word: str, completion: str) -> bool:
    """Whether the completion's first word is exactly the plural."""
    return completion.split()[:1] == [plural(word)]


def reward(prompts: list[str], completions: list[str], word: list[str], **_: object) -> list[float]:
    """Score completions for TRL: 1.0 for a right answer, 0.0 for a wrong one."""
    return [float(is_right(asked, said)) for asked, said in zip(word, completions)]


def training_rows(split: Split, seed: int, num_examples: int = 4) -> list[dict[str, str]]:
    """Return a row for each training word: the bare prompt and the teacher's feedback."""
    rng = random.Random(seed)
    return [
        {
            "prompt": question(word),
            "privileged_context": feedback(word, split, rng, num_examples),
            "word": word,
        }
        for word in split.train
    ]
