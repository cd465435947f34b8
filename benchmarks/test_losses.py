"""Every objective by this library and by eager PyTorch on small shapes: ``make bench``.

A loss is compared with float64 before it is timed.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from fused_sd.bench.accuracy import errors, find_truth
from fused_sd.bench.measure import peak_bytes
from fused_sd.bench.problem import OBJECTIVES, SHAPES, Problem, make_problem, refill_, variant
from fused_sd.bench.providers import PROVIDERS

NAMES = ("fused_sd", "eager")
ROUNDS = 5


@pytest.fixture(scope="module")
def source() -> Problem:
    return make_problem(SHAPES["small"], 128, dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("trainable", [True, False], ids=["trained", "frozen"])
def test_loss(benchmark, source, objective, name, trainable):
    """Forward and backward; the peak memory is in the report's extra information."""
    (provider,) = (p for p in PROVIDERS if p.name == name)
    problem = variant(source, objective=objective, trainable=trainable)
    truth = find_truth(problem)
    refill_(problem, source, truth.tokens)
    build = provider.build(problem)
    loss = build()
    loss.backward()
    found = errors(truth, problem, loss.detach())
    assert not found.beyond(truth.bound), found
    refill_(problem, source, torch.arange(len(problem.mask)))

    def run() -> None:
        build().backward()
        problem.hidden.grad = problem.weight.grad = None

    benchmark.group = f"{objective}, {'trained' if trainable else 'frozen'}"
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["peak_bytes"] = peak_bytes(run, problem.hidden.device)
    benchmark.extra_info["errors"] = found._asdict()
