"""What the row programs cost: instructions a column, launches, reads of the rows."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from divergences import EACH

import fused_sd
from fused_sd.terms.divergence_term import divergence_term
from fused_sd.torch_kernels import rows
from fused_sd.torch_kernels.rows import ROW_METRICS, RowGradient

triton = pytest.importorskip("triton")
from launches import Launches

from fused_sd.kernels import rows as kernels

TESTS = pathlib.Path(__file__).parents[1]
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = [divergence for divergence, _ in EACH.values()]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

# The most instructions that a column of a pair of rows may take in code for sm_90, by what is
# asked for: in the pass that finds loss and gradient together, or in that for the loss and that
# for the gradient.
MOST = {
    "log_normalizer": (11,),
    "lse_and_entropy": (21,),
    "normalizers": (26,),
    "normalizers and largest": (32,),
    "softmax_gradient": (8,),
    "reverse_kl": (32,),
    "forward_kl": (32,),
    "mixed_kl": (50,),
    "jsd": (49, 37),
    "jsd of beta 0.3": (59, 41),
    "jsd of beta 0.01": (104, 75),
    "skew_kl": (58, 46),
    "skew_kl of weight 0.1": (120, 106),
    "forward_kl, entry clip": (36, 36),
    "metrics but jsd": (45,),
    "all metrics": (74,),
    "reverse_kl, entropies": (37,),
    "reverse_kl, all metrics": (79,),
    "jsd, all metrics": (82, 37),
    "jsd of beta 0.3, all metrics": (113, 41),
}


@pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="no NVIDIA tools in this Triton")
def test_a_column_takes_few_instructions_and_no_spills():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(TESTS.parent)
    command = [sys.executable, str(TESTS / "support" / "count_instructions.py"), "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    counted: dict[str, list[float]] = {case: [] for case in MOST}
    for launch in json.loads(run.stdout):
        assert launch["spilled"] == 0, launch
        counted[launch["case"]].append(launch["instructions"])
    for case, most in MOST.items():
        assert len(counted[case]) == len(most), case
        for instructions, bound in zip(counted[case], most):
            assert 5 < instructions <= bound, f"{case}: {counted[case]} instructions a column"


ONE, TWO = ["divergence_gradient"], ["divergence", "divergence_gradient"]


@pytest.mark.parametrize("names", [(), ("reverse_kl", "student_entropy"), ROW_METRICS], ids=len)
@pytest.mark.parametrize(
    "divergence, entry_clip, with_gradient, programs",
    [
        ("reverse_kl", None, True, ONE),
        ("forward_kl", None, True, ONE),
        (fused_sd.MixedKl(0.3), None, True, ONE),
        (fused_sd.Jsd(0.5), None, True, TWO),
        (fused_sd.SkewKl(), None, True, TWO),
        ("forward_kl", 0.05, True, TWO),
        ("reverse_kl", None, False, ["divergence"]),
        (fused_sd.Jsd(0.5), 0.05, False, ["divergence"]),
    ],
    ids=str,
)
def test_nothing_runs_but_the_programs(
    monkeypatch, divergence, entry_clip, with_gradient, programs, names
):
    """Metrics add no launch, and no small kernel of PyTorch runs around the programs."""
    student, teacher = torch.randn(2, 4, 300, device=DEVICE)
    weights = torch.ones(4, device=DEVICE)
    gradient = RowGradient(weights, None, student) if with_gradient else None
    with Launches(monkeypatch) as launches:
        sides = kernels.normalizers(student, teacher)
        assert launches.kernels == {"normalizers": 1}
        term = divergence_term(divergence)
        found = kernels.divergence_(student, teacher, sides, term, entry_clip, gradient, names)
        assert launches.kernels == dict.fromkeys(["normalizers", *programs], 1)
    assert list(found.metrics) == list(names)
    assert (found.clipped is None) == (entry_clip is None)


@pytest.mark.parametrize("entry_clip", [None, 0.02])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, fused_sd.Jsd(0.5)], ids=str)
def test_metrics_ride_along(divergence, with_gradient, entry_clip):
    """They equal the metrics that are found alone, and loss and gradient do not notice them."""
    student = 4 * torch.randn(3, 4201, device=DEVICE)
    teacher = student + 0.3 * torch.randn_like(student)
    student[0, 5] = teacher[0, 5] = -torch.inf
    student[:, -3:] = teacher[:, -3:] = -torch.inf
    sides, term = kernels.normalizers(student, teacher), divergence_term(divergence)
    pair = student.double(), teacher.double()
    exact = rows.row_metrics(*pair, rows.normalizers(*pair), ROW_METRICS)
    alone = kernels.row_metrics(student, teacher, sides, ROW_METRICS)
    found = []
    for names in ((), ROW_METRICS, ROW_METRICS[1:4]):
        out = torch.zeros_like(student)
        gradient = RowGradient(torch.ones(3, device=DEVICE), None, out) if with_gradient else None
        compared = kernels.divergence_(student, teacher, sides, term, entry_clip, gradient, names)
        assert list(compared.metrics) == list(names)
        for name, value in compared.metrics.items():
            assert_close(value, exact[name], torch.float32, name)
            assert_close(value, alone[name].double(), torch.float32, name)
        found.append((compared.loss, out))
    for loss, out in found[1:]:
        assert_close(loss, found[0][0].double(), torch.float32)
        assert_close(out, found[0][1].double(), torch.float32)
        if (
            DEVICE == "cpu"
        ):  # a GPU's compiler may join a product and a sum in one and not the other
            assert torch.equal(loss, found[0][0])
            assert torch.equal(out, found[0][1])


def test_a_metric_that_is_the_loss_is_not_computed_again():
    student, teacher = torch.randn(2, 3, 300, device=DEVICE)
    sides = kernels.normalizers(student, teacher)
    for divergence, name, is_loss in (
        ("reverse_kl", "reverse_kl", True),
        (fused_sd.Jsd(0.5), "jsd", True),
        (fused_sd.Jsd(0.3), "jsd", False),
        ("forward_kl", "reverse_kl", False),
    ):
        term = divergence_term(divergence)
        found = kernels.divergence_(student, teacher, sides, term, None, None, (name,))
        assert (found.metrics[name] is found.loss) == is_loss
    clipped = kernels.divergence_(
        student, teacher, sides, divergence_term("reverse_kl"), 1e-3, None, ("reverse_kl",)
    )
    assert (clipped.loss < clipped.metrics["reverse_kl"]).all()
