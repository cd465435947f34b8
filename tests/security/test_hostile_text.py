"""What models write, on pages, in trackers and in terminals: never an element or a control."""

import sys
import types
import unicodedata
from html.parser import HTMLParser

import pytest

from fused_sd.credit import CreditMap, CreditRow, TokenCredit, TopToken, html_page, plain_text
from fused_sd.credit.html import notebook_frame, save_html, token_chips
from fused_sd.credit.terminal import print_map
from fused_sd.credit.tokens import VALUES

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)//",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "\"><a href='javascript:alert(1)'>x</a>",
    "' onmouseover='alert(1)' x='",
    '" style="position:fixed" data-x="',
    "[x](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "```\n</pre></code>\n<b>x</b>\n```",
    "<!-- not closed",
    "<!--><script>alert(1)</script>-->",
    "-->]]></style></title></textarea></iframe><iframe srcdoc='<script>alert(1)</script>'>",
    "<![CDATA[<x>]]>",
    "<?php x ?>",
    "<\0script>alert(1)</\0script>",
    "\0",
    "\u202e)1(trela\u2066\u2069\u200f",
    "&lt;script&gt;&amp;#60;b&#62;&#x3c;i&#x3e;",
    "{{ 7 * 7 }}{% for x in () %}{% endfor %}{# x #}",
    "${7*7}`x`",
    "expression(alert(1));background:url(javascript:alert(1))",
    "\ud800x\udfff",
    "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "a\r\nb\u2028c\u2029d\x0be\x0cf\x85g",
    "\n\n<b>x</b>\n\n    code\n",
]
TEMPLATES = ["{{ 7 * 7 }}", "{% for", "{# x"]
PLAIN = "x"


def a_map(text):
    top = (TopToken(5, text, 0.5),)
    token = TokenCredit(7, text, -1.0, -4.0, 0.5, 0.25, 1.0, 1.5, top, top)
    row = CreditRow((token,), text, student_prompt=text, teacher_prompt=text)
    return CreditMap((row,), text)


class Structure(HTMLParser):
    """The elements, attributes and other marks of a page, in order, and its texts."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.marks, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        names = [
            (name, PLAIN if name in ("srcdoc", "title") else value) for name, value in attributes
        ]
        self.marks.append((tag, names))
        self.texts += [value for name, value in attributes if name in ("srcdoc", "title")]

    def handle_endtag(self, tag):
        self.marks.append(("end", tag))

    def handle_comment(self, data):
        self.marks.append(("comment", data))

    def handle_decl(self, decl):
        self.marks.append(("declaration", decl))

    def handle_pi(self, data):
        self.marks.append(("instruction", data))

    def unknown_decl(self, data):
        self.marks.append(("declaration", data))

    def handle_data(self, data):
        self.texts.append(data)


def without_line_ends(marks):
    """A token that ends a line has a ``br`` behind it; the template has it."""
    return [mark for mark in marks if mark != ("br", [])]


def assert_plain(page, reference):
    found = Structure(page)
    assert without_line_ends(found.marks) == without_line_ends(Structure(reference).marks)
    text = "".join(found.texts)
    assert "\u202e" not in text
    assert "\u2066" not in text
    assert "\0" not in page
    page.encode("utf-8")


@pytest.mark.parametrize("value", VALUES)
def test_a_page_has_the_template_s_elements_alone(value):
    reference = html_page(a_map(PLAIN), value=value)
    for text in HOSTILE:
        assert_plain(html_page(a_map(text), value=value), reference)


def test_everything_hostile_at_once():
    text, other = "".join(HOSTILE), "".join(reversed(HOSTILE))
    for joined in (text, other):
        assert_plain(html_page(a_map(joined)), html_page(a_map(PLAIN)))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_notebook_s_frame_and_the_page_inside(text):
    frame = notebook_frame(a_map(text))
    assert_plain(frame, notebook_frame(a_map(PLAIN)))
    (inside,) = (found for found in Structure(frame).texts if "<html" in found)
    assert_plain(inside, html_page(a_map(PLAIN)))


def test_what_is_shown_is_what_was_written():
    """Escaped, not removed; nothing that looks like a template is filled in."""
    for text in HOSTILE[:6] + TEMPLATES:
        shown = "".join(Structure(html_page(a_map(text))).texts)
        assert shown.count(text) >= 4, text  # title, caption and both prompts


def test_chips_for_other_pages_are_escaped():
    for text in HOSTILE:
        (row,) = a_map(text).rows
        (plain,) = a_map(PLAIN).rows
        assert_plain(str(token_chips(row)), str(token_chips(plain)))


def test_the_page_has_no_script_and_loads_nothing():
    for text in HOSTILE:
        for tag, attributes in Structure(html_page(a_map(text))).marks:
            assert tag not in ("script", "link", "base", "iframe", "object", "embed", "img")
            for name, _ in attributes if isinstance(attributes, list) else []:
                assert not name.startswith("on")
                assert name not in ("href", "src", "srcdoc", "action", "formaction")


def test_a_file_is_written_whatever_the_text(tmp_path):
    for text in HOSTILE:
        save_html(a_map(text), tmp_path / "map.html")
        assert_plain((tmp_path / "map.html").read_text("utf-8"), html_page(a_map(PLAIN)))
        (tmp_path / "map.json").write_text(a_map(text).to_json(), encoding="utf-8")
        assert CreditMap.from_json((tmp_path / "map.json").read_text("utf-8")) == a_map(text)


def controls(text):
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {
        "\n",
        "\t",
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_a_terminal_gets_no_control(text):
    assert not controls(plain_text(a_map(text)))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_coloured_terminal_gets_no_control_but_rich_s(text):
    console_module = pytest.importorskip("rich.console")
    import io

    def printed(shown):
        file = io.StringIO()
        console = console_module.Console(
            file=file, force_terminal=True, color_system="truecolor", width=1000
        )
        print_map(shown, console=console)
        return file.getvalue()

    def sequences(shown):
        return {part.partition("m")[0] for part in printed(shown).split("\x1b")[1:]}

    assert controls(printed(a_map(text))) == {"\x1b"}
    assert sequences(a_map(text)) == sequences(a_map(PLAIN))


class Page:
    def __init__(self, data, inject=True, caption=None):
        self.data = data


TRACKERS = {
    "wandb": {"Html": Page, "log": None},
    "trackio": {"Html": Page, "log": None},
    "swanlab": {"Html": Page, "log": None},
    "mlflow": {"log_text": None},
}


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers_get_the_page(name, monkeypatch):
    pytest.importorskip("trl")
    from fused_sd.integrations.trl.credit_reports import REPORTERS, CreditReport

    sent = []

    def keep(data, *_, **__):
        sent.append(data if isinstance(data, str) else data["credit_map"].data)

    module = types.ModuleType(name)
    vars(module).update({key: value or keep for key, value in TRACKERS[name].items()})
    monkeypatch.setitem(sys.modules, name, module)
    for text in HOSTILE:
        REPORTERS[name](CreditReport(a_map(text), "delta", png=False, step=1, callbacks=[]))
        assert_plain(sent[-1], html_page(a_map(PLAIN)))


def test_tensorboard_gets_one_block_of_code():
    """TensorBoard renders Markdown; indented lines are shown as they are."""
    pytest.importorskip("trl")
    from transformers.integrations import TensorBoardCallback

    from fused_sd.integrations.trl.credit_reports import REPORTERS, CreditReport

    texts = []
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = types.SimpleNamespace(add_text=lambda tag, text, step: texts.append(text))
    for text in HOSTILE:
        REPORTERS["tensorboard"](
            CreditReport(a_map(text), "delta", png=False, step=1, callbacks=[board])
        )
        assert all(line.startswith("    ") for line in texts[-1].splitlines())
        markdown = pytest.importorskip("markdown", reason="no Markdown renderer here").markdown
        marks = [mark[0] for mark in Structure(markdown(texts[-1])).marks]
        assert marks == ["pre", "code", "end", "end"]


def test_the_demo_s_report():
    markupsafe = pytest.importorskip("markupsafe")
    from fused_sd.demo.charts import Line, line_chart
    from fused_sd.demo.report import table

    def page(text):
        (row,) = a_map(text).rows
        chart = line_chart(text, [Line(text, [(0, 0.5)], "s0")], y_label=text)
        return str(table([text], [[text, token_chips(row), text], [chart, text]]))

    def structure(text):
        marks = Structure(page(text)).marks
        return [
            (
                tag,
                [(n, v) for n, v in rest if n != "aria-label"] if isinstance(rest, list) else rest,
            )
            for tag, rest in without_line_ends(marks)
        ]

    for text in HOSTILE:
        assert structure(text) == structure(PLAIN)
    assert isinstance(table([PLAIN], [[PLAIN]]), markupsafe.Markup)
