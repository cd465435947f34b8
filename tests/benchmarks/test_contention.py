"""The benchmark beside busy neighbours runs, and ends them."""

import multiprocessing

from benchmarks import contention


def test_every_competitor_is_timed_beside_a_neighbour(capsys, monkeypatch):
    monkeypatch.setattr(contention, "START", 0.0)
    sizes = ["--sizes", "6", "8", "64", "--runs", "1", "--threads", "1"]
    contention.main([*sizes, "--objectives", "jsd", "--neighbours", "none", "python"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "jsd, 1 threads, neighbour none",
        "jsd, 1 threads, neighbour python",
    ]
    assert all(name in line for line in lines for name in ("fused_sd", "eager", "GEMMs"))
    assert not multiprocessing.active_children()
