"""Blocks of rows on several threads: the same bits for any number, and nothing else changed.

Dimension key:  C rows, W columns
"""

import subprocess
import sys
import threading

import pytest
import torch

from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels import row_blocks, rows, selection
from fused_sd.torch_kernels.row_blocks import for_row_blocks

WIDTH = 40_000  # several rows in a block, and more numbers than PyTorch leaves to one thread

needs_openmp = pytest.mark.skipif(row_blocks._openmp() is None, reason="PyTorch without OpenMP")


@pytest.fixture
def threads():
    """A setter of PyTorch's number of threads, which is restored at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(student, teacher):
    """What every function on rows of logits finds, and the gradients that they write."""
    normalizers = rows.normalizers(student, teacher)
    weights = torch.linspace(0, 1, len(student))
    found = [*normalizers[:2], *rows.lse_and_entropy(student)]
    for term in (DivergenceTerm("reverse_kl", 0.0), DivergenceTerm("jsd", 0.3)):
        out = torch.empty_like(student)
        gradient = rows.RowGradient(weights, 30.0, out)
        given = student, teacher, normalizers, term, 0.01, gradient, rows.ROW_METRICS
        loss, clipped, metrics = rows.divergence_(*given)
        found += [loss, clipped, *metrics.values(), out]
    out = torch.empty_like(student)
    rows.softmax_gradient_(student, normalizers.student, weights, -weights, None, out)
    return [*found, out, *selection.select(out, 2**-6, 300)]


@pytest.mark.parametrize("apart", [0.1, 40.0], ids=["near", "far"])
def test_results_are_the_same_bits_for_any_number_of_threads(threads, apart):
    student = torch.randn(23, WIDTH)
    teacher = student + apart * torch.randn(23, WIDTH)
    threads(1)
    expected = results(student, teacher)
    for count in (2, 3, 30):
        threads(count)
        found = results(student, teacher)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@needs_openmp
def test_blocks_run_at_the_same_time_each_on_one_thread(threads):
    threads(3)
    together = threading.Barrier(3, timeout=60)
    seen = []

    def work(at, own):
        together.wait()
        own.fill_(at.start)
        together.wait()
        seen.append((at.start, torch.get_num_threads(), (own == at.start).all().item()))

    size = row_blocks.rows_in_block(100, WIDTH)
    for_row_blocks(torch.empty(3 * size, WIDTH), 1, work)
    assert sorted(seen) == [(at * size, 1, True) for at in range(3)]
    assert row_blocks.rows_in_work(3 * size, WIDTH) == 3 * size
    assert row_blocks.rows_in_work(300 * size, WIDTH) == 3 * size
    others = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *others] == [3, 3]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_in_a_block_reaches_the_caller(threads, count, where):
    threads(count)
    caller = threading.get_ident()
    helped, has_helper = threading.Event(), row_blocks._num_workers(9) > 1

    def work(at):
        is_helper = threading.get_ident() != caller
        if is_helper:
            helped.set()
        elif where == "helper" and has_helper:  # else the caller may take every block
            assert helped.wait(60)
        if is_helper == (where == "helper") or count == 1:
            raise LookupError(f"rows from {at.start}")

    if not has_helper and where == "helper" and count == 2:
        pytest.skip("no helper without OpenMP")
    with pytest.raises(LookupError, match="rows from"):
        for_row_blocks(torch.empty(99, WIDTH), 0, work)
    assert torch.get_num_threads() == count


def test_autograd_inference_mode_and_rounding_to_zero_are_the_callers(threads):
    threads(2)
    tiny = torch.full((40, WIDTH), 1e-30, requires_grad=True)
    with torch.inference_mode():
        inference = torch.zeros(40)
    default = torch.get_default_dtype()
    for out, dtype in (
        (torch.zeros(40), default),
        (torch.zeros(40), torch.float64),
        (inference, default),
    ):
        for flushes in (True, False):
            torch.set_flush_denormal(flushes)
            torch.set_default_dtype(dtype)
            try:
                with torch.inference_mode(out.is_inference()), torch.no_grad():
                    for_row_blocks(
                        tiny, 0, lambda at, out=out: torch.sum(tiny[at] * 1e-10, -1, out=out[at])
                    )
            finally:
                torch.set_flush_denormal(False)
                torch.set_default_dtype(default)
            assert ((out == 0) == flushes).all()
            assert not out.requires_grad


def test_several_callers_share_the_helpers(threads):
    threads(2)
    student = torch.randn(40, WIDTH)
    expected = rows.log_normalizer(student)
    found = []
    callers = [
        threading.Thread(target=lambda: found.append(rows.log_normalizer(student)))
        for _ in range(5)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 5
    assert all(torch.equal(one, expected) for one in found)


def test_a_forked_child_and_the_end_of_the_program_need_no_running_helpers():
    script = (
        "import atexit, os, torch\n"
        "from fused_sd.torch_kernels import rows\n"
        "torch.set_num_threads(2)\n"
        f"logits = torch.randn(40, {WIDTH})\n"
        "expected = rows.log_normalizer(logits)\n"
        "def again(): assert torch.equal(rows.log_normalizer(logits), expected)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    again()\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "atexit.register(lambda: (again(), print('done')))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n"


@pytest.mark.parametrize("apart", [0.1, 40.0], ids=["near", "far"])
@pytest.mark.parametrize(
    "name, parameter", [("reverse_kl", 0.0), ("jsd", 0.5), ("jsd", 0.2), ("skew_kl", 0.8)]
)
def test_metrics_beside_a_loss_are_those_of_a_pass_of_their_own(name, parameter, apart):
    student = torch.randn(23, 1000, dtype=torch.float64)
    teacher = student + apart * torch.randn_like(student)
    normalizers = rows.normalizers(student, teacher)
    given = student, teacher, normalizers, DivergenceTerm(name, parameter), None
    gradients = [
        rows.RowGradient(torch.ones(23, dtype=torch.float64), None, torch.empty_like(student))
        for _ in range(2)
    ]
    beside = rows.divergence_(*given, gradients[0], rows.ROW_METRICS)
    alone = rows.divergence_(*given, gradients[1])
    own = rows.row_metrics(student, teacher, normalizers, rows.ROW_METRICS)
    assert beside.metrics.keys() == own.keys() == set(rows.ROW_METRICS)
    assert alone.metrics == {}
    for metric, values in own.items():
        torch.testing.assert_close(beside.metrics[metric], values, rtol=1e-12, atol=1e-13)
    assert torch.equal(beside.loss, alone.loss)
    assert torch.equal(gradients[0].out, gradients[1].out)
    assert beside.clipped is None
