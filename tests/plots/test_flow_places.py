"""Descriptions of the location of a region in an image."""

from __future__ import annotations

import numpy as np
import pytest

from nrm_plugin.plots.flow_places import EDGES, SPREAD, THIRDS, place_name


def square(row: int, column: int, side: int = 4, size: int = 12) -> np.ndarray:
    region = np.zeros((size, size), bool)
    region[row : row + side, column : column + side] = True
    return region


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
def test_a_small_region_lies_in_one_ninth_of_the_image(row, column):
    assert place_name(square(4 * row, 4 * column)) == THIRDS[row][column]


def test_a_region_across_ninths_lies_at_its_centre_of_mass():
    assert place_name(square(2, 0)) == "left"
    assert place_name(np.ones((12, 3), bool)) == EDGES  # it covers all sides


def test_a_region_around_the_others_lies_along_the_edges_unless_its_relevance_does_not():
    region = ~square(2, 2, 8)
    assert place_name(region) == EDGES
    relevance = np.full((12, 12), 0.001)
    relevance[0:2, 8:] = -1.0
    assert place_name(region, relevance) == "upper right"


def test_a_large_region_with_little_relevance_at_its_center_of_mass_lies_in_a_half_or_is_spread_out():
    frame = np.zeros((12, 12), bool)
    frame[2:, [0, 1, 9, 10]] = frame[10:, :11] = True  # open above
    assert place_name(frame) == "bottom"
    assert place_name(frame[::-1]) == "top"
    assert place_name(frame.T) == "right"
    assert place_name(frame.T[:, ::-1]) == "left"
    corners = np.zeros((12, 12), bool)
    corners[np.ix_([1, 2, 9, 10], [1, 2, 9, 10])] = True
    assert place_name(corners) == SPREAD


def test_without_relevance_or_pixels_the_area_decides():
    assert place_name(square(0, 0), np.zeros((12, 12))) == "upper left"
    assert place_name(square(0, 0), np.ones((3, 3))) == "upper left"  # of another size
    assert place_name(np.zeros((12, 12), bool)) == ""
