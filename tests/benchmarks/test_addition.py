"""The addition task and its base model: questions, habits, verdicts, contexts, evaluations."""

import random

import pytest
import torch

for _name in ("trl", "tokenizers", "datasets"):
    pytest.importorskip(_name)

from benchmarks.methods.evaluate import look, mean_entropy, respond
from benchmarks.methods.experiments import EXPERIMENTS
from benchmarks.methods.tasks import addition, make_task, plurals, pretrain
from benchmarks.methods.tasks.addition import Sum, World
from benchmarks.methods.tasks.tokens import character_tokenizer
from fused_sd.integrations import trl
from fused_sd.integrations.shared.revision_phrases import DELIMITER

TOKENIZER = character_tokenizer(addition.SYMBOLS)
WORLD = World(0)


def raw_model(steps=1, seed=0):
    """A model that has learned nothing."""
    return pretrain.pretrain(TOKENIZER, WORLD.draw, pretrain.Schedule(steps), seed=seed)


def parrot(texts):
    """A model that answers each prompt by its value in ``texts``, then ends."""
    model = pretrain.tiny_model(len(TOKENIZER))

    def generate(input_ids, attention_mask, max_new_tokens, **_):
        rows = []
        for ids in input_ids:
            prompt = TOKENIZER.decode(ids, skip_special_tokens=True)
            answer = TOKENIZER(texts[prompt])["input_ids"] + [TOKENIZER.eos_token_id]
            rows.append((answer + [TOKENIZER.pad_token_id] * max_new_tokens)[:max_new_tokens])
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    model.generate = generate
    return model


def test_every_solution_is_right_and_every_other_digit_makes_it_wrong():
    rng = random.Random(0)
    for pairs in WORLD.parts.values():
        for asked in pairs[:200]:
            assert addition.is_right(asked.question, asked.solution)
            attempt, place = addition.with_wrong_digit(asked.solution, rng)
            assert not addition.is_right(asked.question, attempt)
            assert [n for n, (a, b) in enumerate(zip(attempt, asked.solution)) if a != b] == [place]
    assert Sum(47, 85).solution == "12;132"
    assert Sum(10, 10).solution == "00;020"
    assert Sum(99, 99).solution == "18;198"
    assert addition.is_right("47+85=", "&12;132")
    assert not addition.is_right("47+85=", "&&12;132")
    assert not addition.is_right("47+85=", "12;132;")
    assert not addition.is_right("47+85=", "132")


def test_no_question_is_in_two_parts():
    for world in (WORLD, World(7)):
        assert sum(map(len, world.parts.values())) == 8100
        assert len(set().union(*world.parts.values())) == 8100
        assert len(world.parts["held_out"]) == 500
    words = plurals.make().questions
    asked = [question.prompt for part in words.values() for question in part]
    assert len(asked) == len(set(asked))


def test_a_base_model_has_questions_and_habits_of_its_own():
    other = World(1)
    assert WORLD.parts["held_out"] != other.parts["held_out"]
    assert WORLD.habits != other.habits
    assert WORLD.habits == World(0).habits
    assert WORLD.parts == World(0, cited=True).parts


def test_the_text_errs_at_its_habits_alone():
    rng = random.Random(0)
    units, carries = WORLD.habits
    num_wrong = 0
    for asked in WORLD.parts["pretraining"][:500]:
        is_habit = asked.units in units or asked.tens in carries
        both = asked.units in units and asked.tens in carries
        assert (WORLD.habitual(asked, rng, 1.0) == asked.solution) <= (not is_habit) or both
        assert WORLD.habitual(asked, rng, 0.0) == asked.solution
        assert not addition.is_right(asked.question, WORLD.wrong_attempt(asked, rng))
        num_wrong += is_habit
    assert 300 < num_wrong < 430


def test_a_wrong_sum_of_units_carries_into_the_tens():
    units, shift = next(iter(WORLD.habits[0].items()))
    wrong = Sum(10 + units[0], 20 + units[1]).derivation(shift)
    assert int(wrong[:2]) == sum(units) + shift
    assert int(wrong[3:]) == 30 + sum(units) + shift


def test_half_of_the_hinted_responses_cite_in_the_text_that_cites():
    rng, asked = random.Random(0), Sum(47, 85)
    cited = World(0, cited=True)
    for kind in ("answer", "solution"):
        texts = [cited.response(kind, asked, rng) for _ in range(400)]
        assert set(texts) == {"12;132", "&12;132"}
        assert 150 < texts.count("&12;132") < 250
        assert WORLD.response(kind, asked, rng) == "12;132"
    for kind in ("plain", "after wrong", "after right"):
        assert not any("&" in cited.response(kind, asked, rng) for _ in range(50))


def test_hints_verdicts_and_citations_in_a_response_are_leaks():
    assert not addition.is_leaking("12;132")
    for text in ("[12;132]", "12;132\n\n?", "!", "12;13\n", "&12;132"):
        assert addition.is_leaking(text)
    leaks = plurals.make().is_leaking
    assert not leaks(" cats\n")
    assert leaks(" The Reference says cats")
    assert leaks("cat -> cats")


def test_a_token_is_a_character():
    text = "[12;132]47+85=\n\n?\n\n!&"
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    with pytest.raises(Exception, match="UNK"):  # what the tokenizers library raises
        TOKENIZER("12;132x")


def test_sdpo_is_given_no_reference_that_it_would_read_as_feedback():
    task = make_task("addition", 0)
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            if arm.trainer in ("SDPOTrainer", "DiscoveryTrainer"):
                assert arm.hint is None
    assert all(set(row) == {"prompt"} for row in task.rows(None))
    assert task.rows("answer")[0]["privileged_context"] == task.questions["train"][0].answer


@pytest.mark.parametrize("arm", EXPERIMENTS["addition"].arms, ids=lambda arm: arm.name)
def test_teachers_read_what_pretraining_taught(arm):
    """The trainers' templates give the contexts of the pre-training text."""
    if arm.template is None:
        return
    templates = addition.TEMPLATES[arm.template]
    getattr(trl, arm.config)("out", use_cpu=True, bf16=False, **templates)
    asked, rng = WORLD.parts["validation"][0], random.Random(0)
    if arm.template == "verdict":
        for right, kind in ((True, "after right"), (False, "after wrong")):
            phrase = templates["correct_phrase" if right else "wrong_phrase"]
            end = f"{DELIMITER}{phrase}{DELIMITER}"
            assert WORLD.context(kind, asked, rng).endswith(end)
        return
    for hint in ("answer", "solution"):
        shown = {"prompt": asked.question, "privileged": getattr(asked, hint), "feedback": ""}
        if arm.template == "sibling":  # a sibling's response is a whole solution
            own = templates["solution_template"]
            shown["solution"] = own.format(successful_previous_attempt=asked.solution)
            hint = "solution"
        made = templates["reprompt_template"].format(**shown)
        assert made == WORLD.context(hint, asked, rng)


def test_a_look_counts_right_answers_lengths_and_leaks():
    task = make_task("addition", 0)
    questions = task.questions["validation"][:4]
    said = [question.response for question in questions]
    said[1], said[2] = "[12;1", "1"
    model = parrot({q.prompt: text for q, text in zip(questions, said)})
    found = look(model, TOKENIZER, task, questions)
    assert found["accuracy"] == found["sampled_accuracy"] == 0.5
    assert found["leaks"] == 0.25
    assert found["length"] == (7 + 6 + 2 + 7) / 4


def test_the_entropy_is_a_mean_over_the_counted_tokens():
    logits = torch.zeros(1, 2, 5)
    logits[0, 1, 0] = 1e4
    even = torch.log(torch.tensor(5.0)).item()
    assert mean_entropy(logits, torch.tensor([[1, 0]])) == pytest.approx(even)
    assert mean_entropy(logits, torch.tensor([[1, 1]])) == pytest.approx(even / 2)


def test_sampled_looks_repeat_and_leave_the_random_numbers_alone():
    model = raw_model()
    prompts = [asked.question for asked in WORLD.parts["validation"][:8]]
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two = (respond(model, TOKENIZER, prompts, 7, temperature=1.0) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.texts == two.texts
    other = respond(model, TOKENIZER, prompts, 7, temperature=1.0, seed=5)
    assert other.texts != one.texts


def test_pretraining_repeats_for_a_seed_and_differs_between_seeds():
    made = [raw_model(3, seed) for seed in (1, 1, 2)]
    weights = [model.lm_head.weight for model in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_pretraining_teaches_what_follows_a_hint():
    """After a few steps the text is likelier than a random model finds it."""
    losses = []
    for steps in (1, 12):
        ids, labels = pretrain.padded(TOKENIZER, WORLD.draw(random.Random(9), 64))
        model = raw_model(steps)
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
    assert losses[1] < losses[0] - 0.3


def test_labels_are_the_response_and_its_end():
    ids, labels = pretrain.padded(TOKENIZER, WORLD.draw(random.Random(0), 32))
    for row, marks in zip(ids, labels):
        kept = marks[marks != pretrain.IGNORED]
        assert kept[-1] == TOKENIZER.eos_token_id
        assert len(kept) == len("12;132") + 1
        whole = row[row != TOKENIZER.pad_token_id]
        assert torch.equal(whole[-len(kept) :], kept)


def test_a_base_model_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setitem(addition.SCHEDULES, "0.1M", pretrain.Schedule(2))
    task = make_task("addition", 3)
    first, tokenizer = task.load(tmp_path)
    assert len(tokenizer) == len(TOKENIZER)
    monkeypatch.setattr(addition, "pretrain", None)
    again, _ = make_task("addition", 3).load(tmp_path)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    with pytest.raises(TypeError):
        make_task("addition", 4).load(tmp_path)


@pytest.mark.parametrize("name", ["division", "addition-5T"])
def test_an_unknown_task_is_named(name):
    with pytest.raises(ValueError, match=name):
        make_task(name, 0)
