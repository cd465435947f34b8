"""Phrases that SD-Zero writes after a response, once it is known whether the response was right.

They are those of the official code (arXiv 2604.12002).  A phrase stands between two delimiters.
"""

from transformers import PreTrainedTokenizerBase

DELIMITER = "\n\n"
CORRECT_PHRASE = "Let me rephrase the above solution."
WRONG_PHRASE = "Wait, this response is wrong. Let me correct it."  # for Qwen models
# Alternatives to pass as ``wrong_phrase``: the official code's for OLMo models, and the paper's.
OLMO_WRONG_PHRASE = "Wrong. I need to redo all."
PAPER_WRONG_PHRASE = "Wait, this response is not correct, let me start over."


def verdict_ids(tokenizer: PreTrainedTokenizerBase, phrase: str) -> list[int]:
    """Return the tokens of a phrase and its delimiters.

    Both phases use them: the teacher of the second reads what the first has trained on.
    """
    text = f"{DELIMITER}{phrase}{DELIMITER}"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
