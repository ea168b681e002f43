"""Thumbnails of the heat maps of a flow graph; the heat maps are tested with their figure."""

from __future__ import annotations

import numpy as np
import pytest

from nrm_plugin.measure.flow_heat_maps import thumbnail


def test_thumbnails_have_the_same_mass():
    values = np.random.default_rng(0).normal(size=(200, 131))
    small = thumbnail(values)
    assert small.shape == (96, 96)
    assert small.sum() == pytest.approx(values.sum())
    assert thumbnail(values[:5, :7]) is not None
    np.testing.assert_allclose(thumbnail(values[:5, :7]), values[:5, :7])
