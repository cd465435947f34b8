"""Teacher prompts: the student's prompt with a new last user turn that holds a context."""

import re
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout, Sibling, shown_text
from fused_sd.integrations.shared.templates import ANSWER_INSTRUCTION, PROBLEM_PREFIX
from fused_sd.integrations.shared.texts import as_text
from fused_sd.integrations.shared.thinking import Tags, check_thinking_tags

# Where a turn's part that is no text stands while the turn is handled as one text.  It holds a
# number that nobody knows, because a prompt may hold any text.
_SECRET = secrets.token_hex(8)
_MARK = re.compile(f"\0<{_SECRET} ([0-9]+)>\0")
_LEADING = re.compile(f"^(?:{_MARK.pattern})+")


def last_user_text(prompt: Any) -> str:
    """Return the last user turn's text, its parts joined as chat templates write them.

    Raises:
        ValueError: a conversation does not end with a user turn.
    """
    return _MARK.sub("", _marked_text(prompt))


def with_user_text(prompt: Any, text: str) -> Any:
    """Return the prompt with another text in its last user turn; earlier turns stay.

    Images and other parts that are no text stay as well: those that stood before the turn's first
    text stand before the new text, the others behind it.
    """
    if isinstance(prompt, str):
        return text
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return _with_content(prompt, text)
    kinds = [part.get("type") for part in content]
    first = kinds.index("text") if "text" in kinds else len(kinds)
    marks = ["" if kind == "text" else _mark(n) for n, kind in enumerate(kinds)]
    return _with_content(prompt, "".join([*marks[:first], text, *marks[first:]]))


def bare_problem(text: str) -> str:
    """Return a problem without "Problem: " before it and the answer's instruction behind it."""
    return text.removeprefix(PROBLEM_PREFIX).removesuffix(f"\n\n{ANSWER_INSTRUCTION}")


def _mark(index: int) -> str:
    return f"\0<{_SECRET} {index}>\0"


def _marked_text(prompt: Any) -> str:
    """Return the last user turn as one text, with a mark for each part that is no text."""
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
    return "".join(
        part["text"] if part.get("type") == "text" else _mark(n) for n, part in enumerate(content)
    )


def _with_content(prompt: Any, text: str) -> Any:
    """Return the prompt with a text as its last turn; the first of equal marks is its part again.

    A template may show the student's turn twice, but the model reads each image once.
    """
    old = prompt[-1]["content"]
    if isinstance(old, str):
        return [*prompt[:-1], {**prompt[-1], "content": text}]
    content: list[Any] = []
    shown: set[int] = set()
    for n, piece in enumerate(_MARK.split(text)):
        if n % 2 == 0:
            content.extend([{"type": "text", "text": piece}] if piece else [])
        elif int(piece) not in shown:
            shown.add(int(piece))
            content.append(old[int(piece)])
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def check_template(name: str, template: str, *needed: str) -> None:
    """Refuse a template that lacks a placeholder, or has one that nothing fills."""
    if not isinstance(template, str):
        got, remedy = type(template).__name__, f"write one with {_braced(needed)}"
        fail(name, "be a text", got, remedy)
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


def reprompted(prompt: Any, template: str, *, stripped: bool = False, **parts: str) -> Any:
    """Return the prompt with a filled template as its last user turn.

    The turn's images stay where they stood in the text that the template shows, and before all text
    where the turn began with them.

    Args:
        template: is filled with the user's text as ``{prompt}``, and with ``parts``.  A template
            that asks for a boxed answer itself is filled with the bare problem.
        stripped: strip the user's text and the parts, where the official code of a method does.
    """
    whole = _marked_text(prompt)
    text = _LEADING.sub("", whole)
    leading = whole[: len(whole) - len(text)]
    if ANSWER_INSTRUCTION.replace("{}", "{{}}") in template:
        text = bare_problem(text)
    if stripped:
        text, parts = text.strip(), {name: part.strip() for name, part in parts.items()}
    filled = leading + template.format(prompt=text, **parts)
    return filled if isinstance(prompt, str) else _with_content(prompt, filled)


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

    @property
    def thinking_tags(self) -> Tags | None: ...


def check_sibling_settings(settings: SiblingSettings) -> None:
    """Refuse templates that lack a placeholder, and tags that are no pair."""
    removes = settings.remove_thinking_from_demonstration
    check_thinking_tags(settings.thinking_tags, are_read=removes)
    check_template(
        "reprompt_template", settings.reprompt_template, "prompt", "solution", "feedback"
    )
    check_template("solution_template", settings.solution_template, "successful_previous_attempt")
    check_template("feedback_template", settings.feedback_template, "feedback_raw")
    check_template("attempt_template", settings.attempt_template, "attempt")


def has_demonstration(rollout: Rollout, settings: SiblingSettings) -> bool:
    """Return whether a successful rollout of the group may be shown to this one's teacher."""
    return bool(_demonstrations(rollout, settings))


def _demonstrations(rollout: Rollout, settings: SiblingSettings) -> list[str]:
    """Return the texts of successful rollouts; one that says nothing demonstrates nothing."""
    found = rollout.siblings(
        threshold=settings.success_reward_threshold,
        successful=True,
        itself=not settings.dont_reprompt_on_self_success,
    )
    texts = [_shown(sibling, settings) for sibling in found]
    return [text for text in texts if text.strip()]


def _shown(said: Rollout | Sibling, settings: SiblingSettings) -> str:
    thoughts = not settings.remove_thinking_from_demonstration
    return shown_text(said, thoughts=thoughts, tags=settings.thinking_tags)


def sibling_prompt(rollout: Rollout, feedback: Any, settings: SiblingSettings) -> Any:
    """Return SDPO's teacher prompt: with a successful sibling, feedback or both; None for neither.

    As in SDPO's official code, the first successful sibling in the order of sampling is shown, and
    neither its text nor the feedback is stripped.  A sibling whose thoughts were cut off has no
    text to show, and the next one stands in its place.

    Raises:
        ValueError: feedback is neither text nor made of texts.
    """
    feedback = as_text("feedback", feedback, rollout.row)
    solution = shown_feedback = ""
    if settings.use_successful_as_teacher:
        found = _demonstrations(rollout, settings)
        if found:
            solution = settings.solution_template.format(successful_previous_attempt=found[0])
    unneeded = settings.environment_feedback_only_without_solution and solution
    if settings.include_environment_feedback and (feedback or "").strip() and not unneeded:
        shown_feedback = settings.feedback_template.format(feedback_raw=feedback)
    if not solution and not shown_feedback:
        return None
    attempt = _shown(rollout, settings)
    if settings.include_own_attempt and attempt.strip():
        shown_feedback = settings.attempt_template.format(attempt=attempt) + shown_feedback
    template = settings.reprompt_template
    return reprompted(rollout.prompt, template, solution=solution, feedback=shown_feedback)
