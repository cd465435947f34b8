"""Answers in boxes, and tokens between tags, against texts read by eye."""

import pytest

from fused_sd.integrations.shared.answers import boxed_answer, tokens_between


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is \\boxed{ 4 }.", "4"),
        ("First \\boxed{3}, no: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{}", ""),
        ("It is 4.", None),
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed{3} and \\boxed 4", None),
        ("", None),
    ],
)
def test_the_last_whole_box_is_the_answer(text, answer):
    assert boxed_answer(text) == answer


def between(*pieces):
    return "".join(
        piece if inside else "."
        for piece, inside in zip(pieces, tokens_between(pieces, "<t>", "</t>"))
    )


def test_tokens_between_tags_are_found_however_the_tags_are_cut():
    assert between("a", "<t>", "b", "c", "</t>", "d") == "..bc.."
    assert between("a<", "t", ">", "b", "c", "<", "/t", ">d") == "...bc..."


def test_a_token_that_holds_a_part_of_a_tag_is_outside():
    assert between("<", "t", ">\n", "b", "c</", "t", ">") == "...b..."


def test_a_span_that_is_never_closed_reaches_to_the_end():
    assert between("a", "<t>", "b", "c") == "..bc"


def test_there_may_be_several_spans_or_none():
    assert between("<t>", "a", "</t>", "b", "<t>", "c", "</t>") == ".a...c."
    assert between("a", "b", "</t>") == "..."
    assert between() == ""
