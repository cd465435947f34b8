"""Tools, turns and environments: loss on the model's own tokens, the teacher reads the same turns.

What the model says is scripted, token by token; TRL runs the tools and puts their results between
the turns.

Dimension key:  B rollouts, T completion tokens
"""

import asyncio
import copy

import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from method_pairs import loss_and_gradients, make, states
from tiny_models import tiny_model
from trl import GRPOTrainer as StockGRPOTrainer
from trl.chat_template_utils import qwen3_chat_template
from trl_pairs import byte_tokenizer

from fused_sd import reference

FLOAT = torch.float64
ROWS = [
    {"prompt": [{"role": "user", "content": question}], "privileged_context": hint}
    for question, hint in (("What is 2 + 2?", "It is 4."), ("What is 3 + 9?", "It is 12."))
]
DATA = Dataset.from_list(ROWS)


def tokenizer():
    """Bytes with Qwen3's template and special tokens."""
    made = byte_tokenizer()
    marks = ["<|im_start|>", "<|im_end|>"]
    made.add_special_tokens({"additional_special_tokens": marks})
    made.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    made.eos_token, made.chat_template = "<|im_end|>", qwen3_chat_template
    return made


WORDS = tokenizer()


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def call(a, b, name="add"):
    arguments = f'{{"name": "{name}", "arguments": {{"a": {a}, "b": {b}}}}}'
    return f"<tool_call>\n{arguments}\n</tool_call><|im_end|>"


# what each of four rollouts says, turn by turn: two calls, one, none, one that is cut off
TURNS = [
    [call(2, 2), call(4, 0), "It is 4.<|im_end|>"],
    [call(2, 2), "It is 4, as I said.<|im_end|>"],
    ["It is 12.<|im_end|>"],
    [call(3, 9), "It is"],
]


@pytest.fixture
def scripted(monkeypatch):
    """Give each rollout its turns; TRL asks again for those that called a tool, in their order."""
    said = []

    def install(turns):
        left, asked = [list(turn) for turn in turns], list(range(len(turns)))

        def speak(self, prompt_ids, *_, **__):
            texts = {row: left[row].pop(0) for row in asked}
            assert len(texts) == len(prompt_ids)
            completions = WORDS(list(texts.values()), add_special_tokens=False)["input_ids"]
            said.extend(zip(texts, completions))
            asked[:] = [row for row, text in texts.items() if "<tool_call>" in text]
            return [list(ids) for ids in completions], None

        monkeypatch.setattr(StockGRPOTrainer, "_generate_single_turn", speak)
        return said

    return install


def trainer_of(method, folder, **settings):
    torch.manual_seed(0)
    student = tiny_model(
        vocab=len(WORDS), max_position_embeddings=4096, eos_token_id=WORDS.eos_token_id
    )
    kind = {} if method in ("GRPO", "RFT") else {"teacher_model_kind": "live"}
    defaults = {"max_completion_length": 512, "num_generations": 2, "loss_type": "bnpo", **kind}
    if method == "RLCSD" or "tools" in settings or "environment_factory" in settings:
        defaults["per_device_train_batch_size"] = 4
    return make(
        method,
        folder,
        student=student.double(),
        data=settings.pop("data", DATA),
        processor=copy.deepcopy(WORDS),
        **{**defaults, **settings},
    )


def sample(trainer, rows=(0, 0, 1, 1)):
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[n] for n in rows])


def own_tokens(said, row):
    return [token for n, ids in said if n == row for token in ids]


@pytest.mark.parametrize("method", ["SDPO", "OPSD", "RLSD", "SDFT", "GRPO"])
def test_the_models_own_tokens_have_loss_and_no_others(method, tmp_path, scripted):
    said = scripted(TURNS)
    extra = {"num_loss_tokens_to_skip": 0} if method == "SDFT" else {}
    trainer = trainer_of(method, tmp_path, tools=[add], **extra)
    inputs = sample(trainer)
    for row in range(4):
        counted = inputs["tool_mask"][row].bool() & inputs["completion_mask"][row].bool()
        assert inputs["completion_ids"][row][counted].tolist() == own_tokens(said, row)
        has_signal = inputs["self_distillation_mask"][row] or not trainer.needs_signal
        assert torch.equal(inputs["loss_mask"][row].bool(), counted & bool(has_signal))
        others = inputs["completion_mask"][row].bool() & ~counted
        text = WORDS.decode(inputs["completion_ids"][row][others])
        assert text.count("<tool_response>") == sum("call" in turn for turn in TURNS[row])


def test_the_teacher_reads_the_same_turns_behind_its_own_prompt(tmp_path, scripted):
    scripted(TURNS)
    trainer = trainer_of("OPSD", tmp_path, tools=[add])
    inputs = sample(trainer)
    length = inputs["completion_ids"].size(1)
    assert torch.equal(inputs["teacher_input_ids"][:, -length:], inputs["completion_ids"])
    assert torch.equal(inputs["teacher_attention_mask"][:, -length:], inputs["completion_mask"])
    ids, mask = inputs["teacher_input_ids"][0, :-length], inputs["teacher_attention_mask"][0]
    text = WORDS.decode(ids[mask[:-length].bool()])
    assert '"name": "add"' in text  # the tools are listed to the teacher, too
    assert "It is 4." in text
    assert text.endswith("<|im_start|>assistant\n")
    assert "<tool_response>\n4\n</tool_response>" in WORDS.decode(inputs["completion_ids"][0])


def test_the_loss_is_that_of_plain_logits_on_the_models_own_tokens(tmp_path, scripted):
    scripted(TURNS)
    trainer = trainer_of("OPSD", tmp_path, tools=[add], entry_clip=None)
    inputs = sample(trainer)
    loss, gradients = loss_and_gradients(trainer, inputs)
    trainer.model.zero_grad()
    batch = states(trainer.model, inputs, "student")
    tokens = reference.divergence(
        batch.student_logits(), batch.teacher_logits(), divergence="forward_kl"
    )
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).double()
    exact = (tokens * mask).sum() / mask.sum()
    exact.backward()
    assert_close(loss, exact.detach(), FLOAT, "loss")
    for name, parameter in trainer.model.named_parameters():
        assert_close(gradients[name], parameter.grad, FLOAT, name)


def test_a_siblings_turns_are_its_solution(tmp_path, scripted):
    scripted(TURNS)
    trainer = trainer_of("SDPO", tmp_path, tools=[add], feedback_func=None)
    inputs = sample(trainer)  # rollouts 1 and 3 succeed
    length = inputs["completion_ids"].size(1)
    text = WORDS.decode(inputs["teacher_input_ids"][0, :-length])
    assert '{"name": "add", "arguments": {"a": 2, "b": 2}}' in text
    assert "<tool_response>\n4\n</tool_response>" in text
    assert "It is 4, as I said." in text


def test_the_last_tool_result_may_be_feedback(tmp_path, scripted):
    scripted(TURNS)
    nothing = {"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)}
    data = DATA.remove_columns("privileged_context")
    settings = {"observation_as_feedback": True, "feedback_func": None, "data": data, **nothing}
    trainer = trainer_of("SDPO", tmp_path, tools=[add], **settings)
    inputs = sample(trainer)
    assert inputs["self_distillation_mask"].tolist() == [1, 1, 0, 1]
    length = inputs["completion_ids"].size(1)
    text = WORDS.decode(inputs["teacher_input_ids"][3, :-length])
    assert "unsuccessful earlier attempt:\n\n12" in text


@pytest.mark.parametrize("masked", [False, True])
def test_a_truncated_turn_has_loss_unless_it_is_masked(masked, tmp_path, scripted):
    said = scripted(TURNS)
    trainer = trainer_of("OPSD", tmp_path, tools=[add], mask_truncated_completions=masked)
    inputs = sample(trainer)
    expected = 0 if masked else len(own_tokens(said, 3))
    assert inputs["loss_mask"][3].sum() == expected
    assert loss_and_gradients(trainer, inputs)[0].isfinite()


def test_a_failing_tool_is_an_error_that_the_model_reads(tmp_path, scripted):
    scripted([[call(1, 1, name="divide"), "No.<|im_end|>"], *TURNS[1:]])
    trainer = trainer_of("GRPO", tmp_path, tools=[add])
    inputs = sample(trainer)
    assert "Tool divide not found" in WORDS.decode(inputs["completion_ids"][0])
    assert trainer._metrics["train"]["tools/failure_frequency"][0] > 0


class Counter:
    """An environment that counts up, and says how far it is."""

    def reset(self, **_):
        self.value = 0
        return " Count to 3."

    def increase(self, by: int) -> str:
        """
        Increase the counter.

        Args:
            by: How far.
        """
        self.value += by
        return f"The counter is at {self.value}."

    def get_reward(self):
        return float(self.value == 3)

    def get_feedback(self):
        return None if self.value == 3 else f"You stopped at {self.value}."


class Echo:
    """An environment that repeats."""

    def reset(self, **_):
        return None

    def repeat(self, text: str) -> str:
        """
        Repeat a text.

        Args:
            text: What to repeat.
        """
        return text

    def get_reward(self):
        return 0.0


def count(by):
    arguments = f'{{"name": "increase", "arguments": {{"by": {by}}}}}'
    return f"<tool_call>\n{arguments}\n</tool_call><|im_end|>"


COUNTS = [
    [count(1), "Done.<|im_end|>"],
    [count(1), count(2), "Done.<|im_end|>"],
    ["Done.<|im_end|>"],
    [count(2), "Done.<|im_end|>"],
]


def test_an_environment_gives_reward_feedback_and_observation(tmp_path, scripted):
    said = scripted(COUNTS)
    trainer = trainer_of(
        "SDPO",
        tmp_path,
        environment_factory=Counter,
        reward_funcs=None,
        feedback_func=None,
        environment_feedback_only_without_solution=False,
    )
    inputs = sample(trainer)
    assert inputs["rewards"].tolist() == [0, 1, 0, 0]
    assert list(trainer.scored.feedback) == [
        "You stopped at 1.",
        None,
        "You stopped at 0.",
        "You stopped at 2.",
    ]
    assert inputs["self_distillation_mask"].tolist() == [1, 0, 1, 1]
    length = inputs["completion_ids"].size(1)
    texts = [WORDS.decode(ids[:-length]) for ids in inputs["teacher_input_ids"]]
    assert "What is 2 + 2? Count to 3." in texts[0]
    assert "You stopped at 1." in texts[0]
    assert "The counter is at 3." in texts[0]  # the successful sibling's turns
    assert "get_feedback" not in "".join(texts)
    assert "get_feedback" not in WORDS.decode(inputs["prompt_ids"][0])
    for row in range(4):
        counted = inputs["loss_mask"][row].bool()
        expected = own_tokens(said, row) if inputs["self_distillation_mask"][row] else []
        assert inputs["completion_ids"][row][counted].tolist() == expected
    metrics = trainer._metrics["train"]
    assert metrics["self_distillation/success_group_fraction"] == [0.5]
    assert metrics["self_distillation/success_sample_fraction"] == [0.25]
    assert metrics["self_distillation/feedback_available_fraction"] == [0.75]
    assert metrics["self_distillation/feedback_used_fraction"] == [0.75]


def test_a_tool_call_for_the_feedback_is_refused(tmp_path, scripted):
    peek = '<tool_call>\n{"name": "get_feedback", "arguments": {}}\n</tool_call><|im_end|>'
    scripted([[peek, "Done.<|im_end|>"], *COUNTS[1:]])
    trainer = trainer_of("GRPO", tmp_path, environment_factory=Counter, reward_funcs=None)
    inputs = sample(trainer)
    assert "Tool get_feedback not found" in WORDS.decode(inputs["completion_ids"][0])


def test_two_environments_each_offer_their_own_tools_to_both_sides(tmp_path, scripted):
    repeat = '<tool_call>\n{"name": "repeat", "arguments": {"text": "hi"}}\n</tool_call><|im_end|>'
    scripted([COUNTS[0], COUNTS[1], [repeat, "Done.<|im_end|>"], ["Done.<|im_end|>"]])
    rows = [{**row, "environment": name} for row, name in zip(ROWS, ("counter", "echo"))]
    trainer = trainer_of(
        "OPSD",
        tmp_path,
        environment_factory={"counter": Counter, "echo": Echo},
        data=Dataset.from_list(rows),
    )
    inputs = sample(trainer)
    length = inputs["completion_ids"].size(1)
    for row, (there, absent) in enumerate(
        [("increase", "repeat")] * 2 + [("repeat", "increase")] * 2
    ):
        sides = inputs["prompt_ids"][row], inputs["teacher_input_ids"][row, :-length]
        for text in map(WORDS.decode, sides):
            assert f'"name": "{there}"' in text
            assert f'"name": "{absent}"' not in text
    assert loss_and_gradients(trainer, inputs)[0].isfinite()


@pytest.mark.parametrize(
    "method", ["SDPO", "RLSD", "RLCSD", "OPSD", "SDFT", "SDZero", "GRPO", "RFT"]
)
def test_every_method_trains_with_tools(method, tmp_path, monkeypatch):
    """With ragged turns, and again on the same rollouts."""

    def speak(self, prompt_ids, *_, **__):
        turn = call(1, 2) if not hasattr(self, "spoken") else "It is 3.<|im_end|>"
        self.spoken = True
        texts = [turn if n % 2 == 0 else f"It is {n}.<|im_end|>" for n in range(len(prompt_ids))]
        return [WORDS(text, add_special_tokens=False)["input_ids"] for text in texts], None

    monkeypatch.setattr(StockGRPOTrainer, "_generate_single_turn", speak)
    student = tiny_model(vocab=len(WORDS), max_position_embeddings=4096)
    trainer = make(
        method,
        tmp_path,
        student=student,
        data=Dataset.from_list(ROWS * 2),
        processor=copy.deepcopy(WORDS),
        tools=[add],
        max_completion_length=512,
        num_iterations=2,
        log_completions=True,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[0]["tools/call_frequency"] > 0
    assert (tmp_path / "completions" / "completions_00001.parquet").exists()


def test_a_rollout_function_brings_its_own_masks(tmp_path):
    def roll(prompts, trainer):
        return {
            "prompt_ids": [[5, 6]] * len(prompts),
            "completion_ids": [[7, 8, 9, 10]] * len(prompts),
            "logprobs": [[-1.0] * 4] * len(prompts),
            "env_mask": [[1, 0, 0, 1]] * len(prompts),
            "answer": ["4"] * len(prompts),
        }

    seen = []

    def feedback(prompts, answer, **_):
        seen.extend(answer)
        return ["Wrong."] * len(prompts)

    trainer = trainer_of("SDPO", tmp_path, rollout_func=roll, feedback_func=feedback)
    inputs = sample(trainer)
    assert inputs["loss_mask"].tolist() == [[1, 0, 0, 1]] * 4
    assert seen == ["4"] * 4
    assert trainer.train_dataset[0].get("answer") is None


def test_rewards_and_feedback_may_be_asynchronous(tmp_path):
    async def reward(prompts, **_):
        return [0.0] * len(prompts)

    async def feedback(prompts, **_):
        return ["Think again."] * len(prompts)

    trainer = trainer_of("SDPO", tmp_path, reward_funcs=reward, feedback_func=feedback)
    inputs = sample(trainer)
    assert inputs["self_distillation_mask"].tolist() == [1, 1, 1, 1]

    async def in_a_notebook():
        return sample(trainer)

    inputs = asyncio.run(in_a_notebook())
    assert inputs["self_distillation_mask"].tolist() == [1, 1, 1, 1]


def test_an_environments_feedback_may_be_asynchronous(tmp_path, scripted):
    class Slow(Counter):
        async def get_feedback(self):
            return f"You stopped at {self.value}."

    scripted(COUNTS)
    trainer = trainer_of(
        "SDPO", tmp_path, environment_factory=Slow, reward_funcs=None, feedback_func=None
    )
    sample(trainer)
    assert list(trainer.scored.feedback) == [f"You stopped at {n}." for n in (1, 3, 0, 2)]
