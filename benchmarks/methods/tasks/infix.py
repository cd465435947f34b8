"""Expressions such as ``a+b*(c-d)-e``: their values, and programs for them, right and wrong.

An error is a kind and the place of the character that is read wrongly:

    precedence   ``a+b*c`` is read as ``(a+b)*c``; the place is that of ``+``
    swapped      ``a-b`` is written ``ba-``
    forgotten    ``a+b`` is written ``ab``
    early        ``a+b`` is written ``a+b``, as in the question
    copied       ``(a+b)`` is written ``(ab+``; the place is that of ``(``
"""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from benchmarks.methods.tasks.stack import COPY, DROP, NOTHING, OPERATORS, SWAP

Error = tuple[str, int]

KINDS = ("precedence", "swapped", "forgotten", "early", "copied")
FILLER = 0.25  # the chance of a harmless word, and of another one behind it
EXCHANGE = 0.2  # the chance that two names that are operands stand in the other order


@dataclass(frozen=True)
class Tree:
    """A name, or an operator with two operands; ``place`` is where it stands in the text."""

    word: str
    place: int
    operands: tuple["Tree", ...] = ()

    @property
    def names(self) -> bool:
        """Whether both operands are names."""
        return not any(operand.operands for operand in self.operands)

    def value(self, inputs: Mapping[str, int]) -> int:
        """Return the value for these inputs."""
        if not self.operands:
            return inputs[self.word]
        first, second = (operand.value(inputs) for operand in self.operands)
        return OPERATORS[self.word](first, second)


@dataclass(frozen=True)
class Infix:
    """An expression with names of one letter, ``+``, ``-``, ``*`` and parentheses."""

    text: str

    @cached_property
    def names(self) -> list[str]:
        """The names, in the order of the text."""
        return [word for word in self.text if word.isalpha()]

    @cached_property
    def tree(self) -> Tree:
        """The expression as it is meant."""
        return self.read(())

    def read(self, errors: Collection[Error]) -> Tree:
        """Return the expression as it is read with errors of precedence."""
        return self._sum(0, errors)[0]

    def _sum(self, start: int, errors: Collection[Error]) -> tuple[Tree, int]:
        """Return the sum of products that begins at a place, and the place behind it."""
        tree, place = self._product(start, errors)
        while self.text[place : place + 1] in ("+", "-"):
            second, end = self._product(place + 1, errors)
            tree, place = Tree(self.text[place], place, (tree, second)), end
        return tree, place

    def _product(self, start: int, errors: Collection[Error]) -> tuple[Tree, int]:
        tree, place = self._factor(start, errors)
        while self.text[place : place + 1] == "*" or ("precedence", place) in errors:
            second, end = self._factor(place + 1, errors)
            tree, place = Tree(self.text[place], place, (tree, second)), end
        return tree, place

    def _factor(self, start: int, errors: Collection[Error]) -> tuple[Tree, int]:
        if self.text[start] != "(":
            return Tree(self.text[start], start), start + 1
        tree, place = self._sum(start + 1, errors)
        return tree, place + 1

    @cached_property
    def sites(self) -> list[tuple[Error, str]]:
        """The errors that can be made, each with the characters that a habit goes by."""
        return list(self._sites())

    def _sites(self) -> Iterator[tuple[Error, str]]:
        for place, word in enumerate(self.text):
            before, behind = self.text[place - 1 : place], self.text[place + 1 : place + 3]
            if word == "(":
                yield ("copied", place), behind[0]
            if word not in OPERATORS or not behind[0].isalpha():
                continue
            yield ("forgotten", place), word + behind[0]
            yield ("early", place), word + behind[0]
            if word != "*" and behind[1:] == "*":
                yield ("precedence", place), word + behind[0]
            if word == "-" and before.isalpha():
                yield ("swapped", place), before + behind[0]

    def program(
        self, rng: random.Random | None = None, errors: Collection[Error] = ()
    ) -> list[str]:
        """Return a program for the expression.

        Args:
            rng: Draws one of many programs, with harmless words; None: the shortest program.
            errors: What the program has wrong.
        """
        words = list(self._words(self.read(errors), rng, errors))
        if rng is None:
            return words
        return [word for each in words for word in (each, *fillers(rng))]

    def _words(
        self, tree: Tree, rng: random.Random | None, errors: Collection[Error]
    ) -> Iterator[str]:
        if not tree.operands:
            if ("copied", tree.place - 1) in errors:
                yield "("
            yield tree.word
            return
        swapped = ("swapped", tree.place) in errors
        exchanged = rng is not None and tree.names and rng.random() < EXCHANGE
        first, second = tree.operands
        if tree.names and (swapped or exchanged):
            first, second = second, first
        yield from self._words(first, rng, errors)
        if ("early", tree.place) in errors:
            yield tree.word
        yield from self._words(second, rng, errors)
        if exchanged and tree.word == "-" and not swapped:
            yield SWAP
        if not {("early", tree.place), ("forgotten", tree.place)} & set(errors):
            yield tree.word


def fillers(rng: random.Random) -> list[str]:
    """Return harmless words that may stand behind any word that leaves a value."""
    words: list[str] = []
    while rng.random() < FILLER:
        words += rng.choice([[NOTHING], [COPY, DROP]])
    return words


def draw(rng: random.Random, names: str, count: int) -> Infix:
    """Return an expression of ``count`` different names, half of the time with parentheses."""
    chosen = rng.sample(names, count)
    pair = rng.randrange(count - 1) if rng.random() < 0.5 else None
    text = ""
    for place, name in enumerate(chosen):
        text += rng.choice(list(OPERATORS)) if place else ""
        text += f"({name}" if place == pair else name
        text += ")" if pair is not None and place == pair + 1 else ""
    return Infix(text)
