"""References of one pass equal single measures sorted by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.dataset.examples import EVENTS, FoundReferences, ReferencesError
from nrm_plugin.errors import InputError, TargetError, UnknownLayerError
from tests.conftest import slow_but, untouched

BATCH = [(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)]


def test_outputs_and_activations_that_cannot_be_ranked_raise():
    three = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).eval()
    with pytest.raises(InputError, match=r"classifier with outputs \(N, classes\), got \(6, 2, 2\)"):
        find_references(three, BATCH, ["0"])

    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(len(x))[:, None] == 2, torch.inf, x)

    broken = nn.Sequential(nn.Linear(3, 4), Infinite(), nn.Hardtanh(), nn.Linear(4, 2)).eval()
    with pytest.raises(ReferencesError, match="activation of '1' is not finite in sample 2"):
        find_references(broken, BATCH, ["1"], by=["activation"])


def test_the_representation_of_references(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    references = find_references(model, BATCH, ["0"], k=2)
    assert repr(references.of("0")) == "References('0' by relevance, 4 groups × 2)"
    assert repr(references.of("0", target=1)) == "References('0' by relevance, 4 groups × 2, target 1)"
    save_file({"x": torch.zeros(1)}, tmp_path / "x", {"nrm-plugin": '{"format": "another"}'})
    with pytest.raises(ReferencesError, match="its format is 'another'"):
        FoundReferences.load(tmp_path / "x")


def one_by_one(net, data, layer, by, unit="measure", reduce="sum", chosen=None):
    """``(score, position)`` of every sample and channel, each sample measured separately."""
    rows = []
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
        rows.append([(float(s), int(row.argmax()), target) for s, row in zip(score, flat, strict=True)])
    return rows


@pytest.mark.parametrize(
    ("unit", "reduce"), [pytest.param("measure", "sum", marks=pytest.mark.slow), ("output", "max"), ("layer", "sum")]
)
@pytest.mark.parametrize("by", slow_but(["relevance", "activation"], "activation"))
def test_references_equal_single_samples_sorted_by_hand(net, data, by, unit, reduce):
    with untouched(net):
        results = find_references(net, data, ["0", "2"], 4, by=(by,), unit=unit, reduce=reduce, batch_size=5)
    assert results.count == 23
    assert results.targets == sorted(set(data.tensors[1].tolist()))
    for layer in ("0", "2"):
        scores = one_by_one(net, data, layer, by, unit, reduce)
        for target in (None, *results.targets):
            references = results.of(layer, by, target)
            for group in references.groups:
                rows = [(row[group], n) for n, row in enumerate(scores) if target in (None, row[group][2])]
                # Rounded because rounding errors depend on the batch size: the repeated images are then a tie.
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
        references = find_references(net, twins, ["0"], 5, batch_size=size).of("0", "activation")
        assert len({tuple(row) for row in references.samples.tolist()}) > 1
        for row in references.samples.tolist():
            assert [sample for sample in row if sample in (0, 2, 3)] == [0, 2, 3]


@pytest.mark.medium
def test_events_are_ranked_by_their_mass(net, data):
    events = {"both": at("0")[1] & at("2")[3], "either": at("2")[[0, 3]]}
    references = find_references(net, data, events=events, k=30, batch_size=4).of(EVENTS)
    assert references.groups == ("both", "either")
    for row, event in enumerate(events.values()):
        masses = [float(RelevanceMeasure(net, x[None], int(y))(event)) for x, y in data]
        order = sorted(range(23), key=lambda n: (-round(masses[n], 10), n))
        assert references.values[row, :23].tolist() == pytest.approx([masses[n] for n in order], abs=1e-12)
        assert references.samples[row, 23:].tolist() == [-1] * 7
        assert references.values[row, 23:].isnan().all()
        assert len(references.of(("both", "either")[row])) == 23
    with pytest.raises(ReferencesError, match="no group 'none'"):
        references.of("none")


@pytest.mark.medium
def test_the_target_may_be_the_prediction_or_one_class(net, data):
    predicted = find_references(net, data.tensors[0].split(6), ["2"], 3, target="prediction", by=["relevance"])
    scores = one_by_one(net, data, "2", "relevance", chosen=lambda output: int(output.argmax()))
    best = [max(row[group][0] for row in scores) for group in range(5)]
    assert predicted.of("2").values[:, 0].tolist() == pytest.approx(best)
    one = find_references(net, data, ["2"], 3, target=2)
    assert one.targets == [2]
    assert torch.equal(one.of("2").samples, one.of("2", target=2).samples)


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
