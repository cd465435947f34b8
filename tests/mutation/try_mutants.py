"""Do the tests notice a fault?  Small faults are put into the core, one at a time.

    python tests/mutation/try_mutants.py terms engine --sample 40 --seed 0
    python tests/mutation/try_mutants.py terms engine --again --seconds 60 --cases 0

The score of a module is killed / (tried - equivalent), with Wilson's interval of 95 %: the mutants
are drawn at random.  ``equivalent.txt`` lists, with reasons, those that no test could notice.
A sample is tried in two rounds: by a few cases of each test, and ``--again``, which tries what
survived once more, by all.  A run that was stopped goes on with what ``--out`` does not have yet.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has one thread
os.environ["FUSED_SD_TEST_THREADS"] = "1"

import argparse
import json
import math
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(pathlib.Path(__file__).parent)]

import pytest
from mutants import Mutant, mutants_of
from trials import Trials

MODULES = {
    "terms": ["fused_sd/terms/*.py"],
    "weighting": ["fused_sd/terms/weighting.py"],
    "torch_kernels": ["fused_sd/torch_kernels/*.py"],
    "objectives": ["fused_sd/objectives/*.py"],
    "engine": ["fused_sd/engine/*.py"],
    "align": ["fused_sd/teaching/align.py"],
    "prompts": [
        "integrations/shared/prompts.py",
        "integrations/shared/rollouts.py",
        "integrations/shared/texts.py",
        "integrations/shared/thinking.py",
        "integrations/shared/sd_zero_prompts.py",
    ],
}
LIVES = ("survived", "not executed")
LOSS_TESTS = [
    "tests/checks/test_checks.py",
    "tests/checks/test_wrong_calls.py",
    "tests/losses/test_losses.py",
    "tests/losses/test_metric_passes.py",
    "tests/losses/test_official_divergences.py",
    "tests/losses/test_official_edges.py",
    "tests/losses/test_official_policies.py",
    "tests/losses/test_reference.py",
    "tests/losses/test_served_teachers.py",
    "tests/losses/test_tokens.py",
    "tests/losses/test_with_grad.py",
]
ENGINE_TESTS = [
    "tests/engine/test_auto_gradients.py",
    "tests/engine/test_backend.py",
    "tests/engine/test_budget.py",
    "tests/engine/test_certificate.py",
    "tests/engine/test_chunked_run.py",
    "tests/engine/test_layout_of_a_run.py",
    "tests/engine/test_operator.py",
    "tests/engine/test_sparse_gradients.py",
]
TESTS = {
    "terms": ["tests/terms", *LOSS_TESTS],
    "weighting": ["tests/terms", *LOSS_TESTS],
    "torch_kernels": ["tests/torch_kernels", "tests/terms", *LOSS_TESTS],
    "objectives": [*ENGINE_TESTS, *LOSS_TESTS],
    "engine": [*ENGINE_TESTS, *LOSS_TESTS],
    "align": ["tests/teaching/test_align.py", "tests/checks/test_wrong_calls.py"],
    "prompts": [
        "tests/integrations/test_sibling_prompts.py",
        "tests/integrations/test_texts.py",
        "tests/integrations/test_thinking.py",
        "tests/integrations/test_official_prompts.py",
    ],
}
# These take long for what they find; and what processes of their own import is as it was.
SLOW = "compile or inductor or forked or allocated or gradcheck or threads or violated or shards"


def drawn(module: str, sample: int, seed: int) -> list[Mutant]:
    """Return a module's mutants, at most ``sample`` of them, drawn at random."""
    paths = sorted(
        str(path.relative_to(ROOT)) for pattern in MODULES[module] for path in ROOT.glob(pattern)
    )
    if module == "terms":
        paths.remove("fused_sd/terms/weighting.py")  # a module of its own
    mutants = [mutant for path in paths for mutant in mutants_of(ROOT, path)]
    random.Random(f"{seed} {module}").shuffle(mutants)
    return mutants[:sample]


def interval(killed: int, total: int) -> tuple[float, float]:
    """Return Wilson's interval of 95 % for a share."""
    z = 1.96
    share = killed / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - half) / (1 + z * z / total), (centre + half) / (1 + z * z / total)


def equivalents() -> set[str]:
    """Return the mutants in ``equivalent.txt``: the lines that are not indented."""
    text = (pathlib.Path(__file__).parent / "equivalent.txt").read_text()
    return {line for line in text.splitlines() if line and line[0] not in " #"}


def table(sample: dict[str, list[Mutant]], ends: dict[str, str]) -> str:
    """Return the scores as a Markdown table."""
    known = equivalents()
    rows = [
        "| module | tried | equivalent | killed | score | interval |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    sums = [0, 0, 0]
    counts = []
    for module, mutants in sample.items():
        tried = [mutant for mutant in mutants if ends.get(str(mutant), "not built") != "not built"]
        lived = [mutant for mutant in tried if ends[str(mutant)] in LIVES]
        equivalent = sum(mutant.lasting_name in known for mutant in lived)
        counts.append((module, len(tried), equivalent, len(tried) - len(lived)))
        sums = [a + b for a, b in zip(sums, counts[-1][1:])]
    for module, tried, equivalent, killed in [*counts, ("all", *sums)]:
        if total := tried - equivalent:
            low, high = interval(killed, total)
            score = f"{killed / total:.0%} | {low:.0%} to {high:.0%}"
            rows.append(f"| {module} | {tried} | {equivalent} | {killed} | {score} |")
    return "\n".join(rows)


def main() -> None:
    """Try the mutants that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="+", choices=[*MODULES, "all"])
    parser.add_argument("--sample", type=int, default=40, help="mutants of a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=6, help="cases of one test; 0: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for one mutant")
    parser.add_argument("--tests", nargs="*", help="files of tests, in place of the module's own")
    parser.add_argument("--without", default=SLOW, help="tests by name, as pytest -k takes it")
    parser.add_argument("--again", action="store_true", help="the survivors in --out once more")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "outputs" / "mutants.json")
    options = parser.parse_args()
    modules = list(MODULES) if "all" in options.modules else options.modules
    ends = json.loads(options.out.read_text()) if options.out.exists() else {}
    sample = {module: drawn(module, options.sample, options.seed) for module in modules}
    pairs = [(n, mutant) for mutants in sample.values() for n, mutant in enumerate(mutants)]
    pairs.sort(key=lambda pair: pair[0])  # a run that is cut short has a sample of each module
    tried_again = (*LIVES, "not built") if options.again else (None,)
    mutants = [mutant for _, mutant in pairs if ends.get(str(mutant)) in tried_again]

    def done(mutant: Mutant, end: str) -> None:
        print(f"{mutant}\n    {end}", flush=True)
        ends[str(mutant)] = end
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(ends, indent=1))

    trials = Trials(ROOT, mutants, options.seconds, options.cases, options.seed, done)
    tests = options.tests or sorted({test for module in modules for test in TESTS[module]})
    os.chdir(ROOT)
    how = ["-q", "-s", "--no-header", "--tb=native", "-k", f"not ({options.without})"]
    code = pytest.main([*how, *tests], [trials])
    print(table(sample, ends))
    raise SystemExit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code)


if __name__ == "__main__":
    main()
