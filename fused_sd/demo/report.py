"""Write the report as one HTML file that loads nothing else, for any screen."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape

from fused_sd.credit.html import document, token_chips
from fused_sd.demo.charts import Line, line_chart, percent
from fused_sd.demo.memory import NUM_STEPS, StepMemory, time_name
from fused_sd.demo.style import STYLE
from fused_sd.demo.task import is_right
from fused_sd.demo.train import Run

NUM_CREDIT_ROWS, NUM_EXAMPLES_SHOWN = 8, 12
NEAR_TEACHER = 0.9  # share of the teacher's accuracy from which the examples are not missed


def render(
    runs: Sequence[Run], memory: Sequence[StepMemory], environment: Mapping[str, str]
) -> str:
    """Return the whole page.

    Args:
        runs: one run for each seed, at least one.
        memory: a measured step of each trainer; the section is left out if empty.
        environment: versions and machine, by name.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none; train before you report")
    sections = [
        _headline(runs),
        _section("While it learned", _curves(runs)),
        _section("Credit of every token", _credit(runs[0])),
        _section("Held-out words, before and after", _examples(runs[0])),
        _section("Memory of one step", _memory(memory, runs[0].settings.device)) if memory else "",
        _section("Settings and versions", _settings(runs, environment)),
    ]
    return document("fused_sd: a model teaches itself", STYLE, "".join(sections))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, all of them escaped."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return _wide(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", header[0])


def _wide(body: str, name: str) -> str:
    """Return what may be wider than the screen in a box that scrolls, also by the keyboard."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="{escape(name)}">{body}</div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _headline(runs: Sequence[Run]) -> str:
    name = "held-out accuracy"
    settings = runs[0].settings
    before = sum(run.first(name) for run in runs) / len(runs)
    after = sum(run.last(name) for run in runs) / len(runs)
    teacher = sum(run.first("teacher accuracy") for run in runs) / len(runs)
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else f"seed {settings.seed}"
    text = (
        "SmolLM2-135M-Instruct is asked <code>cat -&gt;</code>, which does not say that it wants a "
        f"plural. Shown {settings.num_examples} worked examples, it is the teacher. Distilled into "
        f"itself for {settings.steps} steps, {_outcome(before, after, teacher)}. Accuracy is exact "
        f"match on {settings.num_held_out} words that were neither asked nor shown."
    )
    rows = [
        [
            str(run.settings.seed),
            percent(run.first(name)),
            percent(run.last(name)),
            percent(run.first("teacher accuracy")),
            f"{run.first('held-out KL'):.2f} to {run.last('held-out KL'):.2f}",
            f"{run.first('held-out entropy'):.2f} to {run.last('held-out entropy'):.2f}",
            f"{run.training_seconds:.0f} s",
        ]
        for run in runs
    ]
    header = ["seed", "before", "after", "with examples", "KL, nat", "entropy, nat", "training"]
    return (
        f"<header><h1>A model teaches itself</h1><p>{text}</p>"
        f'<p class="big"><b>{percent(before)}</b> <span>to</span> <b>{percent(after)}</b>'
        f"<small>of held-out words, {escape(seeds)}; with the examples in the prompt the untrained "
        f"model answers {percent(teacher)}</small></p>{table(header, rows)}</header>"
    )


def _outcome(before: float, after: float, teacher: float) -> str:
    """Say what the accuracies show, and no more."""
    if after <= before:
        return "it answers no more words without them than before"
    if after < NEAR_TEACHER * teacher:
        return "it answers more words without them than before, and fewer than with them"
    return "it answers without them"


def _curves(runs: Sequence[Run]) -> str:
    def lines(name: str, label: str = "student") -> list[Line]:
        return [
            Line(
                label if len(runs) == 1 else f"{label}, seed {run.settings.seed}",
                run.curves.get(name, []),
                f"s{n % 5}",
            )
            for n, run in enumerate(runs)
        ]

    teacher = runs[0].first("teacher accuracy")
    level = Line("with examples", [(0, teacher), (runs[0].settings.steps, teacher)], "reference")
    charts = [
        ("Accuracy on held-out words", [*lines("held-out accuracy"), level], "right answers"),
        ("Right answers while sampling", lines("training reward"), "right answers"),
        ("KL(teacher || student) on held-out words", lines("held-out KL"), "nat a token"),
        ("Training loss", lines("training loss", "loss"), "nat a token"),
        ("Entropy on held-out words", lines("held-out entropy"), "nat a token"),
    ]
    figures = [
        line_chart(title, drawn, y_label=label, is_share=label == "right answers")
        for title, drawn, label in charts
        if any(line.points for line in drawn)
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _credit(run: Run) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(row["word"])} -&gt;</th>'
        f"<td>{token_chips(row['before'])}</td><td>{token_chips(row['after'])}</td></tr>"
        for row in run.credit[:NUM_CREDIT_ROWS]
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("question", "before", "after"))
    return (
        "<p>The student's own greedy answers, judged by the model that sees the examples. "
        '<span class="chip" style="background:var(--object)">orange</span> is a token the teacher '
        'would not have written, <span class="chip" style="background:var(--approve)">blue</span> '
        "one it wants more of, no colour one on which the two agree. Delta is "
        "log P(teacher) - log P(student). Point at a token to see both distributions; "
        "&#183; is a space, &#8629; the end of the line.</p>"
        + _wide(
            f'<table class="credit"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>',
            "credit",
        )
    )


def _examples(run: Run) -> str:
    def mark(word: str, said: str) -> str:
        sign = "\u2713" if is_right(word, said) else "\u2717"
        return f"{said.strip() or '(nothing)'} {sign}"

    rows = [
        [
            f"{row['word']} ->",
            mark(row["word"], row["before"]),
            mark(row["word"], row["after"]),
            mark(row["word"], row["teacher"]),
        ]
        for row in run.examples
    ]
    header = ["question", "before", "after", "with examples, before"]
    rest = table(header, rows[NUM_EXAMPLES_SHOWN:])
    return (
        table(header, rows[:NUM_EXAMPLES_SHOWN])
        + f"<details><summary>The other {len(rows[NUM_EXAMPLES_SHOWN:])}</summary>{rest}</details>"
    )


def _memory(memory: Sequence[StepMemory], device: str) -> str:
    first = memory[0]
    names = {"stock": "TRL's SDPOTrainer", "fused": "FusedSDPOTrainer"}
    rows = [
        [
            names[step.trainer],
            f"{step.peak_mib:.0f} MiB",
            f"{step.peak_mib / step.logits_mib:.1f}",
            f"{step.seconds:.1f}",
            f"{step.loss:.6f}",
        ]
        for step in memory
    ]
    time = time_name(device)
    header = ["trainer", "peak above the start", "in matrices of logits", time, "loss"]
    clock = ", of all threads" if device == "cpu" else ""
    return (
        f"<p>One <code>compute_loss</code> and <code>backward</code> on {first.num_tokens} random "
        "tokens, each trainer in a process of its own. One float32 matrix of all the logits would "
        f"be {first.logits_mib:.0f} MiB; layers and adapter gradients are in both numbers. The "
        f"trainers took {NUM_STEPS} steps in turns; the {time} are the fastest step's{clock}.</p>"
        f"{table(header, rows)}"
    )


def _settings(runs: Sequence[Run], environment: Mapping[str, str]) -> str:
    settings = {
        name.replace("_", " "): str(value) for name, value in asdict(runs[0].settings).items()
    }
    settings["seed"] = ", ".join(str(run.settings.seed) for run in runs)
    return table(["setting", "value"], list(settings.items())) + table(
        ["environment", "value"], list(environment.items())
    )
