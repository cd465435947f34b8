"""Rewards around TRL's GRPOTrainer: verdicts that are missing, malformed rewards, advantages."""

import copy
import logging
import math

import pytest
import torch
from closeness import assert_close
from method_pairs import DATA, GROUP, REWARDED, TOKENIZER, make, model, rewards, sample
from trl import GRPOConfig as StockConfig
from trl import GRPOTrainer as StockTrainer

from fused_sd.credit import CreditMap
from fused_sd.integrations.trl import teacher_contexts
from fused_sd.integrations.trl.reward_functions import (
    advantages,
    check_weights,
    checked,
    function_list,
    summed,
)

NAN = math.nan
UNKNOWN = [NAN] * GROUP
# rewards of two groups, in which None is NaN
BATCHES = {
    "one unknown": [NAN, 1, 0, 1, 0, 1, 1, 0],
    "a group unknown": [*UNKNOWN, 0.3, 0.7, 0.1, 0.9],
    "one known": [NAN, NAN, 5, NAN, *UNKNOWN],
    "one known beside a group": [NAN, 2, NAN, NAN, 1, 0, NAN, 3],
    "all unknown": UNKNOWN * 2,
    "equal ones": [0.1] * 8,
    "all known": [3, -2, 0.5, 7, 1, 1, 1, 0],
}


def said(*answers):
    return lambda prompts, **_: list(answers)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """TRL's own trainer, whose rewards are those that stand in ``stock.given``."""
    trainer = StockTrainer(
        model(torch.float32),
        lambda prompts, **_: [None if math.isnan(r) else r for r in trainer.given],
        StockConfig(
            str(tmp_path_factory.mktemp("stock")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=2,
        ),
        DATA,
        processing_class=TOKENIZER,
    )
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale, stock):
    stock.scale_rewards = scale
    for name, given in BATCHES.items():
        stock.given = given
        rows = list(DATA.select([0] * GROUP + [1] * GROUP))
        expected = stock._generate_and_score_completions(rows)["advantages"]
        found = advantages(torch.tensor(given), GROUP, scale, 1e-4)
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-5), name


def test_a_rollout_without_a_verdict_is_in_no_mean():
    found = advantages(torch.tensor([NAN, 1.0, 0.0, 1.0]), GROUP, "none", 1e-6)
    assert_close(found, torch.tensor([0, 1 / 3, -2 / 3, 1 / 3]), torch.float32)
    alone = advantages(torch.tensor([NAN, 0.5]), 1, "none", 1e-6)
    assert alone.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("reward", [0.1, 1.7, 100.3, 1000.1])
def test_equal_rewards_have_no_advantage(reward):
    """A mean in fp32 is off by a rounding error, and dividing by its own size makes it near 1."""
    for size in range(2, 17):
        for scale in ("group", "batch", "none"):
            found = advantages(torch.full((2 * size,), reward), size, scale, 1e-6)
            assert not found.any(), (size, scale)


# method: which rollouts of rewards None, 1, 0, 1 are learned from; others have no verdict to wait
# for: their teacher reads a reference, or every token stays in GRPO's mean with advantage 0
LEARNED = {
    "SDZero": [0, 1, 1, 1],
    "RLCSD": [0, 1, 0, 1],  # the only failure has no failed sibling
    "RFT": [0, 1, 0, 1],
}


@pytest.mark.parametrize("method", REWARDED)
def test_no_verdict_is_neither_success_nor_failure(method, tmp_path):
    trainer = make(method, tmp_path, reward_funcs=said(None, 1, 0, 1), feedback_func=None)
    trainer.train_dataset = DATA.remove_columns("privileged_context")  # SDPO's feedback otherwise
    rows = [0] * GROUP
    if method in ("RLSD", "SDPG"):
        trainer.train_dataset = DATA
    inputs = sample(trainer, rows=rows)
    assert math.isnan(inputs["rewards"][0])
    assert inputs["advantages"][0] == 0
    assert inputs["advantages"].sum().abs() < 1e-5
    assert inputs["self_distillation_mask"].tolist() == LEARNED.get(method, [1] * GROUP)
    if method == "RLCSD":
        # neither a right nor a wrong hint
        hints = [trainer._hints(rollout) for rollout in trainer.teacher_contexts._rollouts(inputs)]
        text = trainer.scored.texts[0].strip()
        assert all(text not in str(hint) for hint in hints)


@pytest.mark.parametrize("method", ["SDPO", "SDZero", "RLCSD", "RFT"])
def test_a_group_without_any_verdict_has_no_signal(method, tmp_path):
    trainer = make(method, tmp_path, reward_funcs=said(*[None] * GROUP), feedback_func=None)
    trainer.train_dataset = DATA.remove_columns("privileged_context")
    inputs = sample(trainer)
    assert not inputs["self_distillation_mask"].any()
    assert not inputs["advantages"].any()


def test_a_method_without_rewards_has_no_verdicts(tmp_path):
    trainer = make("OPSD", tmp_path)
    inputs = sample(trainer)
    assert inputs["rewards"].isnan().all()
    assert not inputs["advantages"].any()
    assert not {"reward", "reward_std"} & set(trainer._metrics["train"])


async def asked_later(prompts, **_):
    return [1.0]


class Judge:
    async def __call__(self, prompts, **_):
        return (0, 1, None, math.inf)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([rewards, said(1.0)], "the reward function '<lambda>' must return a list .* got 1;"),
        ([rewards, said(0, 1, math.inf, None)], "'<lambda>' must return finite .* completion 2"),
        ([rewards, asked_later], "'asked_later' must return a list .* 4 completions, got 1"),
        ([Judge()], "the reward function 'Judge' must return finite numbers, got inf for"),
        (said("1", "0", "1", "0"), "must return numbers, or None for no verdict, got '1'"),
        (said(3e38, 0, 0, 1e39), "'<lambda>' must give rewards that fp32 can hold, got inf"),
    ],
)
def test_malformed_rewards_stop_the_run_before_a_step(functions, message, tmp_path):
    trainer = make("GRPO", tmp_path, reward_funcs=functions)
    own = list(trainer.reward_funcs)
    with pytest.raises(ValueError, match=message):
        sample(trainer)
    assert trainer.reward_funcs == own


def test_functions_may_answer_in_every_way_that_has_an_order(tmp_path):
    async def late(prompts, **_):
        return torch.tensor([1.0, 0, 1, NAN])

    functions = (rewards, lambda **given: late(**given), late)
    trainer = make("GRPO", tmp_path, reward_funcs=functions, scale_rewards="none")
    inputs = sample(trainer)
    assert inputs["rewards"].tolist() == [2.0, 1.0, 2.0, 1.0]


def test_a_sum_beyond_fp32_is_the_largest_functions_fault():
    given = torch.tensor([[1.0, 2.0], [3e38, NAN], [NAN, NAN]])
    found = summed(given, torch.tensor([1.0, 0.5]), ("a", "b"))
    assert torch.equal(found[:2], torch.tensor([2.0, 3e38]))
    assert found[2].isnan()
    with pytest.raises(ValueError, match=r"'b' must .* got -inf for completion 0 of all processes"):
        summed(torch.tensor([[1.0, -torch.inf]]), torch.ones(2), ("a", "b"))
    with pytest.raises(ValueError, match=r"'a' must .* got 3e\+38 for completion 1"):
        summed(given, torch.tensor([2.0, 1.0]), ("a", "b"))


def test_a_reward_model_is_asked_as_it_is():
    assert checked(torch.nn.Identity(), "model", has_loop=False).__class__ is torch.nn.Identity


def test_reward_functions_are_a_list_of_ones_own():
    given = [rewards, "a/model"]
    assert function_list(given) == given
    assert function_list(given) is not given
    assert function_list(tuple(given)) == function_list(iter(given)) == given
    assert function_list(rewards) == [rewards]
    assert function_list(None) == function_list(()) == []


# name: what makes a trainer, and what the error says
REFUSED = {
    "a mapping of functions": ({"reward_funcs": {"a": rewards}}, "reward_funcs must be .* a dict"),
    "a set of functions": ({"reward_funcs": {rewards}}, "reward_funcs must be .* got a set"),
    "no function among them": ({"reward_funcs": [rewards, None]}, "a NoneType in place 1"),
    "a number": ({"reward_funcs": 3}, "reward_funcs must be .* got a int"),
    "an empty tuple": ({"reward_funcs": ()}, "reward_funcs must be given to GRPOTrainer"),
    "a weight too few": (
        {"reward_funcs": (rewards, rewards), "reward_weights": [1.0]},
        "reward_weights must be a list of numbers, one for each of 2 reward functions",
    ),
    "several completions a prompt": (
        {"generation_kwargs": {"num_return_sequences": 2}},
        r"generation_kwargs\['num_return_sequences'\] must be 1, got 2; num_generations says",
    ),
    "several completions by a command line": (
        {"generation_kwargs": '{"n": 4}'},
        r"generation_kwargs\['n'\] must be 1, got 4",
    ),
    "an object of outputs": (
        {"generation_kwargs": {"return_dict_in_generate": True}},
        "must be False, got True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_trainer_is_refused_before_it_is_made(name, tmp_path):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make("GRPO", tmp_path, **settings)


@pytest.mark.parametrize("weights", [2.0, "12", [1.0, "a"], [1.0], [1.0] * 3, [1.0, NAN]])
def test_weights_are_finite_numbers_for_each_function(weights):
    with pytest.raises(ValueError, match="reward_weights must be"):
        check_weights(weights, 2)
    check_weights([1, 0.5], 2)
    check_weights(None, 2)


def test_a_models_own_number_of_sequences_is_refused(tmp_path):
    student = model()
    student.generation_config = copy.deepcopy(student.generation_config)
    student.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match="num_return_sequences must be 1, got 8 completions of 4"):
        sample(make("GRPO", tmp_path, student=student))


def test_a_credit_map_shows_no_reward_where_there_is_no_verdict(tmp_path):
    settings = {"reward_funcs": said(None, 1, 0, 1), "credit_map_steps": 1, "max_steps": 1}
    make("SDPO", tmp_path, student=model(torch.float32), **settings).train()
    (path,) = (tmp_path / "credit_maps").glob("*.json")
    shown = [row.caption.split(", ")[2:] for row in CreditMap.from_json(path.read_text()).rows]
    assert sorted(shown) == [[], ["reward 0"], ["reward 1"], ["reward 1"]]


@pytest.mark.parametrize(
    ("method", "lacking"),
    [
        ("RFT", "RFT: no rollout of the last 1 batches has a signal."),
        ("SDPO", "SDPO: no rollout of the last 1 batches has a signal."),
        ("RLSD", "RLSD: no rollout of the last 1 batches has a context for the teacher: rewards"),
    ],
)
def test_a_warning_names_the_method(method, lacking, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(teacher_contexts, "PATIENCE", 1)
    bare = DATA.map(lambda row: {"privileged_context": None})
    trainer = make(method, tmp_path, data=bare, reward_funcs=said(*[None] * 4), feedback_func=None)
    with caplog.at_level(logging.WARNING, logger="fused_sd.integrations.trl.teacher_contexts"):
        sample(trainer)
    assert lacking in caplog.text
