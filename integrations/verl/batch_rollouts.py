"""Reads the rollouts of a training step from verl's batch, to write the teacher's prompts.

Dimension key:  B samples
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict

from fused_sd.checks import fail
from fused_sd.integrations.shared.returned import texts as checked_texts
from fused_sd.integrations.shared.rollouts import Rollout, Sibling
from fused_sd.integrations.shared.thinking import Tags, answer_text

FIELDS = ("uid", "raw_prompt", "prompts", "responses", "response_mask", "rm_scores", "extra_fields")
"""The columns of verl's batch that ``read_rollouts`` reads."""


def read_rollouts(
    data: TensorDict,
    keys: Sequence[str],
    tokenizer: Any,
    *,
    reference_key: str | None,
    feedback_key: str | None,
    thinking_tags: Tags | None = None,
    needs_verdicts: bool = False,
) -> list[Rollout | None]:
    """Return each sample as a rollout, together with its group: the responses to its prompt.

    A reward of NaN is no verdict: verl's rewards are numbers, and None is not among them.

    Args:
        data: ``FIELDS``, and the column that ``reference_key`` begins with.
        keys: verl's key of each sample, ``{uid}_{session}_{output}``.  A session is one of the
            ``rollout.n`` generations; an agent loop may write several outputs in one session.
        tokenizer: decodes responses.
        reference_key: dotted path of the reference in a dataset row.
        feedback_key: key of the feedback in ``reward_extra_info``.
        thinking_tags: the opening and the closing tag of thoughts; None: the known pairs.
        needs_verdicts: whether the loss reads verl's advantages, which one NaN makes NaN in its
            whole group.

    Returns:
        B rollouts; None for a later output of a session, whose prompt is not the dataset's.

    Raises:
        ValueError: reference_key begins with a column that the batch does not have, or leads to
            no row's value; a reward is infinite, or a needed verdict missing; or feedback is of
            another kind than text, a number or chat messages.
    """
    responses = data["responses"].unbind()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    prompts = [ids.tolist() for ids in data["prompts"].unbind()]
    answers = [
        answer_text(tokenizer, text, prompt, response.tolist(), thinking_tags)
        for text, prompt, response in zip(texts, prompts, responses)
    ]
    rewards = [float(scores.sum()) for scores in data["rm_scores"].unbind()]
    _check_rewards(keys, rewards, needs_verdicts)
    sessions, outputs = zip(*(map(int, key.rsplit("_", 2)[1:]) for key in keys))
    known = list(zip(texts, rewards, answers))
    groups = _groups(list(data["uid"]), sessions, outputs, known)
    extras = list(data["extra_fields"])
    references = [None] * len(keys) if reference_key is None else _column(data, reference_key)
    feedback: list[str | None] = [None] * len(keys)
    if feedback_key is not None:
        said = [(extra or {}).get("reward_extra_info", {}).get(feedback_key) for extra in extras]
        feedback = checked_texts(f"the reward function's {feedback_key!r}", said, len(keys))
    rollouts: list[Rollout | None] = []
    for n, (uid, raw_prompt) in enumerate(zip(data["uid"], data["raw_prompt"])):
        rollout = Rollout(
            prompt=list(raw_prompt),
            prompt_ids=prompts[n],
            completion_ids=responses[n].tolist(),
            text=texts[n],
            reward=rewards[n],
            privileged=references[n],
            feedback=feedback[n],
            index=sessions[n],
            group=groups[uid],
            answer=answers[n],
            hint_name=reference_key or "reference",
        )
        rollouts.append(rollout if outputs[n] == 0 else None)
    return rollouts


def _check_rewards(keys: Sequence[str], rewards: Sequence[float], needs_verdicts: bool) -> None:
    """Refuse rewards that a trainer cannot learn from."""
    rule = "return finite numbers" if needs_verdicts else "return finite numbers, or NaN"
    for key, reward in zip(keys, rewards):
        if math.isinf(reward) or (needs_verdicts and math.isnan(reward)):
            remedy = "bound it, and leave out questions without a verdict"
            fail("the reward function", rule, f"{reward} for sample {key}", remedy)


def _groups(
    uids: Sequence[str],
    sessions: Sequence[int],
    outputs: Sequence[int],
    said: Sequence[tuple[str, float, str]],
) -> dict[str, list[Sibling]]:
    """Return each prompt's sessions in their order, each by its last output.

    verl's GRPO takes the last output for the session, too.

    Args:
        said: the text, the reward and the answer of each sample.
    """
    last: dict[str, dict[int, int]] = defaultdict(dict)
    for n in sorted(range(len(uids)), key=outputs.__getitem__):
        last[uids[n]][sessions[n]] = n
    return {
        uid: [Sibling(session, *said[n]) for session, n in sorted(found.items())]
        for uid, found in last.items()
    }


def _column(data: TensorDict, path: str) -> list[Any]:
    """Return each row's value at a dotted path; None for a row that has none.

    A path that leads nowhere in all rows is a wrong one: nothing would be taught, in silence.
    """
    name, *inner = path.split(".")
    if name not in data.keys():  # noqa: SIM118  a TensorDict iterates over rows
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
