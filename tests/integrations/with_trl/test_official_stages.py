"""SD-Zero's official phase 1: its strings, its two stages token by token, and its phrases."""

import os

import pytest
import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from chatml import chatml_tokenizer
from datasets import Dataset
from tiny_models import tiny_model
from transformers import Olmo2Config, Qwen3Config
from trl import SFTConfig, SFTTrainer

from fused_sd.integrations.shared.revision_phrases import phrases_for
from fused_sd.integrations.shared.sd_zero_prompts import (
    collection_prompt,
    distillation_prompt,
    problem_of,
)
from fused_sd.integrations.trl.collect import collect_traces
from fused_sd.integrations.trl.official_stages import (
    official_stages,
    without_loop,
    without_reply,
)
from fused_sd.integrations.trl.revise import TraceConfig
from fused_sd.integrations.trl.srt import SRTConfig
from fused_sd.integrations.trl.srt_stages import sequential_srt
from fused_sd.integrations.trl.trace_filters import before_stop
from fused_sd.integrations.trl.traces import Trace, load_traces

TOKENIZER = chatml_tokenizer()
VOCAB = len(TOKENIZER)
WRONG = "Wait, this response is wrong. Let me correct it."


def ids(text):
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def trace(number, initial="It is 5", revision="So 4", correct=False, task="math"):
    prompt = collection_prompt(f"q{number}", task)
    prompt_ids = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    phrase = "Let me rephrase the above solution." if correct else WRONG
    verdict = ids(f"\n\n{phrase}\n\n")
    end = ids("<|im_end|>")
    turn = ids(initial), phrase, verdict, ids(revision) + end
    return Trace(number, prompt, tuple(prompt_ids), *turn, correct, 0.0, 1.0)


def test_the_prompts_are_the_official_ones():
    assert collection_prompt("1+1?") == [
        {
            "role": "system",
            "content": "You are a helpful assistant that solves math problems step by step.",
        },
        {
            "role": "user",
            "content": "1+1?\n\nPlease reason step by step, and put your final answer within "
            r"\boxed{}.",
        },
    ]
    assert collection_prompt("Sort.", "code") == [
        {
            "role": "system",
            "content": "You are a helpful assistant that solves coding problems step by step.",
        },
        {"role": "user", "content": "Sort."},
    ]
    asked = r"Please reason step by step, and put your final answer within \\boxed{}."
    assert distillation_prompt("1+1?") == [{"role": "user", "content": f"{asked}\n\n1+1?"}]
    for task in ("math", "code"):
        assert problem_of(collection_prompt("1+1?", task), task) == "1+1?"
    with pytest.raises(ValueError, match="prompt must end with a user's text"):
        problem_of([{"role": "assistant", "content": "a"}])
    with pytest.raises(ValueError, match="task must be"):
        collection_prompt("1+1?", "art")


MATH = r"Please reason step by step, and put your final answer within \boxed{{}}."
CODE = "You are a helpful assistant that solves coding problems step by step."


@pytest.mark.parametrize("task, system", [("math", MATH), ("code", CODE)])
def test_both_stages_are_the_official_strings_encoded_as_trls_trainer_encodes_them(
    tmp_path, task, system
):
    traces = [
        trace(0, "It is 5", "Good catch. so 4", task=task),
        trace(1, "7" + " 1 2 3 4 5." * 6, "\nSo 4", task=task),
    ]
    # which trace is of which stage is the subject of another test
    stages = official_stages(traces, TOKENIZER, 1, task=task)
    texts = [("q0", "It is 5", "So 4"), ("q1", "7 1 2 3 4 5.", "So 4")]
    records = {
        "generation": [
            {"prompt": x, "completion": f"{initial}\n\n{WRONG}\n\n{revision}"}
            for x, initial, revision in texts
        ],
        "revision": [
            {"prompt": f"{x}\n\n{initial}\n\n{WRONG}", "completion": revision}
            for x, initial, revision in texts
        ],
    }
    for name, (found,) in stages.items():
        record = records[name][found.question]
        prompt = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{record['prompt']}"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        rows = [{"prompt": prompt, "completion": f"{record['completion']}<|im_end|>"}]
        stock = SFTTrainer(
            tiny_model(vocab=VOCAB),
            SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None),
            train_dataset=Dataset.from_list(rows),
            processing_class=TOKENIZER,
        )
        (row,) = stock.train_dataset
        assert list(found.input_ids) == row["input_ids"], name
        start = len(found.prompt_ids)
        assert row["labels"] == [-100] * start + row["input_ids"][start:]
        assert TOKENIZER.decode(found.revision_ids) == "So 4<|im_end|>"
        if name == "revision":
            assert found.initial_ids == found.verdict_ids == ()
        else:
            assert TOKENIZER.decode(found.initial_ids) == texts[found.question][1]
            assert TOKENIZER.decode(found.verdict_ids) == f"\n\n{WRONG}\n\n"


def test_the_split_is_the_one_that_the_official_code_draws():
    """What it draws was found by running it on the same records, one of them twice."""
    traces = [trace(n, f"It is {n}", f"So {n}", correct=n % 4 == 3) for n in range(9)]
    traces.insert(3, traces[2])
    stages = official_stages(traces, TOKENIZER, 4, seed=3)
    assert [item.question for item in stages["generation"]] == [4, 8, 6, 5, 1]
    assert [item.question for item in stages["revision"]] == [2, 0, 3, 7]


@pytest.mark.parametrize(
    "text, kept",
    [
        ("You're absolutely right \u2014 the sum is 4.", "The sum is 4."),
        ("Yes, you are right, it is 4", "It is 4"),
        ("You are right to point this out. it is 4", "It is 4"),
        (
            "Thank you for the hint! Good catch, 4. Great question - so 4",
            "So 4",
        ),
        (" \n It is 4", "It is 4"),
        ("You're absolutely right! So 4", "You're absolutely right! So 4"),
        ("So you're right: 4", "So you're right: 4"),
        ("it is 4", "it is 4"),
        ("", ""),
    ],
)
def test_an_opening_that_answers_a_user_is_cut_as_the_official_code_cuts_it(text, kept):
    assert without_reply(text) == kept


def test_a_loop_of_characters_is_cut_to_one_copy():
    assert without_loop("x: " + "So it is 2. " * 9 + "So it") == "x: So it is 2."
    # the copies begin where the text begins to repeat: at "2. "
    assert without_loop("Then 1 + 1 = 2. " + "So it is 2. " * 9) == "Then 1 + 1 = 2. So it is"
    assert without_loop("abcdefghi" * 2 + "ab") == "abcdefghi" * 2 + "ab"  # twice is no loop
    assert without_loop("a" * 29) == "a" * 29  # 29 characters hold no three blocks of 10
    assert without_loop("a" * 90) == "a" * 10


def test_official_stages_train_one_after_the_other(tmp_path):
    traces = [trace(n, f"It is {n}", f"So {n}") for n in range(4)]
    torch.manual_seed(0)
    args = SRTConfig(
        str(tmp_path),
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_steps=1,
        logging_steps=1,
    )
    model = tiny_model(vocab=VOCAB, max_position_embeddings=512)
    stages = official_stages(traces, TOKENIZER, 2)
    last = sequential_srt(model, args, stages, processing_class=TOKENIZER)
    assert [list(row) for row in last.train_dataset["input_ids"]] == [
        list(item.input_ids) for item in stages["revision"]
    ]
    assert last.state.log_history[0]["revision_loss"] > 0


@pytest.mark.parametrize(
    "model, wrong",
    [
        ("Qwen/Qwen3-4B-Instruct-2507", WRONG),
        ("allenai/Olmo-3-7B-Instruct", "Wrong. I need to redo all."),
        ("meta-llama/Llama-3.2-1B-Instruct", WRONG),
        ("runs/qwen-and-olmo", WRONG),
        (Olmo2Config(name_or_path="runs/srt"), "Wrong. I need to redo all."),
        (Qwen3Config(name_or_path="/data/olmo/srt"), WRONG),
    ],
)
def test_phrases_are_those_of_the_models_family(model, wrong):
    assert phrases_for(model) == ("Let me rephrase the above solution.", wrong)
    assert phrases_for(model, "Yes.", "No.") == ("Yes.", "No.")
    assert phrases_for(model, wrong="No.").after(False) == "No."


def test_a_folders_configuration_says_its_family(tmp_path):
    Olmo2Config().save_pretrained(tmp_path)
    assert phrases_for(str(tmp_path)).wrong == "Wrong. I need to redo all."


def reward(prompts, completions, **_):
    return [float(said[-1]["content"].rstrip().endswith("4")) for said in completions]


def say(prompts):
    """Answer 5 at first, then 4, and go on to another turn and another question."""
    texts = [TOKENIZER.decode(prompt) for prompt in prompts]
    is_revision = ["redo" in text or "Hm." in text for text in texts]
    first, second = ids("It is 5<|im_start|>user"), ids("It is 4\n\nQuestion: 1?")
    return [list(second if later else first) for later in is_revision]


def collected(path, tokenizer, **settings):
    config = TraceConfig(1, 1, chat_template_kwargs={"enable_thinking": False}, **settings)
    dataset = [{"prompt": collection_prompt("2+2?")}]
    return collect_traces(say, dataset, reward, tokenizer, path, config=config)


def test_collecting_chooses_the_phrase_by_the_tokenizers_name_and_says_so_in_the_file(tmp_path):
    tokenizer = chatml_tokenizer()
    tokenizer.name_or_path = "allenai/Olmo-3-7B-Instruct"
    path = tmp_path / "t.jsonl"
    (found,), _ = collected(path, tokenizer)
    assert found.phrase == "Wrong. I need to redo all."
    assert found.verdict_ids == ids("\n\nWrong. I need to redo all.\n\n")
    assert '"wrong_phrase": "Wrong. I need to redo all."' in path.read_text().splitlines()[0]
    tokenizer.name_or_path = "other"
    with pytest.raises(ValueError, match=r"wrong_phrase 'Wrong.*' instead of 'Wait"):
        collected(path, tokenizer)
    (told,), _ = collected(tmp_path / "told.jsonl", tokenizer, wrong_phrase="Hm.")
    assert told.verdict_ids == ids("\n\nHm.\n\n")


def test_a_response_ends_before_a_stop_string_and_is_judged_without_it(tmp_path):
    settings = {"wrong_phrase": "Hm.", "trim_repeats": False}
    (found,), _ = collected(tmp_path / "t.jsonl", TOKENIZER, **settings)
    assert TOKENIZER.decode(found.revision_ids) == "It is 4\n\n"
    assert TOKENIZER.decode(found.initial_ids) == "It is 5"  # before <|im_start|>
    traces, _ = collected(tmp_path / "whole.jsonl", TOKENIZER, stop_strings=(), **settings)
    assert traces == []  # "It is 4\n\nQuestion: 1?" does not end with the answer


def test_tokens_before_a_stop_string_hold_none_of_it():
    words = {1: "a", 2: " bQ", 3: "ue", 4: "s:", 5: "c"}

    def decode(tokens):
        return "".join(words[token] for token in tokens)

    assert before_stop([1, 5, 2, 3, 4, 5], ["Ques:"], decode) == [1, 5]
    assert before_stop([1, 5, 2, 3, 4, 5], ["c", "Ques:"], decode) == [1]
    assert before_stop([1, 5, 2, 3], ["Ques:"], decode) == [1, 5, 2, 3]
    assert before_stop([2, 3, 4], ["Ques:"], decode) == []
    assert before_stop([1, 5], [], decode) == [1, 5]


def test_a_trace_knows_its_chat_format_from_the_first_line_of_its_file(tmp_path):
    path = tmp_path / "t.jsonl"
    (found,), _ = collected(path, TOKENIZER, wrong_phrase="Hm.")
    assert found.chat_template_kwargs == {"enable_thinking": False}
    assert TOKENIZER.decode(found.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert load_traces(path).traces == [found]
    assert "enable_thinking" not in path.read_text().splitlines()[1]
