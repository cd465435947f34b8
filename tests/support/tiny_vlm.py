"""A tiny random vision-language model of each family, with a processor, made without a download."""

import numpy
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<pad>",
    "<eos>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<boi>",
    "<eoi>",
    "<image_soft_token>",
)
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GEMMA_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<boi>")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
VISION = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}


def image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """Random pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype="uint8")
    return Image.fromarray(pixels)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the families' special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["What is in the picture? It is red."] * 4, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
    return made


def qwen_processor(family: str):
    """The processor of Qwen2.5-VL or Qwen3-VL, for images of a few patches."""
    words = tokenizer()
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    pixels = transformers.Qwen2VLImageProcessorPil(**sizes, min_pixels=64, max_pixels=1024)
    name = "Qwen2_5_VLProcessor" if family == "Qwen2.5-VL" else "Qwen3VLProcessor"
    # A video processor needs torchvision, which no test does; the class insists on one.
    unchecked = {"check_argument_for_proper_class": lambda *_: None}
    made = type(name, (getattr(transformers, name),), unchecked)(
        image_processor=pixels, tokenizer=words, video_processor=None, chat_template=QWEN_TEMPLATE
    )
    return made


def qwen_model(family: str, words: PreTrainedTokenizerFast):
    """Qwen2.5-VL or Qwen3-VL with two layers on each side."""
    ids = {
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": words.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
    }
    text = {
        **TEXT,
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": None,
    }
    if family == "Qwen2.5-VL":
        config = transformers.Qwen2_5_VLConfig(
            text_config={
                **text,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                },
            },
            vision_config={
                **VISION,
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **ids,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    config = transformers.Qwen3VLConfig(
        text_config={
            **text,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            **VISION,
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **ids,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def gemma_processor():
    """The processor of Gemma 3: four soft tokens for an image."""
    words = tokenizer()
    words.boi_token, words.eoi_token, words.image_token = "<boi>", "<eoi>", "<image_soft_token>"
    for name in ("boi", "eoi", "image"):
        setattr(
            words, f"{name}_token_id", words.convert_tokens_to_ids(getattr(words, f"{name}_token"))
        )
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return transformers.Gemma3Processor(
        image_processor=pixels, tokenizer=words, chat_template=GEMMA_TEMPLATE, image_seq_length=4
    )


def gemma_model(words: PreTrainedTokenizerFast):
    """Gemma 3 with two layers on each side."""
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            "head_dim": 8,
            "vocab_size": len(words),
            "pad_token_id": words.pad_token_id,
            "eos_token_id": words.eos_token_id,
            "bos_token_id": None,
            "query_pre_attn_scalar": 8,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_id=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_id=words.convert_tokens_to_ids("<boi>"),
        eoi_token_id=words.convert_tokens_to_ids("<eoi>"),
        eos_token_id=words.eos_token_id,
    )
    made = transformers.Gemma3ForConditionalGeneration(config)
    # zero when it is made, so that images would change nothing
    torch.nn.init.normal_(made.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return made


FAMILIES = ("Qwen2.5-VL", "Qwen3-VL", "Gemma3")


def tiny_vlm(family: str, dtype: torch.dtype = torch.float64):
    """Return a model with the same random weights each time, and a processor."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("the tiny models' configurations and processors are those of transformers 5")
    torch.manual_seed(0)
    if family == "Gemma3":
        processor = gemma_processor()
        return gemma_model(processor.tokenizer).eval().to(dtype), processor
    processor = qwen_processor(family)
    return qwen_model(family, processor.tokenizer).eval().to(dtype), processor
