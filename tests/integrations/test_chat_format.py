"""The chat format that a tokenizer remembers."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from types import SimpleNamespace

from chatml import chatml_tokenizer
from transformers import AutoTokenizer

from fused_sd.integrations.shared.chat_format import (
    check_chat_format,
    record_chat_format,
    recorded_chat_format,
)

NO_THOUGHT = {"enable_thinking": False}


def test_a_saved_tokenizer_remembers_the_arguments_of_its_chat_template(tmp_path):
    tokenizer = chatml_tokenizer()
    assert recorded_chat_format(tokenizer) is None
    check_chat_format(tokenizer, NO_THOUGHT)  # nothing is known
    record_chat_format(tokenizer, NO_THOUGHT)
    for folder in (tmp_path / "first", tmp_path / "second"):
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert recorded_chat_format(tokenizer) == NO_THOUGHT
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n"  # the record changes no template


def test_a_processor_remembers_by_its_tokenizer():
    processor = SimpleNamespace(tokenizer=chatml_tokenizer())
    record_chat_format(processor, {})
    assert recorded_chat_format(processor) == recorded_chat_format(processor.tokenizer) == {}


def test_other_arguments_than_the_recorded_are_refused():
    tokenizer = chatml_tokenizer()
    record_chat_format(tokenizer, NO_THOUGHT)
    check_chat_format(tokenizer, NO_THOUGHT)
    for other in ({}, {"enable_thinking": True}):
        with pytest.raises(ValueError, match=r"trained with, \{'enable_thinking': False\}, got"):
            check_chat_format(tokenizer, other)
