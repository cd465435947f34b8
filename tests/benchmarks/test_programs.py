"""The task of programs: its interpreter, expressions, text, and the contexts of its teachers."""

import random
import re

import pytest

for _name in ("trl", "tokenizers", "datasets"):
    pytest.importorskip(_name)

from benchmarks.methods.experiments import EXPERIMENTS, Scale
from benchmarks.methods.tasks import infix, make_task, programs
from benchmarks.methods.tasks.infix import Infix
from benchmarks.methods.tasks.pretrain import tiny_model
from benchmarks.methods.tasks.programs import MIX, World, context, is_leaking, is_right
from benchmarks.methods.tasks.stack import LARGEST, Fault, fault, run
from benchmarks.methods.tasks.tokens import word_pattern, word_tokenizer
from benchmarks.methods.train import build, common_settings
from fused_sd.integrations.shared.rollouts import Rollout, grouped

WORLD, TASK = World(0), make_task("programs", 0)
INPUTS = {"a": 2, "b": 3, "c": 5}
QUESTION = Infix("a+b*c-d")
RIGHT, OTHER, WRONG = "abc*+d-", "abc*+.d-", "ab+c*d-"
TOKENIZER = word_tokenizer(programs.WORDS)
SDPO = [arm for arm in EXPERIMENTS["programs"].arms if arm.template == "sdpo"]


def some(count, part="validation"):
    """Some expressions of a part."""
    return random.Random(0).sample(WORLD.parts[part], count)


@pytest.mark.parametrize(
    "program, left",
    [
        ("abc*+", [17]),
        ("ab+c*", [25]),
        ("ab-", [-1]),
        ("ab\\-", [1]),
        ("a$*b.", [4, 3]),
        ("ab%", [2]),
        ("abc\\", [2, 5, 3]),
        ("", []),
    ],
)
def test_a_program_leaves_its_values(program, left):
    assert run(program, INPUTS) == left


@pytest.mark.parametrize(
    "program, kind, message",
    [
        ("a+b", "underflow", "underflow at 2"),
        ("$ab+", "underflow", "underflow at 1"),
        ("ab+%%", "underflow", "underflow at 5"),
        ("a\\b+", "underflow", "underflow at 2"),
        ("(ab+", "unknown", "unknown ( at 1"),
        ("abd+", "unknown", "unknown d at 3"),
        ("abc$*$*$*$*+", "overflow", "overflow at 9"),
        ("abc*", "left", "2 left"),
        ("ab+%", "left", "0 left"),
        ("", "left", "0 left"),
        ("ab+c*", "value", "got 25 want 17"),
        ("abc*-", "value", "got -13 want 17"),
    ],
)
def test_the_interpreter_says_what_is_wrong_and_where(program, kind, message):
    assert fault(program, INPUTS, 17) == Fault(kind, message)
    assert fault("abc*+", INPUTS, 17) is None


def test_values_do_not_grow_without_bound():
    assert run("c" + "$*" * 2, INPUTS) == [5**4]
    assert run("c" + "$*" * 3, INPUTS) == Fault("overflow", "overflow at 7")
    assert LARGEST >= 9 * 8 * 7 * 6 * 5  # no question overflows


def test_right_programs_compute_what_python_computes():
    rng = random.Random(0)
    for question in some(200):
        for inputs, wanted in programs.cases(question.text):
            assert wanted == eval(question.text, {}, dict(inputs))
        programs_of_it = {"".join(question.program(rng)) for _ in range(5)}
        assert len(programs_of_it) > 1  # several are right
        for program in [*programs_of_it, "".join(question.program())]:
            assert is_right(f"{question.text}=", program)
            assert programs.feedback(f"{question.text}=", program) is None


@pytest.mark.parametrize(
    "text, errors, program, said",
    [
        ("a+b*c-d", [], "abc*+d-", None),
        ("a*(b-c)+d", [], "abc-*d+", None),
        ("(a-b)-c-d", [], "ab-c-d-", None),
        ("a+b*c-d", [("precedence", 1)], "ab+c*d-", "got "),
        ("a-b*c+d", [("precedence", 1)], "ab-c*d+", "got "),
        ("a-b+c*d", [("swapped", 1)], "ba-cd*+", "got "),
        ("a-b+c*d", [("forgotten", 3)], "ab-cd*", "2 left"),
        ("a-b+c*d", [("early", 1)], "a-bcd*+", "underflow at 2"),
        ("a*(b-c)+d", [("copied", 2)], "a(bc-*d+", "unknown ( at 2"),
    ],
)
def test_errors_are_those_of_their_names(text, errors, program, said):
    assert "".join(Infix(text).program(errors=errors)) == program
    heard = programs.feedback(f"{text}=", program)
    assert heard is None if said is None else heard.startswith(said)
    assert {error for error, _ in Infix(text).sites} >= set(errors)


def test_exchanged_names_of_a_difference_are_exchanged_back():
    rng = random.Random(0)
    drawn = {"".join(Infix("a-b+c+d").program(rng)) for _ in range(300)}
    assert {"ab-c+d+", "ba\\-c+d+"} <= drawn
    assert all(is_right("a-b+c+d=", program) for program in drawn)


def test_the_text_errs_at_its_habits_alone():
    rng = random.Random(0)
    for question in some(100):
        made = {error for _ in range(20) for error in WORLD.errors(question, rng)}
        assert made == {e for e, site in question.sites if (e[0], site) in WORLD.habits}
        assert not WORLD.errors(question, rng, set(infix.KINDS))
        program, found = WORLD.attempt(question, rng)
        assert programs.judged(question, program) == found
        assert found.kind in programs.REPAIRS
    assert World(1).habits != WORLD.habits


def test_a_message_repairs_what_it_names_and_a_sibling_everything():
    rng = random.Random(0)
    right = dict.fromkeys(MIX, 0)
    for question in some(300):
        for shown in MIX:
            asked, response = WORLD.example(shown, question, rng)
            assert asked.endswith(f"{question.text}=")
            right[shown] += is_right(f"{question.text}=", response)
    assert 60 < right[()] < 150
    for shown in (("message",), ("attempt", "message")):
        assert right[()] + 60 < right[shown] < 270
    assert right["sibling",] == right["sibling", "message"] == 300


def test_harmless_words_are_as_frequent_with_help_as_without():
    rng = random.Random(0)
    shares = []
    for shown in MIX:
        said = [WORLD.example(shown, question, rng)[1] for question in some(300)]
        harmless = sum(len(re.findall(r"\.|\$%", text)) for text in said)
        shares.append(harmless / sum(len(re.findall("[^.$%]", text)) for text in said))
    expected = infix.FILLER / (1 - infix.FILLER)
    assert all(abs(share - expected) < 0.04 for share in shares)


def test_no_question_is_in_two_parts():
    parts = WORLD.parts
    assert {name: len(part) for name, part in parts.items()} == programs.PARTS
    assert len(set().union(*parts.values())) == sum(programs.PARTS.values())
    assert World(1).parts["held_out"] != parts["held_out"]


def test_responses_fit_and_tokens_are_words():
    rng = random.Random(0)
    pairs = WORLD.draw(rng, 500)
    for asked, response in pairs:
        for text in (asked, response):
            ids = TOKENIZER(text)["input_ids"]
            assert TOKENIZER.decode(ids) == text
            assert TOKENIZER.pad_token_id not in ids
    lengths = [len(TOKENIZER(response)["input_ids"]) + 1 for _, response in pairs]
    assert sum(length > programs.MAX_RESPONSE for length in lengths) < 5
    assert 10 <= sum(lengths) / 500 < programs.MAX_RESPONSE / 1.5
    split = re.findall(word_pattern(programs.WORDS), "unknown ( at 3")
    assert split == ["unknown ", "(", " at ", "3"]


def test_marks_of_hints_are_leaks():
    for text in ("[abc", "<ab", "a=", "ab\n", "got 3", "2 left", "underflow", "a want b"):
        assert is_leaking(text)
    for text in (RIGHT, "a(bc-*d+", "ab\\-.$%c*", ""):
        assert not is_leaking(text)


def rollouts(texts, hears):
    """The group of a question's rollouts, as the trainers make it."""
    prompt = f"{QUESTION.text}="
    prompts = [prompt] * len(texts)
    rewards, said = TASK.reward(prompts, texts), TASK.said(prompts, texts)
    group = grouped(texts, rewards, len(texts))[0]
    ids = TOKENIZER(prompt)["input_ids"]
    return [
        Rollout(prompt, ids, [], text, reward, None, heard if hears else None, index, group)
        for index, (text, reward, heard) in enumerate(zip(texts, rewards, said))
    ]


@pytest.mark.parametrize("arm", SDPO, ids=lambda arm: arm.name)
def test_teachers_read_what_pretraining_taught(arm, tmp_path):
    """The trainers' contexts are those of the text, and each arm shows what it says."""
    common = common_settings(0, str(tmp_path))
    model = tiny_model(len(TOKENIZER))
    trainer = build(TASK, arm, model, TOKENIZER, rate=1e-4, scale=Scale(1, 1, 1), **common)

    def shown(texts):
        prompts = [trainer.teacher_prompts(rollout) for rollout in rollouts(texts, arm.hears)]
        return [None if ids is None else TOKENIZER.decode(ids) for ids in prompts]

    message = programs.feedback(f"{QUESTION.text}=", WRONG)
    assert message.startswith("got ")
    sibling, told = {"sibling": RIGHT}, {"message": message}
    tried = {"attempt": WRONG, **told}
    alone, beside = {  # what a wrong rollout's teacher reads, without and beside a right sibling
        "sdpo_sibling": (None, sibling),
        "sdpo_feedback": (told, told),
        "sdpo_attempt": (tried, tried),
        "sdpo_either": (told, sibling),
        "sdpo_both": (told, {**sibling, **told}),
    }[arm.name]
    assert all(parts is None or tuple(parts) in MIX for parts in (alone, beside))
    first = None if alone is None else context(QUESTION, **alone)
    assert shown([WRONG, WRONG]) == [first, first]
    assert shown([RIGHT, WRONG]) == [None, context(QUESTION, **beside)]
    assert shown([RIGHT, OTHER]) == (
        [context(QUESTION, sibling=OTHER), context(QUESTION, sibling=RIGHT)]
        if "sibling" in beside
        else [None, None]
    )


def test_the_texts_contexts_are_made_of_their_parts():
    """``context`` is what pre-training reads before a response."""
    rng = random.Random(0)
    program = r"[a-h+*()\\.$%-]+"
    said = r"underflow at \d+|unknown \( at \d+|\d left|got -?\d+ want -?\d+|overflow at \d+"
    parts = {"sibling": rf"\[{program}\]", "attempt": f"<{program}>", "message": f"({said})\n"}
    for question in some(100):
        for shown in MIX:
            asked, _ = WORLD.example(shown, question, rng)
            pattern = "".join(parts[name] for name in shown) + re.escape(question.text) + "="
            assert re.fullmatch(pattern, asked), asked


def test_a_task_is_made_by_name():
    task = make_task("programs", 3)
    assert task.name == "programs"
    question = task.questions["train"][0]
    assert task.is_right(question.prompt, question.response)
    assert task.feedback(question.prompt, "") == "0 left"
    with pytest.raises(ValueError, match="must be one of none, got 'programs-7B'"):
        make_task("programs-7B", 0)
