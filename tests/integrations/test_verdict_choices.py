r"""Which letter a response chooses: a table of ways to say it, and of ways to say nothing."""

import pytest

from fused_sd.integrations.verdicts import ChoiceVerifier
from fused_sd.integrations.verdicts.choices import chosen_letter

CHOSEN = {
    "Answer: B": "B",
    "answer: b": "B",
    "Answer: (B)": "B",
    "Answer: [B]": "B",
    "**Answer:** B": "B",
    "**Answer: B**": "B",
    "**Answer**: **B**": "B",
    "Final answer: B.": "B",
    "Answer:\n\nB": "B",
    "ANSWER = C": "C",
    "The answer is B": "B",
    "The answer is (b).": "B",
    "The answer is A.": "A",
    "The answer is A": "A",
    "The answer is A\nHope this helps.": "A",
    "The answer is A, since whales are mammals.": "A",
    "The answer is A because whales are mammals.": "A",
    "The correct answer is option C.": "C",
    "The correct option is: D) 12": "D",
    "The answer is therefore C.": "C",
    "The answer must be $\\text{C}$.": "C",
    "The answer is \\textbf{(C)}": "C",
    "The best choice would be B, a mammal.": "B",
    "I would choose D.": "D",
    "I'll go with (D)": "D",
    "\\boxed{B}": "B",
    "\\boxed{\\text{B}}": "B",
    "\\boxed{\\textbf{(B)} 12}": "B",
    "$\\boxed{\\mathrm{B}}$": "B",
    "\\boxed{B. Paris}": "B",
    "\\boxed{a}": "A",
    "First \\boxed{A}. No, that is wrong: \\boxed{C}.": "C",
    "The answer is A.\n\n\\boxed{C}": "C",
    "<answer>\nD\n</answer>": "D",
    "<answer>(D) 5 m</answer>": "D",
    "Answer: A. Wait, that is wrong. Answer: B": "B",
    "A is wrong, for a whale is no fish. So the answer is C.": "C",
    "**A** is wrong. **B** too.\n\nAnswer: C": "C",
    "It is **B**, of course.": "B",
    "So it must be **(B) Paris**.": "B",
    "**B. Paris**\n\nIt is the capital.": "B",
    "Option B is correct.": "B",
    "So (A) is the right one.": "A",
    "A is correct, as whales are mammals.": "A",
    "B": "B",
    "(B)": "B",
    "**B**": "B",
    "b)": "B",
    "It has no gills.\n\nB": "B",
    "It has no gills.\nB. Mammal": "B",
    "It has no gills.\nA) Mammal": "A",
    "It has no gills.\nA": "A",
}
NOTHING = (
    "",
    "A whale is no fish.",
    "A whale is a mammal.\nA mammal it is",
    "The answer is a mammal.",
    "The answer is A mammal, I think.",
    "The answer is I do not know.",
    "I'm sure.",
    "I think so",
    "The answer is not B.",
    "The answer isn't B.",
    "Answer: A or B",
    "Answer: A and B",
    "Answer: (A), (B)",
    "Answer: both A and B",
    "\\boxed{A, B}",
    "\\boxed{A/B}",
    "\\boxed{12}",
    "\\boxed{AB}",
    "\\boxed{A, B, C, D}",
    "**A** or **B**",
    "**A.** A fish\n**B.** A mammal",
    "A is correct, and B is correct too.",
    "Answer: Z",
    "Answer: Berlin",
    "Answer: Ａ",  # noqa: RUF001 - a full-width letter
    "Options: A) fish B) mammal",
    "We compare A-frames and B-trees",
    "A-frames are houses",
    "Both could be right.\nA, B",
)


@pytest.mark.parametrize("response", CHOSEN)
def test_a_choice_is_found(response):
    assert chosen_letter(response, "ABCDEFGHIJ") == CHOSEN[response]


@pytest.mark.parametrize("response", NOTHING)
def test_no_choice_is_made_up(response):
    assert chosen_letter(response, "ABCDEFGHIJ") is None


def test_letters_beyond_the_options_are_no_choice():
    assert chosen_letter("Answer: E", "ABCD") is None
    assert chosen_letter("Answer: E", "ABCDE") == "E"


def test_rewards_and_feedback():
    judge = ChoiceVerifier(letters="ABCD")
    completions = ["Answer: B", [{"role": "assistant", "content": "\\boxed{C}"}], "Hm.", "B"]
    answers = ["B", "(b)", "B", "E"]
    assert judge(completions, prompts=[""] * 4, answer=answers) == [1.0, 0.0, 0.0, None]
    right, wrong, silent, unknown = judge.feedback(completions, answer=answers)
    assert right is None
    assert unknown is None
    assert wrong == "The chosen option C is wrong."
    assert "Answer: " in silent


@pytest.mark.parametrize("letters", ["", "abc", "AAB", "A-C"])
def test_bad_letters_are_refused(letters):
    with pytest.raises(ValueError, match="letters must be distinct capital letters"):
        ChoiceVerifier(letters=letters)
