"""Photographs in figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nrm_plugin.commands.photos import margin_note, photo, side_by_side
from nrm_plugin.dataset.images import LoadedImage
from nrm_plugin.dataset.preprocessing import preprocessing
from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.plots.flow_thumbnails import Photo, node_thumbnails, photo_pixels, region_places
from tests.plots.test_flow_caption import layer


def test_two_images_are_next_to_each_other_with_the_regions_in_both():
    first, second = torch.full((3, 32, 32), 0.25), torch.full((3, 32, 32), 0.75)
    region = np.zeros((32, 32), bool)
    region[:16] = True
    both = side_by_side(Photo(first), Photo(second), {"input/0": region})
    assert both.colors.shape == (32, 66, 3)
    np.testing.assert_allclose(both.colors[:, :32], 0.25)
    np.testing.assert_allclose(both.colors[:, 32:34], 1.0)  # a white gap
    np.testing.assert_allclose(both.colors[:, 34:], 0.75)
    mask = both.regions["input/0"]
    assert mask.shape == (32, 66)
    assert mask[:, :32].sum() == mask[:, 34:].sum() == 16 * 32
    assert not mask[:, 32:34].any()
    assert region_places(both)["input/0"][0] < 0.5  # the name is in the first image


def test_margins_are_described_with_their_relevance():
    assert margin_note(0.009, 0.5) == ""
    text = "The margins, 35% of the model's input, only make the image square. Areas do not count them."
    assert margin_note(0.35, 0.009) == text
    assert margin_note(0.35, 0.14) == f"{text} 14% of the relevance comes from them."
    assert margin_note(0.35, -0.14) == f"{text} −14% of the relevance comes from them."


@pytest.mark.parametrize(("size", "rows", "columns"), [((40, 20), 8, 16), ((20, 40), 16, 8), ((20, 20), 16, 16)])
def test_the_content_of_a_padded_image_is_known(size, rows, columns):
    image = Image.new("RGB", size, (255, 0, 0))
    loaded = SimpleNamespace(preprocessing=preprocessing(size=16, mean=[0.0] * 3, std=[1.0] * 3, fit="pad"))
    inputs = loaded.preprocessing(image)
    shown = photo(loaded, LoadedImage(Path("a.png"), image, ""), inputs).content
    drawn = inputs[0, 0] > 0.5
    if size == (20, 20):
        assert shown is None
    else:
        np.testing.assert_array_equal(shown, drawn)
        assert (shown.any(1).sum(), shown.any(0).sum()) == (rows, columns)


def test_images_of_one_channel_have_a_white_gap():
    both = side_by_side(Photo(torch.zeros(1, 32, 32)), Photo(torch.ones(1, 32, 32)), {})
    np.testing.assert_allclose(both.colors[:, 32:34], 1.0)


def test_thumbnails_of_two_images_show_outlines_but_no_photograph():
    graph = FlowGraph((layer("input", ("part 1", "part 2"), (0.5, -0.5)),), ())
    region = np.zeros((100, 100), bool)
    region[20:50, 20:50] = True
    both = side_by_side(Photo(torch.rand(3, 100, 100)), Photo(torch.rand(3, 100, 100)), {"input/0": region})
    thumbnails = node_thumbnails(graph, {"input/0": region * 1.0, "input/1": region * 1.0}, both)
    assert thumbnails is not None
    assert thumbnails.grey is None
    top, left, bottom, right = thumbnails.box
    assert (right - left, bottom - top) < (100, 100)
    assert thumbnails.edges["input/0"].any()
    frame = (photo_pixels(replace(both, regions={}), thumbnails) == 255).all(2)
    columns = np.flatnonzero(frame[: len(frame) // 2].mean(0) > 0.3) / frame.shape[1]
    left = [column for column in columns if not 0.48 < column < 0.52]  # without the gap
    assert left
    assert max(left) < 0.48  # the frame is in the first image
