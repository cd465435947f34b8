"""What SD-Zero writes after a response, once it knows whether it was right.

Phrases are those of the official code (arXiv 2604.12002) for Qwen models.
"""

DELIMITER = "\n\n"  # before the phrase and after it
CORRECT_PHRASE = "Let me rephrase the above solution."
WRONG_PHRASE = "Wait, this response is wrong. Let me correct it."
OLMO_WRONG_PHRASE = "Wrong. I need to redo all."
PAPER_WRONG_PHRASE = "Wait, this response is not correct, let me start over."
