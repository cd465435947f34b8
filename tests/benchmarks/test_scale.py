"""Plans of ranks that share a head: memory and traffic equal those of real ranks."""

import statistics

import pytest
import torch

import fused_sd
from benchmarks.scale import __main__ as command
from benchmarks.scale import cases, tables
from fused_sd.bench.floor import NEEDS
from fused_sd.cli import main
from fused_sd.head.vocab_shard import VocabShard
from fused_sd.measuring.losses import loss_name
from fused_sd.planning.devices import CARDS, LATENCY
from fused_sd.planning.objectives import OBJECTIVES
from fused_sd.planning.prediction import row_reads
from fused_sd.planning.wire import GATHER, SUM, SUM_OF_DHIDDEN, wire
from fused_sd.torch_kernels.rows import RowGradient

RANKS = 2
CLOSE = 0.03  # of the counted peak; a plan promises 0.1
COMMAND = ["plan", "--model", "qwen3-8b", "--tokens", "16384", "--device", "H200"]
SETTINGS = {"model": "qwen3-8b", "tokens": 16384, "device": "H200"}
CARD = CARDS["H200"]


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """The counts of two real ranks, by case."""
    found = cases.count(RANKS, tmp_path_factory.mktemp("ranks"))
    return dict(zip(cases.CASES, found, strict=True))


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_ranks_hold_and_send_what_is_planned(counts, case):
    by_rank = counts[case]
    plan = cases.planned(case, RANKS, cases.kept_together(by_rank))
    sent = cases.planned_sums(plan)
    assert [counted.sent for counted in by_rank] == [sent] * RANKS
    assert {counted.num_collectives for counted in by_rank} == {plan.traffic.num_collectives}
    # gloo's own buffers may meet a rank's peak
    peak = statistics.median_low(counted.peak_bytes for counted in by_rank)
    assert plan.peak_bytes == pytest.approx(peak, rel=CLOSE), plan.estimates[0].parts


class CountingShard(VocabShard):
    """A shard without other ranks that counts the numbers it would send."""

    def __init__(self, vocab):
        super().__init__(None, vocab)
        self.alone, self.sums, self.maxes = False, [], []

    def sum_(self, part):
        self.sums.append(part.numel())

    def max(self, part):
        self.maxes.append(part.numel())
        return part.clone()


@pytest.mark.kernels
@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "gkd", "opsd"])
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_row_functions_of_either_backend_send_what_is_planned(name, backend, has_gradient):
    if backend == "cuda":
        pytest.importorskip("triton")
        from fused_sd.kernels import rows  # interpreted where there is no GPU
    else:
        from fused_sd.torch_kernels import rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, vocab = 5, 300
    student, teacher = torch.randn(2, count, vocab, device=device)
    objective, shard = OBJECTIVES[name], CountingShard(vocab)
    compared = objective.comparison
    gradient = RowGradient(torch.ones(count, device=device), None, torch.empty_like(student))
    normalizers = rows.normalizers(student, teacher, shard)
    given = student, teacher, normalizers, compared.term, compared.entry_clip
    rows.divergence_(*given, gradient if has_gradient else None)
    sends = wire(objective, 0, vocab, backend, has_gradient)
    assert (len(shard.maxes), sum(shard.maxes)) == (sends.maxes, count * sends.max_numbers)
    assert (len(shard.sums), sum(shard.sums)) == (sends.sums, count * sends.sum_numbers)


def test_a_shard_divides_the_head_and_its_gemms_and_nothing_else():
    whole, shared = (fused_sd.plan(tensor_parallel=ranks, **SETTINGS) for ranks in (1, 8))
    assert (shared.world_size, shared.shard_rows, shared.tokens_per_rank) == (8, 18992, 16384)
    assert whole["fused_sd"].parts["fp32 dH"] == shared["fused_sd"].parts["fp32 dH"]
    assert shared["fused_sd"].seconds == pytest.approx(whole["fused_sd"].seconds / 8)
    assert shared.peak_bytes < whole.peak_bytes
    kept = fused_sd.plan(
        tensor_parallel=8, gradient="sparse", kept=80, **SETTINGS | {"objective": "jsd"}
    )
    assert kept.kept == 80
    assert kept.estimates[0].parts["entries"] == 8 * 10 * 16384
    uneven = fused_sd.plan(hidden_size=64, vocab=101, tokens=10, tensor_parallel=4, device="cpu")
    assert uneven.shard_rows == 26
    ranks = fused_sd.plan(tensor_parallel=2, world_size=8, **SETTINGS)
    assert (ranks.tokens_per_rank, ranks.num_groups) == (4096, 4)
    assert "on each of 8 ranks" in str(ranks)


def test_ranks_with_other_memory_plan_the_same_chunk():
    chunks = {
        (planned.chunk, planned.group)
        for free in (2**31, 2**36)
        for planned in [fused_sd.plan(tensor_parallel=4, free_bytes=free, **SETTINGS)]
    }
    assert len(chunks) == 1


def test_a_ring_sends_each_part_from_rank_to_rank():
    planned = fused_sd.plan(tensor_parallel=4, objective="sdpo", **SETTINGS)
    payload, sent = planned.traffic.payload, planned.traffic.sent
    assert payload[SUM_OF_DHIDDEN] == 4 * 16384 * 4096
    assert payload[GATHER] == 4 * 16384 * 2 * 100
    assert sent[SUM] == pytest.approx(1.5 * payload[SUM])
    assert sent[GATHER] == 3 * payload[GATHER]
    assert planned.traffic.sent_bytes == sum(sent.values())
    assert fused_sd.plan(**SETTINGS).traffic is None
    twice = fused_sd.plan(tensor_parallel=4, objective="gkd", reduction="none", **SETTINGS)
    once = fused_sd.plan(tensor_parallel=4, objective="gkd", **SETTINGS)
    assert twice.traffic.payload["MAX"] == 2 * once.traffic.payload["MAX"]
    assert twice.traffic.payload[SUM_OF_DHIDDEN] == once.traffic.payload[SUM_OF_DHIDDEN]


def test_a_prediction_is_the_gemms_the_rows_the_rounding_and_the_wire():
    planned = fused_sd.plan(tensor_parallel=8, objective="jsd", **SETTINGS)
    found, shard = planned.prediction, 18992
    assert found.gemms == pytest.approx(8 * 16384 * 4096 * shard / CARD.rate)
    assert found.rows == pytest.approx(26 * 16384 * shard / CARD.bandwidth)
    assert found.rounding == pytest.approx(6 * (16384 + shard) * 4096 / CARD.bandwidth)
    assert found.wire == pytest.approx(planned.traffic.sent_bytes / CARD.link)
    assert found.latency == pytest.approx(planned.traffic.num_collectives * LATENCY)
    parts = found.gemms, found.rows, found.rounding, found.wire, found.latency
    assert found.total == pytest.approx(sum(parts))
    slower = fused_sd.plan(tensor_parallel=8, objective="jsd", link=CARD.link / 10, **SETTINGS)
    assert slower.prediction.wire == pytest.approx(10 * found.wire)
    for unknown in ({"device": "cpu"}, {"device": "A100", "tensor_parallel": 2}):
        assert fused_sd.plan(**SETTINGS | unknown).prediction is None
    assert fused_sd.plan(gradient="sparse", **SETTINGS).prediction is None


def test_a_known_card_without_a_measurement_of_ours_is_predicted():
    for ranks in (1, 2):
        h100, h200 = (
            fused_sd.plan(tensor_parallel=ranks, **SETTINGS | {"device": name}).prediction
            for name in ("H100", "H200")
        )
        assert h200.total < h100.total < 1.5 * h200.total


def test_exact_entries_are_predicted_by_the_rows_that_they_gather():
    settings = SETTINGS | {"objective": "sd_zero"}
    alone, shared = (fused_sd.plan(tensor_parallel=ranks, **settings) for ranks in (1, 8))
    row = 4096 * 2
    gathered = 4 * 16384 * 64 * row  # the sides' dot products, dH and dW
    expected = 4 * 16384 * 151936 + gathered + (16384 + 151936) * row
    assert alone.prediction.rows == pytest.approx(expected / CARD.bandwidth)
    expected = (4 * 16384 * 151936 + gathered) / 8 + (16384 + 18992) * row
    assert shared.prediction.rows == pytest.approx(expected / CARD.bandwidth)
    assert alone.prediction.rounding == 0


@pytest.mark.parametrize("name", NEEDS)
def test_rows_are_read_as_often_as_the_benchmark_says(name):
    assert row_reads(OBJECTIVES[loss_name("name", name)]) == NEEDS[name].row_reads


def test_the_page_is_what_plans_say_now(monkeypatch, tmp_path):
    kept = command.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(command, "PAGE", tmp_path / "scale.md")
    assert command.main(["--write"]) == 0
    written = command.PAGE.read_text(encoding="utf-8")
    assert written == kept, "run python -m benchmarks.scale --write"
    assert "<<" not in written


def test_the_page_counts_every_case_on_every_number_of_ranks():
    rows = command.kept_counts()["cases"]
    assert [(row["case"], row["ranks"]) for row in rows] == [
        (str(case), ranks) for ranks in tables.SHARING for case in cases.CASES
    ]
    for row in rows:
        plan = tables.planned_again(row)
        assert plan.peak_bytes == pytest.approx(row["peak"], rel=CLOSE)
        assert cases.planned_sums(plan) == row["sent"]
        assert plan.traffic.num_collectives == row["collectives"]


def test_the_command_prints_what_is_sent_and_predicted(capsys):
    assert main([*COMMAND, "--tensor-parallel", "8", "--link", "40", "--objective", "gkd"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "8 ranks share the head, 18992 rows or fewer each" in out
    assert "predicted from rates" in out
    assert "wire" in out
    assert main([*COMMAND, "--tensor-parallel", "4", "--world-size", "6"]) == 2
    assert "world_size must be a multiple" in capsys.readouterr().err
