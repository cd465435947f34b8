"""What a teacher reads of values that are no text yet, against what they are for a human."""

import datetime
import decimal

import numpy as np
import pytest

pandas = pytest.importorskip("pandas")

import torch

from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.shared.texts import as_text

MESSAGES = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "tool", "content": None},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "It"}, {"type": "text", "text": "is 4."}],
    },
]
KNOWN = [
    ("It is 4.", "It is 4."),
    (np.str_("4"), "4"),
    (" ", " "),
    (0, "0"),
    (0.0, "0.0"),
    (False, "False"),
    (np.int64(0), "0"),
    (np.float32(0.1), "0.1"),
    (np.bool_(False), "False"),
    (np.array(0), "0"),
    (torch.tensor(0), "0"),
    (torch.tensor(0.5), "0.5"),
    (decimal.Decimal("0.10"), "0.10"),
    (MESSAGES, "2 + 2?\nIt is 4."),
    (np.array(MESSAGES, dtype=object), "2 + 2?\nIt is 4."),
    ([{"role": "assistant", "content": 4}], "4"),
]
MISSING = [
    None,
    float("nan"),
    np.float32("nan"),
    np.array(np.nan),
    torch.tensor(torch.nan),
    decimal.Decimal("NaN"),
    np.datetime64("NaT"),
    np.ma.masked,
    pandas.NA,
    pandas.NaT,
    [],
    np.array([]),
]
OTHERS = [
    {"answer": 4},
    {},
    ["4", "four"],
    np.array(["4"], dtype=object),
    [[]],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": {}}],
    [{"role": "user"}],
    [["4"], ["5", "6"]],
    b"4",
    torch.ones(2),
    datetime.date(2026, 1, 1),
    object(),
]


@pytest.mark.parametrize("value, text", KNOWN, ids=[repr(value)[:30] for value, _ in KNOWN])
def test_values_that_can_be_written_are_text(value, text):
    found = as_text("answer", value, "row 3")
    assert found == text
    assert type(found) is str


@pytest.mark.parametrize("value", MISSING, ids=lambda value: repr(value)[:30])
def test_missing_values_are_missing(value):
    assert as_text("answer", value, "row 3") is None


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_other_values_are_refused_with_row_and_column(value):
    with pytest.raises(ValueError, match=r"answer must be text, .*, got a \w+ .* in row 3; write"):
        as_text("answer", value, "row 3")


def test_a_rollout_refuses_a_hint_only_where_one_is_read():
    own = Rollout("2 + 2?", [1], [2], "4", 1.0, {"target": 4}, None, 0, [])
    assert own.privileged == {"target": 4}
    with pytest.raises(ValueError, match=r"privileged_context must be .* the prompt '2 \+ 2\?'"):
        _ = own.hint
    assert Rollout("", [1], [2], "4", 1.0, "", np.nan, 0, []).hint is None
