"""The experiments' runs and records, their statistics, and the page of claims."""

import dataclasses
import json
import math
import os
import random

import pytest

for _name in ("trl", "tokenizers", "datasets", "scipy"):
    pytest.importorskip(_name)

from benchmarks.methods import report, runs
from benchmarks.methods.__main__ import main
from benchmarks.methods.claims import CLAIMS
from benchmarks.methods.experiments import EXPERIMENTS, Unit, quick
from benchmarks.methods.figures import apart
from benchmarks.methods.outcomes import METRICS, Contrast, by_unit, curve, finished, searched
from benchmarks.methods.records import Records
from benchmarks.methods.statistics import (
    CONTRADICTED,
    NOT_SHOWN,
    SHOWN,
    Estimate,
    estimate,
    power,
    units_needed,
)
from benchmarks.methods.tasks import addition, pretrain
from benchmarks.storage import RESULTS, ROOT


def run_of(accuracies, **last):
    """The values of a run whose evaluations have these accuracies."""
    looks = [
        {
            "step": 10 * n,
            "generations": 640 * n,
            "accuracy": accuracy,
            "sampled_accuracy": 0.1,
            "length": 7.0,
            "entropy": 0.5,
            "leaks": 0.0,
        }
        for n, accuracy in enumerate(accuracies)
    ]
    looks[-1] |= last
    return {"curve": looks, "seconds": 1.0}


def test_students_interval_is_the_published_one():
    # Student 1908, Biometrika 6, table I: the hours of sleep gained by ten patients
    gained = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    other = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = estimate([b - a for a, b in zip(gained, other)])
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == (pytest.approx(0.70, abs=5e-3), pytest.approx(2.46, abs=5e-3))
    assert found.units == 10
    assert estimate([0.5] * 3) == Estimate(0.5, 0.5, 0.5, 3)
    with pytest.raises(ValueError, match="at least 2 units, got 1"):
        estimate([0.5])


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(600):
        found = estimate([rng.gauss(0.3, 1.0) for _ in range(8)])
        covered += found.low <= 0.3 <= found.high
    assert 0.92 < covered / 600 < 0.975


def test_power_is_the_share_of_intervals_that_leave_out_zero():
    # Cohen 1988, one-sample t test: effect 0.5, 5 % two-sided, 80 % power needs 34
    assert units_needed(1.0, 0.5) == 34
    rng = random.Random(1)
    seen = 0
    for _ in range(600):
        found = estimate([rng.gauss(1.0, 1.0) for _ in range(8)])
        seen += found.low > 0 or found.high < 0
    assert power(8, 1.0, 1.0) == pytest.approx(seen / 600, abs=0.05)


def test_a_verdict_needs_the_whole_interval():
    above = Estimate(0.05, 0.01, 0.09, 8)
    assert above.verdict(1) == SHOWN
    assert above.verdict(-1) == CONTRADICTED
    assert above.verdict(1, margin=0.02) == NOT_SHOWN
    assert above.verdict(1, margin=0.1) == CONTRADICTED
    assert above.verdict(-1, margin=0.1) == SHOWN
    assert Estimate(0.0, -0.01, 0.01, 8).verdict(1) == NOT_SHOWN


def test_metrics_of_a_run():
    run = run_of([0.2, 0.4, 0.8, 0.7], length=5.0, leaks=0.3)
    assert METRICS["accuracy"](run) == 0.7
    assert METRICS["gain"](run) == pytest.approx(0.5)
    assert METRICS["mean accuracy"](run) == pytest.approx((0.3 + 0.6 + 0.75) / 3)
    assert METRICS["late change"](run) == pytest.approx(-0.1)  # since step 20 of 30
    assert METRICS["generations"](run) == pytest.approx(math.log(1280))  # 0.8 is reached there
    half = run_of([0.2, 0.7, 0.9])
    assert METRICS["generations"](half) == pytest.approx(math.log(960))  # half-way to 0.9
    assert METRICS["length"](run) == 5.0
    assert METRICS["leaks"](run) == 0.3
    never = run_of([0.2, 0.3])
    assert METRICS["generations"](never) == pytest.approx(math.log(640))
    assert METRICS["generations"](run_of([0.85, 0.9])) == 0.0


def test_a_contrast_is_paired_by_unit_and_means_over_seeds():
    """A spread between the units does not widen the interval of the paired difference."""
    weak = {0: [run_of([0, 0.2]), run_of([0, 0.4])], 1: [run_of([0, 0.9])]}
    strong = {0: [run_of([0, 0.35])], 1: [run_of([0, 0.95])]}
    both = {"grpo": weak, "sdpo": strong}
    assert by_unit(both, "grpo", "accuracy") == {0: pytest.approx(0.3), 1: 0.9}
    found = Contrast("accuracy", "sdpo", "grpo").estimate("x", {"x": both})
    assert (found.mean, found.low, found.high) == (pytest.approx(0.05),) * 3
    assert Contrast("accuracy", "grpo").estimate("x", {"x": both}).low < 0
    assert Contrast("accuracy", "grpo").estimate("x", {"x": {}}) is None
    points = curve(both, "grpo", "accuracy")
    assert [x for x, _ in points] == [0, 640]
    assert points[1][1].mean == pytest.approx(0.6)


def test_a_difference_beyond_another_experiment_is_paired_by_base():
    def runs_of(*leads):
        grpo = {base: [run_of([0, 0.5])] for base in range(len(leads))}
        sdpo = {base: [run_of([0, 0.5 + lead])] for base, lead in enumerate(leads)}
        return {"grpo": grpo, "sdpo": sdpo}

    runs = {"large": runs_of(0.3, 0.2, 0.4), "small": runs_of(0.1, 0.0)}
    found = Contrast("accuracy", "sdpo", "grpo", beyond="small").estimate("large", runs)
    assert (found.mean, found.units) == (pytest.approx(0.2), 2)
    missing = {**runs, "small": {}}
    assert Contrast("accuracy", "sdpo", "grpo", beyond="small").estimate("large", missing) is None


def test_searches_and_blame_are_metrics():
    search = {"probability": {"16": 0.2, "512": 1.0, "64": 0.5}}  # as a file sorts them
    assert METRICS["found in 64"](search) == 0.5
    assert searched({"a": {0: [search], 1: [search]}}, "a") == [
        (count, Estimate(share, share, share, 2))
        for count, share in ((16, 0.2), (64, 0.5), (512, 1))
    ]

    def judged(verdict, alone):
        scores = {"verdict": {"precision": verdict}, "student alone": {"precision": alone}}
        return {"planted": {"likely": scores, "slip": scores}}

    run = {"states": {"base": judged(0.2, 0.3), "phase one": judged(0.5, 0.4)}}
    assert METRICS["blame on likely errors, after phase 1"](run) == 0.5
    assert METRICS["blame on likely errors, beyond surprise"](run) == pytest.approx(0.1)
    assert METRICS["blame on likely errors, gained by phase 1"](run) == pytest.approx(0.3)


def test_a_claims_verdict_is_that_of_all_its_contrasts():
    assert report.together([SHOWN, SHOWN]) == SHOWN
    assert report.together([SHOWN, CONTRADICTED]) == report.PARTLY
    assert report.together([NOT_SHOWN, CONTRADICTED]) == CONTRADICTED
    assert report.together([NOT_SHOWN, report.NOT_RUN]) == NOT_SHOWN
    assert report.together([report.NOT_RUN]) == report.NOT_RUN


def test_numbers_are_said_in_their_units():
    low, high = 0.01, 0.09
    found = Estimate(0.05, low, high, 8)
    assert report.shown(Contrast("accuracy", "a", "b"), found) == "+5.0 points (+1.0 to +9.0)"
    assert report.shown(Contrast("accuracy", "a"), found) == "5.0 % (1.0 to 9.0)"
    assert report.shown(Contrast("entropy", "a", "b"), found) == "+0.05 nat (+0.01 to +0.09)"
    half = Estimate(math.log(0.5), math.log(0.25), 0.0, 8)
    assert report.shown(Contrast("generations", "a", "b"), half) == "0.50 times (0.25 to 1.00)"


def test_names_of_curves_are_apart_and_near_their_ends():
    assert apart([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert apart([4.0, 4.0, 4.0], 1.0) == [3.0, 4.0, 5.0]
    assert apart([0.0, 0.5, 9.0], 1.0) == [-0.25, 0.75, 9.0]
    assert apart([0.0, 0.0, 1.0], 1.0) == pytest.approx([-2 / 3, 1 / 3, 4 / 3])


def test_every_claim_names_arms_and_metrics_that_exist():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        names = {arm.name for arm in EXPERIMENTS[claim.experiment].arms}
        assert set(claim.arms) <= names, claim.name
        assert all(contrast.metric in METRICS for contrast in claim.contrasts)


def test_no_final_unit_chose_a_rate():
    for experiment in EXPERIMENTS.values():
        chosen_on = {unit.base for unit in experiment.selection}
        assert not chosen_on & {unit.base for unit in experiment.units}
        assert not set(experiment.selection) & set(experiment.units)
        assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)


def test_a_record_is_found_by_all_that_decided_it(tmp_path):
    path = tmp_path / "a.jsonl"
    records = Records(path)
    assert records.find({"rate": 1e-3}) is None
    records.add({"rate": 1e-3, "units": (1, 2)}, {"curve": [1]}, {"device": "x"})
    records.add({"rate": 2e-3, "units": (1, 2)}, {"curve": [2]}, {"device": "x"})
    again = Records(path)
    assert again.find({"units": [1, 2], "rate": 2e-3}).values == {"curve": [2]}
    assert again.find({"units": [1, 2], "rate": 3e-3}) is None
    with path.open("a") as file:
        file.write('{"decided')
    with pytest.raises(ValueError, match=r"line 3 of .*a\.jsonl"):
        Records(path)


def test_a_run_is_decided_by_settings_and_not_by_labels():
    experiment = EXPERIMENTS["addition"]
    run = runs.selecting(experiment)[0]
    renamed = dataclasses.replace(run, arm=dataclasses.replace(run.arm, label="another"))
    assert renamed.decided_by == run.decided_by
    set_otherwise = dataclasses.replace(run.arm, settings={"beta": 0.1})
    assert dataclasses.replace(run, arm=set_otherwise).decided_by != run.decided_by
    assert run.decided_by["version"] == addition.VERSION
    assert run.part == "validation"


def test_the_best_rate_is_the_smallest_of_equally_good_ones():
    assert runs.best_rate({1e-4: 0.5, 4e-4: 0.7, 2e-4: 0.7}) == 2e-4


def made(experiment, records, accuracy):
    """Record every run of an experiment, whose last accuracy ``accuracy(run)`` gives."""

    def add(wanted):
        for run in wanted:
            records.add(run.decided_by, run_of([0.2, accuracy(run)]), {"device": "x"})

    add(runs.selecting(experiment))
    add(runs.final(experiment, records))


def test_final_runs_take_each_arms_best_rate_and_whole_units(tmp_path):
    experiment = dataclasses.replace(
        EXPERIMENTS["leaks"], units=(Unit(0, 0), Unit(1, 1), Unit(0, 1000))
    )
    records = Records(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="measured before the final runs"):
        runs.final(experiment, records)

    def accuracy(run):
        return 0.5 + (run.rate == 2e-4) * 0.1 + (run.arm.name == "rlsd") * 0.1

    made(experiment, records, accuracy)
    assert {run.rate for run in runs.final(experiment, records)} == {2e-4}
    found = finished(experiment, records)
    assert {name: {base: len(r) for base, r in units.items()} for name, units in found.items()} == {
        arm.name: {0: 2, 1: 1} for arm in experiment.arms
    }
    # a seed that one arm has not finished is left out for all
    records.all.pop()
    assert {base: len(r) for base, r in finished(experiment, records)["grpo"].items()} == {
        0: 1,
        1: 1,
    }


def page_text():
    blocks = ["claims", *(f"claim {claim.name}" for claim in CLAIMS)]
    blocks += [f"experiment {name}" for name in EXPERIMENTS]
    return "\n".join(f"above\n<!-- {name}: x -->\n<!-- end -->\nbelow" for name in blocks)


def test_the_page_says_what_the_records_hold(tmp_path):
    def accuracy(run):
        return 0.5 + 0.02 * run.unit.base + (run.arm.name == "rlsd") * (0.1 + run.unit.base / 1e4)

    made(EXPERIMENTS["long"], Records(tmp_path / "addition.jsonl"), accuracy)
    (tmp_path / "claims.md").write_text(page_text())
    written = report.write_page(tmp_path, tmp_path)
    text = (tmp_path / "claims.md").read_text()
    ceiling = next(line for line in text.splitlines() if "[RLSD ends above GRPO]" in line)
    assert "+10.1 points (+10.0 to +10.1)" in ceiling
    assert ceiling.endswith("| shown |")
    assert "| not run |" in text
    assert text.count("above") >= len(CLAIMS)
    assert written[0] == tmp_path / "claims.md"
    assert all(path.stat().st_size > 5000 for path in written[1:])
    assert {path.name for path in written[1:]} == {"rlsd-ceiling.png", "rlsd-late.png"}


def test_the_committed_page_is_what_the_committed_records_say(tmp_path):
    page = ROOT / "docs" / "claims.md"
    (tmp_path / "claims.md").write_text(page.read_text())
    report.write_page(RESULTS / "methods", tmp_path)
    assert (tmp_path / "claims.md").read_text() == page.read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a whole small experiment, made by the command."""
    folder = tmp_path_factory.mktemp("quick")
    kept = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(addition.SCHEDULES, "0.1M", pretrain.Schedule(2))
        arguments = ["leaks", "--quick", "--work", str(folder), "--results", str(folder)]
        main(["select", *arguments])
        main(["run", *arguments])
    os.environ.clear()
    os.environ.update(kept)
    return folder, arguments


def test_a_small_experiment_is_recorded_whole(trained):
    folder, _ = trained
    experiment = quick(EXPERIMENTS["leaks"])
    lines = (folder / "addition-cited.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(experiment.arms)
    for record in map(json.loads, lines[len(experiment.arms) :]):
        generations = [look["generations"] for look in record["values"]["curve"]]
        assert generations == [0, 16, 32]
        assert record["stamp"]["device"]
    records = Records(folder / "addition-cited.jsonl")
    assert all(len(units) == 1 for units in finished(experiment, records).values())


def test_a_second_command_makes_no_run_again(trained, monkeypatch, capsys):
    folder, arguments = trained
    before = (folder / "addition-cited.jsonl").read_text()

    def refuse(*_):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(runs, "measure", refuse)
    main(["run", *arguments])
    assert "4 of 4 runs are there already" in capsys.readouterr().out
    assert (folder / "addition-cited.jsonl").read_text() == before


def test_an_unknown_experiment_is_named():
    with pytest.raises(SystemExit, match="got divide"):
        main(["run", "divide"])
