"""Asks a context for the teacher's prompts, for all outputs of a session.

A context belongs to the question.  A later output's prompt holds more than the question: the turns
so far.  The teacher reads them, too, behind its own version of the question:

    student   question            turns so far   response
    teacher   question + context  turns so far   response

This is done with tokens, so that both read the same turns.  Where a later output's prompt does not
begin with the question, because the agent loop has shortened the history, nobody knows where the
context belongs, and the output gets none.  An agent loop can tell: it puts the messages that the
prompt was written from into ``AgentLoopOutput.extra_fields["raw_prompt"]``, and the output then
begins a conversation of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verl.batch_rollouts import (
    OWN_MESSAGES,
    OutputRollout,
    asks_the_same,
    num_shared,
)
from fused_sd.integrations.verl.contexts import Context, PromptTokenizer
from fused_sd.integrations.verl.images import Vision


class _AnotherConversation(Exception):
    """The output's prompt does not begin with the question that a context wants to rewrite."""


@dataclass(frozen=True)
class SessionTokenizer(PromptTokenizer):
    """Tokenizes a teacher's prompt and puts the turns of an output's own prompt behind it.

    Attributes:
        rollout: the output.
    """

    rollout: OutputRollout = field(kw_only=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of messages in the place of those that the conversation began with."""
        written = super().chat(messages)
        first, own = list(self.rollout.first_prompt_ids), self.rollout.prompt_ids
        # from the question's end on, the output's own tokens: a later prompt may have been rendered
        # anew, with another generation header in the place of the first one
        closing = len(first) - self.rollout.question_length
        kept = min(closing, num_shared(first[::-1], written[::-1]))
        start = len(first) - kept
        if not asks_the_same(own, first, start):
            raise _AnotherConversation
        return written[: len(written) - kept] + own[start:]


class SessionPrompts:
    """The teacher's prompts of a batch.

    Attributes:
        num_compacted: number of outputs without a context because their prompt does not begin with
            the question.
    """

    def __init__(self, context: Context, tokenizer: PromptTokenizer) -> None:
        self.context, self.tokenizer = context, tokenizer
        self.num_compacted = 0
        self._offered: dict[Any, Sequence[Any] | None] = {}  # the tools of a beginning

    def teacher_prompt(self, rollout: OutputRollout) -> list[int] | None:
        """Return the tokens of the teacher's prompt; None: there is nothing to show.

        Raises:
            ValueError: the output's prompt was not written from the messages that came with it.
        """
        tokenizer = self.tokenizer_of(rollout)
        if rollout.has_own_messages:
            _check_own_messages(rollout, tokenizer)
        own = SessionTokenizer(**vars(tokenizer), rollout=rollout)
        try:
            return self.context.teacher_prompt(rollout, own)
        except _AnotherConversation:
            self.num_compacted += 1
            return None

    def tokenizer_of(self, rollout: OutputRollout) -> PromptTokenizer:
        """Return the tokenizer of an output's conversation: with its tools, images and videos.

        verl's tool agent offers the configured tools, or those of them that the row's
        ``extra_info.tool_selection`` names; its single-turn agent offers none.  The batch does not
        say which loop it was, but the prompt's tokens do.
        """
        beginning = dataclasses.replace(rollout, prompt_ids=list(rollout.first_prompt_ids))
        tokenizer = self.tokenizer.beside(beginning)
        tools = tokenizer.chat_settings.get("tools")
        if not tools:
            return tokenizer
        names = rollout.tool_selection or ()
        key = tuple(rollout.first_prompt_ids), tuple(names)
        if key not in self._offered:
            by_name = {tool["function"]["name"]: tool for tool in tools}
            chosen = [by_name[name] for name in names if name in by_name] if names else tools
            offers = [chosen, None]
            fitting = [
                tools
                for tools in offers
                if _offering(tokenizer, tools).chat(rollout.prompt) == beginning.prompt_ids
            ]
            self._offered[key] = (fitting or offers)[0]
        return _offering(tokenizer, self._offered[key])

    def check(self, rollouts: Sequence[OutputRollout | None], vision: Vision | None) -> None:
        """Make sure that teacher and student tokenise a prompt alike.

        Otherwise the teacher's prompt would differ from the student's by more than the context.
        The first rollout stands for all, and the first one with images for theirs.

        Raises:
            ValueError: they do not.
        """
        known = [(n, rollout) for n, rollout in enumerate(rollouts) if rollout is not None]
        for _, rollout in known[:1]:
            self._check_beginning(rollout)
        if vision is None:
            return
        for n, rollout in [row for row in known if vision.has_any(row[0])][:1]:
            self._check_beginning(rollout)
            vision.check(n)

    def _check_beginning(self, rollout: OutputRollout) -> None:
        own = self.tokenizer_of(rollout).chat(rollout.prompt)
        student = list(rollout.first_prompt_ids)
        if own != student:
            fail(
                "raw_prompt",
                "be tokenised by the teacher as it was by the rollout",
                f"{len(own)} tokens {own[:8]}... and {len(student)} tokens {student[:8]}...",
                "give both the same data.apply_chat_template_kwargs; set "
                "distillation.check_prompts=False for an agent loop that writes its own prompts",
            )


def _offering(tokenizer: PromptTokenizer, tools: Sequence[Any] | None) -> PromptTokenizer:
    """Return a tokenizer that lists other tools."""
    settings = {**tokenizer.chat_settings, "tools": tools}
    return dataclasses.replace(tokenizer, chat_settings=settings)


def _check_own_messages(rollout: OutputRollout, tokenizer: PromptTokenizer) -> None:
    """Refuse messages that are not those of the output's prompt: its turns would be lost."""
    written, own = tokenizer.chat(rollout.prompt), rollout.prompt_ids
    if written != own:
        fail(
            f"extra_fields[{OWN_MESSAGES!r}] of an agent loop's output",
            "hold the messages that the output's prompt was written from",
            f"{len(written)} tokens {written[:8]}... for {len(own)} tokens {own[:8]}...",
            "leave it out where the prompt goes on with the session's first one",
        )


def num_turn_tokens(rollout: OutputRollout) -> int:
    """Return by how many tokens an output's prompt is longer than the conversation's first one."""
    return max(0, len(rollout.prompt_ids) - len(rollout.first_prompt_ids))
