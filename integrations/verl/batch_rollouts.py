"""Reads the rollouts of a training step from verl's batch, to write the teacher's prompts.

verl calls each of a prompt's ``rollout.n`` generations a session.  An agent loop may return several
outputs of a session, each a prompt and a response: one for each call of the model, say, or a new
one whenever it shortens the history.  Each output is a sample of the batch, and verl copies the
reward of the last one to all.

Dimension key:  B samples
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict

from fused_sd.checks import fail
from fused_sd.integrations.shared.returned import texts as checked_texts
from fused_sd.integrations.shared.rollouts import Rollout, Sibling
from fused_sd.integrations.shared.thinking import Tags, answer_text

FIELDS = (
    "uid",
    "raw_prompt",
    "prompts",
    "responses",
    "response_mask",
    "rm_scores",
    "extra_fields",
    "extra_info",
)
"""The columns of verl's batch that ``read_rollouts`` reads; a dataset may lack ``extra_info``."""

OWN_MESSAGES = "raw_prompt"
"""Key of ``AgentLoopOutput.extra_fields``: the messages that the output's prompt was written from.

Such an output begins a conversation of its own.
"""


@dataclass(frozen=True)
class OutputRollout(Rollout):
    """One output of a session.

    ``text``, ``answer``, ``reward`` and ``feedback`` are the session's: what it said from the
    question on to the end of its last output, and what was said of that.

    Attributes:
        first_prompt_ids: the prompt with which the output's conversation began, which ``prompt``
            holds as messages: that of the session's first output.
        question_length: number of its tokens up to the end of the question; the rest ends the turn
            and is the generation header.
        has_own_messages: whether the agent loop has told the messages of the output's own prompt,
            with which its conversation then began.
        tool_selection: names of the tools that the row offers; None: all.
    """

    first_prompt_ids: Sequence[int] = ()
    question_length: int = 0
    has_own_messages: bool = False
    tool_selection: Sequence[str] | None = None


def read_rollouts(
    data: TensorDict,
    keys: Sequence[str],
    tokenizer: Any,
    *,
    reference_key: str | None,
    feedback_key: str | None,
    thinking_tags: Tags | None = None,
    needs_verdicts: bool = False,
    chat: Callable[[Any], list[int]] | None = None,
) -> list[OutputRollout]:
    """Return each sample as a rollout, together with its group: the sessions of its prompt.

    A reward of NaN is no verdict: verl's rewards are numbers, and None is not among them.

    Args:
        data: ``FIELDS``, and the column that ``reference_key`` begins with.
        keys: verl's key of each sample, ``{uid}_{session}_{output}``.
        tokenizer: decodes responses.
        reference_key: dotted path of the reference in a dataset row.
        feedback_key: key of the feedback in ``reward_extra_info``.
        thinking_tags: the opening and the closing tag of thoughts; None: the known pairs.
        needs_verdicts: whether the loss reads verl's advantages, which one NaN makes NaN in its
            whole group.
        chat: returns the tokens of messages.  With it a later output's prompt may differ from the
            first in the generation header, as after a chat template has rendered it anew; without
            it such an output has another conversation.

    Returns:
        B rollouts.

    Raises:
        ValueError: reference_key begins with a column that the batch does not have, or leads to
            no row's value; a reward is infinite, or a needed verdict missing; or feedback is of
            another kind than text, a number or chat messages.
    """
    prompts = [ids.tolist() for ids in data["prompts"].unbind()]
    responses = [ids.tolist() for ids in data["responses"].unbind()]
    rewards = [float(scores.sum()) for scores in data["rm_scores"].unbind()]
    _check_rewards(keys, rewards, needs_verdicts)
    extras = [dict(extra or {}) for extra in data["extra_fields"]]
    references = [None] * len(keys) if reference_key is None else _column(data, reference_key)
    feedback: list[str | None] = [None] * len(keys)
    if feedback_key is not None:
        said = [extra.get("reward_extra_info", {}).get(feedback_key) for extra in extras]
        feedback = checked_texts(f"the reward function's {feedback_key!r}", said, len(keys))
    sessions = _sessions(keys)
    raw_prompts, uids = list(data["raw_prompt"]), list(data["uid"])
    has_later = chat is not None and len(sessions) < len(keys)
    closing = _closing(chat, raw_prompts[0]) if chat is not None and has_later else []
    groups: dict[str, list[Sibling]] = defaultdict(list)
    of_session: dict[str, Sibling] = {}
    for session, rows in sorted(sessions.items(), key=lambda one: _index(one[0])):
        first, last = prompts[rows[0]], rows[-1]
        before, said_ids = _attempt(first, prompts[last], responses[last], closing)
        text = tokenizer.decode(said_ids, skip_special_tokens=True)
        answer = answer_text(tokenizer, text, before, said_ids, thinking_tags)
        of_session[session] = Sibling(_index(session), text, rewards[last], answer)
        groups[uids[last]].append(of_session[session])
    infos = list(data["extra_info"]) if _has(data, "extra_info") else [{}] * len(keys)
    rollouts = []
    for n, key in enumerate(keys):
        session = _session(key)
        rows = sessions[session]
        has_own_messages = OWN_MESSAGES in extras[n]
        start = n if has_own_messages else rows[0]  # where the conversation began
        own = of_session[session]
        rollouts.append(
            OutputRollout(
                prompt=list(extras[start].get(OWN_MESSAGES, raw_prompts[n])),
                prompt_ids=prompts[n],
                completion_ids=responses[n],
                text=own.text,
                reward=own.reward,
                privileged=references[n],
                feedback=feedback[rows[-1]],
                index=own.index,
                group=groups[uids[n]],
                answer=own.answer,
                hint_name=reference_key or "reference",
                first_prompt_ids=prompts[start],
                question_length=_question_length(prompts[start], closing),
                has_own_messages=has_own_messages,
                tool_selection=dict(infos[n] or {}).get("tool_selection"),
            )
        )
    return rollouts


def num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return with how many equal tokens two sequences begin."""
    pairs = zip(ids, others)
    return next(
        (n for n, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others))
    )


def asks_the_same(prompt: Sequence[int], first: Sequence[int], question_length: int) -> bool:
    """Return whether a prompt begins with the question of a first one, and its turn ends there."""
    end = min(question_length + 1, len(first))
    return prompt[:end] == first[:end]


def _closing(chat: Callable[[Any], list[int]], prompt: Any) -> list[int]:
    """Return what a chat template writes behind a question: the turn's end, the next one's header.

    It is what two prompts end with alike that differ in the question.

    Args:
        prompt: messages of the dataset.  Some templates want a turn's content as a list of parts.
    """
    is_text = isinstance(prompt[-1]["content"], str)
    contents = [said if is_text else [{"type": "text", "text": said}] for said in ("1", "2")]
    one, other = (chat([{"role": "user", "content": content}]) for content in contents)
    return one[len(one) - num_shared(one[::-1], other[::-1]) :]


def _question_length(prompt: Sequence[int], closing: Sequence[int]) -> int:
    return len(prompt) - num_shared(prompt[::-1], closing[::-1])


def _attempt(
    first: list[int], prompt: list[int], response: list[int], closing: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return what a session read before it spoke, and all that followed.

    The last output's prompt tells it: the turns behind the question, results of tools included.
    Where that prompt does not begin with the question, its response alone is left.

    Args:
        first: the prompt of the session's first output.
        prompt, response: of its last one.
        closing: what the chat template writes behind a question.
    """
    if not asks_the_same(prompt, first, _question_length(first, closing)):
        return prompt, response
    start = num_shared(first, prompt)
    return prompt[:start], prompt[start:] + response


def _sessions(keys: Sequence[str]) -> dict[str, list[int]]:
    """Return the samples of each session, in the order of its outputs."""
    found: dict[str, list[int]] = defaultdict(list)
    for n in sorted(range(len(keys)), key=lambda n: _index(keys[n])):
        found[_session(keys[n])].append(n)
    return found


def _session(key: str) -> str:
    return key.rpartition("_")[0]


def _index(key: str) -> int:
    return int(key.rpartition("_")[2])


def _has(data: TensorDict, name: str) -> bool:
    return name in data.keys()  # noqa: SIM118  a TensorDict iterates over rows


def _check_rewards(keys: Sequence[str], rewards: Sequence[float], needs_verdicts: bool) -> None:
    """Refuse rewards that a trainer cannot learn from."""
    rule = "return finite numbers" if needs_verdicts else "return finite numbers, or NaN"
    for key, reward in zip(keys, rewards):
        if math.isinf(reward) or (needs_verdicts and math.isnan(reward)):
            remedy = "bound it, and leave out questions without a verdict"
            fail("the reward function", rule, f"{reward} for sample {key}", remedy)


def _column(data: TensorDict, path: str) -> list[Any]:
    """Return each row's value at a dotted path; None for a row that has none.

    A path that leads nowhere in all rows is a wrong one: nothing would be taught, in silence.
    """
    name, *inner = path.split(".")
    if not _has(data, name):
        known = ", ".join(sorted(data.keys()))
        fail("distillation.reference_key", "begin with a column", path, f"the batch has {known}")
    values = list(data[name])
    for key in inner:
        names = {str(one) for value in values if isinstance(value, Mapping) for one in value}
        if key not in names and any(value is not None for value in values):
            got = f"{path}, where {key!r} is not among {', '.join(sorted(names)) or 'any keys'}"
            fail("distillation.reference_key", "lead to a value", got, "name one of them")
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return values
