"""Mathematical results: what counts as equal, and what is no result."""

import sys
import threading

import pytest

from fused_sd.integrations.verdicts import MathsVerifier


@pytest.fixture
def judge():
    pytest.importorskip("math_verify")
    return MathsVerifier()


@pytest.mark.parametrize(
    "response, reference",
    [
        ("So \\boxed{42}.", "42"),
        ("First \\boxed{7}. No, it is \\boxed{42}.", "42"),
        ("It is 12 + 30 = 42", "42"),
        ("The final answer is $42$. I hope it is correct.", "42"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{0.75}", "\\frac{3}{4}"),
        ("\\boxed{\\frac{6}{8}}", "$\\frac{3}{4}$"),
        ("\\boxed{1,000}", "1000"),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        ("\\boxed{(1, 2)}", "(1,2)"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{72}", "She has 12 + 60 = 72 in all.\n#### 72"),
        ("\\boxed{72}", "The answer is 72."),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}"),
        ("<think>\\boxed{7}</think>\\boxed{42}", "42"),
    ],
)
def test_equal_results(judge, response, reference):
    assert judge([response], answer=[reference]) == [1.0]
    assert judge.feedback([response], answer=[reference]) == [None]


@pytest.mark.parametrize(
    "response, reference",
    [
        ("So \\boxed{41}.", "42"),
        ("First \\boxed{42}. No, it is \\boxed{7}.", "42"),
        ("\\boxed{4}", "\\frac{3}{4}"),
        ("\\boxed{3}", "\\frac{3}{4}"),
        ("\\boxed{1, 2, 3, 42}", "42"),
        ("\\boxed{x + 1}", "(x+1)^2"),
        ("\\boxed{(2, 1)}", "(1,2)"),
    ],
)
def test_unequal_results(judge, response, reference):
    assert judge([response], answer=[reference]) == [0.0]
    assert judge.feedback([response], answer=[reference]) == [
        "The result of the response is wrong."
    ]


@pytest.mark.parametrize("response", ["", "I do not know.", "<think>\\boxed{42}", "\\boxed{}"])
def test_no_result(judge, response):
    assert judge([response], answer=["42"]) == [0.0]
    assert "holds no result" in judge.feedback([response], answer=["42"])[0]


def test_a_tools_result_is_not_the_models(judge):
    called = {"role": "assistant", "content": None, "tool_calls": []}
    result = {"role": "tool", "name": "multiply", "content": "42"}
    said = {"role": "assistant", "content": "It is \\boxed{42}."}
    completions = [[called, result], [called, result, said], [called]]
    assert judge(completions, answer=["42"] * 3) == [0.0, 1.0, 0.0]


def test_a_reference_that_is_no_result_gives_no_reward(judge):
    assert judge(["\\boxed{42}"] * 2, answer=["", "what it was before"]) == [None, None]
    assert judge.feedback(["\\boxed{42}"], answer=[""]) == [None]
    # a row that has none, by itself or as pandas writes it: not the product of N, o, n and e
    missing = [None, float("nan"), "42"]
    assert judge(["\\boxed{42}"] * 3, answer=missing) == [None, None, 1.0]
    assert judge.feedback(["\\boxed{41}"] * 2, answer=missing[:2]) == [None, None]


def test_there_is_a_reference_for_each_completion(judge):
    with pytest.raises(ValueError, match="column 'answer' must have one entry for each of 2"):
        judge(["\\boxed{42}"] * 2, answer=["42"])


def test_a_comparison_without_end_is_no_match():
    pytest.importorskip("math_verify")
    judge = MathsVerifier(timeout_seconds=1)
    assert judge(["\\boxed{(10^{10})!}"], answer=["7"]) == [0.0]


def test_other_threads_are_refused(judge):
    found = []

    def work():
        with pytest.raises(ValueError, match="MathsVerifier must be called in the main thread"):
            judge(["\\boxed{42}"], answer=["42"])
        found.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found


def test_the_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ModuleNotFoundError, match=r"; pip install 'fused-sd\[verdicts\]'$"):
        MathsVerifier()


def test_the_column_is_named(judge):
    with pytest.raises(ValueError, match="dataset must have a column 'answer'"):
        judge(["\\boxed{42}"], solution=["42"])
    assert MathsVerifier("solution")(["\\boxed{42}"], solution=["42"]) == [1.0]
