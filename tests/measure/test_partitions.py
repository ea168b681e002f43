"""Groups of neurons and their names."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at, patches
from nrm_plugin.errors import EventError, InputError, MissingExtraError
from nrm_plugin.measure.partitions import segments
from tests.flows import measure


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


def test_regions_patches_labels_and_classes_have_names(mu):
    left = torch.zeros(6, 6, dtype=torch.bool)
    left[:, :2] = True
    graph = mu.flow(["output", "input"], over={"input": {"left": left, "nothing": left & ~left}}, top=None,
                    names={"output": ["cat", "dog", "bird"]}, sample=0)  # fmt: skip
    output, region = graph.layers
    assert (output.labels, output.groups) == (("cat", "dog", "bird", "3"), (0, 1, 2, 3))
    assert region.labels == ("left", "nothing")
    assert region.masses == (pytest.approx(float(mu(at("input")[..., left])[0])), 0)
    assert region.rest == pytest.approx(float(mu(at("input")[..., ~left])[0]))
    cut = mu.flow(["output", "input"], over={"input": patches((6, 6), (2, 3))}, names={"input": {4: "middle"}}, top=6,
                  sample=0).layers[1]  # fmt: skip
    assert dict(zip(cut.groups, cut.labels, strict=True))[4] == "middle"
    for group, mass in zip(cut.groups, cut.masses, strict=True):
        row, column = divmod(group, 3)
        patch = mu(at("input")[:, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2])
        assert mass == pytest.approx(float(patch[0]))
    places = mu.flow(["2"], over="position", sample=0).layers[0]
    assert dict(zip(places.groups, places.labels, strict=True))[places.groups[0]] == "{},{}".format(
        *divmod(places.groups[0], 4)
    )


def test_regions_that_do_not_fit_raise(mu):
    mask = torch.ones(6, 6, dtype=torch.bool)
    for regions, words in [
        ({"a": mask, "b": mask}, "'b' of 'input' shares 108 neurons with an earlier region"),
        ({"a": mask[:5]}, r"'a' of shape \(5, 6\) does not broadcast"),
        ({"a": mask.long()}, "'a' of 'input' must be a boolean tensor"),
        ({}, "contains no region"),
    ]:
        with pytest.raises(EventError, match=words):
            mu.flow(["input"], over={"input": regions}, sample=0)


def test_patches_are_as_equal_as_possible():
    labels = patches((5, 7, 3), (2, 3, 1))
    assert labels.shape == (5, 7, 3)
    assert sorted(torch.bincount(labels.flatten()).tolist()) == [12, 12, 18, 18, 18, 27]
    for wrong in [0, 6, (2, 2, 2)]:
        with pytest.raises(InputError, match="patches"):
            patches((5, 7), wrong)


def test_volumes_have_patches_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 8, 2)).double().eval()
    mu = RelevanceMeasure(model, torch.randn(1, 1, 4, 4, 4).double(), 1)
    graph = mu.flow(["0", "input"], over={"input": patches((4, 4, 4), 2)}, top=None)
    corner = at("0")[1] & at("input")[:, :2, 2:, :2]
    assert graph.joints[0][1, 2] == pytest.approx(float(mu(corner)))
    assert graph.layers[1].groups == tuple(range(8))


def test_superpixels_follow_the_colours_of_an_image():
    pytest.importorskip("skimage")
    image = torch.zeros(3, 20, 24)
    image[0, :, :12], image[1, :, 12:] = 0.9, 0.8
    labels = segments(image, 8)
    assert labels.shape == (20, 24)
    assert labels.unique().tolist() == list(range(int(labels.max()) + 1))
    assert not {*labels[:, :12].flatten().tolist()} & {*labels[:, 12:].flatten().tolist()}
    assert segments(image[:1], 4).shape == (20, 24)
    mu = measure()
    assert mu.marginal("input", over=segments(torch.rand(1, 6, 6), 4)).ndim == 2
    with pytest.raises(InputError, match="superpixels are computed for one image"):
        segments(image[None])


def test_superpixels_without_scikit_image_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(MissingExtraError, match=r"nrm-plugin\[segments\]"):
        segments(torch.zeros(3, 8, 8))
