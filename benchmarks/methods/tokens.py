"""A tokenizer whose tokens are characters."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<end>"


def character_tokenizer(symbols: str) -> PreTrainedTokenizerFast:
    """One token for each symbol; padding and end come first."""
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
