"""Rewards and feedback of programs in responses."""

import os

import pytest

from fused_sd.integrations.verdicts import CodeVerifier, Limits
from fused_sd.integrations.verdicts.code import program_in, shortened

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no POSIX processes here")

DOUBLE = [{"stdin": "3\n", "stdout": "6\n"}, {"stdin": "4\n", "stdout": "8\n"}]
LIMITS = Limits(cpu_seconds=30, wall_seconds=60.0)


def fenced(program, mark="python"):
    return f"Here it is:\n\n```{mark}\n{program}\n```\nIt works."


def judged(response, tests, **settings):
    return CodeVerifier(limits=LIMITS, **settings).judge(response, tests)


def test_a_right_program():
    verdict = judged(fenced("print(2 * int(input()))"), DOUBLE)
    assert (verdict.reward, verdict.feedback) == (1.0, None)


def test_a_wrong_answer_shows_input_output_and_what_was_expected():
    verdict = judged(fenced("n = int(input())\nprint(n + 3)"), DOUBLE)
    assert verdict.reward == 0.0
    assert verdict.feedback == (
        "Wrong answer on test 2 of 2.\nInput:\n4\nOutput:\n7\nExpected output:\n8"
    )


def test_an_exception_shows_its_traceback():
    verdict = judged(fenced("n = int(input())\nprint(12 / (n - 3))"), DOUBLE)
    assert verdict.feedback.startswith("Runtime error on test 1 of 2.\nTraceback")
    assert 'File "solution.py", line 2' in verdict.feedback
    assert "ZeroDivisionError: division by zero\nInput:\n3" in verdict.feedback


def test_statements_are_tests_too():
    program = fenced("def double(n):\n    return n + 2")
    tests = ["assert double(2) == 4", {"code": "assert double(3) == 6", "stdout": None}]
    verdict = judged(program, tests)
    assert verdict.feedback.startswith("Wrong answer on test 2 of 2.\nTraceback")
    assert verdict.feedback.endswith("Test:\nassert double(3) == 6")
    assert judged(program, tests[:1]).reward == 1.0
    missing = judged(fenced("x = 1"), tests)
    assert missing.feedback.startswith("Runtime error on test 1 of 2.")
    assert "NameError: name 'double' is not defined" in missing.feedback


def test_partial_credit_is_the_share_of_tests():
    program = fenced("n = int(input())\nprint(n + 3)")
    assert judged(program, DOUBLE, partial_credit=True).reward == 0.5
    assert judged(program, DOUBLE).reward == 0.0


def test_after_time_is_over_no_other_test_is_run():
    judge = CodeVerifier(limits=Limits(cpu_seconds=1, wall_seconds=3.0))
    response = fenced("while True: pass")
    results = judge.results(response, DOUBLE)
    assert [result.outcome and result.outcome.status for result in results] == ["time", None]
    assert not any(result.passed for result in results)
    verdict = judge.judge(response, DOUBLE)
    assert verdict.feedback == "Time limit exceeded on test 1 of 2.\nInput:\n3"


def test_every_test_has_its_verdict():
    judge = CodeVerifier(limits=LIMITS)
    tests = [*DOUBLE, {"stdin": "", "stdout": "0"}]
    results = judge.results(fenced("n = int(input())\nprint(n + 3)"), tests)
    assert [result.passed for result in results] == [True, False, False]
    assert [result.outcome.status for result in results] == ["finished", "finished", "raised"]


def test_white_space_does_not_count():
    tests = [{"stdin": None, "stdout": "1 2\n3"}]
    assert judged(fenced("print(1)\nprint(2, 3, end='')"), tests).reward == 1.0
    assert judged(fenced("print('12 3')"), tests).reward == 0.0


@pytest.mark.parametrize(
    "response, program",
    [
        (fenced("x = 1"), "x = 1\n"),
        (fenced("x = 1", "py"), "x = 1\n"),
        (fenced("x = 1", "Python"), "x = 1\n"),
        (fenced("x = 1", ""), "x = 1\n"),
        (fenced("x = 1") + fenced("x = 2"), "x = 2\n"),
        (fenced("x = 1") + fenced("out", ""), "x = 1\n"),
        (fenced("x = 1") + fenced("ls", "bash"), "x = 1\n"),
        (fenced("x = '``` in the line ```'"), "x = '``` in the line ```'\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("x = 1", None),
        (fenced("ls", "bash"), None),
        ("```python\nx = 1", None),
        (fenced("x = 1") + "\n```python\nx = 2", "x = 1\n"),
        ("", None),
    ],
)
def test_the_program_in_a_response(response, program):
    assert program_in(response) == program


def test_no_program():
    verdict = judged("I would add them.", DOUBLE)
    assert verdict.reward == 0.0
    assert "```python" in verdict.feedback


def test_thinking_is_not_the_response():
    thought = f"<think>{fenced('print(2 * int(input()))')}</think>"
    judge = CodeVerifier(limits=LIMITS)
    completions = [thought, thought[:-8], f"{thought}\n{fenced('print(2 * int(input()))')}"]
    assert judge(completions, tests=[DOUBLE] * 3) == [0.0, 0.0, 1.0]


def test_rewards_and_feedback_come_from_one_run(tmp_path):
    judge = CodeVerifier(limits=LIMITS)
    ran = []
    results = judge.results
    judge.results = lambda *given: ran.append(given) or results(*given)
    completions = [
        [{"role": "assistant", "content": fenced("print(6)")}],
        [{"role": "assistant", "content": fenced("print(2 * int(input()))")}],
        [{"role": "assistant", "content": fenced("print(6)")}],
    ]
    columns = {"prompts": ["", "", ""], "tests": [DOUBLE] * 3}
    feedback = judge.feedback(completions, **columns)
    rewards = judge(completions, **columns)
    assert rewards == [0.0, 1.0, 0.0]
    assert [text is None for text in feedback] == [False, True, False]
    assert len(ran) == 2  # the same program on the same tests is run once
    judge(completions[:1], tests=[DOUBLE[:1]])
    assert len(ran) == 3


def test_a_row_without_tests_has_no_reward():
    judge = CodeVerifier(limits=LIMITS)
    assert judge([fenced("x = 1")] * 2, tests=[None, []]) == [None, None]


@pytest.mark.parametrize("test", [{"stdin": "3"}, {}, 3, {"code": None, "stdout": None}])
def test_what_is_no_test_is_refused(test):
    with pytest.raises(ValueError, match="test must be statements"):
        judged(fenced("x = 1"), [test])


def test_tests_must_be_a_list():
    with pytest.raises(ValueError, match="tests must be a list of tests"):
        judged(fenced("x = 1"), "assert True")
    with pytest.raises(ValueError, match="dataset must have a column 'tests'"):
        CodeVerifier()([""], answer=[""])
    with pytest.raises(ValueError, match="workers must be at least 1"):
        CodeVerifier(workers=0)


def test_long_texts_are_shortened_in_their_middle():
    assert shortened("abc", 3) == "abc"
    text = shortened("a" * 50 + "b" * 50, 10)
    assert text == "aaaaa\n[... 90 characters ...]\nbbbbb"
    verdict = judged(fenced("print('x' * 10**5)"), DOUBLE)
    assert len(verdict.feedback) < 2000
