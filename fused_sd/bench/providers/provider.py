"""What a provider is: one implementation of some objectives, behind one signature.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from torch import Tensor

from fused_sd import checks
from fused_sd.bench.problem import Loss, Problem
from fused_sd.engine.certificate import GradientCertificate

Build = Callable[[Problem], Loss]
Certify = Callable[[Problem], GradientCertificate]
Refusal = Callable[[Problem], str | None]


class Provider(NamedTuple):
    """One implementation, used as its users use it."""

    name: str  # shown in tables
    package: str | None  # distribution whose version is reported; None: PyTorch alone
    objectives: frozenset[str]
    why_not: Refusal  # why it cannot run a problem here; None: it can
    build: Build  # the loss of a problem: the mean over its mask
    needs_gpu: bool
    note: str  # what its numbers mean
    certify: Certify | None = None  # of a gradient that leaves something out


class Kept(NamedTuple):
    """The tokens that count, for implementations that have no mask."""

    hidden: Tensor  # (M, D)
    teacher_hidden: Tensor  # (M, D)
    token_ids: Tensor  # (M,)
    old_log_probs: Tensor  # (M,)
    advantages: Tensor  # (M,)


def kept(problem: Problem) -> Kept:
    """Select the rows of the mask, inside the loss, as users must in every step."""
    mask = problem.mask
    return Kept(
        problem.hidden[mask],
        problem.teacher_hidden[mask],
        problem.token_ids[mask],
        problem.old_log_probs[mask],
        problem.advantages[mask],
    )


def labels(problem: Problem) -> Tensor:
    """The sampled tokens with -100 where they do not count: (N,)."""
    return problem.token_ids.masked_fill(~problem.mask, -100)


def make_provider(
    name: str,
    builders: Mapping[str, Build],
    *,
    note: str,
    package: str | None = None,
    module: str | None = None,
    needs_gpu: bool = False,
    refusal: Refusal = lambda problem: None,
    certify: Certify | None = None,
) -> Provider:
    """A provider from one builder for each objective.

    Args:
        module: what a builder imports; it is imported to answer ``why_not``, but only where the
            package is installed and the device is right.
        refusal: what else stands in the way of a problem, asked last.
        certify: what a gradient leaves out, where it does.
    """

    def why_not(problem: Problem) -> str | None:
        if problem.objective not in builders:
            return f"has no {problem.objective}"
        absent = None if package is None else why_absent(package)
        if absent is not None:
            return absent
        if needs_gpu and problem.hidden.device.type != "cuda":
            return f"needs CUDA, and the problem is on {problem.hidden.device.type}"
        broken = None if module is None else why_broken(module)
        return broken or refusal(problem)

    def build(problem: Problem) -> Loss:
        checks.check_one_of("objective", problem.objective, builders)
        return builders[problem.objective](problem)

    return Provider(name, package, frozenset(builders), why_not, build, needs_gpu, note, certify)


def why_absent(package: str) -> str | None:
    """Answered from metadata: importing a trainer takes many seconds."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None


def why_broken(module: str) -> str | None:
    """Why an installed module cannot be imported here."""
    try:
        import_module(module)
    except Exception as error:  # whatever another's package raises is the answer
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None
