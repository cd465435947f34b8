"""A legal call with one argument spoiled: it must work, or be refused by us with a remedy.

What is refused must be a ValueError whose message has the rule, the value and the remedy, or a
TypeError of our own about a keyword.  An error of PyTorch's from inside is a fault.
"""

import dataclasses
import random
import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch
from fuzz_losses import arguments
from fuzz_problem import Problem, Tensors, draw
from torch import Tensor

import fused_sd

WORDS = ("", "mean", "forward_kl", "x", "triton", "sparse")
NUMBERS = (-1, 0, 1, 3, 2.5, -0.5, 1e-30, 1e30, 10**20, float("nan"), float("inf"), True)
OTHERS = (None, (), [], {}, (1, 2), (0.5, 0.2), (None, None), ("a",), object, 1j)
MORE = (  # keywords that a call does not have already, or not at all
    *("reduction", "gradient", "tolerance", "process_group", "metrics", "with_grad", "support"),
    *("teacher_log_probs", "old_log_probs", "token_ids", "importance", "evidence", "unknown"),
)
MESSAGE = re.compile(r" must .*, got .*; .", re.DOTALL)
# the first is ours, the others are Python's own for a signature that does not fit
TYPE_ERROR = re.compile("got an unknown keyword|got an unexpected keyword|got multiple values for")

# public functions that make no loss, with legal arguments
HELPERS: dict[str, Callable[[], dict[str, Any]]] = {
    "aggregation_weights": lambda: {
        "mask": torch.ones(2, 3),
        "mode": "constant_length",
        "num_tokens": None,
        "length": 4.0,
        "dtype": torch.float32,
    },
    "skip_first_tokens": lambda: {"mask": torch.ones(2, 3), "num_tokens": 1},
    "rlcsd_advantages": lambda: {
        "advantages": torch.randn(4),
        "correct_log_probs": -torch.rand(4),
        "wrong_log_probs": -torch.rand(4, 3),
        "wrong_mask": torch.ones(4, 3, dtype=torch.bool),
        "temperature": 0.02,
        "scale": 1.0,
        "mix": 0.5,
        "threshold": 0.02,
        "clip": (-2.0, 2.0),
    },
    "iw_opd_advantages": lambda: {
        "teacher_log_probs": -torch.rand(2, 4),
        "rollout_log_probs": -torch.rand(2, 4),
        "mask": torch.ones(2, 4),
        "gamma": 0.5,
    },
    "trust_region_states": lambda: {
        "reference_hidden": torch.randn(3, 4),
        "reference_head": torch.randn(9, 4),
        "student_hidden": torch.randn(3, 5),
        "student_head": torch.randn(9, 5),
        "rate": 0.5,
    },
    "align_responses": lambda: {
        "student_ids": torch.tensor([[5, 6, 7, 8]]),
        "student_mask": torch.ones(1, 4),
        "teacher_ids": torch.tensor([[9, 5, 6, 7, 8]]),
        "teacher_mask": torch.ones(1, 5),
        "student_response_mask": torch.tensor([[0, 0, 1, 1]]),
        "teacher_response_mask": torch.tensor([[0, 0, 0, 1, 1]]),
        "student_sequence_ids": torch.zeros(1, 4, dtype=torch.int64),
        "teacher_sequence_ids": torch.zeros(1, 5, dtype=torch.int64),
    },
    "check_alignment": lambda: {
        "alignment": fused_sd.Alignment(
            torch.tensor([1, 2]), torch.tensor([2, 3]), torch.tensor([7, 8]), torch.ones(2)
        ),
        "student_ids": torch.tensor([[5, 6, 7, 8]]),
        "student_mask": torch.ones(1, 4),
        "teacher_ids": torch.tensor([[9, 5, 6, 7, 8]]),
        "teacher_mask": torch.ones(1, 5),
        "temperature": 1.0,
    },
    "detect_shift": lambda: {
        "student_hidden": torch.randn(7, 4),
        "student_head": torch.randn(9, 4),
        "teacher_hidden": torch.randn(7, 4),
        "teacher_head": torch.randn(9, 4),
        "alignment": fused_sd.Alignment(*[torch.arange(7)] * 3, torch.ones(7)),
        "temperature": 1.0,
    },
    "generalized_jsd": lambda: {"beta": 0.5, "argument": "beta"},
    "LMHead": lambda: {
        "weight": torch.randn(9, 4),
        "bias": torch.randn(9),
        "logit_scale": 1.0,
        "softcap": None,
        "valid_vocab": 8,
        "shard_sizes": (9,),
    },
    "Options": lambda: dict(vars(fused_sd.Options())),
    "Comparison": lambda: dict(vars(fused_sd.Comparison())),
    "Evidence": lambda: {"clip": (0.2, 0.2), "mix": 0.5, "log_prob": "current"},
    "EvidenceSchedule": lambda: {"peak": 0.5, "warmup_steps": 1, "hold_steps": 2, "decay_steps": 3},
    "ImportanceCap": lambda: {"old_log_probs": -torch.rand(3), "cap": 2.0},
    "Jsd": lambda: {"beta": 0.5},
    "MixedKl": lambda: {"forward_weight": 0.5},
    "SkewKl": lambda: {"student_weight": 0.5},
    "StudentTopK": lambda: {"k": 3},
    "TeacherNucleus": lambda: {"k": 3, "mass": 0.5},
    "TokenIds": lambda: {"ids": torch.zeros(3, 2, dtype=torch.int64)},
}


@dataclasses.dataclass
class Call:
    """A call of a public function, and what was spoiled in it."""

    function: str
    given: list[Any]
    named: dict[str, Any]
    what: str
    problem: Problem | None


def call(seed: int) -> Call:
    """Draw a call and spoil it."""
    r = random.Random(~seed)
    torch.manual_seed(seed)
    problem = None
    if r.random() < 0.25:
        name = r.choice(list(HELPERS))
        given, named = [], HELPERS[name]()
    else:
        problem = draw(seed, max_tokens=5, max_vocab=30)
        name = problem.loss
        tensors = Tensors(problem, getattr(torch, problem.dtype))
        args, kwargs = arguments(problem, tensors)
        given, named = list(args), dict(kwargs)
    at = r.randrange(len(given) + len(named) + 1)
    if at < len(given):
        given[at], how = spoiled(given[at], r)
        return Call(name, given, named, f"argument {at}: {how}", problem)
    if at < len(given) + len(named):
        key = list(named)[at - len(given)]
        named[key], how = spoiled(named[key], r)
        return Call(name, given, named, f"{key}: {how}", problem)
    key = r.choice(MORE)
    named[key], how = spoiled(None, r)
    return Call(name, given, named, f"{key} added: {how}", problem)


def spoiled(value: Any, r: random.Random) -> tuple[Any, str]:
    """Return something else in a value's place, and what it is."""
    if isinstance(value, Tensor) and r.random() < 0.75:
        return spoiled_tensor(value, r)
    if isinstance(value, fused_sd.LMHead) and r.random() < 0.6:
        weight, how = spoiled_tensor(value.weight, r)
        if isinstance(weight, Tensor):
            return weight, f"weight {how}"
        return weight, how
    pool = [*WORDS, *NUMBERS, *OTHERS, "tensor", "array", "module"]
    made = r.choice(pool)
    if isinstance(made, str) and made == "tensor":
        return torch.randn(r.choice([(), (2,), (3, 2)])), "a float tensor"
    if isinstance(made, str) and made == "array":
        return numpy.zeros(3), "a numpy array"
    if isinstance(made, str) and made == "module":
        return torch.nn.Linear(3, 5), "a module"
    return made, repr(made)


def spoiled_tensor(value: Tensor, r: random.Random) -> tuple[Any, str]:
    value = value.detach().clone()
    ways: dict[str, Callable[[], Any]] = {
        "one more row": lambda: torch.cat([value, value[:1]]) if value.dim() else value[None],
        "one more dimension": lambda: value[None],
        "no dimension": lambda: value.sum(),
        "transposed": lambda: value.transpose(0, -1) if value.dim() else value,
        "empty": lambda: value.new_zeros(0),
        "complex": lambda: value.to(torch.complex64),
        "int64": lambda: value.nan_to_num(0).long(),
        "int8": lambda: value.nan_to_num(0).clamp(-9, 9).to(torch.int8),
        "bool": lambda: value != 0,
        "another float": lambda: value.to(torch.float64 if r.random() < 0.5 else torch.bfloat16),
        "fp8": lambda: value.float().to(torch.float8_e4m3fn),
        "NaN": lambda: (
            torch.full_like(value, torch.nan, dtype=value.dtype)
            if value.is_floating_point()
            else value.long() - 10**9
        ),
        "inf": lambda: (
            torch.full_like(value, torch.inf, dtype=value.dtype)
            if value.is_floating_point()
            else value.long() + 10**9
        ),
        "negative": lambda: ~value if value.dtype == torch.bool else -1 - value.abs(),
        "on meta": lambda: value.to("meta"),
        "sparse": lambda: value.to_sparse(),
        "with a gradient": lambda: value.float().requires_grad_(),
        "a list": lambda: value.tolist(),
        "a numpy array": lambda: value.float().numpy(),
        "quantised": lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    }
    how = r.choice(list(ways))
    return ways[how](), how


def check(seed: int) -> list[str]:
    """Make a spoiled call; return what is wrong with how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = call(seed)
        try:
            getattr(fused_sd, made.function)(*made.given, **made.named)
        except Exception as error:  # which is what is looked at
            return judged(error)
    return []


def judged(error: Exception) -> list[str]:
    """What is wrong with an error that a caller sees."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    is_ours = "/fused_sd/" in where.filename and where.filename.endswith(".py")
    if isinstance(error, ValueError) and is_ours and MESSAGE.search(str(error)):
        return []
    if isinstance(error, TypeError) and TYPE_ERROR.search(str(error)):
        return []
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fused_sd/" in f.filename]
    at = f"{frames[-1].filename.rpartition('/fused_sd/')[2]}:{frames[-1].lineno}" if frames else ""
    return [f"{text} (at {at})"]


def code(seed: int) -> str:
    made = call(seed)
    return f"{made.function} with {made.what}; {made.problem!r}"
