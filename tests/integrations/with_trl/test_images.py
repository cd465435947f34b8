"""Vision-language models: both sides see the images, and the loss is that of plain PyTorch.

The truth runs the model on each row alone, without padding, on what the processor makes of the
conversation with its images.

Dimension key:  B rollouts, T completion tokens, V vocabulary
"""

import functools
import logging

import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from method_pairs import loss_and_gradients, make
from tiny_vlm import FAMILIES, image, tiny_vlm
from transformers import ProcessorMixin

from fused_sd.integrations.shared.prompts import with_user_text

FLOAT = torch.float64
TYPES = ("token_type_ids", "mm_token_type_ids")
ROWS = [
    {
        "prompt": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": "What is it?" * (1 + n % 2)},
        ],
        "images": [image(n, 16 * (1 + n % 2), 16), image(9 + n)][: 1 + n % 2],
        "privileged_context": f"It is {n}, of course.",
    }
    for n in range(4)
]
DATA = Dataset.from_list(ROWS)


@functools.cache
def family(name, dtype=FLOAT):
    return tiny_vlm(name, dtype)


def trainer_of(method, folder, name="Qwen3-VL", data=DATA, dtype=FLOAT, **settings):
    model, processor = tiny_vlm(name, dtype)
    kind = {} if method == "GRPO" else {"teacher_model_kind": "live"}
    settings = {**kind, "loss_type": "bnpo", "num_generations": 2, **settings}
    return make(method, folder, student=model, data=data, processor=processor, **settings)


def sample(trainer, rows=(0, 0, 1, 1)):
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[n] for n in rows])


def messages(row, text=None):
    """A row's conversation with its images before the text, as TRL puts them."""
    parts = [{"type": "image", "image": one} for one in row["images"]]
    own = row["prompt"][-1]["content"]
    content = [*parts, {"type": "text", "text": own if text is None else text}]
    system = {"role": "system", "content": [{"type": "text", "text": "Look."}]}
    return [system, {"role": "user", "content": content}]


def logits(model, processor, conversation, completion):
    """A completion's logits (T, V) behind a conversation."""
    made = processor.apply_chat_template(
        [conversation],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs = dict(made)
    for name in ("input_ids", "attention_mask", *TYPES):
        if name in inputs:
            fill = {"input_ids": completion, "attention_mask": torch.ones_like(completion)}
            added = fill.get(name, torch.zeros_like(completion))
            inputs[name] = torch.cat([inputs[name], added[None]], 1)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return model(**inputs, use_cache=False).logits[0, -len(completion) - 1 : -1]


def both_sides(trainer, rows, batch):
    """Log-probabilities (T, V) of student and teacher, and the tokens, for each rollout."""
    model, processor = trainer.model, trainer.processing_class
    for row, ids, mask in zip(rows, batch["completion_ids"], batch["completion_mask"], strict=True):
        completion = ids[mask.bool()]
        template = getattr(trainer.args, "reprompt_template", "{prompt}{privileged}")
        asked = template.format(
            prompt=row["prompt"][-1]["content"],
            privileged=row["privileged_context"],
            **({} if "{solution}" not in template else {"solution": "", "feedback": ""}),
        )
        own = logits(model, processor, messages(row), completion).log_softmax(-1)
        with torch.no_grad():
            other = logits(model, processor, messages(row, asked), completion).log_softmax(-1)
        yield own, other, completion


def forward_kl(own, other, *_):
    return (other.exp() * (other - own)).sum(-1)


def grpo(own, other, ids, advantage):
    chosen = own.gather(-1, ids[:, None])[:, 0]
    return -advantage * (chosen - chosen.detach()).exp()


def rlsd(own, other, ids, advantage):
    gap = (other - own).gather(-1, ids[:, None])[:, 0].detach()
    weight = (advantage.sign() * gap).exp().clamp(0.8, 1.2)
    return grpo(own, other, ids, advantage * (0.5 + 0.5 * weight))


METHODS = {
    "OPSD": ({"entry_clip": None}, forward_kl),
    "SDFT": ({"num_loss_tokens_to_skip": 0}, forward_kl),
    "RLSD": ({"evidence_decay_steps": 0}, rlsd),
    "GRPO": ({}, grpo),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradient_are_those_of_each_row_alone(method, name, tmp_path):
    settings, definition = METHODS[method]
    trainer = trainer_of(method, tmp_path, name, **settings)
    inputs = sample(trainer)
    assert inputs["num_images"] == [1, 1, 2, 2]
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    sides = both_sides(trainer, [ROWS[n] for n in (0, 0, 1, 1)], inputs)
    exact = torch.cat(
        [
            definition(*side, advantage)
            for side, advantage in zip(sides, inputs["advantages"].double(), strict=True)
        ]
    ).mean()
    exact.backward()
    # rotary angles, which transformers forms in fp32, differ where rows are padded
    assert float(loss) == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-6)
    truths = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    largest = max(float(truth.abs().max()) for truth in truths.values())
    assert largest > 1e-3
    for parameter, truth in truths.items():
        assert float((gradients[parameter] - truth).abs().max()) <= 1e-5 * largest, parameter
    towers = [n for n in gradients if "visual" in n or "vision" in n]
    assert any(gradients[n].any() for n in towers)


@pytest.mark.parametrize("name", FAMILIES)
def test_sdpo_shows_the_images_beside_a_siblings_solution(name, tmp_path):
    settings = {"distillation_mode": "full_logits", "distillation_alpha": 0.0}
    trainer = trainer_of("SDPO", tmp_path, name, feedback_func=None, **settings)
    inputs = sample(trainer)  # rollouts 1 and 3 succeed, and are shown to 0 and 2
    texts = [row["privileged_context"] for row in ROWS[:2]]
    loss, _ = loss_and_gradients(trainer, inputs)
    terms = []
    for n in range(4):
        row, completion = ROWS[n // 2], inputs["completion_ids"][n][inputs["loss_mask"][n].bool()]
        solution = trainer.args.solution_template.format(
            successful_previous_attempt=trainer.scored.texts[n + 1] if n % 2 == 0 else ""
        )
        feedback = trainer.args.feedback_template.format(feedback_raw=texts[n // 2])
        shown = (solution, "") if n % 2 == 0 else ("", feedback)
        asked = trainer.args.reprompt_template.format(
            prompt=row["prompt"][-1]["content"], solution=shown[0], feedback=shown[1]
        )
        sides = [
            logits(trainer.model, trainer.processing_class, messages(row, text), completion)
            for text in (None, asked)
        ]
        terms.append(forward_kl(*(side.log_softmax(-1) for side in sides)))
    assert_close(loss, torch.cat(terms).mean().detach(), torch.float32, "loss")


@pytest.mark.parametrize("method", ["SDPO", "RLSD", "RLCSD", "OPSD", "SDFT", "SDZero", "GRPO"])
def test_a_method_trains_on_images(method, tmp_path):
    # RLCSD needs another success, and another failure, beside each rollout
    size = 4 if method == "RLCSD" else 2
    trainer = trainer_of(method, tmp_path, dtype=torch.float32, num_generations=size)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert any("visual" in name for name in moved)
    assert trainer.state.log_history[0]["self_distillation/active_token_fraction"] > 0


def test_a_batch_without_images_may_follow_one_with_them(tmp_path):
    data = Dataset.from_list([ROWS[0], {**ROWS[1], "images": []}, *ROWS[2:]])
    trainer = trainer_of("OPSD", tmp_path, data=data)
    for row, has_images in ((0, True), (1, False)):
        inputs = sample(trainer, [row] * 4)
        assert ("pixel_values" in inputs) is has_images
        assert loss_and_gradients(trainer, inputs)[0] > 0


def test_a_single_image_column_is_read(tmp_path):
    rows = [{**row, "image": row["images"][0]} for row in ROWS]
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in rows])
    trainer = trainer_of("RLSD", tmp_path, data=data)
    assert sample(trainer)["num_images"] == [1, 1, 1, 1]


def test_micro_batches_have_the_images_of_their_rows(tmp_path):
    settings = {"steps_per_generation": 2, "per_device_train_batch_size": 2, "loss_type": "dapo"}
    trainer = trainer_of("OPSD", tmp_path, **settings, gradient_accumulation_steps=2, max_steps=1)
    seen = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **_: seen.append(inputs) or compute(model, inputs)
    trainer.train()
    assert [len(inputs["num_images"]) for inputs in seen] == [2, 2]
    for inputs in seen:
        pixels = inputs["image_grid_thw"].prod(-1).sum()
        assert len(inputs["pixel_values"]) == pixels
        assert len(inputs["image_grid_thw"]) == sum(inputs["num_images"])


def test_a_prompt_whose_images_would_be_cut_has_no_teacher(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fused_sd"):
        trainer = trainer_of("OPSD", tmp_path, max_reprompt_len=10)
        inputs = sample(trainer)
    assert inputs["self_distillation_mask"].tolist() == [0, 0, 0, 0]
    assert "4 that would have lost images are left out" in caplog.text
    loss, _ = loss_and_gradients(trainer, inputs)
    assert loss == 0


def test_a_text_model_refuses_images_before_training(tmp_path):
    with pytest.raises(ValueError, match="be a processor, for the dataset has a column 'images'"):
        make("OPSD", tmp_path, data=DATA)
    shown = [{"type": "image", "image": image(0)}, {"type": "text", "text": "What is it?"}]
    row = {**ROWS[0], "prompt": [{"role": "user", "content": shown}]}
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "images"}])
    with pytest.raises(ValueError, match="for the dataset has images in its prompts"):
        make("OPSD", tmp_path, data=data)


def test_videos_are_left_to_the_rewards_with_a_warning(tmp_path):
    data = DATA.remove_columns("images").add_column("video", ["a.mp4"] * 4)
    with pytest.warns(UserWarning, match="OPSDTrainer reads no video"):
        trainer_of("OPSD", tmp_path, data=data)


def test_packed_rows_and_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="padding_free must be False for a model with images"):
        trainer_of("OPSD", tmp_path, padding_free=True)


def test_a_processor_without_images_is_no_obstacle(tmp_path):
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in ROWS])
    trainer = trainer_of("SDPO", tmp_path, data=data, dtype=torch.float32)
    assert isinstance(trainer.processing_class, ProcessorMixin)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_template_keeps_what_is_no_text():
    picture = {"type": "image", "image": 1}
    texts = [{"type": "text", "text": one} for one in ("a", "b")]
    prompt = [{"role": "user", "content": [picture, texts[0], picture, texts[1]]}]
    new = with_user_text(prompt, "new")[0]["content"]
    assert new == [picture, {"type": "text", "text": "new"}, picture]
    bare = with_user_text([{"role": "user", "content": [picture]}], "new")[0]["content"]
    assert bare == [picture, {"type": "text", "text": "new"}]
