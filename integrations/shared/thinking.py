"""What a completion says once its thoughts are left out.

Models write their thoughts between two tags.  Many chat templates put the opening tag into the
generation header, so that a completion holds the closing tag alone, and none where it was cut.
"""

import re
from collections.abc import Sequence
from typing import Any

from fused_sd.checks import fail

Tags = Sequence[str]  # an opening tag and its closing tag

KNOWN_TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Olmo, Nemotron, Phi, LFM and most others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),  # Reka Flash
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<longcat_think>", "</longcat_think>"),
    ("◁think▷", "◁/think▷"),  # Kimi-VL, Kimi-Dev
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    # Of gpt-oss and Muse.  What comes before the answer's own header, calls of tools too, is none.
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    (" to=self<|message|>", " to=user<|message|>"),
)
_HEADER_TOKENS = 32  # enough of a prompt's end to hold an opening tag


def check_thinking_tags(tags: Tags | None, *, are_read: bool) -> None:
    """Refuse tags that are no pair, or that nothing reads; None stands for the known pairs."""
    if tags is None:
        return
    if not are_read:
        remedy = "set remove_thinking_from_demonstration, or leave the tags out"
        fail("thinking_tags", "be None where thoughts are shown", repr(tags), remedy)
    given = [] if isinstance(tags, str) else list(tags)
    if len(given) != 2 or not all(isinstance(tag, str) and tag for tag in given):
        remedy = 'pass both, such as ["<think>", "</think>"], or None for the known pairs'
        fail("thinking_tags", "hold an opening tag and a closing tag", repr(tags), remedy)
    if given[0] == given[1]:
        remedy = "pass the two tags of the model's chat template"
        fail("thinking_tags", "hold two different tags", repr(tags), remedy)


def without_thinking(text: str, tags: Tags | None = None, *, opened_by: str | None = None) -> str:
    """Return a text without its thoughts and the white space behind them.

    A closing tag without an opening one ends thoughts that began before the text.  A text that ends
    in the midst of thoughts has no answer: the result is empty.

    Args:
        tags: the opening and the closing tag; None: each pair of ``KNOWN_TAGS``.
        opened_by: the opening tag that the prompt ends with; None: the prompt opened no thoughts.
    """
    closing_of = dict(_pairs(tags))
    every = [*closing_of, *closing_of.values()]
    kept, start = "", 0
    awaited = None if opened_by is None else closing_of[opened_by]  # what ends the thoughts
    for found in re.finditer("|".join(map(re.escape, every)), text):
        tag = found[0]
        if awaited is None and tag in closing_of:
            kept, awaited = kept + text[start : found.start()], closing_of[tag]
        elif awaited is None or tag == awaited:
            kept, start = kept if awaited else "", _behind_space(text, found.end())
            awaited = None
    return kept + text[start:] if awaited is None else ""


def answer_text(
    tokenizer: Any,
    text: str,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    tags: Tags | None = None,
) -> str:
    """Return what a completion says behind its thoughts; empty where these were cut off.

    Args:
        tokenizer: a tokenizer of transformers.
        text: the completion without special tokens.
        prompt_ids: its prompt, whose end tells whether thoughts began there.
        completion_ids: the completion's tokens.  The tags of some models are special tokens, which
            ``text`` does not show.
        tags: as in ``without_thinking``.
    """
    pairs = _pairs(tags)
    header = tokenizer.decode(list(prompt_ids)[-_HEADER_TOKENS:], skip_special_tokens=False)
    begun = [opening for opening, _ in pairs if header.rstrip().endswith(opening.rstrip())]
    every = [tag for pair in pairs for tag in pair]
    whole = tokenizer.decode(list(completion_ids), skip_special_tokens=False)
    special: set[str] = set()
    if any(whole.count(tag) > text.count(tag) for tag in every):
        text, special = _with_tags(tokenizer, completion_ids, every)
    answer = without_thinking(text, tags, opened_by=begun[0] if begun else None)
    for piece in special:
        answer = answer.replace(piece, "")
    return answer


def _pairs(tags: Tags | None) -> Sequence[tuple[str, str]]:
    return KNOWN_TAGS if tags is None else [(tags[0], tags[1])]


def _behind_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _with_tags(tokenizer: Any, ids: Sequence[int], tags: Sequence[str]) -> tuple[str, set[str]]:
    """Decode without special tokens but those that tags are made of, and return these as well."""
    shown: dict[int, str] = {}
    for token in set(ids):
        piece = tokenizer.decode([token], skip_special_tokens=False)
        is_special = bool(piece) and not tokenizer.decode([token], skip_special_tokens=True)
        if is_special and any(piece in tag for tag in tags):
            shown[token] = piece
    pieces: list[str] = []
    run: list[int] = []
    for token in ids:
        if token in shown:
            pieces += [tokenizer.decode(run, skip_special_tokens=True), shown[token]]
            run = []
        else:
            run.append(token)
    pieces.append(tokenizer.decode(run, skip_special_tokens=True))
    return "".join(pieces), set(shown.values())
