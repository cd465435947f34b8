"""What the teachers are shown of completions, feedback and references."""

import dataclasses

import numpy as np
import pytest
from datasets import Dataset
from method_pairs import DATA, GROUP, make, sample
from trl_pairs import TOKENIZER

REFERENCED = ("OPSD", "SDFT", "RLSD", "SDPG")
MESSAGES = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def teacher_texts(trainer, inputs):
    length = inputs["completion_ids"].size(1)
    rows = zip(inputs["teacher_input_ids"], inputs["teacher_attention_mask"])
    return [TOKENIZER.decode(ids[:-length][mask[:-length].bool()]) for ids, mask in rows]


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
