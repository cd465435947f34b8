"""What the teachers are shown of completions, feedback and references."""

import dataclasses

import numpy as np
import pytest
from datasets import Dataset
from method_pairs import DATA, GROUP, make, sample
from transformers import HfArgumentParser
from trl_pairs import TOKENIZER

from fused_sd.integrations import trl as ours

REFERENCED = ("OPSD", "SDFT", "RLSD", "SDPG")
MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def teacher_texts(trainer, inputs):
    length = inputs["completion_ids"].size(1)
    rows = zip(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
    return [TOKENIZER.decode(ids[:-length][mask[:-length].bool()]) for ids, mask in rows]


def shown(method, folder, said, *, prompt="Solve 2 + 2.", **settings):
    """What teachers are shown of completions that say something, and who has a signal."""
    data = Dataset.from_list([{"prompt": prompt, "answer": "4"}] * GROUP)
    trainer = make(method, folder, data=data, feedback_func=None, **settings)
    inputs = sample(trainer)
    ids = [TOKENIZER(text)["input_ids"] for text in said]
    trainer.scored = dataclasses.replace(trainer.scored, texts=list(said), completion_ids=ids)
    made = trainer.teacher_contexts.build(inputs)
    texts = teacher_texts(trainer, inputs | made)
    wrong = made.get("wrong_input_ids")
    if wrong is not None:
        texts += [TOKENIZER.decode(row) for row in wrong.flatten(0, 1)]
    return texts, made["self_distillation_mask"].tolist()


OPENED = "Solve 2 + 2. <think>\n"
SAID = {  # a prompt, and what the successful rollouts 1 and 3 say
    "a pair": ("Solve 2 + 2.", "<think>\nsecret</think>\n\nIt is 4."),
    "a closing tag": ("Solve 2 + 2.", "secret</think>\n\nIt is 4."),
    "a closing tag, opened by the prompt": (OPENED, "secret</think>\n\nIt is 4."),
    "another model's": ("Solve 2 + 2.", "[THINK]secret[/THINK]It is 4."),
}
CUT = {
    "an opening tag": ("Solve 2 + 2.", "<think>\nsecret"),
    "no tag, opened by the prompt": (OPENED, "secret"),
}


@pytest.mark.parametrize("name", SAID)
def test_sdpos_demonstration_is_what_follows_the_thoughts(name, tmp_path):
    prompt, said = SAID[name]
    texts, signal = shown("SDPO", tmp_path, ["no", said, "no", said], prompt=prompt)
    assert all("Correct solution:\n\nIt is 4." in text for text in texts)
    assert not any("secret" in text for text in texts)
    assert signal == [1, 1, 1, 1]


@pytest.mark.parametrize("name", CUT)
def test_thoughts_that_were_cut_off_demonstrate_nothing(name, tmp_path):
    prompt, said = CUT[name]
    whole = "</think>It is 4."
    texts, signal = shown("SDPO", tmp_path, ["no", said, "no", whole], prompt=prompt)
    assert signal == [1, 1, 1, 0]  # rollout 3 is the only one that shows an answer
    assert all("Correct solution:\n\nIt is 4." in text for text in texts[:3])
    texts, signal = shown("SDPO", tmp_path, ["no", said, "no", said], prompt=prompt)
    assert signal == [0, 0, 0, 0]
    assert not any("secret" in text or "Correct solution" in text for text in texts)


def test_the_share_of_demonstrations_counts_what_is_shown(tmp_path):
    data = DATA.remove_columns("privileged_context")
    trainer = make("SDPO", tmp_path, feedback_func=None, data=data)
    inputs = sample(trainer)
    texts = ["no", "<think>cut", "no", "<think>cut"]
    trainer.scored = dataclasses.replace(trainer.scored, texts=texts)
    trainer.teacher_contexts.build(inputs)
    assert trainer._metrics["train"]["self_distillation/success_sample_fraction"][-1] == 0


def test_thoughts_are_shown_where_that_is_asked_for(tmp_path):
    texts, _ = shown(
        "SDPO", tmp_path, ["no", "a</think>4", "no", "no"], remove_thinking_from_demonstration=False
    )
    assert "Correct solution:\n\na</think>4" in texts[0]


def test_the_students_own_attempt_is_shown_without_its_thoughts(tmp_path):
    own = {"include_own_attempt": True, "environment_feedback_only_without_solution": False}
    texts, _ = shown("SDPO", tmp_path, ["secret</think>5", "4", "<think>secret", "4"], **own)
    assert "Your earlier attempt:\n\n5\n" in texts[0]
    assert "Your earlier attempt" not in texts[2]
    assert not any("secret" in text for text in texts)


def test_tags_of_ones_own(tmp_path):
    said = ["no", "<plan>secret</plan>It is 4.", "no", "no"]
    texts, _ = shown("SDPO", tmp_path, said, thinking_tags=["<plan>", "</plan>"])
    assert "Correct solution:\n\nIt is 4." in texts[0]
    for method in ("SDPO", "RLCSD"):
        removed = {"remove_thinking_from_demonstration": True}
        with pytest.raises(ValueError, match="thinking_tags must hold an opening"):
            make(method, tmp_path, thinking_tags=["<plan>"], **removed)
    parsed = HfArgumentParser(ours.SDPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--thinking_tags", "<plan>", "</plan>"]
    )
    assert parsed[0].thinking_tags == ["<plan>", "</plan>"]


def test_rlcsds_hints_are_whole_as_in_the_official_code_or_without_thoughts(tmp_path):
    said = ["secret</think>5", "secret</think>4", "<think>secret", "secret</think>4"]
    texts, signal = shown("RLCSD", tmp_path, said)
    assert any("secret" in text for text in texts)
    assert signal == [1, 1, 1, 1]
    texts, signal = shown("RLCSD", tmp_path, said, remove_thinking_from_demonstration=True)
    assert signal == [0, 1, 1, 1]  # rollout 0 has no other wrong sibling that says anything
    assert not any("secret" in text for text in texts)
    assert any("5\n\nCorrect final answer: 5" in text for text in texts)


@pytest.mark.parametrize("method", REFERENCED)
@pytest.mark.parametrize(
    "column, texts",
    [
        ([0, 4], ["0", "4"]),
        ([0.0, 4.0], ["0.0", "4.0"]),
        ([False, True], ["False", "True"]),
        ([float("nan"), 4.0], [None, "4.0"]),
        ([None, "4"], [None, "4"]),
        (["", "4"], [None, "4"]),
        ([MESSAGES, MESSAGES[:1]], ["2 + 2?\nIt is 4.", "2 + 2?"]),
    ],
    ids=["int", "float", "bool", "NaN", "None", "empty", "messages"],
)
def test_a_reference_is_text_whatever_its_column_holds(method, column, texts, tmp_path):
    data = Dataset.from_dict({"prompt": DATA["prompt"][:2], "privileged_context": column})
    trainer = make(method, tmp_path, data=data)
    for row, text in enumerate(texts):
        inputs = sample(trainer, rows=[row] * GROUP)
        assert inputs["self_distillation_mask"].tolist() == [float(text is not None)] * GROUP
        prompt = data[row]["prompt"]
        expected = trainer.args.reprompt_template.format(prompt=prompt, privileged=text)
        read = prompt if text is None else expected
        assert teacher_texts(trainer, inputs) == [read] * GROUP


@pytest.mark.parametrize("value", [{"target": 4}, ["4", "four"]], ids=["dict", "list"])
def test_a_reference_of_another_kind_is_refused_by_row_and_column(value, tmp_path):
    data = Dataset.from_dict({"prompt": ["Solve 2 + 2."] * 4, "privileged_context": [value] * 4})
    for method in REFERENCED:
        kind = type(value).__name__
        message = rf"privileged_context must be text, .* got a {kind} .* in row 0 of train_dataset"
        with pytest.raises(ValueError, match=message):
            make(method, tmp_path, data=data)
    stream = make("OPSD", tmp_path, data=data.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"privileged_context must be .* the prompt 'Solve 2 \+"):
        stream._generate_and_score_completions([dict(data[0])] * GROUP)
    unread = make("SDPO", tmp_path, data=data)  # feedback_func is asked, not the column
    sample(unread)
    heard = make("SDPO", tmp_path, data=data, feedback_func=None)
    with pytest.raises(ValueError, match="privileged_context must be text"):
        sample(heard)


def test_feedback_is_text_whatever_a_function_returns(tmp_path):
    answers = [0, MESSAGES, np.nan, np.float32(0.5)]
    nothing = {"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}
    trainer = make("SDPO", tmp_path, feedback_func=lambda prompts, **_: answers, **nothing)
    inputs = sample(trainer)
    texts = teacher_texts(trainer, inputs)
    assert inputs["self_distillation_mask"].tolist() == [1, 1, 0, 1]
    for text, said in zip(texts, ["0", "2 + 2?\nIt is 4.", None, "0.5"]):
        assert said is None or f"earlier attempt:\n\n{said}\n" in text
    trainer.feedback_func = lambda prompts, **_: ["a", {"line": 3}, None, None]
    with pytest.raises(ValueError, match=r"feedback_func must be text, .* dict .* in answer 1"):
        sample(trainer)


@pytest.mark.parametrize(
    "answer, said", [(0, "0"), (False, "False"), (float("nan"), None), (MESSAGES, "2 + 2?")]
)
def test_rlcsds_known_answer_is_text(answer, said, tmp_path):
    trainer = make("RLCSD", tmp_path, correct_hint="reference", data=DATA)
    trainer.final_answer = lambda text: "boxed"
    inputs = sample(trainer)
    row = dict(trainer.scored.examples[0], answer=answer)
    trainer.scored = dataclasses.replace(trainer.scored, examples=[row] * GROUP)
    text = teacher_texts(trainer, inputs | trainer.teacher_contexts.build(inputs))[0]
    assert f"Correct final answer: {'boxed' if said is None else said}\n" in text
