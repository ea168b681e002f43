"""Sizes of tensors without values, counted by hand."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from nrm_plugin.recording.shapes_only import ShapesOnly


def test_tensors_count_until_they_are_released():
    mode = ShapesOnly([], torch.device("cpu"))
    x = mode.shapes(torch.randn(100, 100))
    with mode:
        a = x + 1
        b = a * 2  # the peak: two tensors of 40,000 bytes
        del a
        gc.collect()
        c = b.t() - 1
    assert c.shape == (100, 100)
    assert mode.peak == 2 * 40_000
    assert sum(mode.bytes_at_peak.values()) == mode.peak


def test_reads_raise_unless_representative_values_are_wanted():
    mode = ShapesOnly([], torch.device("cpu"))
    x = mode.shapes(torch.randn(3))
    with mode:
        with pytest.raises(DataDependentOutputException):
            bool(x.sum() > 0)
        mode.answers = True
        assert bool((x.relu() >= 0).all())
        assert not bool((x >= 0).all())
        assert bool((torch.arange(3) < 3).all())
