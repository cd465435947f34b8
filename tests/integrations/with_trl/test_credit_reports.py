"""Test what is sent to each tracker, by stand-ins that have the real functions' parameters."""

import importlib
import inspect
import sys
import types

import pytest
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from fused_sd.credit import CreditMap, CreditRow, TokenCredit, html_page
from fused_sd.integrations.trl.credit_reports import REPORTERS, CreditReport

SHOWN = CreditMap((CreditRow((TokenCredit(7, " a\n", -1.0, -4.0, 0.5, 0.5, 1.0, 1.0),), "step"),))
CALLS = []


class Html:
    """The page that Weights & Biases and Trackio take."""

    def __init__(self, data, inject=True, data_is_not_path=False):
        assert not inject  # their styles would change the page's
        self.data = data


class SwanLabHtml:
    def __init__(self, data, caption=None):
        self.data = data


def wandb_log(data, step=None, commit=None):
    CALLS.append(("wandb", data, step))


def trackio_log(metrics, step=None):
    CALLS.append(("trackio", metrics, step))


def swanlab_log(data, step=None):
    CALLS.append(("swanlab", data, step))


def mlflow_log_text(text, artifact_file, run_id=None):
    CALLS.append(("mlflow", text, artifact_file))


# read in wandb 0.31, trackio 0.43, swanlab 0.10 and mlflow 3.17
STAND_INS = {
    "wandb": {"Html": Html, "log": wandb_log},
    "trackio": {"Html": Html, "log": trackio_log},
    "swanlab": {"Html": SwanLabHtml, "log": swanlab_log},
    "mlflow": {"log_text": mlflow_log_text},
}


def sent(name, monkeypatch):
    """Send a map by a tracker's stand-in, and return what it was given."""
    module = types.ModuleType(name)
    vars(module).update(STAND_INS[name])
    monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()
    REPORTERS[name](CreditReport(SHOWN, "reverse_kl", png=True, step=50, callbacks=[]))
    ((tracker, *given),) = CALLS
    assert tracker == name
    return given


PAGE = html_page(SHOWN, value="reverse_kl")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_page_is_logged_on_transformers_axis(name, monkeypatch):
    data, step = sent(name, monkeypatch)
    assert step is None  # the tracker counts calls; the axis is what is logged beside the page
    assert data.pop("train/global_step") == 50
    assert data.pop("credit_map").data == PAGE
    assert not data


def test_swanlab_gets_the_page_at_the_step(monkeypatch):
    data, step = sent("swanlab", monkeypatch)
    assert step == 50
    assert data.pop("credit_map").data == PAGE
    assert not data


def test_mlflow_keeps_the_page_as_a_file_of_the_run(monkeypatch):
    assert sent("mlflow", monkeypatch) == [PAGE, "credit_maps/step_000050.html"]


class Writer:
    """Record what a TensorBoard writer was asked to write."""

    def __init__(self):
        self.texts, self.figures = [], []

    def add_text(self, tag, text_string, global_step=None, walltime=None):
        self.texts.append((tag, text_string, global_step))

    def add_figure(self, tag, figure, global_step=None, close=True, walltime=None):
        self.figures.append((tag, figure, global_step))


@pytest.mark.parametrize("png", [False, True])
def test_tensorboard_gets_text_and_a_picture_if_wanted(png):
    if png:
        pytest.importorskip("matplotlib")
    board, silent = (TensorBoardCallback.__new__(TensorBoardCallback) for _ in range(2))
    board.tb_writer, silent.tb_writer = Writer(), None  # of other processes
    report = CreditReport(SHOWN, "delta", png=png, step=50, callbacks=[object(), silent, board])
    REPORTERS["tensorboard"](report)
    ((tag, text, step),) = board.tb_writer.texts
    assert (tag, step) == ("credit_map", 50)
    assert text.split("\n")[-2:] == ["     a\u21b5[-3.00]", "    "]
    assert all(line.startswith("    ") for line in text.split("\n"))
    assert [(tag, step) for tag, _, step in board.tb_writer.figures] == [("credit_map", 50)] * png


def test_the_names_are_those_of_transformers():
    assert set(REPORTERS) <= set(INTEGRATION_TO_CALLBACK)
    assert set(STAND_INS) | {"tensorboard"} == set(REPORTERS)


@pytest.mark.parametrize("name", STAND_INS)
def test_the_stand_ins_have_the_real_parameters(name):
    module = pytest.importorskip(name)
    for function, stand_in in STAND_INS[name].items():
        real = inspect.signature(getattr(module, function)).parameters
        own = inspect.signature(stand_in).parameters
        assert list(own) == list(real)[: len(own)], function


def test_the_writer_has_the_real_parameters():
    pytest.importorskip("tensorboard")
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    for name in ("add_text", "add_figure"):
        real = inspect.signature(getattr(writer, name)).parameters
        assert list(inspect.signature(getattr(Writer, name)).parameters) == list(real)
