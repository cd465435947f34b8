"""Send credit maps to the trackers that a trainer reports to.

``REPORTERS`` has a function for each name of ``report_to`` whose tracker can show a page or a text.
A trainer's trackers are found by their callbacks, so that one which was added by hand counts, too.
The trackers' own modules are imported when the first map is sent: transformers' callbacks have
imported them before and have begun the run that the maps go to.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from fused_sd.credit import CreditMap, credit_figure, html_page, plain_text

TAG = "credit_map"


@dataclass(frozen=True)
class CreditReport:
    """Hold a map and how to show it.

    Attributes:
        shown: the map.
        value: the number that colours the tokens.
        png: whether to draw a picture where the page cannot be shown.
        step: the trainer's step.
        callbacks: the trainer's callbacks, of which TensorBoard's has the writer.
    """

    shown: CreditMap
    value: str
    png: bool
    step: int
    callbacks: Iterable[Any]

    @property
    def page(self) -> str:
        return html_page(self.shown, value=self.value)


def to_wandb(report: CreditReport) -> None:
    """Log the page to Weights & Biases, on the axis that transformers' callback defines."""
    import wandb

    page = wandb.Html(report.page, inject=False)
    wandb.log({TAG: page, "train/global_step": report.step})


def to_trackio(report: CreditReport) -> None:
    """Log the page to Trackio, whose interface is that of Weights & Biases."""
    import trackio

    page = trackio.Html(report.page, inject=False)
    trackio.log({TAG: page, "train/global_step": report.step})


def to_swanlab(report: CreditReport) -> None:
    """Log the page to SwanLab."""
    import swanlab

    swanlab.log({TAG: swanlab.Html(report.page)}, step=report.step)


def to_mlflow(report: CreditReport) -> None:
    """Log the page to MLflow, which shows HTML files among a run's artifacts."""
    import mlflow

    mlflow.log_text(report.page, f"{TAG}s/step_{report.step:06d}.html")


def to_tensorboard(report: CreditReport) -> None:
    """Write the map as text to TensorBoard, which has no pages, and as a picture if wanted."""
    text = plain_text(report.shown, value=report.value)
    # TensorBoard renders Markdown, in which indented lines are shown as they are
    block = "\n".join(f"    {line}" for line in text.split("\n"))
    for callback in report.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(TAG, block, report.step)
            if report.png:
                figure = credit_figure(report.shown, value=report.value)
                callback.tb_writer.add_figure(TAG, figure, report.step)


REPORTERS: dict[str, Callable[[CreditReport], None]] = {
    "mlflow": to_mlflow,
    "swanlab": to_swanlab,
    "tensorboard": to_tensorboard,
    "trackio": to_trackio,
    "wandb": to_wandb,
}
"""What sends a map, by the names of transformers' ``report_to``."""


def send(report: CreditReport) -> None:
    """Send a map to all of the trainer's trackers that can show it."""
    names = {name for callback in report.callbacks for name in trackers(callback)}
    for name, reporter in REPORTERS.items():
        if name in names:
            reporter(report)


def without_maps(callbacks: Iterable[Any]) -> list[str]:
    """Return the names of the trackers to which no map goes."""
    found = [trackers(callback) for callback in callbacks]
    return [name for names in found if not REPORTERS.keys() & names for name in names]


def trackers(callback: Any) -> list[str]:
    """Return the names of a callback's tracker in ``report_to``; none: it reports to no tracker."""
    return [name for name, kind in INTEGRATION_TO_CALLBACK.items() if isinstance(callback, kind)]
