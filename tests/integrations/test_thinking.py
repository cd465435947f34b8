"""What is left of a completion without its thoughts."""

import pytest

pytest.importorskip("transformers")

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from fused_sd.integrations.shared.thinking import (
    KNOWN_TAGS,
    answer_text,
    check_thinking_tags,
    without_thinking,
)

OPENINGS = [pair[0] for pair in KNOWN_TAGS]


def tokenizer(*special, plain=()):
    """One of characters, and of tags that decoding may or may not leave out."""
    characters = [chr(code) for code in (10, *range(32, 127))] + list("◁▷")
    inner = Tokenizer(models.WordLevel({c: n for n, c in enumerate(["<pad>", *characters])}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return made


def answer(made, completion, *, prompt="User: 2 + 2?\nAssistant: ", tags=None):
    ids = [made(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
    text = made.decode(ids[1], skip_special_tokens=True)
    return answer_text(made, text, *ids, tags)


@pytest.mark.parametrize("opening, closing", KNOWN_TAGS, ids=OPENINGS)
@pytest.mark.parametrize("are_special", [False, True], ids=["plain", "special"])
def test_thoughts_of_every_known_kind_are_left_out(opening, closing, are_special):
    is_header = opening.endswith("<|message|>")  # whose words are no special tokens
    own = (
        ["<|channel|>", "<|message|>"] if is_header else [opening.removesuffix("thought"), closing]
    )
    made = tokenizer(*own) if are_special else tokenizer(plain=own)
    assert answer(made, f"{opening}\nsecret\n{closing}\n\nIt is 4.<end>") == "It is 4."
    opened = f"User: 2 + 2?\nAssistant: {opening}\n"
    assert answer(made, f"secret\n{closing}\n\nIt is 4.", prompt=opened) == "It is 4."
    assert answer(made, f"secret\n{closing}\n\nIt is 4.") == "It is 4."
    assert answer(made, f"{opening}\nsecret, cut") == ""
    assert answer(made, "secret, cut", prompt=opened) == ""
    assert answer(made, "It is 4.", prompt=f"{opened}\n{closing}\n\n") == "It is 4."
    assert answer(made, "It is 4.") == "It is 4."


@pytest.mark.parametrize(
    "text, left",
    [
        ("<think>a</think> b <think>c</think> d", "b d"),
        ("It is <think>so</think>4.", "It is 4."),
        ("a <think>b</think> c</think> 4", "4"),
        ("a <think>b</think> c </think> d", "d"),
        ("<think>a <think> b</think> 4", "4"),
        ("<think>a </thinking> b</think> 4", "4"),
        ("b <think>cut", ""),
        ("<think>a</think> b <think>cut", ""),
        ("<think>a</think>", ""),
        ("4 < 5 > 3 [THINKING]", "4 < 5 > 3 [THINKING]"),
        ("", ""),
    ],
)
def test_spans_are_paired(text, left):
    assert without_thinking(text) == left


def test_a_pair_of_ones_own_stands_for_all_others():
    own = ["<plan>", "</plan>"]
    assert without_thinking("<plan>a</plan> <think>b</think>", own) == "<think>b</think>"
    made = tokenizer()
    assert answer(made, "secret</plan> 4", tags=own) == "4"
    assert answer(made, "secret", prompt="2 + 2? <plan>", tags=own) == ""
    assert answer(made, "4", prompt="2 + 2? <think>", tags=own) == "4"


def test_calls_of_tools_stay_and_what_a_question_quotes_opens_nothing():
    turns = "<think>a</think>\ncall(2)\nuser: 4\nassistant: <think>\nb</think>\nIt is 4."
    assert without_thinking(turns) == "call(2)\nuser: 4\nassistant: It is 4."
    asked = "User: what does <think> mean?\nAssistant: "
    assert answer(tokenizer(), "It opens.", prompt=asked) == "It opens."


def test_harmonys_answer_is_its_final_channel():
    made = tokenizer("<|channel|>", "<|message|>", "<|start|>", "<|call|>", "<|return|>")
    said = (
        "<|channel|>analysis<|message|>secret<|end|><|start|>assistant to=functions.f<|channel|>"
        "commentary json<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>"
    )
    assert answer(made, f"{said}It is 4.<|return|>") == "It is 4."
    assert answer(made, "<|channel|>commentary<|message|>Wait.") == "commentaryWait."
    assert "channel" not in answer(made, "<|channel|>final<|message|>4<|channel|>x<|message|>y")


@pytest.mark.parametrize("tags", ["<think>", ["<think>"], ["a", "b", "c"], ["<t>", "<t>"], [1, 2]])
def test_tags_that_are_no_pair_are_refused(tags):
    with pytest.raises(ValueError, match="thinking_tags must hold"):
        check_thinking_tags(tags, are_read=True)
    check_thinking_tags(("<t>", "</t>"), are_read=True)
    check_thinking_tags(None, are_read=False)
    with pytest.raises(ValueError, match="thinking_tags must be None where thoughts are shown"):
        check_thinking_tags(("<t>", "</t>"), are_read=False)
