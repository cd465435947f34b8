"""What reward and feedback functions may return, and what is refused."""

import decimal
import math

import numpy as np
import pytest
import torch

from fused_sd.integrations.shared.returned import rewards, texts


async def later(value):
    return value


# name: what a reward function returns for right, wrong, right and a completion without a verdict
READ = {
    "floats": lambda: [1.0, 0.0, 1.0, None],
    "integers": lambda: [1, 0, 1, None],
    "booleans": lambda: [True, False, True, None],
    "a tuple": lambda: (1, 0, 1, None),
    "NaN": lambda: [1.0, 0.0, 1.0, math.nan],
    "a tensor": lambda: torch.tensor([1, 0, 1, math.nan]),
    "a column": lambda: torch.tensor([[1], [0], [1], [math.nan]]),
    "bf16 with a gradient": lambda: torch.tensor(
        [1, 0, 1, math.nan], requires_grad=True
    ).bfloat16(),
    "an array": lambda: np.array([1, 0, 1, np.nan]),
    "a column of an array": lambda: np.array([[1], [0], [1], [np.nan]]),
    "numbers of many kinds": lambda: [np.bool_(1), torch.tensor(0), decimal.Decimal(1), None],
    "a generator": lambda: iter([1, 0, 1, None]),
    "a coroutine": lambda: later([1, 0, 1, None]),
    "coroutines": lambda: [later(1), later(0), 1, later(None)],
}


@pytest.mark.parametrize("name", READ)
def test_a_number_is_a_reward_and_none_or_nan_is_no_verdict(name):
    assert rewards("reward", READ[name](), 4) == [1.0, 0.0, 1.0, None]


# what is returned for two completions, and what the error says of it
REFUSED = {
    "one for all": ([1.0], "return a list with one entry for each of 2 completions, got 1"),
    "one too many": ([1.0] * 3, "got 3; return None for a completion without a verdict"),
    "a number": (1.0, "got a float; put the answers into a list"),
    "a tensor without a dimension": (torch.tensor(1.0), "got a Tensor"),
    "nothing": (None, "got a NoneType"),
    "a text": ("10", "got a str"),
    "a mapping": ({0: 1.0, 1: 0.0}, "got a dict"),
    "a set": ({1.0, 0.0}, "got a set"),
    "texts": ([0, "1"], "return numbers, or None for no verdict, got '1' for completion 1"),
    "mappings": ([{"score": 1.0}] * 2, "got {'score': 1.0} for completion 0"),
    "lists": ([[1.0], [0.0]], "got [1.0] for completion 0"),
    "two numbers each": (torch.zeros(2, 2), "for completion 0"),
    "a complex number": ([1j, 0], "got 1j for completion 0"),
    "beyond every float": ([0, 10**400], "for completion 1"),
    "infinity": ([0.0, math.inf], "return finite numbers, got inf for completion 1; bound it"),
    "minus infinity": (np.array([-np.inf, 0]), "for completion 0"),
    "an infinite one later": ([later(math.inf), 1], "got inf for completion 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_reward_is_refused_with_its_function_and_place(name):
    answers, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        rewards("the reward function 'judge'", answers, 2)
    for one in answers if isinstance(answers, list) else ():
        if hasattr(one, "close"):
            one.close()
    assert str(error.value).startswith("the reward function 'judge' must return ")
    assert message in str(error.value)


def test_feedback_is_a_text_or_none_for_each_completion():
    assert texts("feedback_func", iter(["no", None]), 2) == ["no", None]
    assert texts("feedback_func", np.array(["no", "why?"]), 2) == ["no", "why?"]
    assert texts("feedback_func", ["no", math.nan], 2) == ["no", None]
    with pytest.raises(ValueError, match=r"be text, a number, .* got a dict .* in answer 1"):
        texts("feedback_func", ["no", {"why": 3}], 2)
    with pytest.raises(ValueError, match="for each of 2 completions, got 1; put None where"):
        texts("feedback_func", ["no"], 2)
    with pytest.raises(ValueError, match="got a dict"):
        texts("feedback_func", {0: "no", 1: "yes"}, 2)
