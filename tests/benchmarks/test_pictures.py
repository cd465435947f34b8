"""The task with pictures: what is drawn, verdicts, habits, contexts, and training on images."""

import random

import numpy
import pytest
import torch

for _name in ("trl", "tokenizers", "datasets", "PIL"):
    pytest.importorskip(_name)

from benchmarks.methods import arms, train
from benchmarks.methods.evaluate import Responses, respond, response_logits, share
from benchmarks.methods.experiments import EXPERIMENTS, Scale, Unit, quick
from benchmarks.methods.runs import Run, measure
from benchmarks.methods.tasks import Question, make_task, pictures
from benchmarks.methods.tasks.addition import SYMBOLS, Sum, World
from benchmarks.methods.tasks.pictures import DIGITS, Gallery, context, drawn
from benchmarks.methods.tasks.pretrain import IGNORED, Schedule, fitted
from benchmarks.methods.tasks.vision import picture_processor, pictured, tiny_vision_model

BASE = 200
PROCESSOR = picture_processor(SYMBOLS)
PAIR = Sum(47, 85)
GALLERY = Gallery(World(BASE, cited=True))


@pytest.fixture(scope="module")
def task():
    return make_task("pictures", BASE)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A cache of a base model that has learned next to nothing."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "SCHEDULE", Schedule(steps=2, batch=4))
        GALLERY.base_model(folder)
    return folder


@pytest.fixture(scope="module")
def base(task, work):
    return task.load(work)


def read(picture):
    """Read a picture: the digit, at any place in its square, that fits the ink best."""
    grey = numpy.asarray(picture)[:, :, 0].astype(float)
    said = ""
    for top, left in ((0, 0), (0, 8), (8, 0), (8, 8)):
        cell = grey[top : top + 8, left : left + 8]
        fits = {}
        for digit, glyph in enumerate(DIGITS):
            for y, x in ((y, x) for y in range(2) for x in range(4)):
                placed = numpy.zeros((8, 8))
                placed[y : y + 7, x : x + 5] = glyph
                fits[digit, y, x] = numpy.corrcoef(placed.ravel(), cell.ravel())[0, 1]
        said += str(max(fits, key=fits.get)[0])
    return said


def test_a_picture_shows_its_numbers_and_no_two_are_alike():
    rng = random.Random(0)
    for pair in GALLERY.world.parts["held_out"][:40]:
        picture = drawn(pair, rng)
        assert picture.size == (16, 16)
        assert picture.mode == "RGB"
        assert read(picture) == f"{pair.first}{pair.second}"
    first, second = (numpy.asarray(drawn(PAIR, rng)) for _ in range(2))
    assert (first != second).mean() > 0.2
    same = [numpy.asarray(drawn(PAIR, random.Random(3))) for _ in range(2)]
    assert numpy.array_equal(*same)


def test_a_question_says_nothing_that_its_picture_must_tell(task):
    for part in task.questions.values():
        assert {question.prompt for question in part} == {"="}
    question = task.questions["train"][0]
    assert read(question.images[0]) == question.asked.replace("+", "").rstrip("=")


def test_there_is_no_variant():
    with pytest.raises(ValueError, match="must be one of none, got 'pictures-cited'"):
        make_task("pictures-cited", BASE)


def test_no_question_is_in_two_parts(task):
    asked = [question.asked for part in task.questions.values() for question in part]
    asked += [pair.question for pair in GALLERY.world.parts["pretraining"]]
    assert len(asked) == len(set(asked)) == 8100


def test_verdicts_pass_over_a_citation_which_is_a_leak(task):
    for said, is_right, is_leaking in (
        ("12;132", True, False),
        ("&12;132", True, True),
        ("12;133", False, False),
        ("[12;132", False, True),
        ("47+85", False, False),
    ):
        assert task.is_right(PAIR.question, said) is is_right
        assert task.is_leaking(said) is is_leaking


def test_rewards_read_turns_and_the_question_that_the_prompt_does_not_tell(task):
    prompts = [[{"role": "user", "content": "="}]] * 2
    turns = [[{"role": "assistant", "content": said}] for said in ("&12;132", "12;133")]
    assert task.reward(prompts, turns, asked=[PAIR.question] * 2) == [1.0, 0.0]


def test_the_text_errs_at_habits_and_is_right_after_hints():
    rng = random.Random(0)
    units, carries = GALLERY.world.habits
    assert World(BASE + 1).habits != (units, carries)
    cited = []
    for pair in GALLERY.world.parts["pretraining"][:400]:
        is_habit = pair.units in units or pair.tens in carries
        plain = GALLERY.response("plain", pair, rng)
        assert is_habit or plain == pair.solution
        assert GALLERY.response("reading", pair, rng) == f"{pair.first}+{pair.second}"
        for kind in ("solution", "answer"):
            said = GALLERY.response(kind, pair, rng)
            assert said.removeprefix("&") == pair.solution
            cited.append(said.startswith("&"))
    assert 0.4 < sum(cited) / len(cited) < 0.6
    errors = [
        GALLERY.response("plain", pair, rng) != pair.solution
        for pair in GALLERY.world.parts["pretraining"][:2000]
    ]
    assert 0.55 < sum(errors) / len(errors) < 0.75


def test_labels_are_the_responses_alone():
    shown = [drawn(PAIR, random.Random(n)) for n in range(2)]
    texts = [("=", "12;132"), ("[132]=", "&12;132")]
    inputs, labels = pictured(PROCESSOR, texts, shown)
    for row, (_, said) in zip(labels, texts):
        assert PROCESSOR.tokenizer.decode(row[row != IGNORED]) == f"{said}<end>"
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [4, 4]
    assert inputs["pixel_values"].shape == (2 * 16, 48)
    assert inputs["attention_mask"].sum(1).tolist() == [6 + 1 + 7, 6 + 6 + 8]


CONTEXTS = {"plain": arms.GRPO, "answer": arms.RLSD, "solution": arms.OPSD_UNCLIPPED}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_students_and_teachers_read_what_pretraining_taught(kind, task, base, tmp_path):
    """The trainers' own functions make the tokens and pixels of the pre-training text."""
    common = train.common_settings(0, str(tmp_path))
    trainer = train.build(task, CONTEXTS[kind], *base, rate=1e-4, scale=Scale(1, 1, 1), **common)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * arms.GROUP)
    question, pair = task.questions["train"][0], GALLERY.world.parts["train"][0]
    assert question.asked == pair.question
    inputs, _ = pictured(PROCESSOR, [(context(kind, pair), "")], list(question.images))
    wanted = inputs["input_ids"][0, :-1].tolist()  # without the response, which ends at once
    ids = batch["prompt_ids" if kind == "plain" else "teacher_input_ids"]
    types = batch["mm_token_type_ids" if kind == "plain" else "teacher_mm_token_type_ids"]
    assert [row[: len(wanted)].tolist() for row in ids] == [wanted] * arms.GROUP
    whole = torch.cat([ids, batch["completion_ids"]], 1) if kind == "plain" else ids
    assert torch.equal(types, whole.eq(PROCESSOR.image_token_id).long())
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"].repeat(arms.GROUP, 1))


def test_a_siblings_solution_stands_where_pretraining_showed_solutions(task):
    templates = task.templates["sibling"]
    own = templates["solution_template"].format(successful_previous_attempt=PAIR.solution)
    made = templates["reprompt_template"].format(prompt="=", solution=own, feedback="")
    assert made == context("solution", PAIR) == "[12;132]="


def test_the_evaluation_reads_what_pretraining_taught(task, base):
    """Logits behind padded conversations are those of the pre-training's own sequences."""
    model, processor = base
    questions = task.questions["held_out"][:3]
    prompts = [question.shown for question in questions]
    prompts[1][0]["content"][1]["text"] = "[132]="  # longer than the others, which are padded
    ids = torch.tensor(processor.tokenizer(["12;1", "&132", "8+;5"])["input_ids"])
    responses = Responses([], ids, torch.ones_like(ids))
    logits = response_logits(model, processor, prompts, responses)
    for n, question in enumerate(questions):
        text = prompts[n][0]["content"][1]["text"]
        said = processor.tokenizer.decode(ids[n])
        inputs, labels = pictured(processor, [(text, said)], list(question.images))
        with torch.no_grad():
            alone = model.eval()(**inputs).logits[0, :-1][labels[0, 1:] != IGNORED]
        torch.testing.assert_close(logits[n], alone[:4], atol=1e-5, rtol=1e-5)


def test_a_model_learns_to_look_and_another_picture_misleads_it():
    pairs = GALLERY.world.parts["pretraining"][:8]

    def batches(rng, count):
        chosen = rng.choices(pairs, k=count)
        texts = [("?", pair.question) for pair in chosen]
        return pictured(PROCESSOR, texts, [drawn(pair, rng) for pair in chosen])

    model = fitted(
        lambda: tiny_vision_model(PROCESSOR.tokenizer),
        batches,
        Schedule(steps=120, batch=32, warmup=10, cooling=20),
        rate=pictures.RATE,
        seed=0,
    )
    asked = [pair for pair in pairs for _ in range(4)]
    rng = random.Random("unseen")
    shown = [
        Question("?", "", "", pair.question, images=(drawn(pair, rng),)).shown for pair in asked
    ]
    texts = respond(model, PROCESSOR, shown, 7).texts
    assert share(a == pair.question for a, pair in zip(texts, asked)) > 0.6
    exchanged = respond(model, PROCESSOR, shown[4:] + shown[:4], 7).texts
    assert share(a == pair.question for a, pair in zip(exchanged, asked)) < 0.2


@pytest.mark.parametrize("arm", [arms.RLSD, arms.OPSD_UNCLIPPED], ids=lambda arm: arm.name)
def test_an_arm_trains_on_pictures(arm, work):
    experiment = quick(EXPERIMENTS["pictures"])
    assert arm in experiment.arms
    values = measure(Run("pictures", arm, 1e-3, Unit(BASE, 0), experiment.scale), work)
    assert [point["step"] for point in values["curve"]] == [0, 1, 2]
    for point in values["curve"]:
        assert 0 <= point["accuracy"] <= 1
        assert 1 <= point["length"] <= 8
        assert point["entropy"] > 0
    if arm is arms.OPSD_UNCLIPPED:  # RLSD has no advantage where nothing is right
        first, _, last = values["curve"]  # the first step of the warm-up has rate 0
        assert first["entropy"] != last["entropy"]
