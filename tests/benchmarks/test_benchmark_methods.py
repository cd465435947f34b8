"""The experiment's parts: the task, the statistics, the stored parts, and a small run."""

import json
import os
import random

import pytest
import torch

for _name in ("trl", "tokenizers", "datasets"):
    pytest.importorskip(_name)

from benchmarks.methods import arithmetic, collect, planted, pretrain, runs, settings
from benchmarks.methods.__main__ import main
from benchmarks.methods.arithmetic import Sum
from benchmarks.methods.discovery import TEMPLATES, first
from benchmarks.methods.evaluate import look, mean_entropy, respond
from benchmarks.methods.plurals import plurals
from benchmarks.methods.statistics import bootstrap, interval, wilson
from benchmarks.methods.tokens import character_tokenizer
from benchmarks.storage import Parts
from fused_sd.credit import credit_map, planted_error_scores
from fused_sd.integrations import trl
from fused_sd.integrations.shared.revision_phrases import DELIMITER
from fused_sd.measuring.readme import Block

TOKENIZER = character_tokenizer(arithmetic.SYMBOLS)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder whose base model of seed 0 has learned nothing."""
    folder = tmp_path_factory.mktemp("work")
    home = folder / f"tiny-{pretrain.VERSION}-0"
    model, tokenizer, measured = pretrain.pretrain(0, accuracy=0.0, max_steps=2)
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    (home / "measured.json").write_text(json.dumps(measured))
    return folder


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
    for pairs in arithmetic.splits().values():
        for asked in pairs[:200]:
            assert arithmetic.is_right(asked.question, asked.solution)
            attempt, place = arithmetic.with_wrong_digit(asked.solution, rng)
            assert not arithmetic.is_right(asked.question, attempt)
            assert [n for n, (a, b) in enumerate(zip(attempt, asked.solution)) if a != b] == [place]
    assert Sum(47, 85).solution == "12;132"
    assert Sum(10, 10).solution == "00;020"
    assert Sum(99, 99).solution == "18;198"
    assert not arithmetic.is_right("47+85=", "12;132;")
    assert not arithmetic.is_right("47+85=", "132")


def test_no_question_is_in_two_parts():
    parts = arithmetic.splits()
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 8100
    assert len(parts["held_out"]) == 500
    words = plurals().questions
    asked = [question.prompt for part in words.values() for question in part]
    assert len(asked) == len(set(asked))


def test_the_text_errs_at_its_habits_alone():
    rng = random.Random(0)
    num_wrong = 0
    for asked in arithmetic.splits()["pretraining"][:500]:
        units = (asked.first % 10, asked.second % 10)
        tens = (asked.first // 10, asked.second // 10)
        is_habit = units in arithmetic.UNITS_HABITS or tens in arithmetic.CARRY_HABITS
        assert (arithmetic.habitual(asked, rng, 1.0) == asked.solution) <= (not is_habit) or (
            units in arithmetic.UNITS_HABITS and tens in arithmetic.CARRY_HABITS
        )
        assert arithmetic.habitual(asked, rng, 0.0) == asked.solution
        assert not arithmetic.is_right(asked.question, arithmetic.wrong_attempt(asked, rng))
        num_wrong += is_habit
    assert 300 < num_wrong < 430


def test_a_wrong_sum_of_units_carries_into_the_tens():
    units, shift = next(iter(arithmetic.UNITS_HABITS.items()))
    wrong = Sum(10 + units[0], 20 + units[1]).derivation(shift)
    assert int(wrong[:2]) == sum(units) + shift
    assert int(wrong[3:]) == 30 + sum(units) + shift


def test_hints_and_verdicts_in_a_response_are_leaks():
    assert not arithmetic.is_leaking("12;132")
    for text in ("[12;132]", "12;132\n\n?", "!", "12;13\n"):
        assert arithmetic.is_leaking(text)
    leaks = plurals().is_leaking
    assert not leaks(" cats\n")
    assert leaks(" The Reference says cats")
    assert leaks("cat -> cats")


def test_a_token_is_a_character():
    text = "[12;132]47+85=\n\n?\n\n!"
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("method", settings.METHODS)
def test_teachers_read_what_pretraining_taught(method):
    """The trainers' templates give the contexts of the pre-training text."""
    task, chosen = arithmetic.addition(), settings.METHODS[method]
    if chosen.template is None:
        return
    templates = task.templates[chosen.template]
    getattr(trl, chosen.config)("out", use_cpu=True, bf16=False, **templates)
    asked = arithmetic.splits()["validation"][0]
    rng = random.Random(0)
    if chosen.template == "verdict":
        for right, kind in ((True, "after right"), (False, "after wrong")):
            phrase = templates["correct_phrase" if right else "wrong_phrase"]
            end = f"{DELIMITER}{phrase}{DELIMITER}"
            assert arithmetic.context(kind, asked, rng).endswith(end)
        return
    for hint in ("answer", "solution"):
        shown = {"prompt": asked.question, "privileged": getattr(asked, hint), "feedback": ""}
        if chosen.template == "sibling":  # a sibling's response is a whole solution
            own = templates["solution_template"]
            shown["solution"] = own.format(successful_previous_attempt=asked.solution)
            hint = "solution"
        made = templates["reprompt_template"].format(**shown)
        assert made == arithmetic.context(hint, asked, rng)


def test_discovery_shows_the_revisers_context():
    said = TEMPLATES["attempt_template"].format(attempt="13;133")
    said += TEMPLATES["feedback_template"].format(feedback_raw=arithmetic.WRONG)
    prompt = TEMPLATES["reprompt_template"].format(prompt="47+85=", solution="", feedback=said)
    assert prompt == "47+85=13;133\n\n?\n\n"
    assert first([False, False, True, True]) == 3
    assert first([False]) is None


def test_each_method_has_rates_of_equal_effort():
    for task, table in settings.RATES.items():
        assert set(table) == set(settings.METHODS)
        for name, measured in table.items():
            assert tuple(sorted(measured)) == settings.GRID[task], (task, name)
            best = settings.learning_rate(task, name)
            assert measured[best] == max(measured.values())


def test_a_look_counts_right_answers_lengths_and_leaks():
    task = arithmetic.addition()
    questions = task.questions["validation"][:4]
    said = [question.response for question in questions]
    said[1], said[2] = "[12;1", "1"
    model = parrot({q.prompt: text for q, text in zip(questions, said)})
    found = look(model, TOKENIZER, task, questions)
    assert found["right"] == "1001"
    assert found["accuracy"] == found["sampled_accuracy"] == 0.5
    assert found["leaks"] == 0.25
    assert found["length"] == (7 + 6 + 2 + 7) / 4


def test_the_entropy_is_a_mean_over_the_counted_tokens():
    logits = torch.zeros(1, 2, 5)
    logits[0, 1, 0] = 1e4
    even = torch.log(torch.tensor(5.0)).item()
    assert mean_entropy(logits, torch.tensor([[1, 0]])) == pytest.approx(even)
    assert mean_entropy(logits, torch.tensor([[1, 1]])) == pytest.approx(even / 2)


def test_sampled_looks_repeat_and_leave_the_random_numbers_alone(work):
    task = arithmetic.addition()
    model, tokenizer, _ = pretrain.pretrain(0, accuracy=0.0, max_steps=1)
    prompts = [question.prompt for question in task.questions["validation"][:8]]
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two = (respond(model, tokenizer, prompts, 7, temperature=1.0) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.texts == two.texts
    other = respond(model, tokenizer, prompts, 7, temperature=1.0, seed=5)
    assert other.texts != one.texts


def test_pretraining_repeats_for_a_seed_and_differs_between_seeds():
    made = [pretrain.pretrain(seed, accuracy=0.0, max_steps=3)[0] for seed in (1, 1, 2)]
    weights = [model.lm_head.weight for model in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(RuntimeError, match="must reach 200%"):
        pretrain.pretrain(1, accuracy=2.0, max_steps=1)


def test_labels_are_the_response_and_its_end():
    pool = arithmetic.splits()["pretraining"]
    ids, labels = pretrain.batch_of(TOKENIZER, pool, random.Random(0), 32)
    for row, marks in zip(ids, labels):
        kept = marks[marks != pretrain.IGNORED]
        assert kept[-1] == TOKENIZER.eos_token_id
        assert len(kept) == arithmetic.MAX_RESPONSE
        whole = row[row != TOKENIZER.pad_token_id]
        assert torch.equal(whole[-len(kept) :], kept)


def test_wilsons_interval_is_the_published_one():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    for right, asked, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        found = wilson(right, asked)
        assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_the_bootstrap_sees_both_questions_and_seeds():
    alike = ["10" * 100] * 5
    apart = ["1" * 200, "0" * 200]
    low, high = bootstrap(alike)
    assert 0.42 < low < 0.45  # as of one run of 200 questions
    assert 0.55 < high < 0.58
    assert bootstrap(apart) == (0.0, 1.0)
    assert bootstrap(["1" * 10] * 3) == (1.0, 1.0)
    assert interval(alike[:1]) == wilson(100, 200)
    with pytest.raises(ValueError, match="equally long"):
        bootstrap(["1", "11"])


def test_a_difference_between_methods_is_paired():
    """A spread between the seeds does not widen the interval of the paired difference."""
    weak = ["1" * 20 + "0" * 180, "1" * 160 + "0" * 40]
    strong = [run.replace("10", "11", 1) for run in weak]  # one question more in every seed
    low, high = bootstrap(strong, weak)
    assert 0 <= low <= 0.005 <= high < 0.02
    assert bootstrap(weak)[1] - bootstrap(weak)[0] > 0.5
    assert bootstrap(weak, weak) == (0, 0)
    assert bootstrap(weak, strong)[0] == -high
    with pytest.raises(ValueError):
        bootstrap(weak, strong[:1])


def test_a_part_is_kept_for_what_decided_it(tmp_path):
    parts = Parts(tmp_path / "parts")
    assert parts.load("a", {"rate": 1e-3}) is None
    parts.save("a", {"rate": 1e-3}, {"curve": [1, 2]})
    assert parts.load("a", {"rate": 1e-3}) == {"curve": [1, 2]}
    assert parts.load("a", {"rate": 2e-3}) is None
    (tmp_path / "parts" / "a.json").write_text('{"decided')
    assert parts.load("a", {"rate": 1e-3}) is None


def run_of(accuracies):
    """A run whose evaluations answer these numbers of ten questions."""
    curve = [
        {
            "step": n,
            "generations": 16 * n,
            "right": "1" * right + "0" * (10 - right),
            "accuracy": right / 10,
            "sampled_accuracy": 0.1,
            "length": 7.0,
            "entropy": 0.5 - n / 10,
            "leaks": 0.0,
        }
        for n, right in enumerate(accuracies)
    ]
    return {"curve": curve, "seconds": 1.0}


def test_results_compare_generations_and_late_losses():
    scale = settings.QUICK
    accuracies = {"grpo": [(2, 4, 6), (2, 6, 8)], "sdpo": [(2, 8, 6), (2, 6, 4)]}
    values = {
        runs.Part("tiny", name, 1e-3, seed, scale): run_of(looks)
        for name, seeds in accuracies.items()
        for seed, looks in enumerate(seeds)
    }
    found = collect.results(values)["methods"]
    assert found["grpo"]["curve"][-1]["accuracy"] == pytest.approx(0.7)
    assert found["grpo"]["generations_to_reference"] == 32
    assert found["sdpo"]["generations_to_reference"] == 16
    assert found["sdpo"]["late_change"] == pytest.approx(-0.2)
    assert found["grpo"]["late_change"] == 0
    assert found["sdpo"]["final_by_seed"] == [0.6, 0.4]
    assert found["sdpo"]["above_reference"]["mean"] == pytest.approx(-0.2)
    assert found["grpo"]["above_reference"]["interval"] == (0, 0)
    look_of = found["sdpo"]["curve"][1]
    assert look_of["low"] < look_of["accuracy"] < look_of["high"]


def test_discovery_counts_questions_solved_in_time():
    run = {"questions": ["a", "b", "c", "d"], "best of k": [1, 17, None, 16]}
    found = collect.discovery_results([{**run, "self-distillation": [1, 2, 3, None]}], 32)
    assert found["attempts"] == [16, 32]
    assert found["best of k"]["probability"] == [0.5, 0.75]
    assert found["self-distillation"]["probability"] == [0.75, 0.75]


def test_a_planted_error_is_one_other_digit():
    asked = arithmetic.splits()["held_out"][:5]
    model, tokenizer, _ = pretrain.pretrain(0, accuracy=0.0, max_steps=2)
    for kind in planted.KINDS:
        attempts, masks = planted.plant(model, tokenizer, asked, kind, 0)
        for question, attempt, mask in zip(asked, attempts, masks):
            assert [a != b for a, b in zip(attempt, question.solution)] == mask
            assert sum(mask) == 1


def test_a_likely_error_is_the_students_own_choice():
    """A student that always writes 7 is not surprised by the planted 7."""
    asked = [Sum(47, 85), Sum(61, 22)]
    model, tokenizer, _ = pretrain.pretrain(0, accuracy=0.0, max_steps=1)
    seven = tokenizer.convert_tokens_to_ids("7")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[seven] = 1.0
    model.model.norm.forward = lambda hidden: torch.ones_like(hidden)
    attempts, masks = planted.plant(model, tokenizer, asked, "likely", 0)
    for attempt, mask in zip(attempts, masks):
        assert attempt[mask.index(True)] == "7"
    head = model.lm_head.weight.detach()
    bare = [question.question for question in asked]
    hidden, ids = planted.states(model, tokenizer, bare, attempts)
    rows = [planted.alone(row) for row in credit_map(hidden, head, hidden, head, ids).rows]
    assert planted_error_scores(rows, masks).precision == 0  # least surprising of all


def test_states_are_those_that_predict_the_attempt():
    model = pretrain.tiny_model(len(TOKENIZER)).eval()
    prompts, attempts = ["47+85=", "10+20="], ["12;132", "00;030"]
    hidden, ids = planted.states(model, TOKENIZER, prompts, attempts)
    assert TOKENIZER.batch_decode(ids) == attempts
    whole = torch.tensor(TOKENIZER([p + a for p, a in zip(prompts, attempts)])["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=whole).logits[:, 5:-1]
        own = hidden @ model.lm_head.weight.T
    assert torch.allclose(own, logits, atol=1e-5)


@pytest.fixture(scope="module")
def quick(work, tmp_path_factory):
    """The results of the whole command at its smallest, with four methods."""
    folder = tmp_path_factory.mktemp("quick")
    readme = folder / "README.md"
    readme.write_text("above\n<!-- methods tiny: x -->\n<!-- end -->\nbelow\n")
    arguments = ["--quick", "--seeds", "1", "--work", str(work), "--results", str(folder)]
    arguments += ["--docs", str(folder), "--methods", "grpo", "sdft", "sdpo", "sd_zero"]
    kept = dict(os.environ)
    main([*arguments, "--update-readme", str(readme)])
    os.environ.clear()
    os.environ.update(kept)
    return folder, arguments


def test_a_quick_run_writes_results_table_and_plot(quick):
    folder, _ = quick
    found = json.loads((folder / "tiny.json").read_text())
    assert set(found["methods"]) == {"grpo", "sdft", "sdpo", "sd_zero"}
    for method in found["methods"].values():
        generations = [look["generations"] for look in method["curve"]]
        assert generations == [0, 16, 32]  # the same for every method
        assert all(look["low"] <= look["accuracy"] <= look["high"] for look in method["curve"])
    assert set(found["planted_errors"]["slip"]) >= {"answer", "solution", "chance"}
    assert found["discovery"]["num_questions"] == 1
    assert found["environment"]["torch"] == torch.__version__
    assert (folder / "methods_tiny.png").stat().st_size > 10_000
    pictured = {path.name for path in folder.glob("*_*_*.png")}
    assert pictured == {f"methods_tiny_{name}.png" for name in ("grpo", "sdft", "sdpo", "sd_zero")}
    text = (folder / "README.md").read_text()
    assert text.startswith("above\n")
    assert text.endswith("<!-- end -->\nbelow\n")
    assert "| GRPO |" in text
    assert "| SD-Zero |" in text


def test_a_resumed_run_makes_no_part_again(quick, monkeypatch, capsys):
    folder, arguments = quick
    before = json.loads((folder / "tiny.json").read_text())

    def refuse(*_):
        raise AssertionError("a finished part was made again")

    monkeypatch.setattr(runs, "measure", refuse)
    main([*arguments, "--resume"])
    assert "6 of 6 parts are there already" in capsys.readouterr().out
    assert json.loads((folder / "tiny.json").read_text())["methods"] == before["methods"]


def test_the_table_replaces_what_was_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- methods tiny: x -->\nold\n<!-- end -->\nb\n<!-- end -->\n")
    Block(readme, "methods tiny").fill(["new"])
    assert readme.read_text() == (
        "a\n<!-- methods tiny: x -->\n\nnew\n\n<!-- end -->\nb\n<!-- end -->\n"
    )
    readme.write_text("no place")
    with pytest.raises(ValueError, match="methods"):
        Block(readme, "methods tiny")
