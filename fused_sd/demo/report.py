"""Write the report as one HTML file that loads nothing else, for any screen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from markupsafe import Markup

from fused_sd.credit.html import fragment, template, token_chips
from fused_sd.demo.charts import Line, line_chart, percent
from fused_sd.demo.memory import NUM_STEPS, StepMemory, time_name
from fused_sd.demo.task import is_right
from fused_sd.demo.train import Run

NUM_CREDIT_ROWS, NUM_EXAMPLES_SHOWN = 8, 12
NEAR_TEACHER = 0.9  # share of the teacher's accuracy from which the examples are not missed
TRAINERS = {"stock": "TRL's SDPOTrainer", "fused": "FusedSDPOTrainer"}


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
    settings = runs[0].settings
    before = sum(run.first("held-out accuracy") for run in runs) / len(runs)
    after = sum(run.last("held-out accuracy") for run in runs) / len(runs)
    teacher = sum(run.first("teacher accuracy") for run in runs) / len(runs)
    all_settings = asdict(settings) | {"seed": ", ".join(str(run.settings.seed) for run in runs)}
    return template("report.html", "fused_sd.demo").render(
        table=table,
        settings=settings,
        seeds=f"mean of {len(runs)} seeds" if len(runs) > 1 else f"seed {settings.seed}",
        before=percent(before),
        after=percent(after),
        teacher=percent(teacher),
        outcome=_outcome(before, after, teacher),
        accuracies=[_accuracies(run) for run in runs],
        charts=_charts(runs),
        credit=[
            (f"{row['word']} ->", token_chips(row["before"]), token_chips(row["after"]))
            for row in runs[0].credit[:NUM_CREDIT_ROWS]
        ],
        examples=_examples(runs[0]),
        NUM_EXAMPLES_SHOWN=NUM_EXAMPLES_SHOWN,
        memory=memory,
        steps=[_step(step) for step in memory],
        time=time_name(settings.device),
        NUM_STEPS=NUM_STEPS,
        all_settings=[(name.replace("_", " "), value) for name, value in all_settings.items()],
        environment=environment.items(),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table whose cells are texts, or HTML that is marked as such."""
    return fragment("table.html", "fused_sd.demo", header=header, rows=rows)


def _outcome(before: float, after: float, teacher: float) -> str:
    """Say what the accuracies show, and no more."""
    if after <= before:
        return "it answers no more words without them than before"
    if after < NEAR_TEACHER * teacher:
        return "it answers more words without them than before, and fewer than with them"
    return "it answers without them"


def _accuracies(run: Run) -> list[str]:
    return [
        str(run.settings.seed),
        percent(run.first("held-out accuracy")),
        percent(run.last("held-out accuracy")),
        percent(run.first("teacher accuracy")),
        f"{run.first('held-out KL'):.2f} to {run.last('held-out KL'):.2f}",
        f"{run.first('held-out entropy'):.2f} to {run.last('held-out entropy'):.2f}",
        f"{run.training_seconds:.0f} s",
    ]


def _charts(runs: Sequence[Run]) -> list[Markup]:
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
    return [
        line_chart(title, drawn, y_label=label, is_share=label == "right answers")
        for title, drawn, label in charts
        if any(line.points for line in drawn)
    ]


def _examples(run: Run) -> list[list[str]]:
    def mark(word: str, said: str) -> str:
        sign = "\u2713" if is_right(word, said) else "\u2717"
        return f"{said.strip() or '(nothing)'} {sign}"

    return [
        [
            f"{row['word']} ->",
            *(mark(row["word"], row[who]) for who in ("before", "after", "teacher")),
        ]
        for row in run.examples
    ]


def _step(step: StepMemory) -> list[str]:
    return [
        TRAINERS[step.trainer],
        f"{step.peak_mib:.0f} MiB",
        f"{step.peak_mib / step.logits_mib:.1f}",
        f"{step.seconds:.1f}",
        f"{step.loss:.6f}",
    ]
