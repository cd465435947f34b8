"""Images and videos in the teacher's prompt: those of the student, as verl has read them already.

verl's agent loop runs the processor once for each sample.  It leaves the pixels in
``multi_modal_inputs``, the tokens that stand for each image in the prompt, and for most models
positions in three dimensions (M-RoPE), which show the image's height and width.

The teacher's prompt must hold the same images in the same order.  The pixels are then read from the
student's column: nobody makes or sends them again, and the trainer never receives them.  What the
teacher's prompt needs is in the student's tokens and positions.

Dimension key:  L tokens, L' tokens of the teacher's sequence
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from verl.utils.tokenizer import (
    build_multimodal_processor_inputs,
    get_processor_token_id,
    normalize_token_ids,
)
from verl.utils.tokenizer.chat_template import apply_chat_template

from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout

KINDS = {1: "image", 2: "video"}  # transformers' numbers in mm_token_type_ids
Messages = Sequence[Mapping[str, Any]]


def chat_ids(
    processor: Any, messages: Messages, student: Rollout | None, settings: Mapping[str, Any]
) -> list[int]:
    """Return the tokens of chat messages as a processor writes them, with the generation header.

    Args:
        processor: a processor of transformers.
        student: its prompt has the messages' images; None: there are none.
        settings: arguments of the chat template.

    Raises:
        ValueError: the messages have other images than the student's prompt, or its tokens are not
            those of its messages.
    """
    ids = _template_ids(processor, messages, settings)
    shown = _media(messages)
    if not shown:
        return ids
    own = [] if student is None else _media(student.prompt)
    if student is None or not _are_same(shown, own):
        fail(
            "the teacher's prompt",
            "hold the images and videos of the student's prompt, in their order",
            f"{len(shown)} of them, not the student's {len(own)}",
            "write contexts of text, and keep the question's parts",
        )
    assert student is not None
    written = iter(_written(processor, student, settings))
    expanded: list[int] = []
    places = _placeholders(processor)
    for token in ids:
        expanded.extend(next(written, [token]) if token in places else [token])
    return expanded


def _template_ids(processor: Any, messages: Messages, settings: Mapping[str, Any]) -> list[int]:
    """Return the tokens of messages with one placeholder for each image, as verl's agent loop."""
    text = apply_chat_template(
        processor, list(messages), tokenize=False, add_generation_prompt=True, **settings
    )
    # without images the processor leaves the placeholders as they are
    return normalize_token_ids(
        build_multimodal_processor_inputs(processor, text=[text])["input_ids"]
    )


def _media(messages: Messages) -> list[Mapping[str, Any]]:
    """Return the messages' parts that are no text."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") != "text"]


def _are_same(some: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two lists of parts are the same; contexts hand on the objects of the prompt."""
    try:
        return list(some) == list(others)
    except (RuntimeError, ValueError):  # copies of arrays, which have no truth value
        return False


def _placeholders(processor: Any) -> dict[int, int]:
    """Return the ids of the tokens that stand for images and videos, with their kinds."""
    found = {get_processor_token_id(processor, name): kind for kind, name in KINDS.items()}
    return {token: kind for token, kind in found.items() if token is not None}


def _written(processor: Any, student: Rollout, settings: Mapping[str, Any]) -> list[list[int]]:
    """Return the tokens that the rollout wrote in the place of each of the template's placeholders.

    The text between the placeholders is the same on both sides.  Placeholders are tokens of their
    own, so that text beside them is tokenised as it would be alone.
    """
    places, read = _placeholders(processor), student.prompt_ids
    between: list[list[int]] = [[]]
    for token in _template_ids(processor, student.prompt, settings):
        if token in places:
            between.append([])
        else:
            between[-1].append(token)
    written, start = [], len(between[0])
    fits = read[:start] == between[0]
    for n, text in enumerate(between[1:], start=2):
        is_last = n == len(between)
        end = len(read) - len(text) if is_last else _find(read, text, start + 1)
        fits = fits and start < end and read[end : end + len(text)] == text
        written.append(read[start:end])
        start = end + len(text)
    if not fits:
        fail(
            "raw_prompt",
            "be tokenised by the teacher as it was by the rollout, around its images",
            f"{len(between) - 1} placeholders in {student.row}",
            "give both the same data.apply_chat_template_kwargs",
        )
    return written


def _find(tokens: list[int], wanted: list[int], start: int) -> int:
    """Return where a list of tokens begins in another; -1 if it is not in there."""
    for place in range(start, len(tokens) - len(wanted) + 1):
        if tokens[place : place + len(wanted)] == wanted:
            return place
    return -1


@dataclass(frozen=True, eq=False)
class Vision:
    """The images and videos of a batch, as the students' tokens and positions show them.

    Attributes:
        processor: a processor that verl has loaded.
        input_ids: (L,) int64 of each sample, prompt and response.
        position_ids: (L,) or (4, L) of each sample, by verl's agent loop.
    """

    processor: Any
    input_ids: Sequence[Tensor]
    position_ids: Sequence[Tensor]

    def has_any(self, sample: int) -> bool:
        """Whether a sample has an image or a video."""
        places = torch.tensor(list(_placeholders(self.processor)))
        return bool(torch.isin(self.input_ids[sample], places).any())

    def positions(self, sample: int, ids: Tensor) -> Tensor:
        """Return the positions of a sequence with a sample's images, by verl's own function.

        Args:
            ids: (L',) int64.

        Returns:
            (L',), or (L', 4) for a model with M-RoPE: text, time, height, width.

        Raises:
            ValueError: the sequence has other images than the sample.
        """
        own = self.input_ids[sample]
        if torch.equal(ids, own):
            return self.position_ids[sample].transpose(0, -1)
        runs = [_lengths(self.processor, tokens) for tokens in (ids, own)]
        if runs[0] != runs[1]:
            fail(
                "the teacher's sequence",
                "hold the images and videos of the student's, each once and in their order",
                f"(kind, tokens) {runs[0]} instead of {runs[1]}",
                "leave none out of the prompt, and repeat no response that has one",
            )
        return self._computed(sample, ids).transpose(0, -1)

    def check(self, sample: int) -> None:
        """Make sure that verl's function gives a sample the positions that it has.

        Raises:
            ValueError: the agent loop computes positions otherwise.
        """
        own, found = self.position_ids[sample], self._computed(sample, self.input_ids[sample])
        if not torch.equal(own, found):
            fail(
                "position_ids",
                "be those of verl's AgentLoopWorker, which the teacher's are computed with",
                f"{own[..., -1].tolist()} at the last token, not {found[..., -1].tolist()}",
                "use an agent loop that leaves _compute_position_ids as it is",
            )

    def _computed(self, sample: int, ids: Tensor) -> Tensor:
        """Return what verl's agent loop would write in ``position_ids``: (L',) or (4, L')."""
        # imported here because verl's workers import this module with the contexts, too
        from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

        inputs: dict[str, Any] = dict(self._grids(sample))
        # verl fills in the types, if the processor says with this key that its model reads them
        inputs["mm_token_type_ids"] = ()
        found: Tensor = AgentLoopWorker._compute_position_ids(
            SimpleNamespace(processor=self.processor),
            ids[None],
            torch.ones_like(ids)[None],
            inputs,
        )
        return found[0]

    def _grids(self, sample: int) -> dict[str, Tensor]:
        """Return each image's patches in time, height and width, by verl's names.

        A frame of a video that has tokens of its own, as Qwen3-VL's, is a video of one frame here.
        """
        positions = self.position_ids[sample]
        if positions.dim() == 1:  # a model whose positions know no height and width
            return {}
        merged = self.processor.image_processor.merge_size  # patches a token, in each direction
        grids: dict[str, list[Tensor]] = {}
        for kind, start, end in _runs(self.processor, self.input_ids[sample]):
            place = positions[-2:, start:end]
            height, width = (place.amax(1) - place.amin(1) + 1).tolist()
            frames, rest = divmod(end - start, height * width)
            if rest:
                fail(
                    "position_ids",
                    "be those of M-RoPE",
                    f"{end - start} tokens of {height} x {width}",
                    "use an agent loop of verl's, whose positions are right",
                )
            grid = torch.tensor([frames, height * merged, width * merged])
            grids.setdefault(f"{KINDS[kind]}_grid_thw", []).append(grid)
        return {name: torch.stack(found) for name, found in grids.items()}


def _runs(processor: Any, ids: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield the kind, start and end of each run of tokens that stand for one image or frame."""
    kinds = torch.zeros_like(ids)
    for token, kind in _placeholders(processor).items():
        kinds[ids == token] = kind
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    end = 0
    for kind, count in zip(values.tolist(), counts.tolist()):
        start, end = end, end + count
        if kind:
            yield kind, start, end


def _lengths(processor: Any, ids: Tensor) -> list[tuple[int, int]]:
    return [(kind, end - start) for kind, start, end in _runs(processor, ids)]
