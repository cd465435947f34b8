"""Mathematical results, compared by the library math-verify."""

import re
import threading
from typing import Any

from fused_sd.checks import fail
from fused_sd.checks.extras import require
from fused_sd.integrations.verdicts.verifier import Verdict, Verifier

# a reference with one of these is read as a response is, any other as one expression
DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[|####")
PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")


class MathsVerifier(Verifier):
    r"""Rewards a response whose result equals the reference, in whatever form it is written.

    The result is the last ``\boxed``, and without one what math-verify finds: the formula or number
    behind words as "the final answer is", else the last number.  A reference is an expression
    (``\frac12``, ``3/4``, ``(1, 2)``) or a text that holds one as responses do (``... #### 72``).

    Args:
        column: the dataset's column of references.
        timeout_seconds: limits each parse and each comparison; one that takes longer is no match.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
        ValueError: a verdict is asked for outside the main thread, whose alarm keeps the time.

    Examples:
        >>> from fused_sd.integrations.verdicts import MathsVerifier
        >>> judge = MathsVerifier()
        >>> judge(["It is \\boxed{0.5}.", "It is \\boxed{2}."], answer=["1/2", "1/2"])
        [1.0, 0.0]
        >>> judge.feedback(["I do not know."], answer=["1/2"])
        ['The response holds no result: end with it in \\boxed{}.']
    """

    def __init__(self, column: str = "answer", *, timeout_seconds: int = 5) -> None:
        super().__init__("maths", column)
        self.timeout_seconds = timeout_seconds
        _math_verify()

    def judge(self, response: str, reference: Any) -> Verdict:
        """Judge one response; see ``Verifier.judge``."""
        wanted = self._parse(_as_text(str(reference)))
        if not wanted:
            return Verdict(None, None)
        # math-verify would read boxes in one sentence, the one taken back too, as a set
        found = self._parse(response[max(response.rfind("\\boxed"), 0) :])
        if not found:
            return Verdict(0.0, "The response holds no result: end with it in \\boxed{}.")
        if _math_verify().verify(wanted, found, timeout_seconds=self.timeout_seconds):
            return Verdict(1.0, None)
        return Verdict(0.0, "The result of the response is wrong.")

    def _parse(self, text: str) -> list[Any]:
        """Return the expressions in a text, none where there is none that can be parsed."""
        if threading.current_thread() is not threading.main_thread():
            rule = "be called in the main thread, whose alarm limits the time of a comparison"
            fail("MathsVerifier", rule, threading.current_thread().name, "call it there")
        library = _math_verify()
        return library.parse(
            text,
            extraction_config=[
                library.LatexExtractionConfig(boxed_match_priority=0),
                library.ExprExtractionConfig(),
            ],
            fallback_mode="no_fallback",
            parsing_timeout=self.timeout_seconds,
        )


def _as_text(reference: str) -> str:
    if DELIMITED.search(reference) or ("\\" not in reference and PROSE.search(reference)):
        return reference
    return f"${reference}$"


def _math_verify() -> Any:
    require("verdicts", "math_verify")
    import math_verify

    return math_verify
