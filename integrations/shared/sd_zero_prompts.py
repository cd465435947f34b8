"""The prompts of SD-Zero's official runs (arXiv 2604.12002), as chat messages.

The official code asks a question in three ways: to collect traces, to train on them, and to distil.
Braces are doubled in one of them, as there.
"""

from typing import Any, NamedTuple

from fused_sd.checks import check_one_of, fail

Messages = list[dict[str, Any]]
CODER = "You are a helpful assistant that solves coding problems step by step."


class TaskPrompts(NamedTuple):
    """What stands around a problem in phase 1."""

    system: str  # while traces are collected
    suffix: str  # behind the problem, while traces are collected
    training_system: str  # while they are trained on


TASKS = {
    "math": TaskPrompts(
        "You are a helpful assistant that solves math problems step by step.",
        "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "Please reason step by step, and put your final answer within \\boxed{{}}.",
    ),
    "code": TaskPrompts(CODER, "", CODER),
}


def collection_prompt(problem: str, task: str = "math") -> Messages:
    """Return the prompt that phase 1 collects traces with; ``task`` is "math" or "code"."""
    task_prompts = _task(task)
    return _messages(task_prompts.system, f"{problem}{task_prompts.suffix}")


def training_prompt(text: str, task: str = "math") -> Messages:
    """Return the prompt that phase 1 trains with: of the problem, and what is shown with it."""
    return _messages(_task(task).training_system, text)


def distillation_prompt(problem: str) -> Messages:
    """Return phase 2's prompt, which has no system message, and is for mathematics."""
    # two backslashes, as in the official file
    instruction = "Please reason step by step, and put your final answer within \\\\boxed{}."
    return [{"role": "user", "content": f"{instruction}\n\n{problem}"}]


def problem_of(prompt: Any, task: str = "math") -> str:
    """Return the problem in a prompt of ``collection_prompt``.

    Of another prompt, return the text of the last turn, which must be the user's.

    Raises:
        ValueError: the prompt does not end with a user's text.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if not isinstance(text, str) or (not isinstance(prompt, str) and prompt[-1]["role"] != "user"):
        remedy = "collect with prompts of collection_prompt"
        fail("prompt", "end with a user's text", repr(prompt), remedy)
    return text.removesuffix(_task(task).suffix)


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _task(name: str) -> TaskPrompts:
    check_one_of("task", name, tuple(TASKS))
    return TASKS[name]
