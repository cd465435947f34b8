r"""A stack language whose interpreter says what went wrong and where.

    a b c ...   push the input of this name
    + - *       replace the two topmost values by their sum, difference or product
    \           exchange the two topmost values
    $           push the topmost value once more
    %           drop the topmost value
    .           do nothing

A program is right if it leaves one value, the wanted one.  Words are counted from 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, mul, sub

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul}
SWAP, COPY, DROP, NOTHING = "\\", "$", "%", "."
STACK_WORDS = (*OPERATORS, SWAP, COPY, DROP, NOTHING)
LARGEST = 99_999  # products of copies would otherwise grow without bound
NEEDED = {**dict.fromkeys(OPERATORS, 2), SWAP: 2, COPY: 1, DROP: 1, NOTHING: 0}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a program.

    Attributes:
        kind: One of "underflow", "unknown", "overflow", "left" and "value".
        message: What the interpreter says of it.
    """

    kind: str
    message: str


def run(program: Sequence[str], inputs: Mapping[str, int]) -> list[int] | Fault:
    """Return the values that a program leaves, the topmost last, or the fault that stopped it."""
    stack: list[int] = []
    for place, word in enumerate(program, 1):
        if word in inputs:
            stack.append(inputs[word])
            continue
        if word not in NEEDED:
            return Fault("unknown", f"unknown {word} at {place}")
        if len(stack) < NEEDED[word]:
            return Fault("underflow", f"underflow at {place}")
        if word in OPERATORS:
            second, first = stack.pop(), stack.pop()
            stack.append(OPERATORS[word](first, second))
        elif word == SWAP:
            stack[-2:] = stack[:-3:-1]
        elif word == COPY:
            stack.append(stack[-1])
        elif word == DROP:
            stack.pop()
        if stack and abs(stack[-1]) > LARGEST:
            return Fault("overflow", f"overflow at {place}")
    return stack


def fault(program: Sequence[str], inputs: Mapping[str, int], wanted: int) -> Fault | None:
    """Return what is wrong with a program on these inputs; None: it is right."""
    left = run(program, inputs)
    if isinstance(left, Fault):
        return left
    if len(left) != 1:
        return Fault("left", f"{len(left)} left")
    return None if left == [wanted] else Fault("value", f"got {left[0]} want {wanted}")
