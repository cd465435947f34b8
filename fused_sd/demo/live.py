"""Show the demo's progress and results in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_sd.demo.memory import StepMemory, time_name
from fused_sd.demo.train import Run


class Live:
    """Show a progress bar with the latest numbers beside it, and a table at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self.console,
        )

    def __enter__(self) -> "Live":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim")

    def begin(self, description: str, steps: int) -> None:
        self._task = self._bar.add_task(description, total=steps, numbers="measuring")

    def progress(self, step: int, run: Run) -> None:
        """Show the last point of the main curves; ``train`` calls this."""
        if self._task is None:
            raise RuntimeError("progress must come after begin, got no task; call begin first")
        shown = {
            "held-out": f"{100 * run.last('held-out accuracy'):.0f} %",
            "KL": f"{run.last('held-out KL'):.2f}",
            "entropy": f"{run.last('held-out entropy'):.2f}",
        }
        if "training loss" in run.curves:
            shown["loss"] = f"{run.last('training loss'):.2f}"
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self.console.is_terminal and step % 5 == 0:  # a log file has no bar to watch
            self.console.print(f"step {step}: {numbers}")

    def summary(
        self, runs: Sequence[Run], memory: Sequence[StepMemory], report: Path, seconds: float
    ) -> None:
        table = Table(title="accuracy on held-out words (exact match)")
        for name in ("seed", "before", "after", "with examples", "training"):
            table.add_column(name, justify="right")
        for run in runs:
            table.add_row(
                str(run.settings.seed),
                f"{100 * run.first('held-out accuracy'):.0f} %",
                f"{100 * run.last('held-out accuracy'):.0f} %",
                f"{100 * run.first('teacher accuracy'):.0f} %",
                f"{run.training_seconds:.0f} s",
            )
        self.console.print(table)
        for step in memory:
            self.console.print(
                f"{step.trainer} trainer: peak {step.peak_mib:.0f} MiB in one step of "
                f"{step.num_tokens} tokens, loss {step.loss:.6f}, {step.seconds:.1f} "
                f"{time_name(runs[0].settings.device)}"
            )
        self.console.print(f"report: {report} ({seconds:.0f} s in all)")
