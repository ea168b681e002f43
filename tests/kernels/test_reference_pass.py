"""Differences between tensors and their references."""

import pytest
import torch

from nrm_plugin.kernels.reference_pass import LEAST, difference

INF = torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_are_unchanged_and_zeros_become_tiny(dtype):
    value = torch.tensor([1.5, 2.0, -3.0, 0.0, 1e-10], dtype=dtype)
    reference = torch.tensor([1.0, 2.0, 4.0, -0.0, 0.0], dtype=dtype)
    result = difference(value, reference)
    assert result.delta[[0, 2, 4]].equal((value - reference)[[0, 2, 4]])
    assert result.delta[[1, 3]].abs().tolist() == [torch.tensor(LEAST[dtype], dtype=dtype).item()] * 2
    assert result.is_zero.tolist() == [False, True, False, True, False]


def test_without_zeros_there_is_no_mask():
    value = torch.tensor([1.0, -2.0, INF])
    result = difference(value, torch.zeros(3))
    assert result.delta.equal(value)
    assert result.is_zero is None
    assert difference(value[:0], value[:0]).is_zero is None


def test_no_difference_is_zero_even_if_it_equals_the_tiny_number():
    least = torch.tensor(LEAST[torch.float32], dtype=torch.float32)
    result = difference(torch.stack([-least, least, -least / 2, least * 0]), torch.zeros(4))
    assert bool((result.delta.abs() >= least).all())
    assert result.is_zero.tolist() == [False, False, True, True]


def test_equal_infinities_do_not_differ():
    value = torch.tensor([INF, -INF, -INF, 1.0, 0.0])
    result = difference(value, torch.tensor([INF, -INF, 1.0, -INF, 0.0]))
    assert result.is_zero.tolist() == [True, True, False, False, True]
    assert result.delta[2:4].tolist() == [-INF, INF]
