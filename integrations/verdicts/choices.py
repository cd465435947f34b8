r"""The chosen letter of a multiple-choice question.

Of these rules the first that finds something decides, and within a rule the last place in the
response:

1. ``\boxed{B}`` or ``<answer>B</answer>``
2. a statement: ``Answer: B``, ``the correct option is (B)``, ``I choose **B**``
3. letters in bold type or called right, if all are the same: ``**B**``, ``option B is correct``
4. the last line, where it is an option and no sentence: ``B``, ``(B)``, ``B. Paris``

The letter may stand in parentheses, ``\text{}`` or asterisks, and its text may follow.  ``A`` and
``I`` are words too: before another word they are options only behind a delimiter (``A) cat``).  A
place that names two letters (``A or B``) chooses none, and then the response does not either.
"""

import re
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verdicts.verifier import Verdict, Verifier

BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
NOUN = r"(?:answer|choice|option|letter)"
STATED = re.compile(
    rf"(?:\b{NOUN}\b[*_]*\s*(?::|=|\b(?:is|(?:must|should|would|will)\s+be)\b)"
    r"|\bI(?:\s+would|\s+will|'ll|'d)?\s+(?:choose|pick|select|go\s+with)\b)"
    rf"[\s:*_]*(?:(?:therefore|thus|hence|clearly)\s+)?(?:(?:the\s+)?{NOUN}\b[\s:*_]*)?",
    re.IGNORECASE,
)
BOLD = re.compile(r"\*\*(?=[^*\n]+\*\*)")
CALLED_RIGHT = re.compile(r"(?<![\w'])(?=\(?[A-Z]\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b)")
# what may stand around a letter, and what follows one that is no word of a sentence
OPENING = r"(?:\\(?:text|textbf|mathbf|mathrm|bf)\s*\{|[\s(\[*_$\"'{])*"
CLOSING = r"[\s)\]*_$\"'}]*"
END = r"(?:$|[\n.:)\]*}]|\s[-\u2013\u2014])"
END_OF_CLAUSE = rf"(?:{END}|[,;!?]|\s+(?:because|since|as|which|with|is)\b)"


class ChoiceVerifier(Verifier):
    """Rewards a response that chooses the reference's letter.

    Args:
        column: the dataset's column of references: a letter, in whatever case and parentheses.
        letters: the letters of the options.

    Raises:
        ValueError: ``letters`` are not distinct capital letters.

    Examples:
        >>> from fused_sd.integrations.verdicts import ChoiceVerifier
        >>> judge = ChoiceVerifier(letters="ABCD")
        >>> judge(["The answer is B.", "The answer is C."], answer=["B", "(b)"])
        [1.0, 0.0]
    """

    def __init__(self, column: str = "answer", *, letters: str = "ABCDEFGHIJ") -> None:
        super().__init__("choice", column)
        if not re.fullmatch("[A-Z]+", letters) or len(set(letters)) < len(letters):
            fail("letters", "be distinct capital letters", repr(letters), "pass 'ABCD'")
        self.letters = letters

    def judge(self, response: str, reference: Any) -> Verdict:
        """Judge one response; see ``Verifier.judge``."""
        wanted = str(reference).strip(" ().").upper()
        if len(wanted) != 1 or wanted not in self.letters:
            return Verdict(None, None)
        chosen = chosen_letter(response, self.letters)
        if chosen is None:
            text = f"The response chooses no single option: end with 'Answer: {self.letters[0]}'"
            return Verdict(0.0, f"{text} or another letter.")
        if chosen != wanted:
            return Verdict(0.0, f"The chosen option {chosen} is wrong.")
        return Verdict(1.0, None)


def chosen_letter(response: str, letters: str) -> str | None:
    """Return the letter that a response chooses by the rules of this module, or None."""

    def named(*patterns: re.Pattern[str], end: str) -> list[str]:
        """Return the letters at each place, in order; a group holds the text, else it follows."""
        places = sorted(
            (match.start(), match[1] if pattern.groups else response[match.end() :])
            for pattern in patterns
            for match in pattern.finditer(response)
        )
        return [found for _, text in places if (found := _letters_at(text, letters, end))]

    chosen = named(BOXED, TAGGED, end=END_OF_CLAUSE) or named(STATED, end=END_OF_CLAUSE)
    if not chosen:
        agreeing = {*named(BOLD, end=END), *named(CALLED_RIGHT, end=END_OF_CLAUSE)}
        if len(agreeing) > 1:
            return None
        last_line = response.strip().rpartition("\n")[2]
        chosen = [*agreeing] or [_letters_at(last_line, letters, END, sentence=True)]
    return chosen[-1] if len(chosen[-1]) == 1 else None


def _letters_at(text: str, letters: str, end: str, *, sentence: bool = False) -> str:
    """Return the letters that a text begins with: none, the chosen one, or two that it offers.

    Args:
        end: what must follow a letter that could be a word.
        sentence: treat every letter as if it could be a word.
    """
    start = re.match(rf"{OPENING}([{letters}{letters.lower()}])(?![A-Za-z0-9])", text)
    if start is None:
        return ""
    letter, rest = start[1], text[start.end() :]
    other = re.match(rf"{CLOSING}(?:,|/|&|or\b|and\b){OPENING}([{letters}])(?![A-Za-z0-9'])", rest)
    if other is not None:
        return letter.upper() + other[1]
    could_be_word = sentence or letter.islower() or letter in "AI"
    if could_be_word and not re.match(rf"{CLOSING}{end}", rest):
        return ""
    return letter.upper()
