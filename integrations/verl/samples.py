"""What verl's batch knows of each sample when the teacher's prompts are written.

Dimension key:  B samples
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict

from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout, Sibling
from fused_sd.integrations.verl.privileged import rows_of

FIELDS = ("uid", "raw_prompt", "prompts", "responses", "response_mask", "rm_scores", "extra_fields")


def rollouts_of(
    data: TensorDict,
    keys: Sequence[str],
    tokenizer: Any,
    *,
    reference_key: str | None,
    feedback_key: str | None,
) -> list[Rollout | None]:
    """Each sample with its group, the responses to the same prompt.

    Args:
        data: ``FIELDS``, and what ``reference_key`` begins with.
        keys: verl's, ``{uid}_{session}_{output}``.
        tokenizer: decodes responses.
        reference_key: path of the reference in a row.
        feedback_key: of the feedback in ``reward_extra_info``.

    Returns:
        None for samples that continue another one of their session: their prompt is not the
        dataset's.

    Raises:
        ValueError: a path leads nowhere.
    """
    responses = rows_of(data["responses"])
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    rewards = [float(scores.sum()) for scores in rows_of(data["rm_scores"])]
    places = [key.rsplit("_", 2)[1:] for key in keys]
    sessions, groups = _groups(list(data["uid"]), places, texts, rewards)
    extras, prompts = list(data["extra_fields"]), rows_of(data["prompts"])
    references = [None] * len(keys) if reference_key is None else _column(data, reference_key)
    rollouts: list[Rollout | None] = []
    for n, (uid, raw_prompt) in enumerate(zip(data["uid"], data["raw_prompt"])):
        feedback = None
        if feedback_key is not None:
            feedback = (extras[n] or {}).get("reward_extra_info", {}).get(feedback_key)
        rollout = Rollout(
            prompt=list(raw_prompt),
            prompt_ids=prompts[n].tolist(),
            completion_ids=responses[n].tolist(),
            text=texts[n],
            reward=rewards[n],
            privileged=None if references[n] is None else str(references[n]),
            feedback=feedback,
            index=sessions[n],
            group=groups[uid],
        )
        rollouts.append(rollout if int(places[n][1]) == 0 else None)
    return rollouts


def _groups(
    uids: list[str], places: list[list[str]], texts: list[str], rewards: list[float]
) -> tuple[list[int], dict[str, list[Sibling]]]:
    """Each sample's session, and each prompt's sessions by their last outputs, in their order."""
    last: dict[str, dict[int, int]] = defaultdict(dict)
    sessions = [int(session) for session, _ in places]
    for n, uid in enumerate(uids):
        before = last[uid].get(sessions[n])
        if before is None or int(places[before][1]) < int(places[n][1]):
            last[uid][sessions[n]] = n
    return sessions, {
        uid: [Sibling(session, texts[n], rewards[n]) for session, n in sorted(found.items())]
        for uid, found in last.items()
    }


def _column(data: TensorDict, path: str) -> list[Any]:
    """The value of each row at a dotted path; None where the row has none."""
    name, *inner = path.split(".")
    if name not in data.keys():  # noqa: SIM118  a TensorDict iterates over rows
        known = ", ".join(sorted(data.keys()))
        fail("distillation.reference_key", "begin with a column", path, f"the batch has {known}")
    values = list(data[name])
    for key in inner:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return values
