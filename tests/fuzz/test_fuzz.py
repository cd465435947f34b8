"""A short form of the fuzzing, and the shrunk cases that once failed in it."""

import math
import os

import pytest
import torch

pytest.importorskip("trl")

import fuzz_junk
import fuzz_losses
import fuzz_relations
import fuzz_texts
from fuzz_losses import compare, eager, exact, fused
from fuzz_problem import Ids, Problem, draw

import fused_sd
from fused_sd import Jsd, LMHead

TIMES = 20 if os.environ.get("FUSED_SD_TEST_FULL") else 1
pytestmark = pytest.mark.filterwarnings("ignore")  # of reductions and deprecated dtypes


@pytest.mark.parametrize(
    "area, count",
    [(fuzz_losses, 100), (fuzz_relations, 30), (fuzz_junk, 300), (fuzz_texts, 100)],
    ids=["losses", "relations", "junk", "texts"],
)
def test_drawn_cases(area, count):
    failures = {seed: area.check(seed) for seed in range(count * TIMES)}
    assert {seed: found for seed, found in failures.items() if found} == {}


def test_a_problem_is_made_again_by_its_code():
    names = {name: getattr(fused_sd, name) for name in fused_sd.__all__}
    for seed in range(50):
        p = draw(seed)
        again = eval(repr(p), {"Problem": Problem, "Ids": Ids, "torch": torch, **names})
        assert vars(again) == vars(p) or "FullVocabulary" in repr(p)


def test_a_wrong_loss_is_found(monkeypatch):
    p = Problem(loss="gkd_loss", settings={"beta": 0.5}, options={"reduction": "sum"})
    assert compare(p).failures == []
    real = fuzz_losses.fused
    off = {"loss": 1 + 1e-9, "dhidden": 1 + 1e-9}
    monkeypatch.setattr(
        fuzz_losses,
        "fused",
        lambda *given: {name: value * off.get(name, 1) for name, value in real(*given).items()},
    )
    assert [line.split(":")[0] for line in compare(p).failures] == ["loss", "dhidden"]


def test_a_failure_is_shrunk(monkeypatch):
    drawn = Problem(
        seed=3,
        loss="gkd_loss",
        settings={"beta": 0.5},
        options={"temperature": 2.0, "reduction": "sum"},
        tokens=(4, 3),
        vocab=40,
        head={"softcap": 2.0},
    )
    monkeypatch.setattr(fuzz_losses, "fails", lambda p, backend: "softcap" in p.head)
    shrunk = fuzz_losses.shrunk(drawn, "auto")
    assert shrunk.head == {"softcap": 2.0}
    assert shrunk.options == {}
    assert shrunk.num_tokens <= 2
    assert shrunk.vocab <= 8


@pytest.mark.parametrize("loss", ["cross_entropy_loss", "divergence_loss"])
def test_a_token_without_a_batch_has_metrics(loss):
    settings = {"ignore_index": -100} if loss == "cross_entropy_loss" else {}
    options = {"metrics": ("student_entropy",), "reduction": "sum"}
    p = Problem(loss=loss, settings=settings, options=options, tokens=())
    assert compare(p).failures == []
    assert fused(p)["metric student_entropy"].shape == ()


def test_k3_of_a_token_that_the_reference_excludes_has_a_gradient():
    """It was constant from a log-ratio of 20 on, where the penalty matters most."""
    hidden, head = torch.zeros(1, 4, requires_grad=True), torch.eye(4)
    output = fused_sd.sampled_kl_loss(
        *(hidden, head, torch.tensor([2])),
        teacher_log_probs=torch.tensor([-301.0]),
        estimator="k3",
        reduction="sum",
    )
    output.loss.backward()
    gap = 301 - torch.tensor(4.0).log()
    assert output.loss.item() == pytest.approx(float(gap - 1))
    assert hidden.grad[0].tolist() == pytest.approx([-0.25, -0.25, 0.75, -0.25])


def test_k3_of_a_token_that_the_policy_excludes_does_not_overflow():
    hidden, head = torch.zeros(1, 4, requires_grad=True), 400 * torch.eye(4)
    hidden.data[0, 0] = 1.0
    output = fused_sd.sampled_kl_loss(
        *(hidden, head, torch.tensor([2])),
        teacher_log_probs=torch.tensor([-1.0]),
        estimator="k3",
        reduction="sum",
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(math.exp(20) - 21)
    assert not hidden.grad.any()


def test_a_mixture_close_to_one_side_keeps_its_digits():
    """A token loss of Jsd(0.999) was off by 1e-2 of itself in fp32."""
    worst = []
    for seed in range(12):
        p = Problem(
            seed=seed,
            loss="gkd_loss",
            settings={"beta": Jsd(0.999)},
            options={"reduction": "sum"},
            tokens=(8,),
            hidden_size=8,
            vocab=50,
            dtype="float32",
        )
        mine, theirs, true = (f(p)["token_loss"].double() for f in (fused, eager, exact))
        worst.append([float(((x - true) / true).abs().max()) for x in (mine, theirs)])
    ours, eagers = torch.tensor(worst).amax(0).tolist()
    assert ours <= 2e-5
    assert ours <= eagers


@pytest.mark.parametrize("forward_weight", [0.0, 1.0])
def test_a_mixture_of_one_kl_does_not_see_the_other(forward_weight):
    """0 times a KL that is infinite was NaN."""
    head, lacking = torch.eye(4), torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    full, without = LMHead(head), LMHead(head, bias=lacking)
    sides = (without, full) if forward_weight == 0 else (full, without)
    hidden = torch.randn(3, 4, requires_grad=True)
    output = fused_sd.divergence_loss(
        *(hidden, sides[0], torch.randn(3, 4), sides[1]),
        divergence=fused_sd.MixedKl(forward_weight),
        reduction="sum",
    )
    output.loss.backward()
    assert output.loss.isfinite()
    assert hidden.grad.isfinite().all()
