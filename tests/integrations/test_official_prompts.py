"""The templates against the official codes', string by string, and what happens around them."""

import official_prompts as official
import pytest

from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.prompts import (
    bare_problem,
    last_user_text,
    reprompted,
    with_user_text,
)

IMAGE, CHART = {"type": "image", "image": 1}, {"type": "image", "image": 2}
PROBLEM, SOLUTION = "How many {x} are in $\\frac{1}{2}$? ", " Half.\n<think>Or?</think>\nOne. \n"


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": list(content)}]


def asked(prompt, template, **settings):
    """The teacher's user turn for a prompt of one text."""
    return reprompted([{"role": "user", "content": prompt}], template, **settings)[-1]["content"]


def test_opsd_has_the_official_prompt_for_the_official_students():
    student = official.opsd_student(PROBLEM)
    own = asked(student, templates.OPSD, privileged=SOLUTION)
    assert own == official.opsd(PROBLEM, SOLUTION)
    assert asked(PROBLEM, templates.OPSD, privileged=SOLUTION) == own, "a bare problem stays bare"


def test_rlsd_has_the_official_prompt():
    own = asked(f"\n{PROBLEM}", templates.RLSD, stripped=True, privileged=SOLUTION)
    assert own == official.rlsd(f"\n{PROBLEM}", SOLUTION)


def test_rlcsd_has_the_official_prompt_and_no_second_problem():
    hint = templates.RLCSD_HINT.format(solution=SOLUTION.strip(), answer="1")
    expected = official.rlcsd(PROBLEM, SOLUTION, "1")
    for student in (official.opsd_student(PROBLEM), f"Problem: {PROBLEM}", PROBLEM):
        assert asked(student, templates.RLCSD, stripped=True, privileged=hint) == expected


def test_sdft_has_the_official_prompt():
    own = asked(PROBLEM, templates.SDFT, privileged=SOLUTION)
    assert own == official.sdft(PROBLEM, SOLUTION)


def test_only_a_template_that_asks_for_a_box_takes_the_students_instruction_away():
    student = official.opsd_student("Why?")
    assert asked(student, templates.SDFT, privileged="x") == official.sdft(student, "x")
    assert bare_problem(student) == "Why?"
    assert bare_problem("Which Problem: this?") == "Which Problem: this?"


def test_images_stay_where_they_stood_in_the_text():
    prompt = user(text("Problem: Compare "), IMAGE, text(" with "), CHART, text("."))
    made = reprompted(prompt, "Look. {prompt} Hint: {privileged}", privileged="both")
    assert made[0] == prompt[0]
    assert made[-1]["content"] == [
        text("Look. Problem: Compare "),
        IMAGE,
        text(" with "),
        CHART,
        text(". Hint: both"),
    ]
    bare = reprompted(prompt, templates.RLCSD, privileged="both")[-1]["content"]
    assert bare[:2] == [text("Problem: Compare "), IMAGE]
    assert prompt[-1]["content"][0] == text("Problem: Compare "), "the prompt is not changed"


def test_a_turn_that_begins_with_its_image_is_a_bare_problem_too():
    prompt = user(IMAGE, CHART, text(official.opsd_student("Which?")))
    made = reprompted(prompt, templates.OPSD, privileged="S")[-1]["content"]
    assert made == [IMAGE, CHART, text(official.opsd("Which?", "S"))]
    made = reprompted(prompt, templates.SDFT, privileged="S")[-1]["content"]
    asked = official.sdft(official.opsd_student("Which?"), "S")
    assert made == [IMAGE, CHART, text(asked)], "the template's first line is behind the images"


def test_a_template_that_shows_the_prompt_twice_shows_an_image_once():
    prompt = user(text("Which "), IMAGE, text("?"))
    made = reprompted(prompt, "{prompt} {feedback} {prompt}", feedback="No.")[-1]["content"]
    assert made == [text("Which "), IMAGE, text("? No. Which "), text("?")]


def test_another_text_leaves_images_in_their_places():
    prompt = user(IMAGE, text("a"), CHART, text("b"))
    assert last_user_text(prompt) == "ab"
    assert with_user_text(prompt, "c")[-1]["content"] == [IMAGE, text("c"), CHART]
    assert with_user_text(user(IMAGE), "c")[-1]["content"] == [IMAGE, text("c")]
    assert with_user_text("a", "c") == "c"
    assert with_user_text([{"role": "user", "content": "a"}], "c")[-1]["content"] == "c"


def test_a_conversation_has_to_end_with_a_user_turn():
    for prompt in ([], [{"role": "assistant", "content": "Hm."}]):
        with pytest.raises(ValueError, match="prompt must end with a user turn"):
            last_user_text(prompt)
