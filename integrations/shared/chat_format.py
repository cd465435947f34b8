"""The chat format that a model was trained in: arguments of its chat template, such as
``{"enable_thinking": False}``.

SD-Zero's two phases must write prompts alike.  The first records its arguments with the tokenizer,
whose ``save_pretrained`` writes them into ``tokenizer_config.json``; the second reads them there.
"""

from collections.abc import Mapping
from typing import Any

from fused_sd.checks import fail

KEY = "chat_template_kwargs"


def record_chat_format(processing_class: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
    """Remember the chat template's arguments in a tokenizer, or in a processor's tokenizer."""
    _settings(processing_class)[KEY] = dict(chat_template_kwargs)


def recorded_chat_format(processing_class: Any) -> dict[str, Any] | None:
    """Return the chat template's arguments that were recorded; None where none were."""
    found = _settings(processing_class).get(KEY)
    return None if found is None else dict(found)


def check_chat_format(processing_class: Any, used: Mapping[str, Any]) -> None:
    """Refuse arguments of the chat template that differ from the recorded ones.

    Raises:
        ValueError: a record is there, and says something else than ``used``.
    """
    recorded = recorded_chat_format(processing_class)
    if recorded is not None and recorded != dict(used):
        fail(
            KEY,
            f"be those that the model was trained with, {recorded!r}",
            repr(dict(used)),
            f"pass these, or delete {KEY!r} in the model's tokenizer_config.json",
        )


def _settings(processing_class: Any) -> dict[str, Any]:
    """Return the arguments of a tokenizer's constructor, all of which it saves."""
    settings: dict[str, Any] = getattr(processing_class, "tokenizer", processing_class).init_kwargs
    return settings
