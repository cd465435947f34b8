"""A tokenizer with one token for each character."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"


def character_tokenizer(symbols: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer for these symbols; padding is token 0, the end token 1."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *symbols])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    whole.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
