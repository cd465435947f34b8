"""A tiny Qwen3-VL with a processor, made without a download, for pictures of 16 x 16 pixels.

The vision encoder reads patches of 4 x 4 pixels and gives the language model a token for each
square of 8 x 8.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from benchmarks.methods.tasks.pretrain import padded
from benchmarks.methods.tasks.tokens import character_tokenizer

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
PATCH, MERGED = 4, 2  # pixels on a patch's side, and patches on the side of a token's square
PIXELS = 256
TOKENS = PIXELS // (PATCH * MERGED) ** 2  # the language model's tokens of a picture
WIDTH, VISION_WIDTH = 64, 48
# an image, then text: the model continues a conversation as it would continue a plain prompt
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    f"{START}{IMAGE}{END}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class PictureProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without videos, whose own processor would need torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """Accept that there is no processor of videos."""


def picture_processor(symbols: str) -> PictureProcessor:
    """Return a processor with a token for each symbol, and tokens for images."""
    tokenizer = character_tokenizer(symbols)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, IMAGE, VIDEO]})
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=MERGED,
        min_pixels=PIXELS,
        max_pixels=PIXELS,
    )
    return PictureProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=None, chat_template=TEMPLATE
    )


def tiny_vision_model(tokenizer: Any) -> Qwen3VLForConditionalGeneration:
    """Return a random model for the tokenizer of ``picture_processor``."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "spatial_merge_size": MERGED,
        "in_channels": 3,
        "depth": 1,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 3 * VISION_WIDTH,
        "num_heads": 3,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": PIXELS // PATCH**2,
        "deepstack_visual_indexes": [0],
        # from the default of 0.02 the encoder is so faint that the text ignores it for long
        "initializer_range": 0.06,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(START),
        vision_end_token_id=token(END),
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)


def pictured(
    processor: PictureProcessor, texts: Sequence[tuple[str, str]], images: Sequence[Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a model's inputs and the labels (B, L); only responses have a loss.

    Args:
        processor: The processor.
        texts: Contexts, without their pictures, and responses.
        images: The picture before each context.
    """
    shown = f"{START}{IMAGE * TOKENS}{END}"
    tokenizer = processor.tokenizer
    ids, labels = padded(tokenizer, [(shown + context, said) for context, said in texts])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "mm_token_type_ids": (ids == processor.image_token_id).long(),
        **processor.image_processor(list(images), return_tensors="pt"),
    }
    return inputs, labels
