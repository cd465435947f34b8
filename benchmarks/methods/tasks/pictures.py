"""Addition of two numbers that stand in a picture, for a model that sees.

The picture shows the digits of ``47+85``, two above two, each a little moved, with other ink and
with noise.  All else is as in ``addition``, citing variant: the answer is ``12;132``, the text
errs by habit where it has no hint, and half of its hinted responses begin with ``&``, as if it said
"according to the reference".  The verifier passes over that mark.  A response follows one of these
contexts, where P is the picture:

    P=                       the question alone, which the student reads
    P[12;132]=               with a solution
    P[132]=                  with the answer alone
    P?                       a question for the numbers themselves, answered by ``47+85``
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.methods.tasks.addition import (
    HINTED,
    PARTS,
    SYMBOLS,
    TEMPLATES,
    Sum,
    World,
    is_leaking,
    is_right,
)
from benchmarks.methods.tasks.pretrain import Schedule, fitted, kept
from benchmarks.methods.tasks.task import Question, Task
from benchmarks.methods.tasks.vision import picture_processor, pictured, tiny_vision_model

ASK, READ = "=", "?"
# shares of the contexts in the text
MIX = {"plain": 0.4, "solution": 0.15, "answer": 0.25, "reading": 0.2}
HINTS = ("solution", "answer")
SCHEDULE = Schedule(steps=400)
RATE = 4e-3
MAX_RESPONSE = 8  # tokens: a citation, a derivation and the end
VERSION = 1  # raise it with every change of the weights or questions: it names the folders
CELL = 8  # pixels on the side of a digit's square
NOISE = 12.0  # standard deviation of the brightness, of 255
GLYPHS = (  # 5 x 7 pixels for each digit, a row of bits each
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
DIGITS = [
    numpy.array([[int(bit) for bit in row] for row in glyph.split()], dtype=float)
    for glyph in GLYPHS
]


def drawn(pair: Sum, rng: random.Random) -> Image.Image:
    """Return a picture of two numbers, drawn by hand: no two are alike."""
    noise = numpy.random.default_rng(rng.getrandbits(64))
    pixels = numpy.zeros((2 * CELL, 2 * CELL))
    for place, digit in enumerate(f"{pair.first}{pair.second}"):
        glyph = DIGITS[int(digit)]
        height, width = glyph.shape
        top = place // 2 * CELL + rng.randint(0, CELL - height)
        left = place % 2 * CELL + rng.randint(0, CELL - width)
        pixels[top : top + height, left : left + width] = glyph * rng.uniform(150, 255)
    return _image(pixels + noise.normal(0.0, NOISE, pixels.shape))


def _image(pixels: NDArray[Any]) -> Image.Image:
    """Return a picture in the three channels that a model reads, from grey levels."""
    grey = pixels.clip(0, 255).astype(numpy.uint8)
    return Image.fromarray(numpy.repeat(grey[:, :, None], 3, axis=2))


def context(kind: str, pair: Sum) -> str:
    """Return the text after the picture, of one kind in ``MIX``."""
    if kind == "reading":
        return READ
    return HINTED.format(hint=getattr(pair, kind), question=ASK) if kind in HINTS else ASK


@dataclass(frozen=True)
class Gallery:
    """The pictures, questions and habits of one base model.

    Attributes:
        world: The numbers, their habits and the text's responses, which addition has too.
    """

    world: World

    def questions(self, pairs: Sequence[Sum]) -> list[Question]:
        """Return questions, each with one picture that does not change."""
        return [
            Question(
                prompt=ASK,
                solution=pair.solution,
                answer=pair.answer,
                response=pair.solution,
                images=(drawn(pair, random.Random(f"{self.world.base} {pair.question}")),),
                asked=pair.question,
            )
            for pair in pairs
        ]

    def draw(
        self, rng: random.Random, size: int
    ) -> tuple[list[tuple[str, str]], list[Image.Image]]:
        """Return contexts and responses of the pre-training text, and the pictures before them."""
        kinds = rng.choices(list(MIX), list(MIX.values()), k=size)
        pairs = rng.choices(self.world.parts["pretraining"], k=size)
        texts = [
            (context(kind, pair), self.response(kind, pair, rng))
            for kind, pair in zip(kinds, pairs)
        ]
        return texts, [drawn(pair, rng) for pair in pairs]

    def response(self, kind: str, pair: Sum, rng: random.Random) -> str:
        """Return the text's response after a context of one kind."""
        if kind == "reading":
            return pair.question.rstrip("=")
        return self.world.response(kind, pair, rng)

    def base_model(self, cache: Path) -> Path:
        """Return the folder of the base model, which the first call trains."""
        processor = picture_processor(SYMBOLS)

        def batches(rng: random.Random, count: int) -> tuple[dict[str, Tensor], Tensor]:
            texts, images = self.draw(rng, count)
            return pictured(processor, texts, images)

        def trained() -> tuple[Any]:
            new = partial(tiny_vision_model, processor.tokenizer)
            return (fitted(new, batches, SCHEDULE, rate=RATE, seed=self.world.base),)

        return kept(cache / f"pictures-{VERSION}-{self.world.base}", trained)

    def load(self, cache: Path) -> tuple[Any, Any]:
        """Return the base model in fp32 and its processor."""
        folder = self.base_model(cache)
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return model, picture_processor(SYMBOLS)


def make(base: int) -> Task:
    """Return the task of one base model."""
    gallery = Gallery(World(base, cited=True))
    return Task(
        name="pictures",
        base=base,
        questions={name: gallery.questions(gallery.world.parts[name]) for name in PARTS},
        load=gallery.load,
        is_right=is_right,
        is_leaking=is_leaking,
        max_response=MAX_RESPONSE,
        templates={name: TEMPLATES[name] for name in ("hinted", "sibling")},
    )
