"""The search for answers to hard questions: its three ways, and how they are recorded."""

import random
from dataclasses import replace

import pytest

for _name in ("trl", "tokenizers", "datasets"):
    pytest.importorskip(_name)

from benchmarks.methods import arms, discovery, runs
from benchmarks.methods.__main__ import main
from benchmarks.methods.evaluate import Responses
from benchmarks.methods.experiments import EXPERIMENTS, Experiment, Search, Unit, bases, quick
from benchmarks.methods.records import Records
from benchmarks.methods.tasks import addition, make_task
from benchmarks.methods.tasks.addition import World
from fused_sd.integrations import trl
from fused_sd.integrations.shared.prompts import sibling_prompt
from fused_sd.integrations.shared.rollouts import Rollout


@pytest.fixture
def task():
    return make_task("addition", 0)


def scripted(monkeypatch, say):
    """Let ``say`` answer each prompt; return the calls' prompts and seeds."""
    calls = []

    def respond(model, tokenizer, prompts, max_tokens, *, temperature, seed):
        assert temperature == 1.0
        calls.append((list(prompts), seed))
        return Responses([say(prompt) for prompt in prompts], None, None)

    monkeypatch.setattr(discovery, "respond", respond)
    return calls


def test_the_first_success_is_counted_from_one():
    assert discovery.first([False, False, True, True]) == 3
    assert discovery.first([True]) == 1
    assert discovery.first([False]) is None


def test_the_reported_counts_double_up_to_the_most_attempts():
    assert Search(1, 512, 1).counts == (16, 32, 64, 128, 256, 512)
    assert Search(1, 100, 1).counts == (16, 32, 64)


def test_a_turn_reads_what_pretraining_taught_and_the_teacher_reads(task):
    world, rng = World(0), random.Random(1)
    pair = next(p for p in world.parts["train"] if world.habitual(p, rng, 1.0) != p.solution)
    attempt = world.wrong_attempt(pair, rng)
    read = {world.context("after wrong", pair, rng) for _ in range(50)}
    question = replace(task.questions["train"][0], prompt=pair.question)
    for arm in (arms.MULTI_TURN, arms.TEST_TIME):
        prompt = discovery.turn_prompt(question, attempt, task, arm)
        assert prompt == f"{pair.question}{attempt}\n\n?\n\n"
        assert prompt in read
    config = trl.DiscoveryConfig(
        "out", use_cpu=True, bf16=False, **task.templates["own attempt"], **arms.TEST_TIME.settings
    )
    rollout = Rollout(pair.question, [], [], attempt, 0.0, None, addition.WRONG, 0, [])
    rollout.group.append(rollout)
    assert sibling_prompt(rollout, addition.WRONG, config) == prompt


def test_a_conversation_ends_with_its_first_right_turn(task, monkeypatch):
    """The first question is right at once, the second after its second failure, the third never."""
    questions = task.questions["held_out"][:3]
    one, two, three = (question.prompt for question in questions)
    script = {
        one: questions[0].response,
        two: "1",
        f"{two}1\n\n?\n\n": "2",
        f"{two}2\n\n?\n\n": questions[1].response,
        three: "3",
        f"{three}3\n\n?\n\n": "3",
    }
    calls = scripted(monkeypatch, script.__getitem__)
    found = discovery.converse(None, None, task, arms.MULTI_TURN, questions, max_attempts=5, seed=7)
    assert found == [1, 3, None]
    assert [len(prompts) for prompts, _ in calls] == [3, 2, 2, 1, 1]
    assert len({seed for _, seed in calls}) == 5


def test_a_question_is_hard_if_no_sample_is_right(task, monkeypatch):
    easy = {question.prompt: question.response for question in task.questions["held_out"][1:3]}
    search = Search(num_questions=3, max_attempts=16, hard_samples=4)
    calls = scripted(monkeypatch, lambda prompt: easy.get(prompt, "0"))
    found = discovery.hard_questions(None, None, task, "held_out", search, 0)
    assert found == [task.questions["held_out"][number] for number in (0, 3, 4)]
    assert [prompts for prompts, _ in calls] == [
        [question.prompt] * 4 for question in task.questions["held_out"][:5]
    ]
    few = replace(task, questions={"held_out": task.questions["held_out"][:4]})
    assert len(discovery.hard_questions(None, None, few, "held_out", search, 0)) == 2
    none = replace(task, questions={"held_out": task.questions["held_out"][1:3]})
    with pytest.raises(ValueError, match="must fail 4 times, got none of 2; draw fewer samples"):
        discovery.hard_questions(None, None, none, "held_out", search, 0)


def test_the_samples_of_best_of_k_are_fresh(task, work, monkeypatch):
    calls = scripted(monkeypatch, lambda prompt: "0")
    search = Search(num_questions=1, max_attempts=32, hard_samples=8)
    found = discovery.run(task, arms.BEST_OF_K, None, 3, search, work, part="held_out")
    (hard, hard_seed), (fresh, fresh_seed) = calls
    assert (len(hard), len(fresh)) == (8, 32)
    assert hard_seed != fresh_seed
    assert found["questions"] == [hard[0]] == [fresh[0]]
    assert found["first_success"] == [None]
    assert found["probability"] == {16: 0.0, 32: 0.0}


@pytest.mark.parametrize(("passes", "expected"), [(9, 9), (18, 18), (40, None)])
def test_the_self_distillers_attempts_are_counted_over_its_steps(task, work, passes, expected):
    """The verdict is right at one attempt, counted over the attempts of all steps."""
    rewarded = []

    class Counting(type(task)):
        def reward(self, prompts, completions, **_):
            rewarded.extend(completions)
            return [float(len(rewarded) - len(completions) + n == passes - 1) for n in range(16)]

    counting = Counting(**{**task.__dict__, "is_right": lambda prompt, response: False})
    found = discovery.distil(
        counting,
        arms.TEST_TIME,
        task.questions["held_out"][0],
        rate=1e-3,
        seed=0,
        max_attempts=32,
        cache=work,
    )
    assert found == expected
    assert len(rewarded) == (16 if passes <= 16 else 32)


def test_only_the_trained_way_has_rates_and_all_share_the_units():
    experiment = EXPERIMENTS["discovery"]
    chosen = runs.selecting(experiment)
    assert {run.arm.name for run in chosen} == {"test_time"}
    assert len(chosen) == len(experiment.rates) * len(experiment.selection)
    assert {run.part for run in chosen} == {"validation"}
    assert not {run.unit for run in chosen} & set(experiment.units)
    assert all(run.scale == experiment.scale for run in chosen)


def test_a_search_is_scored_by_its_mean_probability():
    assert runs.score({"probability": {"16": 0.25, "32": 0.75}}) == 0.5
    assert runs.score({"curve": [{"accuracy": 0.1}, {"accuracy": 0.3}]}) == 0.3


def test_the_command_records_one_run_for_each_way_and_unit(work, tmp_path, monkeypatch):
    """All ways of a unit have the same hard questions, and their records hold what is reported."""
    small = Experiment(
        "discovery",
        "addition",
        EXPERIMENTS["discovery"].arms,
        Search(num_questions=2, max_attempts=16, hard_samples=16),
        bases(1),
        rates=(1e-3,),
        selection=(Unit(0, 100),),
    )
    monkeypatch.setitem(EXPERIMENTS, "discovery", small)
    for command in ("select", "run"):
        main([command, "discovery", "--work", str(work), "--results", str(tmp_path)])
    records = Records(tmp_path / "addition.jsonl").all
    assert [record.decided_by["arm"]["name"] for record in records] == [
        "test_time", "best_of_k", "multi_turn", "test_time"
    ]  # fmt: skip
    assert [record.decided_by["rate"] for record in records] == [1e-3, None, None, 1e-3]
    final = records[1:]
    assert len({tuple(record.values["questions"]) for record in final}) == 1
    for record in final:
        assert set(record.values) == {"questions", "first_success", "probability", "seconds"}
        assert len(record.values["first_success"]) == 2
        assert set(record.values["probability"]) == {"16"}


def test_a_quick_search_is_short():
    assert quick(EXPERIMENTS["discovery"]).scale.max_attempts == 32


def test_both_arms_of_a_size_have_one_grid_that_falls_by_halves():
    experiment = EXPERIMENTS["size-3M"]
    assert experiment.task == "addition-3M"
    assert [arm.name for arm in experiment.arms] == ["grpo", "sdpo"]
    assert experiment.rates == (5e-5, 1e-4, 2e-4, 4e-4)
    assert EXPERIMENTS["size-0.4M"].rates == (1e-4, 2e-4, 4e-4, 8e-4)
    assert EXPERIMENTS["size-12M"].rates == (2.5e-5, 5e-5, 1e-4, 2e-4)
    assert experiment.scale == EXPERIMENTS["addition"].scale
