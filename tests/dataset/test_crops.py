"""Crops equal receptive fields computed by hand, and heat maps equal joint relevance."""

from __future__ import annotations

import pytest
import torch

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.dataset.crops import crops, relevance_mask
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.dataset.examples import EVENTS, References, ReferencesError
from nrm_plugin.errors import InputError
from tests.conftest import untouched
from tests.dataset.sweep_nets import Data, net


def test_a_group_without_references_has_no_crops():
    model = net()
    data = Data(4)
    results = find_references(model, [(data.x, torch.zeros(4, dtype=torch.long))], ["4"], k=2, target="label")
    references = results.of("4", target=0)
    references.samples[3] = -1
    cropped = crops(model, data, references, [3, 2], 1)
    assert cropped[3] == []
    assert len(cropped[2]) == 1


def test_a_crop_is_the_receptive_field_and_its_heat_map_the_joint_relevance(net, data):
    references = find_references(net, data, ["2"], 3).of("2")
    with untouched(net):
        rows = crops(net, data, references, [0, 3])
    assert list(rows) == [0, 3]
    for group, row in rows.items():
        assert [crop.sample for crop in row] == references.of(group)
        for place, crop in enumerate(row):
            image, label = data[crop.sample]
            # Two 3×3 convolutions, the second with stride 2: 5×5 pixels, 2 apart.
            top, left = (2 * part for part in divmod(int(references.positions[group, place]), 3))
            assert crop.box == (top, left, top + 5, left + 5)
            assert torch.equal(crop.image, image[:, top : top + 5, left : left + 5])
            mu = RelevanceMeasure(net, image[None], int(label))
            heat = mu.marginal("input", joint=at("2")[group])[0, 0]
            torch.testing.assert_close(crop.heat, heat[top : top + 5, left : left + 5])
            sign = 1 if crop.heat.sum() >= 0 else -1
            largest = (sign * heat).clamp(min=0).max()  # an image this small is not smoothed
            assert torch.equal(crop.mask, sign * crop.heat >= 0.2 * largest)


def test_crops_of_whole_images_of_events_and_without_positions(net, data):
    results = find_references(net, data, ["2"], 2, events={"e": at("2")[1] & at("0")[2]})
    whole = crops(net, data, results.of("2"), [1], 1, whole=True, to_image=lambda image: 1 - image)[1]
    assert len(whole) == 1
    assert whole[0].box == (0, 0, 9, 9)
    assert torch.equal(whole[0].image, 1 - data[whole[0].sample][0])
    event = crops(net, data, results.of(EVENTS), events={"e": at("2")[1] & at("0")[2]})["e"][0]
    assert event.box == (0, 0, 9, 9)
    mu = RelevanceMeasure(net, data[event.sample][0][None], event.target)
    torch.testing.assert_close(event.heat.sum(), mu(at("2")[1] & at("0")[2])[0])
    known = results.of("2")
    unknown = References(**{**vars(known), "positions": torch.full_like(known.positions, -1)})
    for one, other in zip(crops(net, data, known, [1])[1], crops(net, data, unknown, [1])[1], strict=True):
        assert one.box == other.box
    with pytest.warns(DeprecationWarning, match="Use to_image= instead"):
        former = crops(net, data, known, [1], 1, whole=True, picture=lambda image: 1 - image)[1]
    assert torch.equal(former[0].image, whole[0].image)
    with pytest.raises(ReferencesError, match="pass the event"):
        crops(net, data, results.of(EVENTS))
    with pytest.raises(InputError, match=r"image \(C, H, W\)"):
        crops(net, [torch.zeros(3)] * 23, known, [1])


def test_the_mask_of_a_channel_with_negative_evidence_is_of_its_negative_relevance(net, data):
    references = find_references(net, data, ["2"], 23).of("2")
    negative = [
        crop for row in crops(net, data, references, whole=True).values() for crop in row if crop.heat.sum() < -0.01
    ]
    assert len(negative) > 5
    for crop in negative:
        assert torch.equal(crop.mask, -crop.heat >= 0.2 * (-crop.heat).max())


def test_the_mask_follows_the_smoothed_heat_map():
    heat = torch.zeros(60, 80)
    heat[20, 30], heat[50, 70] = 1.0, 0.1
    mask = relevance_mask(heat, 0.2)
    sigma = 80 / 60
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    gauss = torch.exp(-((rows - 20) ** 2 + (columns - 30) ** 2) / (2 * sigma**2))
    assert torch.equal(mask, gauss >= 0.2)
    assert relevance_mask(-heat, 0.2).all()


def test_references_of_a_difference_are_evidence_for_the_target(net, data):
    """The largest values are those of μ times the sign of the difference, and so are the heat maps."""
    inputs = torch.stack([data[number][0] for number in range(len(data))])
    mu = RelevanceMeasure(net, inputs, 1, against="rest")
    assert (mu.sign < 0).any()
    found = find_references(net, data, ["2"], 3, target=1, against="rest", by=["relevance"]).of("2")
    values = mu.sign[:, None] * mu.marginal("2", "channel")
    torch.testing.assert_close(found.values, values.topk(3, 0).values.T.to(found.values), rtol=1e-4, atol=1e-6)
    samples = [int(number) for number in found.samples[2]]
    heat = mu.marginal("input", joint=at("2").channel(2)).sum(1) * mu.sign[:, None, None]
    for crop in crops(net, data, found, [2], whole=True, against="rest")[2]:
        torch.testing.assert_close(crop.heat, heat[crop.sample], rtol=1e-4, atol=1e-6)
        assert crop.sample in samples
