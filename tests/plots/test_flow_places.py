"""Descriptions of the location of a region in an image."""

from __future__ import annotations

import numpy as np
import pytest

from nrm_plugin.plots.flow_places import EDGES, THIRDS, place_name


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


def test_without_relevance_or_pixels_the_area_decides():
    assert place_name(square(0, 0), np.zeros((12, 12))) == "upper left"
    assert place_name(square(0, 0), np.ones((3, 3))) == "upper left"  # of another size
    assert place_name(np.zeros((12, 12), bool)) == ""
