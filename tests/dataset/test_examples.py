"""Reference examples equal single measures sorted by hand; crops equal receptive fields computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.dataset.crops import crops, relevance_mask
from nrm_plugin.dataset.examples import EVENTS, FoundReferences, References, ReferencesError
from nrm_plugin.dataset.maximization import find_references
from nrm_plugin.dataset.reference_plots import reference_figure
from nrm_plugin.errors import InputError, TargetError, UnknownLayerError
from tests.conftest import slow_but, untouched


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(45, 3)).double().eval()


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(1)
    images = torch.rand((23, 1, 9, 9), generator=draw, dtype=torch.float64)
    images[11] = images[4]  # a repeated image: a tie
    labels = torch.randint(0, 3, (23,), generator=draw)
    labels[11] = labels[4]
    return TensorDataset(images, labels)


def one_by_one(net, data, layer, by, unit="measure", reduce="sum", chosen=None):
    """``(score, position)`` of every sample and channel, each sample measured separately."""
    found = []
    for image, label in data:
        target = int(label) if chosen is None else chosen(net(image[None])[0])
        mu = RelevanceMeasure(net, image[None], target)
        values = mu.marginal(layer)[0]
        if by == "activation":
            values = net[: int(layer) + 1](image[None])[0].detach()
        elif unit != "measure":
            values = values * float(mu.output)
        flat = values.flatten(1)
        score = flat.sum(1) if reduce == "sum" else flat.max(1).values
        if unit == "layer":
            score = score / score.abs().sum()
        found.append([(float(s), int(row.argmax()), target) for s, row in zip(score, flat, strict=True)])
    return found


@pytest.mark.parametrize(("unit", "reduce"), [("measure", "sum"), ("output", "max"), ("layer", "sum")])
@pytest.mark.parametrize("by", slow_but(["relevance", "activation"], "activation"))
def test_references_equal_single_samples_sorted_by_hand(net, data, by, unit, reduce):
    with untouched(net):
        found = find_references(net, data, ["0", "2"], 4, by=(by,), unit=unit, reduce=reduce, batch_size=5)
    assert found.count == 23
    assert found.targets == sorted(set(data.tensors[1].tolist()))
    for layer in ("0", "2"):
        scores = one_by_one(net, data, layer, by, unit, reduce)
        for target in (None, *found.targets):
            references = found.of(layer, by, target)
            for group in references.groups:
                rows = [(row[group], n) for n, row in enumerate(scores) if target in (None, row[group][2])]
                # Rounded, because rounding errors depend on the batch size: the repeated images are then a tie.
                rows = sorted(rows, key=lambda row: (-round(row[0][0], 10), row[1]))[:4]
                listed = references.of(group)
                assert len(listed) == min(4, len(rows))
                for place, ((score, position, explained), _) in enumerate(rows):
                    assert float(references.values[group, place]) == pytest.approx(score, rel=1e-9, abs=1e-12)
                    assert int(references.targets[group, place]) == explained
                    twin = {4: 11, 11: 4}.get(rows[place][1], rows[place][1])
                    assert listed[place] in (rows[place][1], twin)
                    if score > 1e-9:
                        assert int(references.positions[group, place]) == position


def test_ties_are_broken_by_sample_index():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double().eval()
    with torch.no_grad():  # integers, so that sums are exact
        net[0].weight.mul_(6).round_()
        net[0].bias.zero_()
    images = torch.randint(0, 5, (5, 1, 4, 4)).double()
    twins = TensorDataset(images[[0, 1, 0, 0, 2]], torch.tensor([0, 1, 0, 0, 2]))
    for size in (1, 2, 3, 5):
        found = find_references(net, twins, ["0"], 5, batch_size=size).of("0", "activation")
        assert len({tuple(row) for row in found.samples.tolist()}) > 1
        for row in found.samples.tolist():
            assert [sample for sample in row if sample in (0, 2, 3)] == [0, 2, 3]


def test_events_are_ranked_by_their_mass(net, data):
    events = {"both": at("0")[1] & at("2")[3], "either": at("2")[[0, 3]]}
    found = find_references(net, data, events=events, k=30, batch_size=4).of(EVENTS)
    assert found.groups == ("both", "either")
    for row, event in enumerate(events.values()):
        masses = [float(RelevanceMeasure(net, x[None], int(y))(event)) for x, y in data]
        order = sorted(range(23), key=lambda n: (-round(masses[n], 10), n))
        assert found.values[row, :23].tolist() == pytest.approx([masses[n] for n in order], abs=1e-12)
        assert found.samples[row, 23:].tolist() == [-1] * 7
        assert found.values[row, 23:].isnan().all()
        assert len(found.of(("both", "either")[row])) == 23
    with pytest.raises(ReferencesError, match="no group 'none'"):
        found.of("none")


def test_the_target_may_be_the_prediction_or_one_class(net, data):
    predicted = find_references(net, data.tensors[0].split(6), ["2"], 3, target="prediction", by=["relevance"])
    scores = one_by_one(net, data, "2", "relevance", chosen=lambda output: int(output.argmax()))
    best = [max(row[group][0] for row in scores) for group in range(5)]
    assert predicted.of("2").values[:, 0].tolist() == pytest.approx(best)
    one = find_references(net, data, ["2"], 3, target=2)
    assert one.targets == [2]
    assert torch.equal(one.of("2").samples, one.of("2", target=2).samples)


def test_saved_references_are_loaded_unchanged(net, data, tmp_path):
    found = find_references(net, data, ["2"], 3, events={"e": at("2")[0]})
    found.save(tmp_path / "found.safetensors")
    again = FoundReferences.load(tmp_path / "found.safetensors")
    assert repr(again) == repr(found)
    for question in (("2", "relevance", None), ("2", "activation", 1), (EVENTS, "relevance", 0)):
        for key, value in vars(found.of(*question)).items():
            other = getattr(again.of(*question), key)
            assert (
                torch.equal(value.nan_to_num(-9), other.nan_to_num(-9))
                if isinstance(value, torch.Tensor)
                else (value == other)
            )
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(ReferencesError, match="is not a file of FoundReferences"):
        FoundReferences.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        FoundReferences.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (InputError, "k=0", {"k": 0}),
        (InputError, "unit='parts'", {"unit": "parts"}),
        (InputError, "by='size'", {"by": ["size"]}),
        (ReferencesError, "nothing to rank", {"layers": []}),
        (InputError, "undefined for events", {"events": {"e": at("2")[0]}, "unit": "layer"}),
        (UnknownLayerError, "'9'", {"layers": ["9"]}),
        (InputError, "target='best'", {"target": "best"}),
        (TargetError, "out of range", {"target": 3}),
        (TargetError, "target -1 is negative", {"target": -1}),
        (ReferencesError, "no labels", {"data": [torch.rand(2, 1, 9, 9).double()]}),
        (ReferencesError, "no samples", {"data": []}),
        (ReferencesError, r"\(inputs, labels\)", {"data": [(1, 2, 3)]}),
        (ReferencesError, "1 labels for 2", {"data": [(torch.rand(2, 1, 9, 9).double(), torch.tensor([1]))]}),
    ],
)
def test_invalid_arguments_raise(net, data, error, words, change):
    options = {"data": data, "layers": ["2"], **change}
    with untouched(net), pytest.raises(error, match=words):
        find_references(net, options.pop("data"), **options)


def test_a_shuffling_loader_raises(net, data):
    for loader in (DataLoader(data, 4, shuffle=True), DataLoader(data, 4, sampler=RandomSampler(data))):
        with pytest.raises(ReferencesError, match="shuffle=False"):
            find_references(net, loader, ["2"])
    given = find_references(net, DataLoader(data, 4), ["2"]).of("2")
    assert torch.equal(given.samples, find_references(net, data, ["2"], batch_size=7).of("2").samples)
    with pytest.raises(ReferencesError, match="was not ranked"):
        find_references(net, data, ["2"], by=["relevance"]).of("2", "activation")
    with pytest.raises(ReferencesError, match="per_target=False"):
        find_references(net, data, ["2"], per_target=False).of("2", target=1)


# -- crops ----------------------------------------------------------------------------------------------------------


def test_a_crop_is_the_receptive_field_and_its_heat_map_the_joint_relevance(net, data):
    found = find_references(net, data, ["2"], 3).of("2")
    with untouched(net):
        rows = crops(net, data, found, [0, 3])
    assert list(rows) == [0, 3]
    for group, row in rows.items():
        assert [crop.sample for crop in row] == found.of(group)
        for place, crop in enumerate(row):
            image, label = data[crop.sample]
            # Two 3×3 convolutions, the second with stride 2: 5×5 pixels, 2 apart.
            top, left = (2 * part for part in divmod(int(found.positions[group, place]), 3))
            assert crop.box == (top, left, top + 5, left + 5)
            assert torch.equal(crop.image, image[:, top : top + 5, left : left + 5])
            mu = RelevanceMeasure(net, image[None], int(label))
            heat = mu.marginal("input", joint=at("2")[group])[0, 0]
            torch.testing.assert_close(crop.heat, heat[top : top + 5, left : left + 5])
            sign = 1 if crop.heat.sum() >= 0 else -1
            largest = (sign * heat).clamp(min=0).max()  # an image this small is not smoothed
            assert torch.equal(crop.mask, sign * crop.heat >= 0.2 * largest)


def test_crops_of_whole_images_of_events_and_without_positions(net, data):
    found = find_references(net, data, ["2"], 2, events={"e": at("2")[1] & at("0")[2]})
    whole = crops(net, data, found.of("2"), [1], 1, whole=True, to_image=lambda image: 1 - image)[1]
    assert len(whole) == 1
    assert whole[0].box == (0, 0, 9, 9)
    assert torch.equal(whole[0].image, 1 - data[whole[0].sample][0])
    event = crops(net, data, found.of(EVENTS), events={"e": at("2")[1] & at("0")[2]})["e"][0]
    assert event.box == (0, 0, 9, 9)
    mu = RelevanceMeasure(net, data[event.sample][0][None], event.target)
    torch.testing.assert_close(event.heat.sum(), mu(at("2")[1] & at("0")[2])[0])
    known = found.of("2")
    unknown = References(**{**vars(known), "positions": torch.full_like(known.positions, -1)})
    for one, other in zip(crops(net, data, known, [1])[1], crops(net, data, unknown, [1])[1], strict=True):
        assert one.box == other.box
    with pytest.warns(DeprecationWarning, match="Use to_image= instead"):
        former = crops(net, data, known, [1], 1, whole=True, picture=lambda image: 1 - image)[1]
    assert torch.equal(former[0].image, whole[0].image)
    with pytest.raises(ReferencesError, match="pass the event"):
        crops(net, data, found.of(EVENTS))
    with pytest.raises(InputError, match=r"image \(C, H, W\)"):
        crops(net, [torch.zeros(3)] * 23, known, [1])


def test_the_mask_of_a_channel_with_negative_evidence_is_of_its_negative_relevance(net, data):
    found = find_references(net, data, ["2"], 23).of("2")
    negative = [crop for row in crops(net, data, found, whole=True).values() for crop in row if crop.heat.sum() < -0.01]
    assert len(negative) > 5
    for crop in negative:
        assert torch.equal(crop.mask, -crop.heat >= 0.2 * (-crop.heat).max())


def test_the_mask_follows_the_smoothed_heat_map():
    heat = torch.zeros(60, 80)
    heat[20, 30], heat[50, 70] = 1.0, 0.1
    found = relevance_mask(heat, 0.2)
    sigma = 80 / 60
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    gauss = torch.exp(-((rows - 20) ** 2 + (columns - 30) ** 2) / (2 * sigma**2))
    assert torch.equal(found, gauss >= 0.2)
    assert relevance_mask(-heat, 0.2).all()


def test_the_figure_has_a_row_for_each_channel(net, data):
    found = find_references(net, data, ["2"], 3).of("2")
    rows = crops(net, data, found, [0, 3])
    for style, lines in (("mask", 1), ("plain", 1), ("heat", 1), ("both", 2)):
        figure = reference_figure(rows, style, "of $5", dark=style == "plain", labels={3: "the $third"})
        assert len(figure.axes) == 2 * 3 * lines
        figure.canvas.draw()
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert texts == ["channel 0", r"the \$third"]
    titles = [axes.get_title() for axes in reference_figure(rows, unit="").axes]
    assert titles[0] == f"{float(found.values[0, 0]):.3g}"
    for wrong in ({}, {number: rows[0] for number in range(17)}):
        with pytest.raises(InputError, match="has room for"):
            reference_figure(wrong)
    with pytest.raises(InputError, match="style="):
        reference_figure(rows, "blur")
    assert math.isclose(sum(crop.value for crop in rows[0]), float(found.values[0].sum()), rel_tol=1e-6)
