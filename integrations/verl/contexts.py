"""Contexts: classes that write the teacher's prompt from a rollout.

Hydra chooses one with
``distillation.context._target_=fused_sd.integrations.verl.contexts.SiblingContext``.  A class of
your own works as well, if it has the method of ``Context``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from verl.utils.tokenizer import normalize_token_ids

from fused_sd.checks import check_bool, check_finite, check_positive_int
from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.chat_format import check_chat_format
from fused_sd.integrations.shared.prompts import (
    check_sibling_settings,
    check_template,
    reprompted,
    sibling_prompt,
)
from fused_sd.integrations.shared.revision_phrases import phrase_ids, phrases_for, without_end
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.verl.images import chat_ids


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes prompts as verl's rollout workers do.

    Attributes:
        tokenizer: a tokenizer of transformers.
        chat_settings: ``data.apply_chat_template_kwargs``, and the tools' schemas.
        processor: a processor of transformers; None for a model of text.
        student: the rollout whose images and videos the prompts have.
    """

    tokenizer: Any
    chat_settings: Mapping[str, Any] = field(default_factory=dict)
    processor: Any = None
    student: Rollout | None = None

    def beside(self, student: Rollout) -> "PromptTokenizer":
        """Return a tokenizer of prompts that have a rollout's images and videos."""
        return replace(self, student=student)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of chat messages, with the generation header.

        Raises:
            ValueError: the messages have other images or videos than the student's prompt.
        """
        if self.processor is not None:
            return chat_ids(self.processor, messages, self.student, self.chat_settings)
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, **self.chat_settings
        )
        return normalize_token_ids(encoded)  # transformers 5 returns a BatchEncoding


class Context(Protocol):
    """What ``distillation.context`` must be."""

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        """Return the teacher's prompt tokens, generation header included; None: nothing to show.

        Args:
            rollout: one output of a session.  Its ``text`` and ``reward`` are the session's, its
                ``prompt`` is the one that the conversation began with, and its ``prompt_ids`` and
                ``completion_ids`` are the output's own.
            tokenizer: for messages in the place of ``prompt``.  What ``chat`` returns ends with the
                turns that followed in the output's own prompt.
        """


@dataclass
class SamePromptContext:
    """No context: the teacher reads the student's own prompt, as in on-policy distillation.

    Only a teacher with other weights than the student's has anything to teach then.
    """

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int]:
        return list(rollout.prompt_ids)


@dataclass
class SiblingContext:
    """SDPO's context: the first successful response to the same prompt, feedback, or both.

    Names, defaults and templates are those of the official configuration (arXiv 2601.20802).

    Args:
        success_reward_threshold: least reward of a response that is shown to others.
        use_successful_as_teacher: show successful responses at all.
        dont_reprompt_on_self_success: do not show a response to itself.
        remove_thinking_from_demonstration: leave thoughts out of a shown response.  One whose
            thoughts were cut off is not shown.
        thinking_tags: the opening and the closing tag of thoughts; null: the known pairs, see
            ``fused_sd.integrations.shared.thinking``.
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
    thinking_tags: Sequence[str] | None = None
    include_environment_feedback: bool = True
    environment_feedback_only_without_solution: bool = True
    include_own_attempt: bool = False
    reprompt_template: str = templates.SDPO
    solution_template: str = templates.SDPO_SOLUTION
    feedback_template: str = templates.SDPO_FEEDBACK
    attempt_template: str = templates.SDPO_ATTEMPT

    def __post_init__(self) -> None:
        check_finite("success_reward_threshold", self.success_reward_threshold, "0.5 is usual")
        check_sibling_settings(self)

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        messages = sibling_prompt(rollout, rollout.feedback, self)
        return None if messages is None else tokenizer.chat(messages)


@dataclass
class ReferenceContext:
    """OPSD's context: the dataset's reference solution.

    Args:
        reprompt_template: template of the last user turn, with {prompt} and {privileged}.  The
            default is OPSD's (arXiv 2601.18734).
    """

    reprompt_template: str = templates.OPSD
    stripped: ClassVar[bool] = False
    """Whether the question and the reference are stripped, as the method's official code does."""

    def __post_init__(self) -> None:
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        hint = rollout.hint
        if hint is None:
            return None
        messages = reprompted(
            rollout.prompt,
            self.reprompt_template,
            stripped=self.stripped,
            privileged=hint,
        )
        return tokenizer.chat(messages)


@dataclass
class AnswerContext(ReferenceContext):
    """RLSD's context: the dataset's answer, or a reference solution (arXiv 2604.03128)."""

    reprompt_template: str = templates.RLSD
    stripped: ClassVar[bool] = True


@dataclass
class AttemptContext:
    """SD-Zero's context (phase 2): the response itself and a phrase that says whether it was right.

    As in the official code (arXiv 2604.12002), the response is shown with all its tokens: with its
    end, if it has one, and with the results of tools.  Of a session with several outputs each is
    revised behind its own prompt, and the session's reward chooses the phrase.

    Args:
        success_reward_threshold: a response is right if its reward is above this; one without a
            verdict, whose reward is NaN, gets no context.
        correct_phrase, wrong_phrase: the phrase behind the response; None: the official one for the
            model's family, see ``fused_sd.integrations.shared.revision_phrases``.
        keep_response_end: whether the end token stands before the phrase; the traces of phase 1
            have none there.
        max_length: most tokens of the whole sequence, which holds the response twice; a longer
            sample gets no context.  The official code cuts its response, for the student too.
    """

    success_reward_threshold: float = 0.5
    correct_phrase: str | None = None
    wrong_phrase: str | None = None
    keep_response_end: bool = True
    max_length: int = 32768

    def __post_init__(self) -> None:
        check_finite("success_reward_threshold", self.success_reward_threshold, "0.5 is usual")
        check_bool("keep_response_end", self.keep_response_end)
        check_positive_int("max_length", self.max_length)

    def teacher_prompt(self, rollout: Rollout, tokenizer: PromptTokenizer) -> list[int] | None:
        if math.isnan(rollout.reward):  # no verdict, for which there is no phrase
            return None
        used = {k: value for k, value in tokenizer.chat_settings.items() if k != "tools"}
        check_chat_format(tokenizer.tokenizer, used)
        model = tokenizer.tokenizer.name_or_path
        phrases = phrases_for(model, self.correct_phrase, self.wrong_phrase)
        phrase = phrases.after(rollout.reward > self.success_reward_threshold)
        response = rollout.completion_ids
        if not self.keep_response_end:
            response = without_end(tokenizer.tokenizer, response)
        shown = [*rollout.prompt_ids, *response, *phrase_ids(tokenizer.tokenizer, phrase)]
        return shown if len(shown) + len(rollout.completion_ids) <= self.max_length else None
