"""The example scripts run as they are, on tiny models with random weights."""

import functools
import itertools
import json
import pathlib
import re
import runpy
import sys

import pytest

for _package in ("trl", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package)

import torch
import transformers
from method_pairs import model
from tiny_models import tiny_model
from tiny_vlm import tiny_vlm
from trl.chat_template_utils import qwen2_5_chat_template
from trl_pairs import TOKENIZER, byte_tokenizer

from fused_sd.integrations.examples import calculations, programming, shapes, start

FOLDER = pathlib.Path(__file__).parents[2] / "integrations" / "examples"
OTHERWISE = ("sd_zero_phase1", "verl_arithmetic", "rlsd_images", "sdpo_tools", "sdpo_code")
SCRIPTS = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text() and path.stem not in OTHERWISE
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model with its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("model")
    model().float().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script, and return the arguments that its trainer got and the trainer's logs."""

    def script(name, home, *further):
        common = ["--model", str(home), "--output_dir", str(tmp_path), "--bf16", "false"]
        size = ["--per_device_train_batch_size", "4", "--num_generations", "4", "--use_cpu"]
        logs = ["--report_to", "none", "--logging_steps", "1"]
        steps = ["--num_questions", "8", "--max_steps", "1"]
        monkeypatch.setattr(sys, "argv", [name, *common, *size, *logs, *steps, *further])
        made = []
        train = transformers.Trainer.train

        def remember(trainer, *args, **kwargs):
            made.append(trainer)
            return train(trainer, *args, **kwargs)

        monkeypatch.setattr(transformers.Trainer, "train", remember)
        runpy.run_module(f"fused_sd.integrations.examples.{name}", run_name="__main__")
        assert list(tmp_path.glob("**/*.safetensors"))
        return made[0]

    return script


SHORT = ("--max_completion_length", "4")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, home, run):
    one = ("--num_questions", "1", "--max_attempts", "8") if name == "discovery" else ()
    trainer = run(name, home, *SHORT, *one)
    assert trainer.state.global_step >= 1
    assert trainer.chat_template_kwargs["enable_thinking"] is False


def test_thinking_is_one_flag(home, run):
    trainer = run("grpo", home, *SHORT, "--thinking")
    assert trainer.chat_template_kwargs["enable_thinking"] is True


@pytest.mark.parametrize("thinking", [False, True])
def test_models_and_lengths_follow_from_the_flag(thinking, monkeypatch):
    class Trainer:
        def __init__(self, model, **given):
            self.model, self.given = model, given

        def train(self):
            pass

        save_model = train

    flag = ["--thinking"] if thinking else []
    cpu = ["--bf16", "false", "--use_cpu", "--num_questions", "2"]
    monkeypatch.setattr(sys, "argv", ["grpo", *flag, *cpu])
    from fused_sd.integrations.trl import GRPOConfig

    made = start.train(Trainer, GRPOConfig)
    assert made.model == start.MODELS[thinking]
    assert made.given["args"].max_completion_length == start.LENGTHS[thinking]
    assert made.given["args"].chat_template_kwargs == {"enable_thinking": thinking}
    assert (
        made.given["args"].learning_rate == GRPOConfig("x", use_cpu=True, bf16=False).learning_rate
    )


def test_phases_of_sd_zero_use_one_chat_format():
    from fused_sd.integrations.examples import sd_zero_phase1

    for thinking, flag in enumerate(([], ["--thinking"])):
        options = sd_zero_phase1.parse(flag)
        assert options.model == start.MODELS[thinking]
        assert options.max_new_tokens == start.LENGTHS[thinking]
    text = (FOLDER / "sd_zero_phase1.py").read_text()
    assert 'chat_template_kwargs={"enable_thinking": options.thinking}' in text


def test_images(tmp_path_factory, run, monkeypatch):
    """Student and teacher both look at the pictures."""
    made, processor = tiny_vlm("Qwen2.5-VL")
    folder = tmp_path_factory.mktemp("vlm")
    made.float().save_pretrained(folder)
    # its video processor needs torchvision, to be loaded and saved
    processor.save_pretrained = processor.tokenizer.save_pretrained
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    looks = []
    tower = type(made.model.visual)
    forward = tower.forward

    @functools.wraps(forward)
    def spy(self, pixels, *args, **given):
        looks.append(torch.is_grad_enabled())
        return forward(self, pixels, *args, **given)

    monkeypatch.setattr(tower, "forward", spy)
    trainer = run("rlsd_images", folder, *SHORT)
    assert trainer.state.global_step == 1
    assert looks == [False, False, True]  # to sample, as the teacher, as the student


def test_pictures_hold_what_is_said_of_them():
    data = shapes.pictures(20)
    for row in data:
        (image,) = row["images"]
        assert image.size == (shapes.CELLS * shapes.CELL,) * 2
        colour = re.search(r"How many (\w+) shapes", row["prompt"][0]["content"])[1]
        wanted = tuple(bytes.fromhex(shapes.COLOURS[colour][1:]))
        centres = (shapes.CELL // 2 + shapes.CELL * n for n in range(shapes.CELLS))
        found = sum(
            image.getpixel(place) == wanted for place in itertools.product([*centres], repeat=2)
        )
        assert str(found) == row["answer"]
        assert row["privileged_context"].count(f": a {colour} ") == found


def with_tools():
    """A tokenizer whose chat template lists tools: Qwen2.5's, turns' ends included."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.chat_template = qwen2_5_chat_template
    return tokenizer


def test_tools(tmp_path_factory, run, monkeypatch):
    """The model calls the calculator twice, for a model with random weights never would."""
    tokenizer = with_tools()
    folder = tmp_path_factory.mktemp("tools")
    tiny = tiny_model(
        vocab=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id
    )
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    calls = []
    real = calculations.calculate

    @functools.wraps(real)
    def calculate(first, operator, second):
        calls.append((first, operator, second))
        return real(first, operator, second)

    def said(prompt):
        """The product, then the sum, then the answer, but for every second rollout a guess."""
        price, shipping, pieces = map(
            int,
            re.search(r"costs (\d+) .*costs (\d+) .*do (\d+) parts", prompt, re.DOTALL).groups(),
        )
        results = re.findall(r"<tool_response>\n(-?\d+)\n</tool_response>", prompt)
        if len(results) == 2:
            return f"It is {results[1]}."
        given = (price, "*", pieces) if not results else (int(results[0]), "+", shipping)
        call = {"name": "calculate", "arguments": dict(zip(("first", "operator", "second"), given))}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"

    def generate(self, input_ids, **_):
        texts = [tokenizer.decode(ids) for ids in input_ids]
        first_turn = "<tool_response>" not in texts[0]
        answers = [said(text) for text in texts]
        if first_turn:
            answers[::2] = ["It is 12."] * len(answers[::2])
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in answers]
        longest = max(map(len, ids))
        rows = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]
        return transformers.BatchEncoding({"ids": rows}, tensor_type="pt")["ids"].new_tensor(
            [[*before, *row] for before, row in zip(input_ids.tolist(), rows)]
        )

    monkeypatch.setattr(calculations, "calculate", calculate)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    trainer = run("sdpo_tools", folder, "--max_completion_length", "600")
    assert [operator for _, operator, _ in calls].count("*") == 2
    assert [operator for _, operator, _ in calls].count("+") == 2
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] == 1.0  # two calls in half of the rollouts
    assert logged["rewards/reward/mean"] == 0.5


def test_what_the_model_says_last_is_its_answer():
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "name": "calculate", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    completions = [turns[:2], turns, turns[2:], [{"role": "assistant", "content": "It is 7."}]]
    assert calculations.reward(completions, ["42"] * 4) == [0.0, 1.0, 1.0, 0.0]
    silent, right, guessed, wrong = calculations.feedback(completions, ["42"] * 4)
    assert right is None
    assert guessed is None
    assert "holds no number" in silent
    assert wrong.endswith("The calculator was not used.")


def test_calculations():
    assert calculations.calculate(6, "*", 7) == "42"
    assert calculations.calculate(6, "+", 7) == "13"
    assert calculations.calculate(6, "-", 7) == "-1"
    assert "no operator" in calculations.calculate(6, "/", 7)


def test_code(home, run, monkeypatch):
    """Half of the rollouts hold a program, one that is wrong, and the teacher reads why."""
    program = "Here:\n```python\nprint(max(map(int, input().split())), 'and so on')\n```"
    texts = itertools.cycle([program, "I do not know."])
    decode = transformers.PreTrainedTokenizerFast.batch_decode

    def decoded(self, ids, **given):
        return [next(texts) for _ in decode(self, ids, **given)]

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "batch_decode", decoded)
    trainer = run("sdpo_code", home, *SHORT)
    monkeypatch.undo()
    feedback = trainer.scored.feedback
    assert feedback[0].startswith("Wrong answer on test 1 of 5.\nInput:")
    assert "and so on" in feedback[0]
    assert "holds no Python program" in feedback[1]
    logged = trainer.state.log_history[0]
    assert logged["rewards/code/mean"] == 0.0
    assert trainer.args.distillation_topk == 20


SOLUTIONS = {
    "the sum of those": "print(sum(x for x in n if x % {k} == 0))",
    "how many are greater": "print(len([x for x in n if x > {k}]))",
    "all numbers from the largest": "print(*sorted(n, reverse=True))",
    "every number without": "print(*dict.fromkeys(n))",
    "the largest difference": "n.sort()\nprint(max([b - a for a, b in zip(n, n[1:])] or [0]))",
    "the length of the longest": (
        "best = run = 1\nfor a, b in zip(n, n[1:]):\n    run = run + 1 if b > a else 1\n"
        "    best = max(best, run)\nprint(best)"
    ),
    "the numbers, each": "print(*[{k} * x for x in reversed(n)])",
    "the sum of the squares": "print(sum(int(c) ** 2 for x in n for c in str(x) if c != '-'))",
}


def test_programming_tasks_can_be_solved():
    from fused_sd.integrations.verdicts import CodeVerifier, Limits

    judge = CodeVerifier(limits=Limits(cpu_seconds=30, wall_seconds=60.0))
    seen = set()
    for row in programming.programs(40):
        text = row["prompt"][0]["content"]
        (start_of_task,) = (known for known in SOLUTIONS if f"one line: {known}" in text)
        if start_of_task in seen:
            continue
        seen.add(start_of_task)
        k = re.findall(r" (\d)\b", text)
        body = SOLUTIONS[start_of_task].replace("{k}", k[0] if k else "")
        response = f"```python\nn = list(map(int, input().split()))\n{body}\n```"
        verdict = judge.judge(response, row["tests"])
        assert verdict.reward == 1.0, (text, verdict.feedback)
    assert len(seen) == len(SOLUTIONS)
