"""What a dataset must have before a trainer starts."""

import warnings
from typing import Any

from datasets import IterableDataset
from transformers import ProcessorMixin

from fused_sd.checks import fail


def check_privileged(name: str, dataset: Any) -> None:
    """Refuse a dataset that does not say what only the teacher may see.

    Args:
        name: of the trainer.
        dataset: a dataset; a stream may not know its columns.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "privileged_context" not in columns:
        fail(
            "train_dataset",
            f"have a column privileged_context for {name}, what only the teacher may see",
            f"columns {', '.join(columns)}",
            "add the reference answer, solution or demonstration under that name",
        )


def check_modalities(name: str, dataset: Any, processing_class: Any) -> None:
    """Refuse images that a text model would not see; warn of what GRPOTrainer does not read."""
    columns = set(getattr(dataset, "column_names", None) or ())
    images = [f"a column {name!r}" for name in sorted(columns & {"image", "images"})]
    is_stream = isinstance(dataset, IterableDataset)
    first = {} if is_stream or not len(dataset) else dataset[0]
    if _shows_images(first.get("prompt")):
        images.append("images in its prompts")
    if images and not isinstance(processing_class, ProcessorMixin):
        fail(
            "processing_class",
            f"be a processor, for the dataset has {images[0]}",
            type(processing_class).__name__,
            "pass a vision-language model and its processor, or remove the column",
        )
    if others := sorted(columns & {"video", "videos", "audio", "audios"}):
        warnings.warn(
            f"{name} reads no {', '.join(others)}: such columns reach the rewards alone",
            stacklevel=3,
        )


def _shows_images(prompt: Any) -> bool:
    """Return whether a prompt's messages hold images, which a text template would not show."""
    contents = [] if isinstance(prompt, str) else [turn["content"] for turn in prompt or ()]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") == "image" for part in parts)
