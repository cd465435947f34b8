"""``python -m benchmarks.contention``: a loss on a CPU beside processes that want the same cores.

This library, eager PyTorch and the bare GEMMs take turns.  For each neighbour the seconds of
forward and backward are printed: the median, and in brackets the slowest run.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fused_sd.bench.floor import gemms
from fused_sd.bench.measure import tiny_is_zero
from fused_sd.bench.problem import Shape, make_problem
from fused_sd.bench.providers.eager import EAGER
from fused_sd.bench.providers.ours import FUSED_SD

START = 3.0  # seconds until a neighbour is at work


def spin() -> None:
    """Python alone."""
    while True:
        pass


def multiply() -> None:
    """A GEMM on one thread."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        torch.mm(matrix, matrix)


NEIGHBOURS: dict[str, tuple[Callable[[], None], ...]] = {
    "none": (),
    "python": (spin,),
    "gemm": (multiply,),
    "both": (spin, multiply),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contention")
    add = parser.add_argument
    add("--threads", type=int, default=torch.get_num_threads(), help="of this process")
    add("--objectives", nargs="+", default=["reverse_kl", "jsd"])
    add("--neighbours", nargs="+", default=list(NEIGHBOURS), choices=tuple(NEIGHBOURS))
    add("--sizes", nargs=3, type=int, default=[256, 512, 49152], help="tokens, hidden size, vocab")
    add("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for objective in options.objectives:
        for neighbour in options.neighbours:
            with beside(NEIGHBOURS[neighbour]), tiny_is_zero():
                times = seconds(objective, options.sizes, options.runs)
            found = [f"{name} {statistics.median(t):.3f} ({max(t):.2f})" for name, t in times]
            print(f"{objective}, {options.threads} threads, neighbour {neighbour}:", *found)


def seconds(objective: str, sizes: Sequence[int], runs: int) -> list[tuple[str, list[float]]]:
    """Seconds of each run, by what is run."""
    num_tokens, hidden_size, vocab = sizes
    shape = Shape("contended", hidden_size, vocab)
    problem = make_problem(shape, num_tokens, objective=objective, dtype=torch.float32)
    times: dict[str, list[float]] = {"fused_sd": [], "eager": [], "GEMMs": []}
    losses = {"fused_sd": FUSED_SD.build(problem), "eager": EAGER.build(problem)}
    bare = gemms(problem, wide=False)
    for _ in range(1 + runs):
        for name, loss in losses.items():
            started = time.perf_counter()
            loss().backward()
            problem.hidden.grad = problem.weight.grad = None
            times[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        bare()
        times["GEMMs"].append(time.perf_counter() - started)
    return [(name, taken[1:]) for name, taken in times.items()]  # the first warms up


@contextmanager
def beside(work: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Run neighbours, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    neighbours = [context.Process(target=each, daemon=True) for each in work]
    for neighbour in neighbours:
        neighbour.start()
    time.sleep(START if neighbours else 0)
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.join()


if __name__ == "__main__":
    main()
