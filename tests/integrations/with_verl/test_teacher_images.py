"""The teacher's prompts of samples with images and videos, against verl's own way to write them."""

import pytest
import torch
from vision_samples import FAMILIES, IMAGES, agent_loop_sample, question, verls_processor

from fused_sd.integrations.shared.rollouts import Rollout, Sibling
from fused_sd.integrations.verl.contexts import (
    AnswerContext,
    AttemptContext,
    PromptTokenizer,
    SiblingContext,
)
from fused_sd.integrations.verl.images import Vision
from fused_sd.integrations.verl.teacher_sequences import teacher_batch

ALONE = {"text": "red", "reward": 0.0, "privileged": "It is red.", "feedback": None}
QUESTIONS = {
    "one image": ("<red>", "What is this?"),
    "images between texts": ("Compare ", "<blue>", " with ", "<green>", "."),
    "the same image twice": ("<red>", "<red>", "?"),
    "a video": ("<video>", "What is that?"),
    "both": ("Is ", "<blue>", " in ", "<video>", "?"),
    "text": ("What is 1+1?",),
}


def rollout_of(sample, **known):
    others = [Sibling(0, "red", 0.0), Sibling(1, "It is a picture.", 1.0)]
    return Rollout(
        prompt=sample["raw_prompt"],
        prompt_ids=sample["prompts"].tolist(),
        completion_ids=sample["responses"].tolist(),
        index=0,
        group=others,
        **{**ALONE, **known},
    )


def staged(processor, sample, context, **settings):
    """What the trainer's stage makes of one sample."""
    tokenizer = PromptTokenizer(processor.tokenizer, {}, processor)
    rollout = rollout_of(sample)
    prompt = context.teacher_prompt(rollout, tokenizer.beside(rollout))
    vision = Vision(processor, [sample["input_ids"]], [sample["position_ids"]])
    vision.check(0)
    return teacher_batch(
        [sample["prompts"]], [sample["responses"]], [prompt], vision=vision, **settings
    )


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return verls_processor(request.param)


@pytest.mark.parametrize("context", [AnswerContext(), SiblingContext()], ids=["rlsd", "sdpo"])
@pytest.mark.parametrize("parts", QUESTIONS.values(), ids=QUESTIONS)
def test_the_teachers_sequence_is_the_one_that_verl_would_write(processor, parts, context):
    sample = agent_loop_sample(processor, question(*parts), "red")
    teacher = staged(processor, sample, context)
    seen = []

    class Spy(PromptTokenizer):
        def chat(self, messages):
            seen.append(messages)
            return []

    context.teacher_prompt(rollout_of(sample), Spy(processor.tokenizer))
    whole = agent_loop_sample(processor, seen[0], "red")
    assert teacher.input_ids[0].tolist() == whole["input_ids"].tolist()
    assert torch.equal(teacher.position_ids[0].t(), whole["position_ids"])
    assert len(teacher.input_ids[0]) > len(sample["input_ids"])
    for name, pixels in whole["multi_modal_inputs"].items():
        if name != "pixel_values_videos":  # random here
            assert torch.equal(pixels, sample["multi_modal_inputs"][name]), name


def test_the_attempt_is_shown_behind_its_images(processor):
    sample = agent_loop_sample(processor, question("<red>", "What?"), "red")
    context = AttemptContext(correct_phrase="Right.", wrong_phrase="Wrong.")
    teacher = staged(processor, sample, context)
    ids = teacher.input_ids[0]
    assert torch.equal(ids[: len(sample["input_ids"])], sample["input_ids"])
    own = sample["position_ids"]
    assert torch.equal(teacher.position_ids[0].t()[:, : own.shape[1]], own)
    later = teacher.position_ids[0].t()[:, own.shape[1] - 1 :].diff(dim=1)
    assert (later == 1).all(), "text behind the image"


def test_a_sample_without_a_context_reads_its_own_positions(processor):
    sample = agent_loop_sample(processor, question("<red>", "What?"), "red")
    vision = Vision(processor, [sample["input_ids"]], [sample["position_ids"]])
    teacher = teacher_batch([sample["prompts"]], [sample["responses"]], [None], vision=vision)
    assert torch.equal(teacher.position_ids[0].t(), sample["position_ids"])


def test_a_prompt_with_images_is_left_out_where_it_would_be_cut(processor):
    seeing = agent_loop_sample(processor, question("<red>", "What?"), "red")
    blind = agent_loop_sample(processor, question("What?"), "red")
    limit = len(seeing["prompts"])
    teacher = staged(processor, seeing, AnswerContext(), max_prompt_length=limit)
    assert torch.equal(teacher.input_ids[0], seeing["input_ids"])
    assert (teacher.mask.tolist(), teacher.num_truncated, teacher.num_left_out) == ([0], 0, 1)
    teacher = staged(processor, blind, AnswerContext(), max_prompt_length=limit)
    assert len(teacher.input_ids[0]) == limit + len(blind["responses"])
    assert (teacher.mask.tolist(), teacher.num_truncated, teacher.num_left_out) == ([1], 1, 0)


OTHERS = {
    "another": ("<blue>", "<green>", "What?"),
    "one more": ("<red>", "<green>", "What?", "<blue>"),
    "one less": ("<red>", "What?"),
    "another order": ("<green>", "<red>", "What?"),
    "a video": ("<red>", "<video>", "What?"),
}


@pytest.mark.parametrize("parts", OTHERS.values(), ids=OTHERS)
def test_a_teacher_that_would_see_other_images_is_refused(processor, parts):
    sample = agent_loop_sample(processor, question("<red>", "<green>", "What?"), "red")
    tokenizer = PromptTokenizer(processor.tokenizer, {}, processor).beside(rollout_of(sample))
    with pytest.raises(ValueError, match="hold the images and videos of the student's prompt"):
        tokenizer.chat(question(*parts))


def test_a_context_that_drops_an_image_is_refused(processor):
    sample = agent_loop_sample(processor, question("<red>", "What?"), "red")

    class Forgetful:
        def teacher_prompt(self, rollout, tokenizer):
            return tokenizer.chat(question("What is red?"))

    with pytest.raises(ValueError, match=r"hold the images .* got .* \[\] instead of \[\(1, 8\)\]"):
        staged(processor, sample, Forgetful())


def test_a_copy_of_an_image_is_the_same_image(processor):
    sample = agent_loop_sample(processor, question("<red>", "What?"), "red")
    messages = question("<red>", "What is it?")
    messages[1]["content"][0]["image"] = IMAGES["red"].copy()
    tokenizer = PromptTokenizer(processor.tokenizer, {}, processor).beside(rollout_of(sample))
    assert len(tokenizer.chat(messages)) > 8


def test_a_rollout_with_a_prompt_of_its_own_is_refused(processor):
    sample = agent_loop_sample(processor, question("<red>", "What?"), "red")
    sample["raw_prompt"] = question("<red>", "Why?")
    with pytest.raises(ValueError, match=r"raw_prompt must be tokenised .* around its images"):
        staged(processor, sample, AnswerContext())


def test_positions_that_verl_would_not_compute_are_refused(processor):
    sample = agent_loop_sample(processor, question("<red>", "What?"), "red")
    shifted = sample["position_ids"] + 1
    with pytest.raises(ValueError, match="position_ids must be those of verl's AgentLoopWorker"):
        Vision(processor, [sample["input_ids"]], [shifted]).check(0)
    flat = torch.zeros_like(shifted)
    with pytest.raises(
        ValueError, match=r"position_ids must be those of verl's|be those of M-RoPE"
    ):
        Vision(processor, [sample["input_ids"]], [flat]).check(0)
