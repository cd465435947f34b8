"""Test that a credit map's page can be read by anyone, whatever a model says."""

import math
import re

import pytest
from page_colours import Colours, contrast, parsed

from fused_sd.credit import VALUES, CreditMap, CreditRow, TokenCredit, TopToken, html_page
from fused_sd.credit.html import notebook_frame, token_chips
from fused_sd.credit.scale import DARK_SIDES, FULL_AT, PAPER, SIDES

TEXT, GRAPHICS = 4.5, 3.0  # the least contrast ratios of WCAG 2.2, level AA
BYTES = TopToken(2, "\ufffd", 0.1)
MINUS = "\u2212"
HOSTILE = "<script>alert(1)</script>\"'&<img/src=x/onerror=alert(2)></style>"


def token(text="a", delta=0.0, **others):
    values = {"forward_kl": 0.5, "reverse_kl": 0.25, "student_entropy": 1.0, "teacher_entropy": 1.5}
    return TokenCredit(7, text, -1.0, -1.0 + delta, **{**values, **others})


def row(*deltas):
    return CreditRow(tuple(token(delta=delta) for delta in deltas))


def every_strength():
    """Return a map whose tokens have every colour from none to full, for each value and sign."""
    tokens = [
        token(
            delta=sign * share / 20 * FULL_AT["delta"],
            **{name: share / 20 * FULL_AT[name] for name in VALUES if name != "delta"},
        )
        for share in range(21)
        for sign in (-1, 1)
    ]
    return CreditMap((CreditRow(tuple(tokens), "caption", "question", "answer"), CreditRow(())))


STRANGE = CreditMap(
    (
        CreditRow(
            (
                token(HOSTILE, -math.inf),
                token(" $x$\n", forward_kl=math.inf),
                token(""),
                token("\u4f60\u597d\x1b[31m\u202e", math.nan, reverse_kl=math.nan),
                token("\ud800", student_top=(TopToken(1, HOSTILE, 0.5), BYTES)),
            ),
            caption=HOSTILE,
            student_prompt=HOSTILE,
            teacher_prompt=HOSTILE,
        ),
        CreditRow((), "empty"),
    ),
    HOSTILE,
)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_every_text_is_readable_on_what_is_behind_it(value, dark):
    found = Colours(html_page(every_strength()), dark=dark, checked=f"by-{value}").pairs()
    assert len(found) > 20
    too_weak = {text: contrast(*pair) for pair, text in found.items() if contrast(*pair) < TEXT}
    assert not too_weak


@pytest.mark.parametrize("dark", [False, True])
def test_full_colours_and_the_focus_stand_out_from_the_page(dark):
    colours = Colours(html_page(CreditMap(())), dark=dark)
    root = colours.root.all("body")[0]
    for surface in ("--page", "--panel"):
        paper = colours.colour(f"var({surface})", colours.style(root))
        for graphic in ("--approve", "--object", "--amount", "--quiet", "--c0"):
            shown = colours.colour(f"var({graphic})", colours.style(root))
            assert contrast(shown, paper) >= GRAPHICS, (graphic, surface)


def test_the_terminals_and_pictures_black_is_readable_on_every_full_colour():
    for colour in (*SIDES.values(), PAPER):
        assert contrast((0, 0, 0), colour) >= TEXT
    assert all(contrast((255, 255, 255), colour) >= TEXT for colour in DARK_SIDES.values())


def test_the_measure_of_contrast_is_wcags():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((0x77,) * 3, (255,) * 3) == pytest.approx(4.48, abs=0.005)  # a known failure
    page = (
        "<style>p{color:#777}@media (prefers-color-scheme:dark){body{background:#000}}</style>"
        '<body style="background:#fff"><p>text</p></body>'
    )
    assert Colours(page, dark=False).pairs() == {((0x77,) * 3, (255,) * 3): "<p> text"}


@pytest.mark.parametrize("value", VALUES)
def test_a_reader_without_a_screen_finds_the_way(value):
    tree = parsed(html_page(every_strength(), value=value))
    (html,) = tree.all("html")
    assert html.attributes["lang"] == "en"
    assert [title.text for title in tree.all("title")] == ["Credit map"]
    assert [heading.text for heading in tree.all("h1")] == ["Credit map"]
    assert len(tree.all("main")) == 1
    (body,) = tree.all("body")
    assert [child.tag for child in body.children] == ["main"]  # all text is in a landmark
    (group,) = tree.all("fieldset")
    assert [legend.text for legend in group.all("legend")] == ["Colour"]
    buttons = [button for label in group.all("label") for button in label.all("input")]
    assert [button.attributes["id"] for button in buttons] == [f"by-{name}" for name in VALUES]
    checked = [button for button in buttons if "checked" in button.attributes]
    assert [button.attributes["id"] for button in checked] == [f"by-{value}"]
    ids = [found.attributes["id"] for found in tree.all() if "id" in found.attributes]
    assert len(ids) == len(set(ids))
    (viewport,) = [tag for tag in tree.all("meta") if tag.attributes.get("name") == "viewport"]
    assert "user-scalable" not in viewport.attributes["content"]
    frame = parsed(notebook_frame(every_strength())).all("iframe")[0]
    assert frame.attributes["title"] == "Credit map"


@pytest.mark.parametrize(
    "value, full_at, numbers, words",
    [
        (
            "delta",
            None,
            [f"{MINUS}3", f"{MINUS}1.5", "0", "1.5", "3"],
            ["objects", "nat", "wants more"],
        ),
        (
            "delta",
            0.5,
            [f"{MINUS}0.5", f"{MINUS}0.25", "0", "0.25", "0.5"],
            ["objects", "nat", "wants more"],
        ),
        ("reverse_kl", None, ["0", "1", "2"], ["little", "nat", "much"]),
    ],
)
def test_the_scale_has_numbers(value, full_at, numbers, words):
    tree = parsed(html_page(CreditMap(()), value=value, full_at=full_at))
    (scale,) = [found for found in tree.all("figure") if f"about-{value}" in found.classes]
    bar, *rows, explanation = scale.children
    assert bar.classes == ["bar"]
    assert [[tick.text for tick in row.children] for row in rows] == [numbers, words]
    assert explanation.text.endswith(".")


@pytest.mark.parametrize("value", VALUES)
def test_what_a_model_writes_stays_text_and_the_page_asks_nobody(value):
    page = html_page(STRANGE, value=value)
    tree = parsed(page)
    assert not {"script", "img", "link"} & {element.tag for element in tree.all()}
    assert len(tree.all("style")) == 1
    known = {"class", "style", "tabindex", "lang", "charset", "name", "content", "type", "id"}
    for element in tree.all():
        assert set(element.attributes) <= known | {"checked", "open"}, element.attributes
    hostile = [element for element in tree.all() if HOSTILE in "".join(element.texts)]
    # the title, the heading, the caption, both prompts, the token, its note and a top token
    tags = sorted(element.tag for element in hostile)
    assert tags == ["b", "h1", "h2", "pre", "pre", "span", "span", "title"]
    for request in ("http", "@import", "url("):
        assert request not in page, request
    page.encode("utf-8")
    assert not re.search("[\x00-\x08\x0e-\x1f\u202a-\u202e\ufffd]", page)


def test_chips_tell_sign_and_strength():
    half = FULL_AT["delta"] / 2
    shown = CreditMap((row(-half, half, -100.0, 0.0, -math.inf),))

    def chips(page):
        return [found for found in parsed(page).all("span") if "tabindex" in found.attributes]

    found = chips(html_page(shown))
    sides = [chip.classes[1] for chip in found]
    assert sides == ["object", "approve", "object", "approve", "object"]
    shares = [chip.attributes["style"].split(";")[0] for chip in found]
    assert shares == [f"--delta:{share}%" for share in (50, 50, 100, 0, 100)]
    wider = chips(html_page(shown, full_at=2 * FULL_AT["delta"]))
    assert wider[0].attributes["style"].startswith("--delta:25%;--forward_kl:25%")
    assert [chip.classes for chip in chips(token_chips(shown.rows[0]))] == [
        chip.classes for chip in found
    ]


def test_the_sign_is_also_told_without_colour():
    page = html_page(CreditMap((row(-1.0, 1.0),)))
    for value in VALUES:
        colours = Colours(page, dark=False, checked=f"by-{value}")
        edges = [
            colours._resolved(colours.style(chip)["--edge"], colours.style(chip))
            for chip in colours.root.all("span")
            if "chip" in chip.classes
        ]
        assert edges == (["dashed", "solid"] if value == "delta" else ["solid", "solid"])


def test_the_students_prompt_stands_open_and_grey_before_the_response():
    page = html_page(every_strength())
    section = parsed(page).all("section")[0]
    teacher, student = section.all("details")
    assert student.text == "What the student readquestion"
    assert "open" in student.attributes
    assert "open" not in teacher.attributes
    places = [section.children.index(part) for part in (student, section.all("p")[0])]
    assert places[1] == places[0] + 1
    colours = Colours(page, dark=False)
    prompt = colours.root.all("details")[-1].all("pre")[0]
    quiet = colours.colour("var(--quiet)", colours.style(prompt))
    assert colours.colour(colours.style(prompt)["color"], colours.style(prompt)) == quiet


def test_a_notebook_gets_the_page_in_a_frame():
    frame = parsed(STRANGE._repr_html_())
    assert [element.tag for element in frame.all()][1:] == ["iframe"]
    assert frame.children[0].attributes["srcdoc"] == html_page(STRANGE)
