"""The tasks of the experiments, each with a base model that errs and can be taught better."""

from importlib import import_module
from typing import Any

from benchmarks.methods.tasks.task import Prompt, Question, Task

KINDS = ("addition", "pictures", "plurals", "programs")

__all__ = ["Prompt", "Question", "Task", "make_task", "version"]


def make_task(name: str, base: int) -> Task:
    """Return a task by its name, with the questions and the model of one number.

    Names are "addition", "addition-cited", "addition-3M" (with a size of ``pretrain.SIZES``),
    "pictures", "plurals" and "programs".
    """
    module, variant = _module(name)
    made: Task = module.make(base, *variant)
    return made


def version(name: str) -> int:
    """Return the number that a task raises with every change of its models or questions."""
    number: int = _module(name)[0].VERSION
    return number


def _module(name: str) -> tuple[Any, list[str]]:
    """Return the task's module and its variant, if it is one."""
    kind, *variant = name.split("-", 1)
    if kind not in KINDS:
        raise ValueError(f"a task's name must begin with one of {', '.join(KINDS)}, got {name!r}")
    module = import_module(f"benchmarks.methods.tasks.{kind}")
    known = getattr(module, "VARIANTS", ())
    if not set(variant) <= set(known):
        raise ValueError(
            f"variants of {kind} must be one of {', '.join(known) or 'none'}, got {name!r}"
        )
    return module, variant
