"""What the teacher is shown, a class for each kind of context: chosen by Hydra's ``_target_``.

distillation.context._target_=fused_sd.integrations.verl.contexts.SiblingContext

Another class will do as well: an object with ``teacher_prompt(rollout, tokenizer)``, which returns
the tokens of the teacher's prompt, generation header included, or None where there is nothing to
show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from verl.utils.tokenizer import normalize_token_ids

from fused_sd.checks import check_finite, check_positive_int
from fused_sd.integrations.shared.prompts import (
    check_sibling_templates,
    check_template,
    reprompted,
    sibling_prompt,
)
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.shared.verdicts import CORRECT_PHRASE, DELIMITER, WRONG_PHRASE


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes prompts as verl's rollouts do.

    Attributes:
        tokenizer: transformers'.
        chat_settings: ``data.apply_chat_template_kwargs``, and the tools' schemas.
    """

    tokenizer: Any
    chat_settings: Mapping[str, Any] = field(default_factory=dict)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of chat messages, with the generation header."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, **self.chat_settings
        )
        return normalize_token_ids(encoded)

    def text(self, text: str) -> list[int]:
        """Tokens of text inside a sequence."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Context(Protocol):
    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None: ...


@dataclass
class SiblingContext:
    """SDPO's: the first successful response to the same prompt, feedback on one's own, or both.

    Defaults and templates are those of the official configuration (arXiv 2601.20802).

    Args:
        success_reward_threshold: reward from which on a response teaches the others.
        use_successful_as_teacher: show siblings at all.
        dont_reprompt_on_self_success: show a response no success of its own.
        remove_thinking_from_demonstration: leave ``<think>`` spans out of a sibling.
        include_environment_feedback: show what the reward function said.
        environment_feedback_only_without_solution: ... but not beside a sibling.
        include_own_attempt: show the attempt before the feedback on it.
        reprompt_template, solution_template, feedback_template, attempt_template: of the last user
            turn, and of its parts.
    """

    success_reward_threshold: float = 0.5
    use_successful_as_teacher: bool = True
    dont_reprompt_on_self_success: bool = True
    remove_thinking_from_demonstration: bool = True
    include_environment_feedback: bool = True
    environment_feedback_only_without_solution: bool = True
    include_own_attempt: bool = False
    reprompt_template: str = (
        "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
    )
    solution_template: str = "\nCorrect solution:\n\n{successful_previous_attempt}"
    feedback_template: str = (
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
    )
    attempt_template: str = "\nYour earlier attempt:\n\n{attempt}\n"

    def __post_init__(self) -> None:
        check_finite("success_reward_threshold", self.success_reward_threshold, "0.5 is usual")
        check_sibling_templates(self)

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        messages = sibling_prompt(rollout, rollout.feedback, self)
        return None if messages is None else tokenizer.chat(messages)


@dataclass
class ReferenceContext:
    """OPSD's and RLSD's: the dataset's reference solution or answer.

    Args:
        reprompt_template: of the last user turn, from {prompt} and {privileged}.  The default is
            OPSD's (arXiv 2601.18734).
    """

    reprompt_template: str = (
        "{prompt}\n\nHere is a reference solution to this problem:\n{privileged}\nAfter "
        "understanding the reference solution and the rationale behind each step, now articulate "
        "your own step-by-step reasoning that derives the same final answer."
    )

    def __post_init__(self) -> None:
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        if not rollout.privileged:
            return None
        template = self.reprompt_template
        return tokenizer.chat(reprompted(rollout.prompt, template, privileged=rollout.privileged))


@dataclass
class AttemptContext:
    """SD-Zero's second phase: one's own response and a phrase that says whether it was right.

    Args:
        success_reward_threshold: a response is right where its reward is above this.
        correct_phrase, wrong_phrase: what follows the response; those of the official code for Qwen
            (arXiv 2604.12002).
        max_length: tokens of the whole sequence, with both copies of the response; a sample over it
            is shown nothing.
    """

    success_reward_threshold: float = 0.5
    correct_phrase: str = CORRECT_PHRASE
    wrong_phrase: str = WRONG_PHRASE
    max_length: int = 32768

    def __post_init__(self) -> None:
        check_finite("success_reward_threshold", self.success_reward_threshold, "0.5 is usual")
        check_positive_int("max_length", self.max_length)

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        is_correct = rollout.reward > self.success_reward_threshold
        phrase = self.correct_phrase if is_correct else self.wrong_phrase
        response = list(rollout.completion_ids)
        if response and response[-1] in set(tokenizer.tokenizer.all_special_ids):
            response = response[:-1]  # its end: the turn goes on
        shown = [*rollout.prompt_ids, *response, *tokenizer.text(f"{DELIMITER}{phrase}{DELIMITER}")]
        return shown if len(shown) + len(rollout.completion_ids) <= self.max_length else None
