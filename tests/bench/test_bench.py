"""Measuring: realistic problems, the truth about gradients, time, memory, floors and verdicts."""

import io
import json
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from fused_sd import reference
from fused_sd.bench import command, progress, rounds
from fused_sd.bench.accuracy import DEFINITIONS, errors, find_truth
from fused_sd.bench.cell import Cell, Row
from fused_sd.bench.floor import BareGemms, Floor, products
from fused_sd.bench.limits import DeviceLost, TimeLimit, TimeUp
from fused_sd.bench.measure import (
    Effort,
    Times,
    affordable,
    peak_bytes,
    quantile,
    timed,
    times_of,
    warm_up,
)
from fused_sd.bench.problem import OBJECTIVES, SHAPES, Problem, make_problem, refill_, variant
from fused_sd.bench.providers import PROVIDERS, Provider
from fused_sd.bench.rounds import measure_cell
from fused_sd.bench.table import report_lines, table_lines, verdict_lines
from fused_sd.cli import main
from fused_sd.engine.out_of_memory import is_out_of_memory
from fused_sd.verify.promises import Sparsity

CPU = torch.device("cpu")
QUICK = Effort(0.0, 2)
FUSED, SPARSE, EAGER = (
    next(provider for provider in PROVIDERS if provider.name == name)
    for name in ("fused_sd", "fused_sd, sparse", "eager")
)


@pytest.fixture(scope="module")
def source() -> Problem:
    return make_problem(SHAPES["tiny"], 150)


def stub(name, build, why_not=lambda problem: None):
    """A provider of every objective."""
    return Provider(name, None, frozenset(OBJECTIVES), why_not, build, False, "")


def test_a_problem_is_like_a_policy_and_its_teacher():
    problem = make_problem(SHAPES["tiny"], 600, seed=3)
    assert problem.hidden.dtype == torch.bfloat16
    student, teacher = (
        reference.logits(hidden.detach(), problem.weight.detach())
        for hidden in (problem.hidden, problem.teacher_hidden)
    )
    assert 20 < student.amax(-1).mean() < 30
    assert 0.3 < reference.entropy(student).mean() < 1.3
    assert 0.02 < reference.gkd(student, teacher, beta=0.0).mean() < 0.1
    log_probs = reference.token_log_prob(student, problem.token_ids)
    assert float(-log_probs.mean()) == pytest.approx(
        float(reference.entropy(student).mean()), rel=0.2
    )
    ratio = (log_probs - problem.old_log_probs).exp()
    clipped = ((ratio - 1).abs() > 0.2).double().mean()
    assert 0.03 < clipped < 0.15
    assert problem.advantages.abs().min() >= 0.5
    assert 0.4 < (problem.advantages > 0).double().mean() < 0.6


def test_a_seed_means_the_same_problem():
    one, other, third = (make_problem(SHAPES["tiny"], 40, seed=seed) for seed in (1, 1, 2))
    for name in ("hidden", "weight", "teacher_hidden", "token_ids", "old_log_probs", "advantages"):
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert not torch.equal(getattr(one, name), getattr(third, name))


@pytest.mark.parametrize("entropy", [0.3, 1.3])
def test_the_entropy_is_chosen(entropy):
    problem = make_problem(SHAPES["tiny"], 600, entropy=entropy, dtype=torch.float32)
    student, teacher = (
        reference.logits(hidden.detach(), problem.weight.detach())
        for hidden in (problem.hidden, problem.teacher_hidden)
    )
    entropies = reference.entropy(student)
    assert torch.allclose(problem.entropies.double(), entropies.double(), atol=1e-4)
    assert float(entropies.mean()) == pytest.approx(entropy, rel=0.25)
    decided, open_ = entropies.quantile(torch.tensor([0.1, 0.9]).to(entropies))
    assert decided < 0.1 * entropy < 1.5 * entropy < open_
    assert 0.02 < reference.gkd(student, teacher, beta=0.0).mean() < 0.1
    gradient = (student.softmax(-1) - teacher.softmax(-1)).abs()
    tails = gradient.sort(-1, descending=True).values.flip(-1).cumsum(-1).flip(-1)
    entries = (tails > 2**-8 * gradient.sum(-1, keepdim=True)).sum(-1)
    assert entries.median() < (10 if entropy < 1 else 80)


def test_variants_share_heads_and_own_their_tokens(source):
    made = variant(source, objective="jsd", num_tokens=100, trainable=False, mask_share=0.5)
    assert made.objective == "jsd"
    assert made.weight.data_ptr() == source.weight.data_ptr()
    assert made.teacher_weight is made.weight
    assert not made.trainable
    assert int(made.mask.sum()) == 50
    assert made.hidden.requires_grad
    assert made.hidden.is_leaf
    assert torch.equal(made.hidden, source.hidden[:100])
    refill_(made, source, torch.full((100,), 7))
    assert torch.equal(made.hidden[3], source.hidden[7])
    assert not torch.equal(source.hidden[3], source.hidden[7])
    apart = make_problem(SHAPES["tiny"], 8, shared_head=False)
    assert apart.teacher_weight.data_ptr() != apart.weight.data_ptr()
    assert torch.equal(variant(apart).teacher_weight, apart.weight)


def found_errors(source, provider, objective, **choices):
    """A provider's errors on the copied tokens, and the bound."""
    problem = variant(source, objective=objective, **choices)
    truth = find_truth(problem)
    refill_(problem, source, truth.tokens)
    loss = provider.build(problem)()
    loss.backward()
    return errors(truth, problem, loss.detach()), truth.bound


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_library_is_found_right_and_rounded_logits_within_the_bound(source, objective):
    ours, bound = found_errors(source, FUSED, objective, mask_share=0.4)
    assert abs(ours.loss_bias) < 1e-4
    assert max(ours.dhidden, ours.dweight) < 3e-3
    assert not ours.beyond(bound)
    theirs, _ = found_errors(source, EAGER, objective, mask_share=0.4)
    assert theirs.dhidden > 4 * ours.dhidden
    assert not theirs.beyond(bound)


@pytest.mark.parametrize("objective", sorted(SPARSE.objectives))
def test_a_sparse_gradient_is_measured_with_its_certificate(source, objective):
    problem = variant(source, objective=objective, mask_share=0.4)
    cell = measure_cell(problem, source, [FUSED, SPARSE], QUICK)
    dense, sparse = cell.rows
    assert (dense.status, sparse.status) == ("ok", "ok"), sparse.reason
    assert dense.kept is None
    assert 0 < sparse.kept.entries < cell.vocab
    assert 0 <= sparse.kept.dense_share <= 1
    assert 0 <= sparse.kept.dropped_share <= 2**-8
    assert sparse.errors.dhidden < 2**-6
    assert json.loads(json.dumps(cell.as_json()))["rows"][1]["kept"] == sparse.kept._asdict()
    (line,) = (line for line in table_lines(cell) if line.startswith("fused_sd, sparse: "))
    assert f"{sparse.kept.entries:.3g} entries a token" in line


def test_a_frozen_head_has_no_error_of_its_gradient(source):
    ours, bound = found_errors(source, FUSED, "reverse_kl", trainable=False)
    assert ours.dweight is None
    assert not ours.beyond(bound)


def other(objective):
    """The library with another objective than the problem's."""
    return stub("other", lambda problem: FUSED.build(replace(problem, objective=objective)))


def scaled(factor):
    return stub("scaled", lambda problem: lambda: factor * FUSED.build(problem)())


def unmasked():
    everything = lambda p: FUSED.build(replace(p, mask=torch.ones_like(p.mask)))  # noqa: E731
    return stub("unmasked", everything)


@pytest.mark.parametrize(
    "objective, wrong",
    [
        ("forward_kl", other("reverse_kl")),
        ("reverse_kl", other("forward_kl")),
        ("jsd", other("reverse_kl")),
        ("topk_tail", other("topk_renormalized")),
        ("rlsd", other("cross_entropy")),
        ("grpo", other("token_log_probs")),
        ("jsd", scaled(0.5)),
        ("cross_entropy", scaled(1.05)),
        ("topk_renormalized", unmasked()),
    ],
)
def test_another_loss_is_beyond_the_bound(source, objective, wrong):
    theirs, bound = found_errors(source, wrong, objective, mask_share=0.4)
    assert theirs.beyond(bound)


def test_a_nan_is_within_no_bound(source):
    ours, bound = found_errors(source, scaled(float("nan")), "jsd")
    assert len(ours.beyond(bound)) == 3


def test_every_objective_has_its_definition_and_its_products():
    assert set(DEFINITIONS) == set(OBJECTIVES)
    u = {o: (products(o, True).u, products(o, False).u) for o in OBJECTIVES}
    assert u["jsd"] == u["opsd"] == u["reverse_kl"] == u["topk_tail"] == u["rlsd"] == (4, 3)
    assert u["cross_entropy"] == u["token_log_probs"] == u["grpo"] == (3, 2)
    assert u["topk_renormalized"] == (1, 1)


def test_the_floor_counts_the_tokens_that_count(source):
    problem = variant(source, objective="jsd", mask_share=0.5)
    bare = BareGemms(problem, QUICK, 0.0)
    assert bare.floor() is None
    bare.warm_up()
    assert bare.left == 2
    for _ in range(2):
        bare.take_turn(1)
    floor = bare.floor()
    assert [len(taken) for taken in bare.milliseconds.values()] == [2, 2]  # bf16, and fp32
    counted = int(problem.mask.sum())
    assert floor.u == 4
    assert floor.flop == 4 * 2 * counted * 64 * 1024
    assert floor.row_bytes == (24 + 2) * counted * 1024
    assert 0 < floor.milliseconds == min(floor.wide_ms, floor.narrow_ms)


def test_numbers_below_the_smallest_normal_one_are_not_measured(source):
    seen = []

    def watched(problem):
        seen.append(float(torch.tensor(1e-30) * 1e-10))
        return EAGER.build(problem)

    measure_cell(variant(source), source, [stub("watched", watched)], None)
    assert seen == [0.0]
    assert float(torch.tensor(1e-30) * 1e-10) > 0


def test_peak_memory_is_exact_on_a_cpu():
    def run():
        first = torch.empty(1000, 1000)
        second = torch.empty(2000, 1000)
        del first
        third = torch.empty(3000, 1000)
        del second, third

    assert peak_bytes(run, CPU) == 4 * 5_000_000
    leaf = torch.randn(300, 500, requires_grad=True)

    def backward():
        (leaf * 2).sum().backward()
        leaf.grad = None

    assert leaf.nbytes <= peak_bytes(backward, CPU) < leaf.nbytes + 100  # the gradient, scalars


def test_time_is_taken_as_often_as_asked_and_affordable():
    calls = []
    run = lambda: calls.append(None)  # noqa: E731
    assert warm_up(run, CPU, 0.0) > 0
    times = times_of(timed(run, CPU, 7))
    assert (times.runs, len(calls)) == (7, 8)
    assert 0 <= times.p20 <= times.p50 <= times.p80
    assert affordable(Effort(0.0, 50, 10.0, 3), 1.0) == 10
    assert affordable(Effort(0.0, 50, 10.0, 3), 9.0) == 3
    assert affordable(Effort(0.0, 50, 10.0, 3), 0.0) == 50
    assert [quantile([4.0, 1.0, 2.0, 3.0, 5.0], share) for share in (0.2, 0.5, 1.0)] == [
        pytest.approx(1.8),
        3.0,
        5.0,
    ]


def test_a_gpu_is_timed_by_its_events_and_weighed_by_its_allocator(monkeypatch):
    """With a stand-in for PyTorch's CUDA: a run takes 3 ms and holds 5 bytes at most."""
    clock, held = [0.0], {"peak": 7}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, later):
            return later.at - self.at

    def run():
        clock[0] += 3.0
        held["peak"] = max(held["peak"], 7 + 5)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    reset = lambda device: held.update(peak=7)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    gpu = torch.device("cuda")
    assert timed(run, gpu, 4) == [3.0] * 4
    held["peak"] = 100
    assert peak_bytes(run, gpu) == 5


@pytest.mark.gpu
def test_a_cell_on_a_gpu():
    drawn = make_problem(SHAPES["small"], 600, device="cuda")
    for objective in OBJECTIVES:
        problem = variant(drawn, objective=objective, mask_share=0.5)
        cell = measure_cell(problem, drawn, [FUSED, EAGER], Effort(0.01, 5))
        assert [row.status for row in cell.rows] == ["ok", "ok"], cell.rows
        ours, theirs = cell.rows
        assert 0 < ours.times.p20 <= ours.times.p80
        assert 0 < ours.errors.dhidden < 6e-3
        assert min(ours.peak_bytes, theirs.peak_bytes) > problem.weight.nbytes
        assert cell.floor.milliseconds > 0


def test_running_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory"))  # Windows
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert not is_out_of_memory(RuntimeError("illegal memory access"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_provider_has_so_much_time(source):
    """An endless loop, a slow call between two runs, and runs that would take too long."""

    def endless(problem):
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # as in libraries that try one way after the other
                continue

    def slow(problem):
        def loss():
            time.sleep(0.5)
            return EAGER.build(problem)()

        return loss

    everybody = [FUSED, stub("endless", endless), stub("slow", slow)]
    problem = variant(source, objective="reverse_kl")
    cell = measure_cell(problem, source, everybody, Effort(0.0, 10), provider_seconds=3.0)
    rows = {row.provider: row for row in cell.rows}
    assert rows["fused_sd"].status == "ok"
    for name in ("endless", "slow"):
        assert (rows[name].status, rows[name].reason) == ("too slow", "more than 3 s")
        assert rows[name].times is None
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_time_limit_holds_over_all_turns():
    limit = TimeLimit(0.3)
    for _ in range(2):
        with limit.turn():
            time.sleep(0.1)
            limit.check()
    time.sleep(0.2)  # between turns its clock stands
    with pytest.raises(TimeUp, match=r"more than 0\.3 s"), limit.turn():
        time.sleep(0.2)
    with pytest.raises(TimeUp), limit.turn():
        time.sleep(0.2)


def test_a_time_limit_holds_in_other_threads_between_runs():
    found = []

    def work():
        limit = TimeLimit(0.05)
        with limit.turn():
            limit.check()
            try:
                limit.check(ahead=1.0)
            except TimeUp as error:
                found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["more than 0.05 s"]


def test_a_cell_holds_what_came_of_everybody(source):
    def exhausted(problem):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    def broken(problem):
        raise KeyError("a bug of theirs")

    seen = []

    def watched(problem):
        def loss():
            seen.append(problem.hidden.detach().clone())
            return EAGER.build(problem)()

        return loss

    everybody = [
        FUSED,
        stub("eager", watched),
        scaled(2.0),
        stub("absent", broken, lambda problem: "not installed"),
        stub("large", exhausted),
        stub("broken", broken),
        Provider("elsewhere", None, frozenset({"jsd"}), lambda p: None, broken, False, ""),
    ]
    problem = variant(source, objective="reverse_kl", mask_share=0.5)
    cell = measure_cell(problem, source, everybody, QUICK)
    assert {row.provider: row.status for row in cell.rows} == {
        "fused_sd": "ok",
        "eager": "ok",
        "scaled": "wrong",
        "absent": "unavailable",
        "large": "out of memory",
        "broken": "failed",
    }
    by_name = {row.provider: row for row in cell.rows}
    assert "loss is off by 100.0%" in by_name["scaled"].reason
    assert by_name["scaled"].times is None
    assert by_name["large"].reason.endswith("9 GiB")
    assert by_name["broken"].reason == "KeyError: 'a bug of theirs'"
    assert by_name["eager"].peak_bytes > 4 * cell.counted * cell.vocab
    # copies of 64 tokens are checked; the tokens themselves are warmed up, weighed and timed
    assert len(seen) == 1 + 1 + QUICK.runs + 1
    assert len(seen[0][problem.mask].unique(dim=0)) == 64
    assert all(torch.equal(hidden, source.hidden) for hidden in seen[1:])
    assert problem.weight.grad is None
    plain = json.loads(json.dumps(cell.as_json()))
    assert plain["rows"][0]["ratio_to_floor"] == pytest.approx(
        by_name["fused_sd"].times.p50 / cell.floor.milliseconds
    )
    assert plain["rows"][0]["tflops"] > 0
    assert plain["rows"][2]["ratio_to_floor"] is None
    text = "\n".join(report_lines(cell))
    for name in by_name:
        assert name in text
    assert all(len(line) <= 200 for line in text.splitlines())


def test_providers_take_turns_in_a_random_order_and_are_listed_in_theirs(source):
    ran, said = [], []

    def recorded(name):
        def build(problem):
            loss = FUSED.build(problem)
            return lambda: (ran.append(name), loss())[1]

        return stub(name, build)

    everybody = [recorded(name) for name in "012345"]
    cell = measure_cell(
        variant(source), source, everybody, Effort(0.0, 3), say=lambda *line: said.append(line)
    )
    assert [row.provider for row in cell.rows] == list("012345")
    assert [row.times.runs for row in cell.rows] == [3] * 6
    turns = [ran[start : start + 6] for start in range(18, len(ran), 6)]  # after checks, weighing
    assert [sorted(once) for once in turns] == [list("012345")] * 3
    assert len({tuple(once) for once in turns}) > 1
    left = [seconds for what, seconds in said if what.startswith("round")]
    assert left == sorted(left, reverse=True)
    assert len(left) == 3
    assert all(seconds is None for what, seconds in said if not what.startswith("round"))


def test_who_fails_in_a_turn_leaves_the_others_in_theirs(source):
    calls = []

    def build(problem):
        def loss():
            calls.append(None)
            if len(calls) == 5:  # check, warm-up, memory, a turn, and the next one
                raise RuntimeError("a bug of theirs")
            return FUSED.build(problem)()

        return loss

    cell = measure_cell(variant(source), source, [FUSED, stub("late", build)], Effort(0.0, 4))
    ours, theirs = cell.rows
    assert (ours.status, ours.times.runs) == ("ok", 4)
    assert (theirs.status, theirs.times, theirs.peak_bytes) == ("failed", None, None)
    assert len(calls) == 5


def test_a_lost_device_leaves_a_cell_with_the_reason(source, monkeypatch):
    problem = variant(source)
    truth = find_truth(problem)
    monkeypatch.setattr(rounds, "find_truth", lambda problem: truth)
    lost = []

    def forget(device):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        lost.append(device)

    monkeypatch.setattr(rounds, "forget", forget)
    cell = measure_cell(problem, source, [FUSED, EAGER], QUICK)
    assert [row.status for row in cell.rows] == ["failed"] * 2
    assert "illegal memory access" in cell.rows[1].reason
    assert json.dumps(cell.as_json())

    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    lost.clear()
    monkeypatch.setattr(rounds, "synchronize", gone)
    with pytest.raises(DeviceLost, match="lost the device: CUDA error"):
        measure_cell(problem, source, [FUSED], QUICK)


def made_cell(**others) -> Cell:
    """A cell with our 10 ms and 100 MiB, and others' times and memory."""
    measured = {"fused_sd": (10.0, 100.0), **others}
    rows = [
        Row(name, None, "", "ok", times=Times(ms, ms, ms, 20), peak_bytes=int(mib * 2**20))
        for name, (ms, mib) in measured.items()
    ]
    floor = Floor(4, 9.0, 8.0, 10**10, 10**6)
    return Cell("jsd", 64, 1024, 10, 10, "bfloat16", True, True, 0.8, floor, 0.2, rows)


def test_the_verdict_says_where_the_library_loses():
    cell = made_cell(slow=(18.0, 1200.0), quick=(8.0, 50.0), same=(10.1, 99.0))
    assert verdict_lines(cell) == [
        "fused_sd is 1.8 x faster than slow, with 1/12 of the memory",
        "fused_sd is 1.2 x SLOWER than quick, with 2 x MORE memory",
        "fused_sd is as fast as same, with the same memory",
    ]
    first = table_lines(cell)[1]
    assert first.startswith("quick")
    assert "1.00" in first
    absent = replace(cell, rows=[Row("fused_sd", None, "", "wrong", "dH is off by 50.0%")])
    assert verdict_lines(absent) == ["fused_sd was not measured: dH is off by 50.0%"]


def test_a_time_below_the_bare_gemms_makes_no_verdict():
    cell = made_cell(slow=(18.0, 100.0), quick=(5.0, 50.0))
    assert verdict_lines(cell) == [
        "fused_sd is 1.8 x faster than slow, with the same memory",
        "the machine was too busy to tell: fused_sd took 10 ms, quick took 5 ms, and the GEMMs "
        "alone that quick needs took 8 ms",
    ]
    busy = replace(cell, floor=Floor(4, 30.0, 20.0, 10**10, 10**6))
    assert all(line.startswith("the machine was too busy to tell") for line in verdict_lines(busy))
    assert verdict_lines(replace(cell, floor=None))[1].startswith("fused_sd is 2 x SLOWER")
    # a sparse gradient needs the logits' half of the GEMMs
    cell.rows[2].kept = Sparsity(10.0, 0.0, 0.0)
    assert verdict_lines(cell)[1].startswith("fused_sd is 2 x SLOWER than quick")
    cell.rows[2].times = Times(3.0, 3.0, 3.0, 20)
    assert "that quick needs took 4 ms" in verdict_lines(cell)[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_counts_down_and_learns(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    shown = progress.Progress(out, {"sdpo": 10.0, "gkd": 100.0})
    shown.begin("sdpo")
    clock[0] = 4.0
    shown.say("checking eager", None)
    shown.say("round 1", 3.0)
    clock[0] = 20.0  # twice what was expected
    shown.end()
    shown.begin("gkd")
    shown.say("checking eager", None)
    clock[0] = 300.0
    shown.say("checking more", None)
    assert out.getvalue().splitlines() == [
        "[1/2] sdpo: checking eager; about 106 s left",
        "[1/2] sdpo: round 1; about 103 s left",
        "[2/2] gkd: checking eager; about 3 min left",
        "[2/2] gkd: checking more; about 0 s left",
    ]
    out = Terminal()
    shown = progress.Progress(out, {"sdpo": 10.0})
    shown.begin("sdpo")
    shown.say("checking eager", None)
    shown.end()
    assert out.getvalue().startswith("\r\x1b[K[1/1] sdpo: checking eager")
    assert out.getvalue().endswith("left\r\x1b[K")
    assert "\n" not in out.getvalue()


def test_an_estimate_grows_with_the_work():
    work = progress.Work("jsd", True, 1e9, Effort(0.0, 5, 10.0, 2))
    one = progress.expected_seconds(work, [FUSED], 1e10)
    assert one < progress.expected_seconds(work, [FUSED, EAGER], 1e10)
    assert one < progress.expected_seconds(work._replace(flop=1e10), [FUSED], 1e10)
    assert one == progress.expected_seconds(work, [FUSED, SPARSE._replace(objectives=())], 1e10)
    assert progress.gemm_rate(64, torch.float32, CPU) > 1e7
    absent = FUSED._replace(package="no-such-package")
    assert [progress.runs_here(p, CPU) for p in (FUSED, absent)] == [True, False]
    assert not progress.runs_here(FUSED._replace(needs_gpu=True), CPU)


TINY = ["bench", "--device", "cpu", "--tokens", "24", "--hidden", "16", "--vocab", "256"]


def test_the_command_measures_the_users_shape(capsys, monkeypatch):
    monkeypatch.setattr(command, "PROVIDERS", (FUSED, EAGER))
    assert main([*TINY, "--loss", "rlcsd,GRPO", "--runs", "2", "--frozen", "--mask", "0.5"]) == 0
    printed = capsys.readouterr()
    out = printed.out
    said = out.split("\n\n")[0]
    assert "rlcsd, grpo: 24 tokens x 16 x 256, fp32; about" in said
    assert "compared: fused_sd; eager" in said
    assert "[1/1] rlcsd, grpo: checking eager; about" in printed.err
    assert "grpo: 24 tokens (12 count) x 16 x 256, float32, head frozen, entropy" in out
    assert "; floor 2u" in out
    assert "fused_sd is" in out
    given = ["--losses", "all", "--runs", "1", "--json", "--dtype", "bf16", "--entropy", "0.5"]
    assert main([*TINY, *given]) == 0
    printed = capsys.readouterr()
    assert "compared: fused_sd; eager" in printed.err
    found = json.loads(printed.out)
    assert {cell["objective"] for cell in found["cells"]} == set(OBJECTIVES)
    assert len(found["cells"]) == len(OBJECTIVES)
    assert found["cells"][0]["losses"] == "sdpo"
    assert found["cells"][0]["rows"][0]["times"]["runs"] == 1
    assert 0.1 < found["cells"][0]["entropy"] < 1
    assert found["environment"]["torch"] == torch.__version__


def test_the_command_fails_where_this_library_is_wrong(capsys, monkeypatch):
    wrong = scaled(2.0)._replace(name="fused_sd")
    monkeypatch.setattr(command, "PROVIDERS", (wrong, EAGER))
    assert main([*TINY, "--losses", "jsd", "--runs", "1"]) == 1
    assert "fused_sd was not measured: loss is off by" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "qwen3-8b"], "model must come without hidden_size and vocab"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--vocab", "64"], "--vocab must be at least 128, got 64"),
        (["--runs", "0"], "--runs must be at least 1, got 0"),
        (["--mask", "1.0"], "--mask must leave a token that counts, got 1.0"),
        (["--entropy", "5"], "--entropy must lie in [0.05, 2.8], got 5.0"),
        (["--kl", "3"], "--kl must lie in [1e-4, 1], got 3.0"),
        (["--dtype", "fp16"], "--dtype must be one of 'bf16', 'fp32', got 'fp16'"),
        (["--device", "tpu"], "--device must be one of"),
    ],
)
def test_wrong_use_says_what_to_do(capsys, arguments, says):
    assert main([*TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert not printed.out
    assert ";" in printed.err


def test_losses_of_the_same_arithmetic_are_timed_once():
    assert command.titles_of(("sdpo", "gkd", "jsd", "sdft", "rlcsd")) == {
        "topk_tail": "sdpo",
        "jsd": "gkd, jsd",
        "forward_kl": "sdft (timed as forward_kl)",
        "grpo": "rlcsd (timed as grpo)",
    }


def test_operands_that_do_not_fit_are_said(capsys, monkeypatch):
    def exhausted(*arguments, **choices):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(command, "make_problem", exhausted)
    assert main(TINY) == 2
    assert "pass fewer tokens or a smaller model" in capsys.readouterr().err
