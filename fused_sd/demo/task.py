"""The task: ``cat ->`` must be continued by ``cats``.  Questions, verdicts, feedback, split.

The feedback is what an environment with a manual would say: worked examples of other words.  It
never holds the word that was asked, and never a word that is held out.
"""

import random
from dataclasses import dataclass

from fused_sd.demo.words import NOUNS, plural

SPLIT_SEED = 1234  # one split for every seed of training, so that seeds can be compared


@dataclass(frozen=True)
class Split:
    """Words to train on and words never seen in training, neither asked nor as examples."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def split_words(num_held_out: int = 60) -> Split:
    """The fixed split of the list by word.

    Raises:
        ValueError: when too few words would be left on either side.
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
    """The bare prompt: nothing in it says that a plural is wanted."""
    return f"{word} ->"


def feedback(word: str, split: Split, rng: random.Random, num_examples: int = 4) -> str:
    """Worked examples, one a line, of training words other than ``word``."""
    others = [other for other in split.train if other != word]
    examples = rng.sample(others, num_examples)
    return "".join(f"{question(example)} {plural(example)}\n" for example in examples)


def answer(completion: str) -> str:
    """The answer in a completion: its first word, empty when there is none."""
    words = completion.split()
    return words[0] if words else ""


def is_right(word: str, completion: str) -> bool:
    """The verdict: the first word of the completion is exactly the plural."""
    return answer(completion) == plural(word)


def reward(prompts: list[str], completions: list[str], word: list[str], **_: object) -> list[float]:
    """The verdicts as TRL asks for them: 1.0 for a right answer, 0.0 for a wrong one."""
    return [float(is_right(asked, said)) for asked, said in zip(word, completions)]


def training_rows(split: Split, seed: int, num_examples: int = 4) -> list[dict[str, str]]:
    """One row a training word: the bare prompt, and the feedback the teacher will see."""
    rng = random.Random(seed)
    return [
        {
            "prompt": question(word),
            "privileged_context": feedback(word, split, rng, num_examples),
            "word": word,
        }
        for word in split.train
    ]
