"""Tokenizers with one token for each word of a small vocabulary."""

import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"


def word_pattern(words: Sequence[str]) -> str:
    """Return the pattern that splits a text into words, longer words first, and characters."""
    longer = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
    return "|".join([*map(re.escape, longer), r"[\s\S]"])


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer for these words; padding is token 0, the end token 1.

    A text is split without spaces between its words.  Whatever is no word is an error of
    the tokenizer: a teacher must not read what the text never had.
    """
    vocabulary = {token: index for index, token in enumerate([PAD, END, *words])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<none>"))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex(word_pattern(words)), "isolated")
    whole.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def character_tokenizer(symbols: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of these characters."""
    return word_tokenizer(symbols)
