"""A task with images: how many shapes of a colour are in a picture."""

import random
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from PIL import ImageDraw

COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f77b4", "orange": "#ff7f0e"}
SHAPES = ("circle", "square", "triangle")
CELLS, CELL = 4, 56  # a picture has 4 x 4 places of 56 x 56 pixels
MAX_SHAPES = 9
FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
        "privileged_context": Value("string"),
        "answer": Value("string"),
    }
)


def pictures(num: int, *, seed: int = 0) -> Dataset:
    """Make a dataset of chat prompts, ``images``, a description as context, and answers."""
    rng = random.Random(seed)
    return Dataset.from_list([_question(rng) for _ in range(num)], features=FEATURES)


def _question(rng: random.Random) -> dict[str, Any]:
    places = rng.sample(range(CELLS * CELLS), rng.randint(3, MAX_SHAPES))
    drawn = [(place, rng.choice(SHAPES), rng.choice(list(COLOURS))) for place in sorted(places)]
    colour = rng.choice(list(COLOURS))
    count = sum(own == colour for _, _, own in drawn)
    text = f"How many {colour} shapes are in the picture? End with the answer as a number."
    rows = "; ".join(
        f"row {place // CELLS + 1}, column {place % CELLS + 1}: a {own} {shape}"
        for place, shape, own in drawn
    )
    return {
        "prompt": [{"role": "user", "content": text}],
        "images": [draw(drawn)],
        "privileged_context": f"The picture holds, {rows}. So {count} are {colour}: {count}.",
        "answer": str(count),
    }


def draw(shapes: list[tuple[int, str, str]]) -> Picture.Image:
    """Draw shapes on white: a place, the shape's name and its colour's for each."""
    picture = Picture.new("RGB", (CELLS * CELL, CELLS * CELL), "white")
    pen = ImageDraw.Draw(picture)
    for place, shape, colour in shapes:
        left, top = place % CELLS * CELL + 8, place // CELLS * CELL + 8
        right, bottom = left + CELL - 16, top + CELL - 16
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        else:
            corners = [(left, bottom), (right, bottom), ((left + right) / 2, top)]
            pen.polygon(corners, fill=COLOURS[colour])
    return picture
