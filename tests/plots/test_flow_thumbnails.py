"""Thumbnails of the nodes of a flow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots.flow_thumbnails import (
    Photo,
    crop,
    is_cropped,
    node_thumbnails,
    painted,
    photo_pixels,
    region_areas,
    region_places,
    smoothed,
)
from nrm_plugin.plots.heatmaps import cell_sums
from nrm_plugin.plots.ribbons import DARK, LIGHT


def graph(*masses: float) -> FlowGraph:
    groups = tuple(range(len(masses)))
    return FlowGraph((FlowLayer("a", groups, tuple(map(str, groups)), masses, 0.0, 0, 0.0, 0.0),), ())


@pytest.mark.parametrize("shape", [(224, 224), (30, 50), (7, 7), (1, 9)])
@pytest.mark.parametrize("cells", [1, 7, 32, (3, 5)])
def test_sums_over_cells_keep_the_total_and_add_whole_blocks(shape, cells):
    values = np.random.default_rng(0).standard_normal(shape)
    sums = cell_sums(values, cells)
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    assert sums.shape == (min(rows, shape[0]), min(columns, shape[1]))
    assert sums.sum() == pytest.approx(values.sum())
    blocks = [np.array_split(np.arange(length), count) for length, count in zip(shape, sums.shape, strict=True)]
    if all(length % count == 0 for length, count in zip(shape, sums.shape, strict=True)):
        for row, column in np.ndindex(*sums.shape):
            block = values[np.ix_(blocks[0][row], blocks[1][column])]
            assert sums[row, column] == pytest.approx(block.sum())


def test_dots_and_grids_of_single_pixels_become_smooth():
    dotted = np.zeros((224, 224))
    dotted[::4, ::4] = 1
    inner = smoothed(dotted)[10:-10, 10:-10]
    assert inner.std() < 0.02 * inner.mean()


def test_all_thumbnails_of_a_layer_share_one_scale_and_weak_maps_are_paler():
    sharp, broad = np.zeros((100, 100)), np.full((100, 100), 1.0)
    sharp[40:60, 40:60] = 5
    thumbnails = node_thumbnails(graph(0.5, 0.4), {"a/0": sharp, "a/1": broad})
    assert thumbnails is not None
    largest = [float(np.abs(thumbnails.values[key]).max()) for key in ("a/0", "a/1")]
    shares = [smoothed(values / values.sum()).max() for values in (sharp, broad)]
    middle = np.median(shares)
    assert largest == pytest.approx([1.0, shares[1] / middle], rel=0.02)


def test_thumbnails_are_cropped_to_the_relevance_in_the_aspect_ratio_of_the_image():
    weights = np.zeros((100, 200))
    weights[20:40, 50:60] = 1
    top, left, bottom, right = crop(weights)
    assert (top <= 20, left <= 50, bottom >= 40, right >= 60) == (True,) * 4
    assert (right - left) == pytest.approx(2 * (bottom - top), abs=2)
    assert (bottom - top) * (right - left) < 0.3 * weights.size
    assert crop(np.ones((100, 200))) == (0, 0, 100, 200)
    assert crop(np.zeros((100, 200))) == (0, 0, 100, 200)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_positive_is_red_and_negative_is_blue_over_the_photograph(palette):
    values = np.zeros((80, 80))
    values[:, :20], values[:, 60:] = 1, -1
    photo = Photo(torch.full((3, 80, 80), 0.5))
    thumbnails = node_thumbnails(graph(0.5), {"a/0": values}, photo)
    assert thumbnails is not None
    pixels = painted(thumbnails, "a/0", palette) / 255
    height, width = pixels.shape[:2]
    for place, color in ((2, palette.positive), (width - 3, palette.negative)):
        np.testing.assert_allclose(pixels[height // 2, place], to_rgb(color), atol=0.2)
    grey = pixels[height // 2, width // 2]
    assert np.ptp(grey) < 0.05
    assert abs(grey - to_rgb(palette.paper)).max() < 0.5


def test_dark_thumbnails_do_not_glare():
    thumbnails = node_thumbnails(graph(0.5), {"a/0": np.eye(80)}, Photo(torch.ones(3, 80, 80)))
    assert thumbnails is not None
    assert painted(thumbnails, "a/0", DARK).mean() < 130


def test_what_the_model_did_not_see_is_dimmed_outside_of_a_frame():
    whole = torch.zeros(3, 100, 200)
    photo = Photo(torch.zeros(3, 50, 50), whole, (0.25, 0.0, 0.75, 1.0))
    pixels = photo_pixels(photo)
    height, width = pixels.shape[:2]
    assert width == pytest.approx(2 * height, abs=1)
    assert pixels[height // 2, width // 8].mean() > 120
    assert pixels[height // 2, width // 2].mean() == 0
    np.testing.assert_allclose(pixels[height // 2, width // 4 + 1] / 255, (0.9, 0.62, 0.0), atol=0.01)


def test_regions_are_outlined_and_placed_in_the_file():
    mask = np.zeros((50, 50), bool)
    mask[:10, 40:] = True
    photo = Photo(torch.ones(3, 50, 50), torch.ones(3, 100, 200), (0.25, 0.0, 0.75, 1.0), {"a/0": mask})
    x, y = region_places(photo)["a/0"]
    assert 0.25 + 0.5 * 0.8 < x < 0.75
    assert 0 < y < 0.2
    thumbnails = node_thumbnails(graph(0.5), {"a/0": mask.astype(float)}, photo)
    assert thumbnails is not None
    assert 0 < thumbnails.edges["a/0"].sum() < 0.2 * thumbnails.edges["a/0"].size


def test_areas_do_not_count_margins():
    content = np.zeros((10, 10), bool)
    content[2:8] = True
    halves, margin = np.zeros((10, 10), bool), ~content
    halves[:, :5] = True
    mixed = np.zeros((10, 10), bool)
    mixed[:5] = True  # 3 of 6 rows of the image, and 2 of the margins
    photo = Photo(torch.ones(3, 10, 10), regions={"a/0": halves, "a/1": margin, "a/2": mixed}, content=content)
    assert region_areas(photo) == {"a/0": 0.5, "a/2": 0.5}
    assert region_areas(replace(photo, content=None)) == {"a/0": 0.5, "a/1": 0.4, "a/2": 0.5}


def test_maps_without_two_dimensions_have_no_thumbnails():
    assert node_thumbnails(graph(0.5), {}) is None
    assert node_thumbnails(graph(0.5), {"a/0": np.ones((1, 24))}) is None


def test_the_crop_contains_relevance_of_both_signs():
    both = np.zeros((100, 100))
    both[10:20, 10:20], both[80:90, 80:90] = 1.0, -1.0
    thumbnails = node_thumbnails(graph(0.5, -0.5), {"a/0": both, "a/1": -both})
    assert thumbnails is not None
    top, left, bottom, right = thumbnails.box
    assert max(top, left) <= 10
    assert min(bottom, right) >= 90
    assert is_cropped(thumbnails) == (thumbnails.box != (0, 0, 100, 100))
    assert not is_cropped(None)


def test_thumbnails_do_not_show_the_amount_of_relevance():
    maps = {"a/0": np.random.default_rng(0).random((30, 30)), "a/1": np.random.default_rng(1).random((30, 30))}
    thumbnails = [node_thumbnails(graph(0.5, 0.5), maps | {"a/1": scale * maps["a/1"]}) for scale in (1, 0.01)]
    assert thumbnails[0] is not None
    assert thumbnails[1] is not None
    for key in maps:
        np.testing.assert_allclose(thumbnails[0].values[key], thumbnails[1].values[key], atol=1e-6)


def test_a_crop_is_noticed():
    one = np.zeros((100, 100))
    one[40:50, 40:50] = 1.0
    assert is_cropped(node_thumbnails(graph(1.0), {"a/0": one}))
    assert not is_cropped(node_thumbnails(graph(1.0), {"a/0": np.ones((100, 100))}))
