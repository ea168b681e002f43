"""Keys are equal for calls and queries of the same form only."""

import pytest
import torch
from torch import nn

from nrm_plugin import at
from nrm_plugin.plan.keys import call_key, frozen


def test_values_of_tensors_are_no_part_of_a_form():
    assert call_key((torch.zeros(2, 3), None))[0] == call_key((torch.ones(2, 3), None))[0]


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3, 2), 1), (torch.zeros(2, 3, dtype=torch.float64), 1), (torch.zeros(3, 2).T, 1),
        (torch.zeros(2, 3), 2), (torch.zeros(2, 3), True), (torch.zeros(2, 3), 1.0), ((torch.zeros(2, 3),), 1),
        {"x": torch.zeros(2, 3), "y": 1}, (torch.zeros(2, 3, device="meta"), 1),
    ],
)  # fmt: skip
def test_shape_dtype_strides_device_and_other_arguments_are_part_of_a_form(other):
    assert call_key((torch.zeros(2, 3), 1))[0] != call_key(other)[0]


def test_a_tensor_that_is_given_twice_is_one_tensor():
    x, y = torch.zeros(2), torch.zeros(2)
    (same, tensors), (different, both) = call_key((x, x)), call_key((x, y))
    assert same != different
    assert (len(tensors), len(both)) == (1, 2)


def test_autocast_and_the_default_dtype_are_part_of_a_form():
    x = torch.zeros(2)
    plain = call_key(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert call_key(x)[0] != plain
    torch.set_default_dtype(torch.float64)
    try:
        assert call_key(x)[0] != plain
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (at("a")[0], at("a")[1]), (at("a"), at("b")), (["a"], ("a",)), (1, True), (1, 1.0), ("1", 1),
        (torch.tensor([1, 2]), torch.tensor([1, 3])), (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)),
        (nn.Linear(1, 1), nn.Linear(1, 1)), ({"a": 1}, {"a": 2}),
    ],
)  # fmt: skip
def test_different_arguments_of_queries_have_different_keys(one, other):
    assert frozen(one) == frozen(one)
    assert frozen(one) != frozen(other)
    hash(frozen(one))


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(1 << 11, 1 << 10)])
def test_what_cannot_be_compared_raises(value):
    with pytest.raises(TypeError, match="cannot be compared"):
        frozen(value)
