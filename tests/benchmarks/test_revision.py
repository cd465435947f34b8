"""SD-Zero whole: its budget, its phases, its reviser and the planted errors."""

import random
from dataclasses import replace

import pytest
import torch

for _name in ("trl", "tokenizers", "datasets"):
    pytest.importorskip(_name)

from benchmarks.methods import arms, planted, reviser, revision, runs, train
from benchmarks.methods.evaluate import Responses
from benchmarks.methods.experiments import EXPERIMENTS, Scale, Unit
from benchmarks.methods.records import Records
from benchmarks.methods.tasks import Task, make_task
from benchmarks.methods.tasks.addition import END, World, is_leaking, is_right
from fused_sd.credit import CreditMap, CreditRow, TokenCredit
from fused_sd.integrations.trl import Trace

SMALL = Scale(steps=3, prompts=2, look_every=1, num_questions=10)
WHOLE = (arms.SRT, arms.SD_ZERO_SEQUENTIAL, arms.SD_ZERO_SYNCED)


@pytest.fixture
def task():
    """Addition with verdicts that a model which has learned nothing gets by chance."""
    return replace(make_task("addition", 0), is_right=lambda _, text: sum(map(ord, text)) % 2 == 0)


@pytest.fixture
def judged(monkeypatch):
    """The number of responses that were given a reward, which evaluations are not."""
    count = [0]

    def reward(self, prompts, completions, **_):
        count[0] += len(completions)
        return [float(self.is_right(*pair)) for pair in zip(prompts, completions)]

    monkeypatch.setattr(Task, "reward", reward)
    return count


def traces(num_right, num_wrong):
    return [
        Trace(n, "1+1=", (2,), (3, n), "!", (4,), (5, 1), n < num_right, None, None)
        for n in range(num_right + num_wrong)
    ]


def test_the_last_attempt_counts():
    assert is_right("47+85=", "12;132")
    assert is_right("47+85=", "13;133\n\n?\n\n12;132")
    assert is_right("47+85=", "13;133\n\n?\n\n&12;132")
    for wrong in ("12;132\n\n!\n\n12;133", "12;132\n\n?\n\n", "12;132\n\n?", "12;13212;132"):
        assert not is_right("47+85=", wrong)


def test_verdicts_leak_unless_they_stand_between_attempts():
    assert not is_leaking("13;133\n\n?\n\n12;132")
    for leak in ("[12;1", "12;132\n\n?", "!", "12;13\n", "13;133\n\n?\n\n12;132\n\n!"):
        assert is_leaking(leak)


def test_contexts_hold_ended_and_double_attempts():
    world, rng = World(0), random.Random(0)
    pair = world.parts["pretraining"][0]
    for kind, verdict in (("after wrong", "?"), ("after right", "!")):
        drawn = [world.context(kind, pair, rng) for _ in range(200)]
        assert all(text.endswith(f"\n\n{verdict}\n\n") for text in drawn)
        counts = [text.count("?") + text.count("!") for text in drawn]
        assert 0.15 < sum(count == 2 for count in counts) / 200 < 0.35
        assert set(counts) == {1, 2}
        assert 0.4 < sum(END in text for text in drawn) / 200 < 0.6
        assert not any("!" in text[:-6] for text in drawn if verdict == "?")


def test_phases_ask_different_questions_within_their_shares(task):
    scale = Scale(steps=120, prompts=8, look_every=20)
    asked, others = revision.divided(task, arms.SD_ZERO_JOINT.phase_one, scale, 3)
    one, two = asked.questions["train"], others.questions["train"]
    assert len(one) == 1280  # two thirds of 7680 generations, 4 for each question
    assert sorted(map(repr, one + two)) == sorted(map(repr, task.questions["train"]))
    assert asked.questions["held_out"] == task.questions["held_out"]
    assert one != task.questions["train"][:1280]
    longer = replace(scale, steps=1000)
    assert len(revision.divided(task, arms.SRT.phase_one, longer, 3)[0].questions["train"]) == 2000
    in_stages = revision.divided(task, arms.SD_ZERO_SEQUENTIAL.phase_one, scale, 3)[0]
    assert len(in_stages.questions["train"]) == 5120 // 12


@pytest.mark.parametrize("arm", WHOLE, ids=lambda arm: arm.name)
def test_every_sample_is_counted_and_the_budget_is_kept(arm, task, work, judged):
    values = revision.run(task, arm, 1e-3, 0, SMALL, work, part="validation")
    curve, first = values["curve"], values["phase_one"]
    assert curve[-1]["generations"] == judged[0] <= SMALL.steps * SMALL.generations
    assert curve[0]["step"] == curve[0]["generations"] == 0
    assert curve[1]["step"] == first["steps"]
    assert (first["steps"] > 0) == (first["counts"]["kept"] >= 2)
    assert curve[1]["generations"] == first["generations"]
    counts = first["counts"]
    assert counts["questions"] == first["questions"]
    assert counts["initial"] == first["questions"] * arm.phase_one.num_initial
    left = SMALL.steps * SMALL.generations - first["generations"]
    second = 0 if arm.trainer == "SRTTrainer" else left // SMALL.generations
    assert curve[-1]["step"] == first["steps"] + second
    assert set(values["states"]) == {"base", "phase one"} | ({"end"} if second else set())
    assert values["seconds"] > 0


def test_a_model_that_keeps_no_trace_goes_on_untrained(task, work):
    never = replace(task, is_right=lambda *_: False)
    values = revision.run(never, arms.SD_ZERO_JOINT, 1e-3, 0, SMALL, work, part="validation")
    assert values["phase_one"]["steps"] == values["phase_one"]["counts"]["kept"] == 0
    assert values["states"]["base"] == values["states"]["phase one"]


def test_stages_share_the_traces_as_the_official_script_does():
    everything = traces(num_right=4, num_wrong=20)
    joint = revision.stages(arms.SD_ZERO_JOINT.phase_one, everything, 0)
    assert joint == {"joint": everything}
    found = revision.stages(arms.SD_ZERO_SEQUENTIAL.phase_one, everything, 0)
    assert list(found) == ["generation", "revision"]
    assert len(found["generation"]) == 20
    assert len(found["revision"]) == 4
    assert all(trace.initial_correct for trace in found["revision"])
    assert revision.stages(arms.SD_ZERO_SEQUENTIAL.phase_one, everything[:1], 0) == {}


def test_phase_two_gets_the_whole_steps_that_remain():
    scale = Scale(steps=120, prompts=8, look_every=20)
    rest = revision.phase_two(arms.SD_ZERO_JOINT, scale, used=5130)
    assert (rest.steps, rest.look_every) == (39, 10)
    assert revision.phase_two(arms.SD_ZERO_JOINT, scale, used=7680).steps == 0
    assert revision.phase_two(arms.SRT, scale, used=64).steps == 0


def test_the_teacher_is_renewed_once_after_half_of_phase_two():
    scale = Scale(steps=40, prompts=8, look_every=10)
    settings = revision.renewed(arms.SD_ZERO_SYNCED, scale).settings
    assert settings["teacher_sync_steps"] == 20
    assert settings["teacher_model_kind"] == "synced"
    assert revision.renewed(arms.SD_ZERO_JOINT, scale) is arms.SD_ZERO_JOINT


def test_arms_and_tasks_without_a_first_phase_are_refused(task, work):
    with pytest.raises(ValueError, match=r"phase_one.*'grpo'"):
        revision.run(task, arms.GRPO, 1e-3, 0, SMALL, work, part="validation")
    with pytest.raises(ValueError, match="whole models"):
        revision.checked(replace(task, lora_rank=4), arms.SRT)


def test_the_curve_ends_with_the_training(task, work):
    scale = replace(SMALL, look_every=2)  # of 3 steps
    values = train.run(task, arms.GRPO, 1e-3, 0, scale, work, part="validation")
    assert [look["step"] for look in values["curve"]] == [0, 2, 3]


def test_runs_dispatch_by_phase_one_and_are_found_again(tmp_path, work, monkeypatch):
    called = []
    for module in (revision, train):
        monkeypatch.setattr(module, "run", lambda *_, m=module, **__: called.append(m) or {})
    experiment, records = EXPERIMENTS["self-revision"], Records(tmp_path / "runs.jsonl")
    for name in ("grpo", "srt", "sd_zero_synced"):
        run = runs.Run("addition", experiment.arm(name), 1e-4, Unit(0, 0), SMALL)
        runs.measure(run, work)
        records.add(run.decided_by, {}, {})
        assert Records(records.path).find(run.decided_by) is not None
    assert called == [train, revision, revision]


def test_revisions_follow_whole_responses_and_first_attempts(monkeypatch):
    task = make_task("addition", 0)
    questions = task.questions["validation"][:4]
    right = [question.response for question in questions]
    said = [
        [right[0], f"1\n\n?\n\n{right[1]}", "2", right[3]],
        [right[0], right[1], "3", "4"],
        [right[0], "5", right[2], "6"],
    ]
    seen = []

    def respond(model, tokenizer, prompts, max_tokens):
        seen.append(list(prompts))
        return Responses(said[len(seen) - 1], None, None)

    monkeypatch.setattr(reviser, "respond", respond)
    monkeypatch.setattr(planted, "score", lambda *_: "planted")
    found = reviser.judge(None, None, task, questions, 0)
    whole = {"first": 0.75, "revised": 0.5, "corrected": 0.0, "kept": 2 / 3}
    attempt = {"first": 0.5, "revised": 0.5, "corrected": 0.5, "kept": 0.5}
    assert found == {"revision": whole, "attempt_revision": attempt, "planted": "planted"}
    assert seen[1][1] == f"{questions[1].prompt}1\n\n?\n\n{right[1]}\n\n!\n\n"
    assert seen[2][1] == f"{questions[1].prompt}1\n\n?\n\n"
    assert seen[2][3] == f"{questions[3].prompt}{right[3]}\n\n!\n\n"


def test_planted_errors_are_one_digit_and_likely_ones_the_students(work):
    task = make_task("addition", 0)
    model, tokenizer = task.load(work)
    questions = task.questions["validation"][:8]
    for kind in planted.KINDS:
        attempts, masks = planted.plant(model, tokenizer, questions, kind, 0)
        for question, attempt, mask in zip(questions, attempts, masks):
            assert mask == [a != b for a, b in zip(attempt, question.solution)]
            assert sum(mask) == 1
            assert not task.is_right(question.prompt, attempt)
    ids = torch.tensor(tokenizer([q.prompt + q.solution for q in questions])["input_ids"])
    logits = model(input_ids=ids).logits
    for row, question, attempt, mask in zip(logits, questions, attempts, masks):
        place = mask.index(True)
        others = [digit for digit in "0123456789" if digit != question.solution[place]]
        scores = row[len(question.prompt) + place - 1]
        likely = max(others, key=lambda digit: scores[tokenizer.convert_tokens_to_ids(digit)])
        assert attempt[place] == likely


def test_planted_scores_follow_the_teachers_blame(work, monkeypatch):
    """A teacher that blames exactly the planted digits scores 1, whatever it reads."""
    task = make_task("addition", 0)
    model, tokenizer = task.load(work)
    questions = task.questions["validation"][:8]
    right = tokenizer([question.solution for question in questions])["input_ids"]

    def omniscient(student, head, teacher, teacher_head, ids, top):
        rows = [
            CreditRow(tuple(token(int(a), int(a) == b) for a, b in zip(row, wanted)))
            for row, wanted in zip(ids, right)
        ]
        return CreditMap(tuple(rows))

    def token(token_id, is_right):
        return TokenCredit(token_id, "", -1.0, -1.0 if is_right else -9.0, 0.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(planted, "credit_map", omniscient)
    for found in planted.score(model, tokenizer, questions, 0).values():
        assert found[planted.CHANCE]["precision"] == pytest.approx(1 / 6)
        assert found[planted.ALONE]["auroc"] == 0.5
        for teacher in planted.TEACHERS:
            assert found[teacher]["precision"] == found[teacher]["auroc"] == 1.0
