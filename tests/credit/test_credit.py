"""Test credit maps' numbers against explicit logits, their pages and pictures, and the scores."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import pytest
import torch

from fused_sd import LMHead
from fused_sd.cli import main
from fused_sd.credit import (
    VALUES,
    CreditMap,
    CreditRow,
    TokenCredit,
    TopToken,
    credit_map,
    html_page,
    plain_text,
    planted_error_scores,
    print_map,
    save_html,
    save_png,
    token_texts,
)
from fused_sd.credit.scale import SIDES, label, rgb, strength, visible

B, T, D, V = 2, 5, 8, 23
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def states(dtype=torch.float64):
    """Return the student's states and head, the teacher's, and the response."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, V, (B, T), generator=generator)
    return normal(B, T, D), normal(V, D), normal(B, T, D), normal(V, D), ids


def token(text="a", student=-1.0, teacher=-1.0, **others):
    values = {"forward_kl": 0.5, "reverse_kl": 0.25, "student_entropy": 1.0, "teacher_entropy": 1.5}
    return TokenCredit(7, text, student, teacher, **{**values, **others})


def row(*deltas):
    return CreditRow(tuple(token(student=-1.0, teacher=-1.0 + delta) for delta in deltas))


STRANGE = CreditMap(
    (
        CreditRow(
            (
                token("<script>alert(1)</script>", teacher=-math.inf),
                token(" $x$\n", student=-math.inf, forward_kl=math.inf),
                token("", student=-math.inf, teacher=-math.inf),
                token("\u4f60\u597d\x1b[31m\u202e", teacher=math.nan, reverse_kl=math.nan),
                token('"&', student_top=(TopToken(1, "<b>", 0.5),)),
            ),
            caption="<i>step</i> 3, reward 1.0",
            student_prompt="<b>question</b>",
            teacher_prompt="answer & question",
        ),
        CreditRow((), "empty"),
    ),
    "A <title>",
)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_number_is_that_of_explicit_logits(temperature):
    student_hidden, student_head, teacher_hidden, teacher_head, ids = states()
    shown = credit_map(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        ids,
        mask=MASK,
        temperature=temperature,
        top=4,
    )
    log_s = (student_hidden @ student_head.T / temperature).log_softmax(-1)
    log_t = (teacher_hidden @ teacher_head.T / temperature).log_softmax(-1)
    for b in range(B):
        kept = [t for t in range(T) if MASK[b, t]]
        assert [credit.token_id for credit in shown.rows[b].tokens] == ids[b, kept].tolist()
        for t, credit in zip(kept, shown.rows[b].tokens):
            s, other = log_s[b, t], log_t[b, t]
            y = int(ids[b, t])
            expected = {
                "student_log_prob": s[y],
                "teacher_log_prob": other[y],
                "delta": other[y] - s[y],
                "forward_kl": (other.exp() * (other - s)).sum(),
                "reverse_kl": (s.exp() * (s - other)).sum(),
                "student_entropy": -(s.exp() * s).sum(),
                "teacher_entropy": -(other.exp() * other).sum(),
            }
            for name, value in expected.items():
                assert getattr(credit, name) == pytest.approx(float(value), abs=1e-10), name
            for top, log_probs in ((credit.student_top, s), (credit.teacher_top, other)):
                best = log_probs.topk(4)
                assert [entry.token_id for entry in top] == best.indices.tolist()
                assert [entry.prob for entry in top] == pytest.approx(
                    best.values.exp().tolist(), abs=1e-10
                )


def test_masked_tokens_may_hold_anything():
    student_hidden, student_head, teacher_hidden, teacher_head, ids = states()
    clean = credit_map(student_hidden, student_head, teacher_hidden, teacher_head, ids, mask=MASK)
    for tensor in (student_hidden, teacher_hidden):
        tensor[MASK == 0] = torch.nan
    ids[MASK == 0] = -100
    again = credit_map(student_hidden, student_head, teacher_hidden, teacher_head, ids, mask=MASK)
    assert again == clean


def test_responses_without_tokens_give_rows_without_tokens():
    student_hidden, student_head, teacher_hidden, teacher_head, ids = states()
    heads = (student_head, teacher_head)
    none = torch.zeros_like(ids)
    masked = credit_map(student_hidden, heads[0], teacher_hidden, heads[1], ids, mask=none)
    sides = (student_hidden[:, :0], heads[0], teacher_hidden[:, :0], heads[1])
    for shown in (masked, credit_map(*sides, ids[:, :0])):
        assert [row.tokens for row in shown.rows] == [(), ()]
        assert "(no token)" in html_page(shown)
        assert plain_text(shown)


def test_a_token_that_the_teacher_excludes_has_delta_minus_infinity():
    student_hidden, student_head, teacher_hidden, teacher_head, ids = states()
    ids[0, 0] = V - 1
    smaller = LMHead(teacher_head, valid_vocab=V - 1)
    shown = credit_map(student_hidden, student_head, teacher_hidden, smaller, ids)
    assert shown.rows[0].tokens[0].teacher_log_prob == -math.inf
    assert shown.rows[0].tokens[0].delta == -math.inf
    assert math.isfinite(shown.rows[0].tokens[0].student_log_prob)
    html_page(shown), plain_text(shown)


def test_both_excluding_a_token_is_agreement():
    assert token(student=-math.inf, teacher=-math.inf).delta == 0.0


def test_measuring_leaves_no_graph_and_accepts_live_states():
    student_hidden, student_head, teacher_hidden, teacher_head, ids = states()
    live = [tensor.requires_grad_() for tensor in (student_hidden, student_head, teacher_hidden)]
    shown = credit_map(live[0], live[1], live[2], teacher_head, ids)
    assert len(shown.rows) == B
    assert all(tensor.grad is None for tensor in live)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"student_hidden": torch.zeros(T, D, dtype=torch.float64)}, r"student_hidden must be \(B"),
        ({"captions": ["one"]}, "captions must be 2 texts, got 1"),
        ({"mask": MASK[:1]}, "must be"),
        ({"top": V + 1}, "must be at most the vocabulary"),
    ],
)
def test_wrong_use_says_what_to_do(changes, says):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "token_ids")
    with pytest.raises(ValueError, match=says):
        credit_map(**{**dict(zip(names, states())), **changes})


def test_texts_keep_spaces_and_join_split_characters():
    pieces = [b"a", b" b", "é".encode()[:1], "é".encode()[1:], b"\xff", b"c", "€"[:1].encode()]

    def decode(ids):
        text = b"".join(pieces[n] for n in ids).decode(errors="replace")
        return text.removeprefix(" ")  # as SentencePiece's tokenizers do

    assert token_texts([0, 1, 2, 3, 4, 5, 6], decode) == [
        "a",
        " b",
        "é(1/2)",
        "é(2/2)",
        "\ufffd",
        "c",
        "€",
    ]
    assert token_texts([4] * 6, decode) == ["\ufffd"] * 6
    assert token_texts([], decode) == []


@pytest.mark.parametrize(
    "pieces, texts",
    [
        # a leading space is in the first token, and the emoji's bytes in all three
        (
            [b"a", b" \xf0", b"\x9f\x98", b"\x80", b"b"],
            ["a", *(f" \U0001f600({n}/3)" for n in (1, 2, 3)), "b"],
        ),
        ([b"\xf0", b"\x9f", b"\x98", b"a"], ["\ufffd"] * 3 + ["a"]),  # it was never completed
        ([b"\xff"] * 3 + [b"\xc3", b"\xa9"], ["\ufffd"] * 3 + ["é(1/2)", "é(2/2)"]),
        ([b"a", b" \xf0", b"\x9f"], ["a", " \ufffd", "\ufffd"]),  # the response was cut off
        ([b"a", b"", b"b"], ["a", "", "b"]),  # a special token that decoding leaves out
    ],
)
def test_no_byte_is_lost(pieces, texts):
    def decode(ids):
        return b"".join(pieces[n] for n in ids).decode(errors="replace")

    assert token_texts(list(range(len(pieces))), decode) == texts


def test_decode_names_tokens_and_top_tokens():
    shown = credit_map(*states(), decode=lambda ids: "".join(chr(97 + n) for n in ids), top=2)
    credit = shown.rows[0].tokens[0]
    assert credit.text == chr(97 + credit.token_id)
    assert all(top.text == chr(97 + top.token_id) for top in credit.student_top)
    assert credit_map(*states()).rows[0].tokens[0].text == f"#{credit.token_id}"


def test_json_gives_the_same_map_back():
    for shown in (STRANGE, credit_map(*states(), mask=MASK, captions=["x", "y"]), CreditMap(())):
        text = shown.to_json()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert repr(CreditMap.from_json(text)) == repr(shown)  # repr: a NaN differs from itself


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"format": "fused_sd credit map"}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match=r"text must .*credit map"):
        CreditMap.from_json(text)


@pytest.mark.parametrize("value", VALUES)
def test_colours_are_colours_whatever_the_value(value):
    for credit in STRANGE.rows[0].tokens:
        assert 0.0 <= strength(value, credit.value(value)) <= 1.0
        assert all(isinstance(level, int) and 0 <= level <= 255 for level in rgb(credit, value))
    assert rgb(token(), "delta") == (255, 255, 255)


def test_an_unknown_value_is_refused_everywhere():
    for show in (html_page, plain_text, print_map):
        with pytest.raises(ValueError, match="value must be one of"):
            show(STRANGE, value="advantage")


def test_what_cannot_be_seen_gets_a_sign():
    assert visible(" a\n\t") == "\u00b7a\u21b5\u21e5"
    assert visible("") == "\u2205"
    assert visible("\x1b[31m") == "\u2039U+001B\u203a[31m"
    assert visible("\u202e") == "\u2039U+202E\u203a"
    assert visible("\ud800") == "\u2039U+D800\u203a"  # UTF-8 has no bytes for it
    assert visible("\u200d") == "\u2039U+200D\u203a"
    family = "\U0001f469\u200d\U0001f467"
    assert visible(family) == family  # one emoji


def test_bytes_without_a_character_are_named_by_their_token():
    assert label(token("\ufffd")) == label(token("\ufffd\ufffd")) == "\u2039bytes #7\u203a"
    assert label(TopToken(12, "\ufffd", 0.5)) == "\u2039bytes #12\u203a"
    assert label(token("a\ufffd")) == "a\ufffd"
    assert label(token("")) == "\u2205"


def test_plain_text_gives_numbers_to_strong_tokens():
    shown = CreditMap((CreditRow((token("the"), token(" cat", teacher=-4.0)), "caption"),), "title")
    assert plain_text(shown).splitlines()[2:] == ["", "caption", "the cat[-3.00]"]
    assert plain_text(STRANGE).count("[-inf]") == 1
    assert "\x1b" not in plain_text(STRANGE)


def test_the_terminal_is_coloured_where_it_can_be():
    rich_console = pytest.importorskip("rich.console")

    def printed(**settings):
        with (console := rich_console.Console(width=60, **settings)).capture() as capture:
            print_map(STRANGE, console=console)
        return capture.get()

    coloured = printed(force_terminal=True, color_system="truecolor")
    objects = ";".join(map(str, SIDES["object"]))
    assert f"\x1b[30;48;2;{objects}m<script>alert(1)</script>" in coloured
    assert printed(force_terminal=False) == plain_text(STRANGE) + "\n"
    assert printed(no_color=True, force_terminal=True) == plain_text(STRANGE) + "\n"


@pytest.mark.parametrize("shown", [STRANGE, CreditMap(()), CreditMap((row(*[0.1] * 300),))])
def test_the_picture_is_a_picture(shown, tmp_path):
    pytest.importorskip("matplotlib")
    for value in VALUES:
        save_png(shown, tmp_path / "map.png", value=value)
        data = (tmp_path / "map.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_holds_every_token_inside_its_width():
    pytest.importorskip("matplotlib")
    from matplotlib.patches import Rectangle

    from fused_sd.credit import credit_figure

    deltas = [-2.0, 0.0, 2.0] * 30
    figure = credit_figure(CreditMap((row(*deltas),)), columns=40)
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 90
    assert max(box.get_x() + box.get_width() for box in boxes) <= 40
    assert len({(box.get_x(), box.get_y()) for box in boxes}) == 90
    assert [box.get_facecolor()[0] for box in boxes[:2]] == pytest.approx(
        [(255 + 2 * SIDES["object"][0]) / 3 / 255, 1.0], abs=0.01
    )


def test_the_command_line_prints_and_writes(tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "map.json"
    path.write_text(STRANGE.to_json())
    assert main(["credit", str(path)]) == 0
    assert capsys.readouterr().out == plain_text(STRANGE) + "\n"
    page = tmp_path / "out.html"
    assert main(["credit", str(path), "--html", str(page), "--value", "reverse_kl"]) == 0
    assert capsys.readouterr().out == ""
    assert page.read_text() == html_page(CreditMap.from_json(path.read_text()), value="reverse_kl")
    save_html(STRANGE, page)
    assert page.read_text() == html_page(STRANGE)


@pytest.mark.parametrize(
    "content, options, says",
    [
        (None, [], "No such file"),
        ("{}", [], "text must be a credit map"),
        (CreditMap(()).to_json(), ["--value", "blame"], "value must be one of"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, capsys, content, options, says):
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    assert main(["credit", str(path), *options]) == 2
    assert says in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    path = tmp_path / "map.json"
    path.write_text(STRANGE.to_json())
    for option, module in (([], "rich"), (["--png", "x.png"], "matplotlib")):
        monkeypatch.setitem(sys.modules, module, None)
        assert main(["credit", str(path), *option]) == 2
        said = capsys.readouterr().err
        assert f"credit: {module} must be installed here" in said
        assert said.endswith("; pip install 'fused-sd[credit]'\n")


def test_importing_credit_needs_torch_only():
    check = (
        "import sys; import fused_sd.credit; "
        "heavy = {'jinja2', 'matplotlib', 'rich', 'IPython', 'transformers', 'trl'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_perfect_map_scores_one():
    scores = planted_error_scores([row(0.1, -3.0, 0.2, -2.0)], [[False, True, False, True]])
    assert dataclasses.astuple(scores) == (1.0, 1.0, 1.0, 1.0, 1.0, 1, 2, 4)


def test_scores_by_hand():
    # ranks by blame: 4.0 planted, 3.0 other, 2.0 planted, 1.0 other, 0.0 other
    rows, planted = [row(-3.0, -4.0, 0.0, -2.0, -1.0)], [[0, 1, 0, 1, 0]]
    scores = planted_error_scores(rows, planted)
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    assert scores.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert scores.auroc == pytest.approx(5 / 6)  # of 2 x 3 pairs one is in the wrong order
    wider = planted_error_scores(rows, planted, k=3)
    assert (wider.precision, wider.recall) == pytest.approx((2 / 3, 1.0))
    assert wider.f1 == pytest.approx(0.8)
    assert planted_error_scores(rows, planted, k=99).precision == pytest.approx(2 / 5)


def test_ties_count_as_their_mean():
    scores = planted_error_scores([row(0.0, 0.0, 0.0, 0.0)], [[True, False, False, False]])
    assert dataclasses.astuple(scores)[:5] == (0.25, 0.25, 0.25, 0.25, 0.5)


def test_the_auroc_is_that_of_the_rank_sum_test():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(300):
        # so few values that most are ties
        planted, others = (
            draw.choices((-math.inf, -2.0, -1.0, 0.0, 1.5), k=draw.randint(1, 20)) for _ in "ab"
        )
        mask = [True] * len(planted) + [False] * len(others)
        scores = planted_error_scores([row(*planted, *others)], [mask])
        # SciPy counts the pairs in which the first is larger: a planted error has a low delta
        wrong = stats.mannwhitneyu(planted, others, method="asymptotic").statistic
        assert scores.auroc == pytest.approx(1 - wrong / (len(planted) * len(others)))


def test_an_excluded_token_is_blamed_most():
    assert planted_error_scores([row(-50.0, -math.inf, 0.0)], [[0, 1, 0]]).auroc == 1.0


def test_responses_without_an_error_are_left_out_and_others_averaged():
    rows = [row(-1.0, 0.0), row(-1.0, 0.0), row(-1.0, 0.0)]
    scores = planted_error_scores(rows, [[1, 0], [0, 1], [0, 0]])
    assert (scores.auroc, scores.precision) == (0.5, 0.5)
    assert (scores.num_rows, scores.num_planted, scores.num_tokens) == (2, 2, 4)


def test_values_without_a_sign_blame_where_they_are_large():
    tokens = (token(reverse_kl=2.0), token(reverse_kl=0.1))
    scores = planted_error_scores([CreditRow(tokens)], [[1, 0]], value="reverse_kl")
    assert scores.auroc == 1.0


@pytest.mark.parametrize(
    "rows, planted, says",
    [
        ([row(1.0)], [], "planted must have 1 responses"),
        ([row(1.0, 2.0)], [[True]], r"planted\[0\] must have 2 tokens"),
        ([row(1.0, 2.0)], [[True, True]], "planted must mark some tokens"),
        ([row(math.nan, 2.0)], [[True, False]], r"rows\[0\] must have a delta"),
    ],
)
def test_scores_refuse_what_has_no_score(rows, planted, says):
    with pytest.raises(ValueError, match=says):
        planted_error_scores(rows, planted)
