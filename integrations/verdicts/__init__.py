"""Verifiers: reward functions for TRL that can also say what was wrong.

    judge = CodeVerifier()
    SDPOTrainer(..., reward_funcs=judge, feedback_func=judge.feedback)

A verifier is called with completions and the dataset's columns, as any reward function of TRL's,
and reads its reference from one of the columns.  ``MathsVerifier`` compares results,
``ChoiceVerifier`` the chosen letter, and ``CodeVerifier`` runs the program in the response.
"""

from fused_sd.integrations.verdicts.choices import ChoiceVerifier
from fused_sd.integrations.verdicts.code import CodeVerifier
from fused_sd.integrations.verdicts.maths import MathsVerifier
from fused_sd.integrations.verdicts.programs import Limits
from fused_sd.integrations.verdicts.verifier import Verdict, Verifier

__all__ = ["ChoiceVerifier", "CodeVerifier", "Limits", "MathsVerifier", "Verdict", "Verifier"]
