"""Teacher prompts: the student's prompt with a new last user turn that holds a context."""

from collections.abc import Sequence
from typing import Any, Protocol

from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout, Sibling, without_thinking


def last_user_text(prompt: Any) -> str:
    """Return the text for a template's ``{prompt}``: of the last user turn, or a text prompt whole.

    Raises:
        ValueError: a conversation does not end with a user turn.
    """
    if isinstance(prompt, str):
        return prompt
    if not prompt or prompt[-1].get("role") != "user":
        role = prompt[-1].get("role") if prompt else None
        fail(
            "prompt",
            "end with a user turn, whose text the teacher's template rewrites",
            f"a last turn of {role!r}",
            "move prefilled answers and tool turns out of the prompt",
        )
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def with_user_text(prompt: Any, text: str) -> Any:
    """Return the prompt with another text in its last user turn; its images and earlier turns stay.

    The text takes the place of the turn's first text; further texts are part of it, and go.
    """
    if isinstance(prompt, str):
        return text
    content: Any = prompt[-1]["content"]
    new: Any = text
    if not isinstance(content, str):
        is_text = [part.get("type") == "text" for part in content]
        place = is_text.index(True) if any(is_text) else len(content)
        others = [part for n, part in enumerate(content) if n > place and not is_text[n]]
        new = [*content[:place], {"type": "text", "text": text}, *others]
    return [*prompt[:-1], {**prompt[-1], "content": new}]


def check_template(name: str, template: str, *needed: str) -> None:
    """Refuse a template that lacks a placeholder, or has one that nothing fills."""
    try:
        template.format(**dict.fromkeys(needed, ""))
    except (KeyError, IndexError, ValueError) as error:
        fail(
            name, f"hold no placeholders but {_braced(needed)}", repr(error), "double other braces"
        )
    missing = [field for field in needed if f"{{{field}}}" not in template]
    if missing:
        fail(name, f"hold {_braced(needed)}", repr(template), f"add {_braced(missing)}")


def _braced(fields: Sequence[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in fields)


def reprompted(prompt: Any, template: str, **parts: str) -> Any:
    """Return the prompt with a filled template as its last user turn.

    Args:
        template: is filled with the user's text as ``{prompt}``, and with ``parts``.
    """
    text = template.format(prompt=last_user_text(prompt), **parts)
    return with_user_text(prompt, text)


class SiblingSettings(Protocol):
    """The settings that SDPO's contexts read, under the names that TRL's SDPOConfig gives them.

    A protocol, because TRL's and verl's configurations have them and share no class.
    """

    use_successful_as_teacher: bool
    success_reward_threshold: float
    dont_reprompt_on_self_success: bool
    remove_thinking_from_demonstration: bool
    include_environment_feedback: bool
    environment_feedback_only_without_solution: bool
    include_own_attempt: bool
    reprompt_template: str
    solution_template: str
    feedback_template: str
    attempt_template: str


def check_sibling_templates(settings: SiblingSettings) -> None:
    """Refuse templates that lack a placeholder."""
    check_template(
        "reprompt_template", settings.reprompt_template, "prompt", "solution", "feedback"
    )
    check_template("solution_template", settings.solution_template, "successful_previous_attempt")
    check_template("feedback_template", settings.feedback_template, "feedback_raw")
    check_template("attempt_template", settings.attempt_template, "attempt")


def has_demonstration(rollout: Rollout, settings: SiblingSettings) -> bool:
    """Return whether a successful rollout of the group may be shown to this one's teacher."""
    return bool(_demonstrations(rollout, settings))


def _demonstrations(rollout: Rollout, settings: SiblingSettings) -> list[Sibling]:
    return rollout.siblings(
        threshold=settings.success_reward_threshold,
        successful=True,
        itself=not settings.dont_reprompt_on_self_success,
    )


def sibling_prompt(rollout: Rollout, feedback: str | None, settings: SiblingSettings) -> Any:
    """Return SDPO's teacher prompt: with a successful sibling, feedback or both; None for neither.

    As in SDPO's official code, the first successful sibling in the order of sampling is shown.
    """
    solution = shown_feedback = ""
    if settings.use_successful_as_teacher:
        found = _demonstrations(rollout, settings)
        if found:
            text = found[0].text
            if settings.remove_thinking_from_demonstration:
                text = without_thinking(text)
            solution = settings.solution_template.format(successful_previous_attempt=text)
    unneeded = settings.environment_feedback_only_without_solution and solution
    if settings.include_environment_feedback and (feedback or "").strip() and not unneeded:
        shown_feedback = settings.feedback_template.format(feedback_raw=feedback)
    if not solution and not shown_feedback:
        return None
    if settings.include_own_attempt:
        attempt = settings.attempt_template.format(attempt=rollout.text)
        shown_feedback = attempt + shown_feedback
    template = settings.reprompt_template
    return reprompted(rollout.prompt, template, solution=solution, feedback=shown_feedback)
