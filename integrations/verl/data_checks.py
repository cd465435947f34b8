"""Checks of what a run reads: the dataset's reference and the reward function's feedback.

A wrong name of either would leave the teacher without its context, in silence.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig

_logger = logging.getLogger(__name__)


def check_reference(dataset: Any, reference_key: str | None) -> None:
    """Refuse a reference that is not in the first row of verl's dataset.

    A dataset without verl's ``dataframe`` is checked in the first batch.
    """
    rows = getattr(dataset, "dataframe", None)
    if reference_key is None or rows is None or not len(rows):
        return
    value: Any = rows[0]
    for name in reference_key.split("."):
        if not isinstance(value, Mapping):
            return
        if name not in value:
            known = ", ".join(map(str, value))
            fail(
                "distillation.reference_key", "lead to a value", reference_key, f"a row has {known}"
            )
        value = value[name]


def check_feedback(answers: Sequence[Mapping[str, Any] | None], key: str | None) -> None:
    """Check that the reward function's answers to a run's first batch hold the feedback's key.

    The default key may be missing, as in a run without feedback, with a warning; one that the
    user named may not.

    Args:
        answers: verl's ``extra_fields`` of each sample.

    Raises:
        ValueError: none has the key.
    """
    said = [(answer or {}).get("reward_extra_info") or {} for answer in answers]
    if key is None or any(key in one for one in said):
        return
    known = ", ".join(sorted({str(name) for one in said for name in one})) or "nothing"
    if key != SelfDistillationConfig.feedback_key:
        remedy = "return it for every sample, as an empty text where there is nothing to say"
        got = f"{key!r}, and the function returns {known}"
        fail("distillation.feedback_key", "be in the reward function's result", got, remedy)
    _logger.warning(
        "no sample has feedback: distillation.feedback_key is %r, and the reward function returns "
        "%s; set distillation.feedback_key=null if there is none",
        key,
        known,
    )
