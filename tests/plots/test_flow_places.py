"""Descriptions of the location of a region in an image."""

from __future__ import annotations

import numpy as np
import pytest

from nrm_plugin.plots.flow_places import SPREAD, THIRDS, half_area, place_name


def square(row: int, column: int, side: int = 4, size: int = 12) -> np.ndarray:
    region = np.zeros((size, size), bool)
    region[row : row + side, column : column + side] = True
    return region


@pytest.mark.parametrize(("relevance", "area"), [
    (np.ones((4, 5)), 0.5), (-np.ones((4, 5)), 1.0), (np.eye(10), 0.05), (np.diag([6.0, 2, 2, 1]), 1 / 16),
    (np.diag([5.0, 4, 3, -90]), 2 / 16),
])  # fmt: skip
def test_the_area_with_half_of_the_positive_relevance(relevance, area):
    assert half_area(relevance) == pytest.approx(area)


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(3))
def test_a_small_region_lies_in_one_ninth_of_the_image(row, column):
    assert place_name(square(4 * row, 4 * column)) == THIRDS[row][column]


def test_a_region_across_ninths_lies_at_its_centre_of_mass():
    assert place_name(square(2, 0)) == "left"


def test_a_large_long_or_hollow_region_has_no_location():
    assert place_name(square(0, 0, 8)) == ""  # 44% of the image
    assert place_name(square(0, 0, 7)) == "upper left"  # 34%
    for length, place in ((9, "left"), (10, "")):  # 75% and 83% of a side
        column = np.zeros((12, 12), bool)
        column[:length, :3] = True
        assert place_name(column) == place
        assert place_name(column.T) == place.replace("left", "top")
    ring = square(0, 0, 7)
    ring[2:5, 2:5] = False
    assert place_name(ring) == ""
    relevance = np.zeros((12, 12))
    relevance[0, 0] = 1.0
    assert place_name(ring, relevance) == ""


def test_a_region_with_little_relevance_at_its_center_of_mass_lies_in_a_half_or_is_spread_out():
    cross = np.zeros((12, 12), bool)
    cross[2:10, 5:7] = cross[5:7, 2:10] = True
    relevance = np.zeros((12, 12))
    relevance[2:4, 5:7] = relevance[8:10, 5:7] = 1.0
    assert place_name(cross, relevance) == SPREAD
    assert place_name(cross, relevance.T) == SPREAD
    relevance[2:4] *= 0.5
    assert place_name(cross, relevance) == "bottom"
    assert place_name(cross, relevance[::-1]) == "top"
    assert place_name(cross, relevance.T) == "right"
    assert place_name(cross, relevance.T[:, ::-1]) == "left"


def test_a_region_whose_relevance_lies_elsewhere_than_its_area_has_no_location():
    corner = np.zeros((12, 12), bool)
    corner[:7, :3] = corner[:3, :7] = corner[:6, :6] = True  # upper left, up to the center
    assert place_name(corner) == "upper left"
    relevance = np.zeros((12, 12))
    relevance[4:6, 4:6] = 1.0
    assert place_name(corner, relevance) == ""
    relevance[4:6, 4:6], relevance[4:7, :3] = 0.0, 1.0
    assert place_name(corner, relevance) == "left"  # the column is the same


def test_without_relevance_or_pixels_the_area_decides():
    assert place_name(square(0, 0), np.zeros((12, 12))) == "upper left"
    assert place_name(square(0, 0), np.ones((3, 3))) == "upper left"  # of another size
    assert place_name(np.zeros((12, 12), bool)) == ""
