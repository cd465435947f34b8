"""Wrong values of an argument, by the kind of value that is right there.

``SCALARS`` go into every argument.  ``tensors_like`` spoils a right tensor, one property at a time.
A kind lists the values that are right after all; whatever it does not list has to be refused.
"""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _some_function(*tensors: Any) -> None:
    """Stands for a function in a value's place."""


SCALARS: dict[str, Any] = {
    "None": None,
    "str": "somthing",
    "digits": "3",
    "bytes": b"mean",
    "True": True,
    "1": 1,
    "0": 0,
    "-7": -7,
    "10**30": 10**30,
    "0.5": 0.5,
    "-0.5": -0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "[]": [],
    "[0.5]": [0.5],
    "(0.5, 'b')": (0.5, "b"),
    "(nan, nan)": (float("nan"), float("nan")),
    "(True, True)": (True, True),
    "[None, None]": [None, None],
    "[[]]": [[]],
    "dict": {"weight": 1},
    "set": {1},
    "generator": (number for number in ()),
    "numpy array": np.ones(3),
    "numpy number": np.float32(2.0),
    "numpy int": np.int64(2),
    "object": object(),
    "namespace": SimpleNamespace(weight=1, shape=(3,), dtype=torch.float32),
    "class": dict,
    "function": _some_function,
    "module": nn.Linear(3, 2),
    "module class": nn.Linear,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "tensor number": torch.tensor(2.0),
    "tensor": torch.ones(3),
}


def tensors_like(right: Tensor) -> Iterator[tuple[str, Any]]:
    """Spoil a right tensor in one property at a time."""
    yield "as a list", right.tolist()
    yield "as numpy", right.detach().float().numpy()
    yield "tensor class", Tensor
    yield "no tokens", right[:0]
    yield "one axis more", right[None]
    yield "axis at the end", right[..., None]
    yield "one axis less", right[0]
    yield "0-d", right.flatten()[0]
    yield "empty", torch.empty(0)
    yield "shorter", right[:-1]
    yield "longer", torch.cat([right, right])
    if right.dim() > 1:
        yield "narrower", right[..., :-1]
        yield "transposed", right.T.contiguous()
    yield "bool", right.detach() > 0
    yield "int64", right.detach().long()
    yield "int32", right.detach().int()
    yield "float64", right.detach().double()
    yield "float16", right.detach().half()
    yield "complex64", right.detach().to(torch.complex64)
    yield "float8", right.detach().float().to(torch.float8_e4m3fn)
    yield "meta", right.detach().to("meta")
    yield "sparse", right.detach().to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        yield "nested", torch.nested.nested_tensor([right.detach()[0], right.detach()[0]])
        yield (
            "jagged",
            torch.nested.nested_tensor([right.detach(), right.detach()], layout=torch.jagged),
        )
        floats = right.detach().float()
        yield "quantized", torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8)
    yield "with gradient", right.detach().float().requires_grad_()
    yield "nan inside", _with(right, float("nan"))
    yield "inf inside", _with(right, float("inf"))
    yield "negative", -1 - right.detach().float().abs()


def _with(right: Tensor, value: float) -> Tensor:
    spoilt = right.detach().clone().float()
    spoilt.flatten()[0] = value
    return spoilt
