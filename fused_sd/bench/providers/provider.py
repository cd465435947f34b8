"""The interface of a provider: one implementation of some objectives, behind one signature.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import warnings
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
    """One implementation, called as its users call it."""

    name: str  # shown in tables
    package: str | None  # distribution whose version is reported; None: PyTorch alone
    objectives: frozenset[str]
    why_not: Refusal  # returns why a problem cannot be run here; None: it can
    build: Build  # returns the loss of a problem: the mean over its mask
    needs_gpu: bool
    note: str  # how it computes, as far as its numbers depend on that
    certify: Certify | None = None  # returns the certificate of a sparse gradient


class Kept(NamedTuple):
    """The kept tokens of a problem, for implementations that have no mask."""

    hidden: Tensor  # (M, D)
    teacher_hidden: Tensor  # (M, D)
    token_ids: Tensor  # (M,)
    old_log_probs: Tensor  # (M,)
    advantages: Tensor  # (M,)


def kept(problem: Problem) -> Kept:
    """Select the tokens of the mask; called inside the loss, as users must do in every step."""
    mask = problem.mask
    return Kept(
        problem.hidden[mask],
        problem.teacher_hidden[mask],
        problem.token_ids[mask],
        problem.old_log_probs[mask],
        problem.advantages[mask],
    )


def labels(problem: Problem) -> Tensor:
    """Return the sampled tokens (N,), with -100 for masked ones."""
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
    """Make a provider from one builder for each objective.

    Args:
        name: shown in tables.
        builders: the function that builds the loss, by objective.
        note: how it computes, as far as its numbers depend on that.
        package: the distribution whose version is reported; None: PyTorch alone.
        module: the module that builders import.  ``why_not`` imports it too, if the package is
            installed and the device is right.
        needs_gpu: whether it runs on a GPU only.
        refusal: returns any other reason why a problem cannot be run; called last.
        certify: returns the certificate of a sparse gradient.
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
    """Why a package is missing, from metadata only: importing a trainer takes many seconds."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None


def why_broken(module: str) -> str | None:
    """Why an installed module cannot be imported here; None: it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers warn of what they import
            import_module(module)
    except Exception as error:  # a broken package may raise anything
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None
