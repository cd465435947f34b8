"""Which rollouts a teacher is shown, and in which words: SDPO's contexts without a trainer."""

import dataclasses
import math

import pytest

from fused_sd.integrations.shared.prompts import (
    check_sibling_settings,
    check_template,
    has_demonstration,
    sibling_prompt,
)
from fused_sd.integrations.shared.rollouts import Rollout, grouped, shown_text
from fused_sd.integrations.shared.sd_zero_prompts import (
    collection_prompt,
    problem_of,
    training_prompt,
)


@dataclasses.dataclass
class Settings:
    use_successful_as_teacher: bool = True
    success_reward_threshold: float = 0.5
    dont_reprompt_on_self_success: bool = True
    remove_thinking_from_demonstration: bool = False
    include_environment_feedback: bool = True
    environment_feedback_only_without_solution: bool = False
    include_own_attempt: bool = False
    reprompt_template: str = "P:{prompt} S:{solution} F:{feedback}"
    solution_template: str = "<{successful_previous_attempt}>"
    feedback_template: str = "[{feedback_raw}]"
    attempt_template: str = "({attempt})"
    thinking_tags: tuple[str, str] | None = None


TEXTS = ["wrong", "<think>a</think> right", " ", "good"]
REWARDS = [0.0, 0.5, 1.0, 1.0]


def rollout(index=0, rewards=REWARDS, texts=TEXTS, prompt="Q", answers=None):
    [group] = grouped(texts, rewards, len(texts), answers)
    own = group[index]
    answer = None if answers is None else answers[index]
    return Rollout(prompt, [1], [2], own.text, own.reward, None, None, index, group, answer=answer)


def test_groups_are_consecutive_rollouts():
    groups = grouped(list("abcd"), [1.0, 2.0, 3.0, 4.0], 2, [None, "B", None, "D"])
    assert [[(s.index, s.text, s.reward, s.answer) for s in group] for group in groups] == [
        [(0, "a", 1.0, None), (1, "b", 2.0, "B")],
        [(2, "c", 3.0, None), (3, "d", 4.0, "D")],
    ]


def test_siblings_are_on_one_side_of_the_threshold():
    """A reward at the threshold is a success, and one without a verdict is on neither side."""
    said = rollout(1, rewards=[0.0, 0.5, math.nan, 1.0])

    def found(successful, itself):
        chosen = said.siblings(threshold=0.5, successful=successful, itself=itself)
        return [sibling.index for sibling in chosen]

    assert found(True, True) == [1, 3]
    assert found(True, False) == [3]
    assert found(False, True) == found(False, False) == [0]


FEEDBACK_ALONE = {"use_successful_as_teacher": False}
FEEDBACK_WITHOUT_SOLUTION = {"environment_feedback_only_without_solution": True}


@pytest.mark.parametrize(
    "settings, index, feedback, made",
    [
        ({}, 0, None, "P:Q S:<<think>a</think> right> F:"),
        ({"remove_thinking_from_demonstration": True}, 0, None, "P:Q S:<right> F:"),
        ({"thinking_tags": ("<x>", "</x>")}, 0, None, "P:Q S:<<think>a</think> right> F:"),
        ({"success_reward_threshold": 0.75}, 0, None, "P:Q S:<good> F:"),
        ({}, 1, None, "P:Q S:<good> F:"),  # not itself, and not the one that says nothing
        ({"dont_reprompt_on_self_success": False}, 3, None, "P:Q S:<<think>a</think> right> F:"),
        ({}, 0, "no", "P:Q S:<<think>a</think> right> F:[no]"),
        ({"include_environment_feedback": False}, 0, "no", "P:Q S:<<think>a</think> right> F:"),
        (FEEDBACK_WITHOUT_SOLUTION, 0, "no", "P:Q S:<<think>a</think> right> F:"),
        (FEEDBACK_ALONE, 0, "no", "P:Q S: F:[no]"),
        (
            {
                "use_successful_as_teacher": False,
                "environment_feedback_only_without_solution": True,
            },
            0,
            "no",
            "P:Q S: F:[no]",
        ),
        ({"include_own_attempt": True}, 0, "no", "P:Q S:<<think>a</think> right> F:(wrong)[no]"),
        ({"include_own_attempt": True}, 2, None, "P:Q S:<<think>a</think> right> F:"),
        (FEEDBACK_ALONE, 0, None, None),
        (FEEDBACK_ALONE | {"include_own_attempt": True}, 0, " \n", None),
        ({"success_reward_threshold": 2.0}, 0, None, None),
    ],
)
def test_a_teacher_reads_a_sibling_or_feedback_or_both(settings, index, feedback, made):
    assert sibling_prompt(rollout(index), feedback, Settings(**settings)) == made


def test_only_a_sibling_that_says_something_demonstrates():
    assert has_demonstration(rollout(0), Settings())
    assert not has_demonstration(rollout(0, texts=["wrong", " ", "", "\n"]), Settings())
    assert not has_demonstration(rollout(3, rewards=[0, 0, 0, 1]), Settings())


def test_what_is_shown_of_a_completion():
    said = rollout(1)
    assert shown_text(said, thoughts=True) == "<think>a</think> right"
    assert shown_text(said, thoughts=False) == "right"
    assert shown_text(said, thoughts=False, tags=("<x>", "</x>")) == "<think>a</think> right"
    known = rollout(1, answers=[None, "from its tokens", None, None])
    assert shown_text(known, thoughts=False) == "from its tokens"
    assert shown_text(known, thoughts=True) == "<think>a</think> right"


def test_an_error_names_the_row_by_its_prompts_end():
    """In languages without spaces, too."""
    for prompt in ("many words before \n the end", "二加二等于几" * 60 + "the end"):
        said = dataclasses.replace(rollout(prompt=prompt), privileged=object())
        with pytest.raises(ValueError, match=r"privileged_context must be text.*the end'"):
            _ = said.hint
    turns = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    said = dataclasses.replace(rollout(prompt=turns), privileged=object())
    with pytest.raises(ValueError, match=r"the prompt .*'content': 'last'"):
        _ = said.hint
    assert dataclasses.replace(said, privileged="").hint is None
    assert dataclasses.replace(said, privileged=4).hint == "4"


@pytest.mark.parametrize(
    "name", ["reprompt_template", "solution_template", "feedback_template", "attempt_template"]
)
def test_a_template_without_its_placeholder_is_refused(name):
    check_sibling_settings(Settings())
    with pytest.raises(ValueError, match=f"{name} must hold"):
        check_sibling_settings(Settings(**{name: "nothing"}))


def test_templates_hold_the_placeholders_that_are_filled_and_no_others():
    check_template("t", "{{braces}} {a} {b}", "a", "b")
    with pytest.raises(ValueError, match=r"t must hold \{a\}, \{b\}, got '\{a\}'; add \{b\}"):
        check_template("t", "{a}", "a", "b")
    for wrong in ("{a} {c}", "{a} {}", "{a} {"):
        with pytest.raises(ValueError, match=r"t must hold no placeholders but \{a\}"):
            check_template("t", wrong, "a")
    with pytest.raises(ValueError, match=r"t must be a text, got int; write one with \{a\}"):
        check_template("t", 4, "a")


def test_tags_that_nothing_reads_are_refused():
    check_sibling_settings(
        Settings(remove_thinking_from_demonstration=True, thinking_tags=("<x>", "</x>"))
    )
    with pytest.raises(ValueError, match="thinking_tags must be None where thoughts are shown"):
        check_sibling_settings(Settings(thinking_tags=("<x>", "</x>")))


def test_sd_zeros_problem_is_what_its_prompt_was_made_of():
    for task, begins in (("math", "You are a helpful"), ("code", "You are a helpful")):
        prompt = collection_prompt("2 + 2?", task)
        assert [turn["role"] for turn in prompt] == ["system", "user"]
        assert prompt[0]["content"].startswith(begins)
        assert problem_of(prompt, task) == "2 + 2?"
        assert problem_of(prompt[-1]["content"], task) == "2 + 2?"
    assert training_prompt("all of it")[1] == {"role": "user", "content": "all of it"}
    assert training_prompt("all of it")[0]["content"].startswith("Please reason")
    for wrong in ([{"role": "assistant", "content": "4"}], [{"role": "user", "content": [1]}]):
        with pytest.raises(ValueError, match="prompt must end with a user's text"):
            problem_of(wrong)
