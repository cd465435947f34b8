"""Every objective by this library and by what else is installed, on small shapes: ``make bench``.

A loss is compared with float64 before it is timed.  Another package that is not here, or needs a
GPU, is skipped with its reason; ``make bench`` installs those that run on a CPU.
"""

import functools
import os
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("pytest_benchmark")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from benchmarks.suites import COMPILING, QUICK
from fused_sd.bench.accuracy import Truth, errors, find_truth
from fused_sd.bench.measure import peak_bytes
from fused_sd.bench.problem import OBJECTIVES, SHAPES, Problem, make_problem, refill_, variant
from fused_sd.bench.providers import PROVIDERS, Provider
from fused_sd.measuring.environment import default_device

NUM_TOKENS = 64
ROUNDS = 5
DEVICE = default_device()
COMPILES = (*COMPILING, "Liger fused_linear_grpo")  # for longer than all the rest takes on a CPU
NAMES = [name for name in QUICK if name not in COMPILES] if DEVICE.type == "cpu" else QUICK
WITH_FROZEN_HEAD = ("fused_sd", "eager")
CASES = [
    pytest.param(provider, objective, trainable, id=f"{provider.name}-{objective}-{head}")
    for objective in OBJECTIVES
    for trainable, head in ((True, "trained"), (False, "frozen"))
    for provider in PROVIDERS
    if provider.name in NAMES and objective in provider.objectives
    if trainable or provider.name in WITH_FROZEN_HEAD
]


@pytest.fixture(scope="module")
def source() -> Problem:
    return make_problem(SHAPES["small"], NUM_TOKENS, dtype=torch.float32, device=DEVICE)


@pytest.fixture(scope="module")
def truth_of(source) -> Callable[[str], Truth]:
    return functools.cache(lambda objective: find_truth(variant(source, objective=objective)))


@pytest.mark.parametrize("provider, objective, trainable", CASES)
def test_loss(
    benchmark,
    source: Problem,
    truth_of: Callable[[str], Truth],
    provider: Provider,
    objective: str,
    trainable: bool,
):
    """Forward and backward; the peak memory is in the report's extra information."""
    problem = variant(source, objective=objective, trainable=trainable)
    reason = provider.why_not(problem)
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")
    truth = truth_of(objective)
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
