"""Samples with images and videos as verl's agent loop writes them, made with its own functions."""

import copy
from types import MethodType, SimpleNamespace

import torch
from tiny_vlm import QWEN_TEMPLATE, image, tiny_vlm

FAMILIES = ("Qwen2.5-VL", "Qwen3-VL")
IMAGES = {"red": image(0, 32, 16), "blue": image(1, 16, 32), "green": image(2, 16, 16)}
VIDEO_GRID = torch.tensor([[2, 4, 8]])  # two frames of 2 x 4 tokens
PATCH = 2 * 3 * 4 * 4  # numbers of one patch


def question(*parts: str) -> list[dict]:
    """Chat messages: a system turn, and a user turn of texts, "<image name>" and "<video>"."""
    content: list[dict] = []
    for one in parts:
        if one == "<video>":
            content.append({"type": "video", "video": "file.mp4"})
        elif one.startswith("<"):
            content.append({"type": "image", "image": IMAGES[one.strip("<>")]})
        else:
            content.append({"type": "text", "text": one})
    return [{"role": "system", "content": "Look."}, {"role": "user", "content": content}]


def verls_processor(family: str):
    """A tiny processor with what verl's ``hf_processor`` binds to it, which also knows videos."""
    model, processor = tiny_vlm(family)
    processor.config = copy.deepcopy(model.config)
    for name in ("get_rope_index", "get_vision_position_ids"):
        setattr(processor, name, MethodType(getattr(type(model.model), name), processor))
    start, *_ = QWEN_TEMPLATE.partition("{% else %}{{ c['text'] }}")
    video = "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    processor.chat_template = start + video + QWEN_TEMPLATE.removeprefix(start)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    return processor


def agent_loop_sample(processor, messages: list[dict], response: str) -> dict:
    """The columns that depend on images, as ``AgentLoopWorkerTQ`` puts them into the queue."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    tokens = torch.tensor(
        [*processor.tokenizer(response)["input_ids"], processor.tokenizer.eos_token_id]
    )
    parts = messages[-1]["content"]
    images = [part["image"] for part in parts if part["type"] == "image"] or None
    has_video = any(part["type"] == "video" for part in parts)
    prompt = torch.tensor(rollout_ids(processor, messages, images, has_video=has_video))
    ids = torch.cat([prompt, tokens])
    worker = SimpleNamespace(processor=processor, tokenizer=processor.tokenizer)
    output = SimpleNamespace(multi_modal_data={"images": images}, mm_processor_kwargs={})
    pixels = AgentLoopWorker._compute_multi_modal_inputs(worker, output, ids)
    if has_video:  # verl's video reader is not installed
        generator = torch.Generator().manual_seed(len(ids))
        pixels["pixel_values_videos"] = torch.randn(64, PATCH, generator=generator)
        pixels["video_grid_thw"] = VIDEO_GRID.clone()
    mask = torch.ones_like(ids)[None]
    positions = AgentLoopWorker._compute_position_ids(worker, ids[None], mask, pixels)[0]
    return {
        "prompts": prompt,
        "responses": tokens,
        "input_ids": ids,
        "position_ids": positions,
        "multi_modal_inputs": pixels,
        "raw_prompt": messages,
        "response_mask": torch.ones(len(tokens), dtype=torch.int64),
    }


def rollout_ids(processor, messages: list[dict], images, *, has_video: bool) -> list[int]:
    """The prompt's tokens by verl's builder, with a video's written by the processor."""
    from verl.utils.tokenizer.continuous_token import VLContinuousTokenBuilder

    if not has_video:
        return VLContinuousTokenBuilder(processor.tokenizer, processor).build_initial_tokens(
            messages, images=images
        )
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    metadata = SimpleNamespace(fps=2.0, frames_indices=[0, 1, 2, 3])
    shown = {"video_grid_thw": VIDEO_GRID, "video_metadata": [metadata]}
    text = text.replace("<|video_pad|>", processor.replace_video_token(shown, 0))
    return processor(text=[text], images=images)["input_ids"][0]
