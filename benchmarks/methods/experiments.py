"""The experiments: tasks, arms, sizes and seeds, written down before the final runs.

A *unit* is one base model with its own questions (or one seed, where there is one base model).  All
arms of an experiment run on the same units, with the same seeds, so that differences are paired by
unit, and a result's interval covers everything that a unit draws: habits, questions, weights,
generations, rounding.

Trials suggested that paired differences of two methods have a standard deviation of 2.6 points
between units, so that 16 units see a difference of 2 points with 82 % power.  The final runs spread
more; the page says how many units each experiment would need.

The learning rate of every arm is chosen by one rule: the best mean accuracy over the selection
units, on validation questions, from one grid; the smaller of equally good rates.  No final run uses
a selection unit.  At first there were two of them everywhere.  On sums two units chose RLSD's rate
by a difference of three points, which is noise, so that there are six where runs are cheap.
"""

from dataclasses import dataclass, replace

from benchmarks.methods import arms
from benchmarks.methods.arms import GROUP, Arm


@dataclass(frozen=True)
class Scale:
    """The size of a training.

    Attributes:
        steps: Optimizer steps, each with new generations.
        prompts: Questions of a step.
        look_every: Steps between two evaluations.
        num_questions: Questions of an evaluation; None: all.
    """

    steps: int
    prompts: int
    look_every: int
    num_questions: int | None = None

    @property
    def generations(self) -> int:
        """Generations of one step."""
        return self.prompts * GROUP


@dataclass(frozen=True)
class Search:
    """The size of a search for the answers to single hard questions.

    Attributes:
        num_questions: The most hard questions of a unit; a unit that has fewer searches all it has.
            Each is searched once.
        max_attempts: Responses to a question before the search gives up.
        hard_samples: A question is hard if this many samples of the base model are all wrong.
    """

    num_questions: int
    max_attempts: int
    hard_samples: int

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of attempts that are reported: 16, 32, ... up to the most."""
        doublings = (16 << n for n in range(self.max_attempts.bit_length()))
        return tuple(count for count in doublings if count <= self.max_attempts)


@dataclass(frozen=True)
class Unit:
    """What is drawn anew: the base model with its questions, and the training's seed."""

    base: int
    seed: int


def bases(count: int, seeds: int = 1, first: int = 0) -> tuple[Unit, ...]:
    """Return units that are base models of their own, each with so many seeds."""
    again = [1000 * number for number in range(seeds)]
    return tuple(Unit(base, base + more) for more in again for base in range(first, first + count))


TWO = bases(2, first=100)
SIX = bases(6, first=100)


@dataclass(frozen=True)
class Experiment:
    """A comparison of arms on one task.

    Attributes:
        name: The name for the command and on the page.
        task: The task's name, for ``make_task``, and that of the file of results, which the
            experiments of one task share.
        arms: What is compared.
        scale: The size of a final run: a training, or a search on hard questions.
        units: The final runs' units.
        rates: The grid of learning rates.
        selection: The units on which the rates are chosen.
        selection_steps: The steps of a training that chooses a rate; a search has none.
    """

    name: str
    task: str
    arms: tuple[Arm, ...]
    scale: Scale | Search
    units: tuple[Unit, ...]
    rates: tuple[float, ...]
    selection: tuple[Unit, ...] = TWO
    selection_steps: int = 120

    @property
    def file(self) -> str:
        """The name of the file of results."""
        return f"{self.task}.jsonl"

    def arm(self, name: str) -> Arm:
        """Return the arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def selection_scale(self) -> Scale | Search:
        """The size of a run that chooses a rate."""
        if isinstance(self.scale, Search):
            return self.scale
        return replace(self.scale, steps=self.selection_steps, look_every=self.selection_steps)


TINY_RATES = (1e-4, 2e-4, 4e-4, 8e-4)
TINY = Scale(steps=120, prompts=8, look_every=20)


def of_size(size: str, num_units: int, highest_rate: float) -> Experiment:
    """Return SDPO against GRPO on addition, for base models of a size in ``pretrain.SIZES``.

    Larger models bear lower rates: a grid falls by halves from its highest rate.
    """
    return Experiment(
        f"size-{size}",
        f"addition-{size}",
        (arms.GRPO, arms.SDPO_TINY),
        Scale(steps=120, prompts=8, look_every=20),
        bases(num_units),
        tuple(sorted(highest_rate / 2**halving for halving in range(4))),
    )


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "addition",
            "addition",
            (
                arms.RFT,
                arms.GRPO,
                arms.SDFT,
                arms.OPSD,
                arms.OPSD_UNCLIPPED,
                arms.SDPO_TINY,
                arms.RLSD,
            ),
            TINY,
            bases(16, seeds=2),
            TINY_RATES,
            SIX,
        ),
        # SD-Zero whole, its phases alone, and what its paper compares it with
        Experiment(
            "self-revision",
            "addition",
            (
                arms.RFT,
                arms.GRPO,
                arms.SDFT,
                arms.SD_ZERO_TINY,
                arms.SRT,
                arms.SD_ZERO_JOINT,
                arms.SD_ZERO_BARE,
                arms.SD_ZERO_SEQUENTIAL,
                arms.SD_ZERO_SYNCED,
            ),
            TINY,
            bases(12),
            TINY_RATES,
        ),
        # three times as long: what happens when nothing is left to learn
        Experiment(
            "long",
            "addition",
            (arms.GRPO, arms.OPSD_UNCLIPPED, arms.SDFT, arms.RLSD),
            Scale(steps=360, prompts=8, look_every=40),
            bases(12),
            TINY_RATES,
            SIX,
        ),
        Experiment(
            "leaks",
            "addition-cited",
            (arms.GRPO, arms.OPSD_UNCLIPPED, arms.SDFT, arms.RLSD),
            TINY,
            bases(12),
            TINY_RATES,
            SIX,
        ),
        # one model that exists: its units are seeds alone
        Experiment(
            "plurals",
            "plurals",
            (arms.RFT, arms.GRPO, arms.SDFT, arms.OPSD, arms.SDPO, arms.RLSD),
            Scale(steps=16, prompts=2, look_every=4),
            bases(4),
            (1e-4, 2e-4, 4e-4),
            selection_steps=16,
        ),
        # the kind of model that RLSD's own experiments had
        Experiment(
            "pictures",
            "pictures",
            (arms.GRPO, arms.OPSD_UNCLIPPED, arms.RLSD),
            TINY,
            bases(12),
            TINY_RATES,
            SIX,
        ),
        Experiment(
            "discovery",
            "addition",
            (arms.BEST_OF_K, arms.MULTI_TURN, arms.TEST_TIME),
            Search(num_questions=16, max_attempts=512, hard_samples=64),
            bases(12),
            TINY_RATES,
        ),
        of_size("0.4M", num_units=8, highest_rate=8e-4),
        of_size("3M", num_units=4, highest_rate=4e-4),
        of_size("12M", num_units=3, highest_rate=2e-4),
        Experiment(
            "programs",
            "programs",
            (
                arms.RFT,
                arms.GRPO,
                arms.SDPO_SIBLING,
                arms.SDPO_FEEDBACK,
                arms.SDPO_ATTEMPT,
                arms.SDPO_EITHER,
                arms.SDPO_BOTH,
            ),
            Scale(steps=120, prompts=8, look_every=10),
            bases(12),
            # at 4e-4 every arm stops learning within 20 steps
            (2.5e-5, 5e-5, 1e-4, 2e-4),
            # the claim is about the way to the top: after 60 steps at 1e-4 all arms are near it
            selection_steps=30,
        ),
    )
}


def quick(experiment: Experiment) -> Experiment:
    """Return an experiment with two steps each, few questions, one rate and one unit, for tests."""
    scale: Scale | Search = Scale(steps=2, prompts=2, look_every=1, num_questions=20)
    if isinstance(experiment.scale, Search):
        scale = Search(num_questions=2, max_attempts=32, hard_samples=16)
    return replace(
        experiment,
        scale=scale,
        units=experiment.units[:1],
        rates=experiment.rates[:1],
        selection=experiment.units[:1],
        selection_steps=1,
    )
