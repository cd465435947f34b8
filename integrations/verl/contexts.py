"""Contexts: classes that write the teacher's prompt from a rollout.

Hydra chooses one with
``distillation.context._target_=fused_sd.integrations.verl.contexts.SiblingContext``.  A class of
your own works as well, if it has the method of ``Context``.
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
    """Tokenizes prompts as verl's rollout workers do.

    Attributes:
        tokenizer: a tokenizer of transformers.
        chat_settings: ``data.apply_chat_template_kwargs``, and the tools' schemas.
    """

    tokenizer: Any
    chat_settings: Mapping[str, Any] = field(default_factory=dict)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of chat messages, with the generation header."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, **self.chat_settings
        )
        return normalize_token_ids(encoded)  # transformers 5 returns a BatchEncoding

    def text(self, text: str) -> list[int]:
        """Return the tokens of text that stands inside a sequence."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Context(Protocol):
    """What ``distillation.context`` must be."""

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        """Return the teacher's prompt tokens, generation header included; None: nothing to show."""


@dataclass
class SiblingContext:
    """SDPO's context: the first successful response to the same prompt, feedback, or both.

    Names, defaults and templates are those of the official configuration (arXiv 2601.20802).

    Args:
        success_reward_threshold: least reward of a response that is shown to others.
        use_successful_as_teacher: show successful responses at all.
        dont_reprompt_on_self_success: do not show a response to itself.
        remove_thinking_from_demonstration: leave ``<think>`` spans out of a shown response.
        include_environment_feedback: show the reward function's feedback on the response.
        environment_feedback_only_without_solution: show feedback only if no response is shown.
        include_own_attempt: show the response before the feedback on it.
        reprompt_template, solution_template, feedback_template, attempt_template: templates of the
            last user turn and of its parts.
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
    """OPSD's and RLSD's context: the dataset's reference solution or answer.

    Args:
        reprompt_template: template of the last user turn, with {prompt} and {privileged}.  The
            default is OPSD's (arXiv 2601.18734).
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
    """SD-Zero's context (phase 2): the response itself and a phrase that says whether it was right.

    Args:
        success_reward_threshold: a response is right if its reward is above this.
        correct_phrase, wrong_phrase: the phrase behind the response; the defaults are those of the
            official code for Qwen (arXiv 2604.12002).
        max_length: most tokens of the whole sequence, which holds the response twice; a longer
            sample gets no context.
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
            response = response[:-1]  # drop the end-of-turn token: the phrase continues the turn
        shown = [*rollout.prompt_ids, *response, *tokenizer.text(f"{DELIMITER}{phrase}{DELIMITER}")]
        return shown if len(shown) + len(rollout.completion_ids) <= self.max_length else None
