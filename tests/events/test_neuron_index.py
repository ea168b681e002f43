"""Keys and texts of indices; which indices are accepted is tested in test_event.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nrm_plugin import at
from nrm_plugin.events.neuron_index import SHOWN, Index, checked_index, key_of, show, shown_in_call

MASK = torch.tensor([True, False, True])


def index(value: Any) -> Index:
    checked = checked_index(at("conv"), value)
    return Index(key_of(checked), checked)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (3, np.int64(3)),
        (3, torch.tensor(3)),
        ([0, 2], torch.tensor([0, 2])),
        ([0, 2], np.array([0, 2])),
        (range(0, 6, 2), [0, 2, 4]),
        (MASK, MASK.numpy()),
        (MASK, [True, False, True]),
        (MASK, MASK.repeat_interleave(2)[::2]),
        (slice(1, 4), slice(np.int64(1), np.int64(4))),
        ((0, slice(None), [1]), (torch.tensor(0), slice(None), np.array([1]))),
        (..., ...),
    ],
)
def test_indices_of_the_same_numbers_are_equal_and_have_the_same_hash(first: Any, second: Any):
    assert index(first) == index(second)
    assert hash(index(first)) == hash(index(second))


DIFFERENT = [
    0,
    1,
    [1],
    [[1]],
    [0, 1],
    [1, 0],
    MASK,
    ~MASK,
    [True, False],
    (0, 1),
    (0, slice(None)),
    slice(None),
    slice(0, 1),
    slice(0, 1, 2),
    ...,
]


def test_indices_of_different_numbers_differ():
    assert len({index(value) for value in DIFFERENT}) == len(DIFFERENT)
    assert index(0) != 0


def test_a_changed_tensor_does_not_change_the_index():
    numbers = torch.tensor([0, 2])
    checked = checked_index(at("conv"), numbers)
    numbers[0] = 1
    assert checked.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("value", "in_brackets", "as_argument"),
    [
        (3, "3", "3"),
        (slice(None), ":", "slice(None, None)"),
        (slice(1, 4), "1:4", "slice(1, 4)"),
        (slice(None, 4, 2), ":4:2", "slice(None, 4, 2)"),
        ((0, slice(2, None), ...), "0, 2:, ...", "0, 2:, ..."),
        ([0, 2], "[0, 2]", "[0, 2]"),
        (range(SHOWN), str(list(range(SHOWN))), str(list(range(SHOWN)))),
        (range(SHOWN + 1), f"{SHOWN + 1} numbers in ({SHOWN + 1},)", f"{SHOWN + 1} numbers in ({SHOWN + 1},)"),
        (MASK, "mask of 2 in (3,)", "mask of 2 in (3,)"),
    ],
)
def test_the_text_of_an_index(value: Any, in_brackets: str, as_argument: str):
    checked = checked_index(at("conv"), value)
    assert show(checked) == in_brackets
    assert shown_in_call(checked) == as_argument
