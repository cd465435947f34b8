"""The size of a model's output head, by the model's name, configuration or given sizes."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from fused_sd import checks

HUB_SECONDS = 5.0  # that the hub may take to answer at all


class HeadSize(NamedTuple):
    """The size of an output head, whose weight is (vocab, hidden_size)."""

    hidden_size: int
    vocab: int


# from the models' own config.json
MODELS: dict[str, HeadSize] = {
    "HuggingFaceTB/SmolLM2-135M": HeadSize(576, 49152),
    "HuggingFaceTB/SmolLM3-3B": HeadSize(2048, 128256),
    "Qwen/Qwen3-0.6B": HeadSize(1024, 151936),
    "Qwen/Qwen3-1.7B": HeadSize(2048, 151936),
    "Qwen/Qwen3-4B": HeadSize(2560, 151936),
    "Qwen/Qwen3-8B": HeadSize(4096, 151936),
    "Qwen/Qwen3-32B": HeadSize(5120, 151936),
    "Qwen/Qwen3-30B-A3B": HeadSize(2048, 151936),
    "Qwen/Qwen3-235B-A22B": HeadSize(4096, 151936),
    "Qwen/Qwen3.5-0.8B": HeadSize(1024, 248320),
    "Qwen/Qwen3.5-27B": HeadSize(5120, 248320),
    "Qwen/Qwen3.5-35B-A3B": HeadSize(2048, 248320),
    "allenai/Olmo-3-7B": HeadSize(4096, 100278),
    "meta-llama/Llama-3.2-1B": HeadSize(2048, 128256),
    "meta-llama/Llama-3.2-3B": HeadSize(3072, 128256),
    "meta-llama/Llama-3.1-8B": HeadSize(4096, 128256),
    "meta-llama/Llama-3.1-70B": HeadSize(8192, 128256),
    "meta-llama/Llama-3.3-70B": HeadSize(8192, 128256),
    "google/gemma-3-4b": HeadSize(2560, 262208),
    "google/gemma-3-12b": HeadSize(3840, 262208),
}
# endings that are removed from a name before it is looked up: a fine-tune has its base's head
_SUFFIXES = ("-instruct", "-base", "-it", "-pt", "-thinking", "-think", "-2507", "-hf")


def head_size(
    model: str | PathLike[str] | Mapping[str, Any] | object | None,
    hidden_size: int | None = None,
    vocab: int | None = None,
    argument: str = "model",
) -> HeadSize:
    """Return the size of the head that the arguments name.

    Args:
        model: a name of ``MODELS`` (with or without its owner, in any case), a path to a
            ``config.json`` or to the folder that holds one, any model that transformers finds in
            its cache or on the hub, a transformers configuration, or its dict; None: the sizes are
            given.
        hidden_size, vocab: the sizes, instead of a model.
        argument: how the caller calls the model.

    Raises:
        ValueError: the model is unknown, or comes with a size, or nothing is given.
    """
    if model is None:
        if hidden_size is None or vocab is None:
            checks.fail(
                argument,
                "be given, or hidden_size and vocab both",
                f"hidden_size={hidden_size}, vocab={vocab}",
                "pass a name, a config.json, a configuration, or both sizes",
            )
        assert hidden_size is not None
        assert vocab is not None
        return _checked(hidden_size, vocab)
    if hidden_size is not None or vocab is not None:
        checks.fail(
            argument,
            "come without hidden_size and vocab, which it sets",
            repr(model),
            "leave out one or the other",
        )
    if isinstance(model, str | PathLike):
        return _by_text(argument, str(model))
    return _by_config(argument, model)


def _by_text(argument: str, text: str) -> HeadSize:
    """The size of a known model, or of the configuration at a path."""
    name = text.rstrip("/").rpartition("/")[2].lower()
    stripped = _strip(name)
    for known, size in MODELS.items():
        if stripped == _strip(known.rpartition("/")[2].lower()):
            return size
    path = Path(text, "config.json") if os.path.isdir(text) else Path(text)
    config: object = None
    if os.path.isfile(path):  # which is no error where a text can be no path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            checks.fail(
                argument,
                "be a readable config.json",
                f"{text!r} ({error})",
                "check the name, or pass hidden_size and vocab",
            )
        if None not in _sizes(config):
            return _by_config(argument, config)
    # what a config.json leaves out has a default in transformers
    return _by_config(argument, _by_transformers(argument, text))


def _by_transformers(argument: str, text: str) -> object:
    """The configuration that transformers has of a model: in its cache, or on the hub."""
    why = "transformers is not installed"
    if find_spec("transformers") is not None:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(text, local_files_only=True)
        except Exception as error:
            why = f"transformers: {_first_line(error)}"
        if not os.path.exists(text):
            why = _why_no_hub(text)
            if not why:
                try:
                    return AutoConfig.from_pretrained(text)
                except Exception as error:  # no such model, no access, code of its own
                    why = f"the hub: {_first_line(error)}"
    checks.fail(
        argument,
        "be a config.json, a model in transformers' cache or on the hub, or one that --help lists",
        f"{text!r} ({why})",
        "check the name, or pass hidden_size and vocab",
    )


def _why_no_hub(text: str) -> str:
    """Why the hub cannot be asked for a model; "": it can.

    One request finds out, because transformers repeats its own for half a minute.
    """
    from huggingface_hub import get_session, hf_hub_url

    try:
        get_session().head(hf_hub_url(text, "config.json"), timeout=HUB_SECONDS)
    except Exception as error:
        return f"not in the cache, and no hub: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _strip(name: str) -> str:
    """A model's name without the endings of fine-tunes; Llama 3 is named like 3.1."""
    name = name.replace("meta-", "").replace("llama-3-", "llama-3.1-").replace("-1025", "")
    while True:
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        if not name.endswith(_SUFFIXES):
            return name


def _by_config(argument: str, config: object) -> HeadSize:
    """The size in a configuration, or in the text model's inside a multimodal one."""
    found = _sizes(config)
    if None in found:
        checks.fail(
            argument,
            "be a configuration with hidden_size and vocab_size",
            type(config).__name__,
            "pass hidden_size and vocab themselves",
        )
    return _checked(*found)


def _sizes(config: object) -> list[Any]:
    inner = _entry(config, "text_config")
    return [_entry(inner or config, name) for name in ("hidden_size", "vocab_size")]


def _entry(config: object, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _checked(hidden_size: Any, vocab: Any) -> HeadSize:
    for name, value in (("hidden_size", hidden_size), ("vocab", vocab)):
        checks.check_positive_int(name, value)
    return HeadSize(hidden_size, vocab)
