"""Groups found on measures, their flows and walks, against events and plain sums.

Covers: nrm_plugin.measure.layer_groups, nrm_plugin.measure.mean_joints.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import Groups, RelevanceMeasure, at, find_groups, patches
from nrm_plugin.dataset.glocal import difference, mean_flow
from nrm_plugin.errors import EventError, InputError, UnknownLayerError
from nrm_plugin.measure.flow_graph import FlowError, FlowGraph
from nrm_plugin.measure.groups import labels_of
from nrm_plugin.plots.flow_caption import flow_caption

LAYERS = ["output", "5", "3", "0", "input"]


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(9, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    ).double()  # fmt: skip


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return RelevanceMeasure(conv_net(), images(), 2)


@pytest.fixture(scope="module")
def groups(mu) -> Groups:
    return find_groups(mu, LAYERS, k=3)


def test_the_kept_share_is_that_of_the_mean_joint_relevance(mu, groups):
    for number, (upper, lower) in enumerate(pairwise(LAYERS[1:4]), start=1):
        joint = mu.joint(upper, lower).mean(0)
        part = joint - joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
        rows, columns = (torch.nn.functional.one_hot(groups.labels[at]).double() for at in (number, number + 1))
        kept = float((rows.T @ part @ columns).abs().sum() / part.abs().sum())
        assert groups.kappas[number] == pytest.approx(kept, rel=1e-9)
    assert math.isnan(groups.kappas[0])  # one class is explained: the output depends on nothing
    assert groups.kappa == pytest.approx(sum(groups.kappas[1:]) / 3)


def test_groups_are_in_order_of_mass_and_named_after_their_largest_member(mu, groups):
    for layer in ("5", "0"):
        number = groups.layers.index(layer)
        mass = mu.marginal(layer, over="channel").mean(0)
        by_hand = [float(mass[groups.labels[number] == group].sum()) for group in range(3)]
        assert list(groups.masses[number]) == pytest.approx(by_hand)
        assert sorted(by_hand, key=lambda value: -abs(value)) == by_hand
        for group, name in enumerate(groups.names[number]):
            inside = torch.where(groups.labels[number] == group, mass.abs(), -1)
            others = int((groups.labels[number] == group).sum()) - 1
            assert name == f"channel {int(inside.argmax())}" + (f" + {others}" if others else "")
        sums = torch.stack([mu(groups.event(mu, layer, group)) for group in range(3)])
        assert list(groups.examples[number]) == sums.abs().argmax(1).tolist()


def test_few_members_with_mass_stay_apart(groups):
    assert groups.names[0] == ("channel 2", "others")
    assert groups.labels[0].tolist() == [1, 1, 0, 1]


def test_a_flow_over_groups_has_no_rest_and_every_number_is_its_event(mu, groups):
    graph = mu.flow(LAYERS, groups=groups, sample=1)
    for layer, name in zip(graph.layers, LAYERS, strict=True):
        assert layer.rest == pytest.approx(0, abs=1e-12)
        assert sum(layer.masses) + layer.sink + layer.bypass == pytest.approx(1, abs=1e-10)
        for group, mass in zip(layer.groups, layer.masses, strict=True):
            assert mass == pytest.approx(float(mu(groups.event(mu, name, group))[1]), abs=1e-12)
    for edge in graph.edges:
        if edge.upper.kind == edge.lower.kind == "group":
            both = groups.event(mu, edge.upper.layer, edge.upper.group) & groups.event(
                mu, edge.lower.layer, edge.lower.group
            )
            assert edge.mass == pytest.approx(float(mu(both)[1]), abs=1e-12)
    assert graph.carried == pytest.approx(1 - graph.layers[-1].sink, abs=1e-10)


@pytest.mark.medium
def test_a_flow_finds_groups_of_its_own(mu, groups):
    graph = mu.flow(LAYERS, over="groups", k=3, sample=1)
    assert graph == mu.flow(LAYERS, groups=groups, sample=1)
    assert [len(layer.groups) for layer in mu.flow(LAYERS[1:4], over="groups", k=9, sample=0).layers] == [9, 9, 9]
    masks = {"left": torch.arange(20) < 10, "right": torch.arange(20) >= 10}
    mixed = mu.flow(LAYERS[1:], over={"5": "groups", "3": "groups", "0": "groups", "input": masks}, k=2, sample=0)
    assert [layer.labels for layer in mixed.layers][3] == ("left", "right") or mixed.layers[3].labels == (
        "right",
        "left",
    )
    assert [len(layer.groups) for layer in mixed.layers] == [2, 2, 2, 2]


def test_groups_of_some_inputs_apply_to_others_and_to_a_file(groups, tmp_path):
    other = RelevanceMeasure(conv_net(), images(5)[4:], 2)
    graph = other.flow(LAYERS, groups=groups)
    assert graph.layers[1].rest == pytest.approx(0, abs=1e-12)
    groups.save(tmp_path / "groups.safetensors")
    again = Groups.load(tmp_path / "groups.safetensors")
    assert again == groups
    assert (groups.origin, again.origin) == ("", "groups.safetensors, where they were found on 3 samples")
    from_file = other.flow(LAYERS, groups=again.named({"3": {1: "legs"}}))
    for one in (from_file, from_file.times(2), from_file.smaller(top=2), FlowGraph.from_json(from_file.to_json())):
        assert one.origin == again.origin
    assert again.named({"3": {1: "legs"}}) != groups
    assert other.flow(LAYERS, groups=again.named({"3": {1: "legs"}})).layers[2].labels.count("legs") == 1
    (tmp_path / "groups.safetensors").write_bytes(b"no groups")
    with pytest.raises(InputError, match=r"was not written by Groups.save\(\)"):
        Groups.load(tmp_path / "groups.safetensors")


@pytest.mark.medium
def test_measures_of_batches_give_the_groups_of_one_batch(mu, groups):
    single = (RelevanceMeasure(conv_net(), image[None], 2) for image in images())
    found = find_groups(single, LAYERS, k=3)
    assert found.samples == groups.samples == 3
    assert all(torch.equal(one, two) for one, two in zip(found.labels, groups.labels, strict=True))
    assert found.kappas[1:] == pytest.approx(groups.kappas[1:])


@pytest.mark.medium
def test_members_are_channels_positions_neurons_labels_or_masks(mu):
    found = find_groups(mu, ["5", "0", "input"], 2, {"5": "neuron", "0": "position", "input": patches((20, 20), 4)})
    assert [len(labels) for labels in found.labels] == [10 * 100, 400, 16]
    assert find_groups(mu, ["5", "input"], 2).labels[1].shape == (256,)  # 16 × 16 cells
    heads = find_groups(mu, ["5", "3"], 2, {"5": (torch.arange(10) // 2).view(10, 1, 1)})
    assert heads.labels[0].shape == (5,)
    assert heads.over(mu, "5").shape == (10, 10, 10)
    apart = find_groups(mu, ["5", "3"], {"5": None, "3": 2})
    assert apart.names[0][0].startswith("channel")
    assert len(apart.names[0]) == 10
    assert len(apart.names[1]) == 2


def test_a_difference_with_a_negative_sign_has_the_groups_of_its_masses():
    mu = RelevanceMeasure(conv_net(), images(1), 2, against=3)
    swapped = RelevanceMeasure(conv_net(), images(1), 3, against=2)
    one, two = (find_groups(each, ["5", "3", "0"], 3) for each in (mu, swapped))
    assert float(mu.sign) == -float(swapped.sign)
    assert all(torch.equal(a, b) for a, b in zip(one.labels, two.labels, strict=True))
    assert np.array(one.masses) == pytest.approx(-np.array(two.masses))


@pytest.mark.medium
def test_bad_arguments_are_named(mu, groups):
    with pytest.raises(InputError, match="k=0 must be a whole number of at least 1"):
        find_groups(mu, ["5", "3"], 0)
    with pytest.raises(InputError, match="restarts=-1 must be"):
        find_groups(mu, ["5", "3"], restarts=-1)
    with pytest.raises(InputError, match="needs at least one measure"):
        find_groups([], ["5", "3"])
    with pytest.raises(EventError, match="is not below"):
        find_groups(mu, ["3", "5"])
    with pytest.raises(InputError, match="there are no groups for '7', only for output, 5"):
        groups.over(mu, "7")
    with pytest.raises(InputError, match="name groups"):
        groups.named({"5": {9: "legs"}})
    with pytest.raises(InputError, match="has groups 0 to 2"):
        groups.event(mu, "5", 3)
    small = RelevanceMeasure(conv_net(), images(1)[..., :12, :12], 2)
    with pytest.raises(InputError, match="have 256 members, but a tap of shape"):
        small.flow(LAYERS, groups=groups)
    with pytest.raises(FlowError, match="pass sample="):
        mu.flow(LAYERS, over="groups")


def test_flows_over_the_same_groups_compare_and_average(mu, groups):
    one, two = (mu.flow(LAYERS, groups=groups, top=None, sample=sample) for sample in (0, 1))
    compared = difference(one, two)
    for layer, name in zip(compared.layers, LAYERS, strict=True):
        assert sum(layer.masses) + layer.sink + layer.bypass == pytest.approx(0, abs=1e-10)
        for group, mass in zip(layer.groups, layer.masses, strict=True):
            first, second, _ = mu(groups.event(mu, name, group)).tolist()
            assert mass == pytest.approx(first - second, abs=1e-12)
    mean = mean_flow(mu, LAYERS, groups=groups, top=None)
    assert list(mean.layers[1].masses) == pytest.approx(list(groups.masses[1]))
    assert mean.layers[1].labels == groups.names[1]


def test_means_and_differences_of_flows_tell_the_file_of_their_groups(mu, groups, tmp_path):
    groups.save(tmp_path / "cats.safetensors")
    groups.save(tmp_path / "dogs.safetensors")
    cats, dogs = (Groups.load(tmp_path / f"{name}.safetensors") for name in ("cats", "dogs"))
    origin = "cats.safetensors, where they were found on 3 samples"
    mean = mean_flow([mu, mu], LAYERS, groups=cats)
    assert mean.origin == mu.flow(LAYERS, groups=cats, sample=0).origin == origin
    assert f"The groups are from {origin}." in flow_caption(mean)
    assert mean_flow(mu, LAYERS, groups=groups).origin == ""
    one, two = (mean_flow(mu, LAYERS, groups=each, top=None) for each in (cats, dogs))
    assert difference(one, one).origin == origin
    assert difference(one, two).origin == f"{origin} and {origin.replace('cats', 'dogs')}"


class Bag(nn.Module):
    """Mean over tokens of a small perceptron."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(20, 8), nn.Linear(8, 9), nn.Linear(9, 3)

    def forward(self, ids):
        return self.second(self.first(self.words(ids)).relu().mean(1))


class Two(nn.Module):
    """Convolutional network of two images."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.second = nn.Conv2d(2, 5, 3), nn.Conv2d(1, 5, 3), nn.Linear(5, 3)

    def forward(self, image, depth):
        return self.second((self.first(image) + self.other(depth)).relu().mean((2, 3)))


def kept_of(joint: torch.Tensor, groups: Groups) -> float:
    """Fraction of the dependence in a joint relevance of members that the groups keep."""
    part = joint - joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
    rows, columns = (torch.nn.functional.one_hot(labels).double() for labels in groups.labels)
    return float((rows.T @ part @ columns).abs().sum() / part.abs().sum())


def test_groups_of_embedded_tokens_keep_the_share_of_masked_passes():
    torch.manual_seed(0)
    mu = RelevanceMeasure(Bag().double().eval(), torch.randint(20, (3, 6)), 1)
    groups = find_groups(mu, ["first", "words"], k=2)
    masked = [mu.marginal("words", joint=at("first")[..., i]).sum(1).mean(0) for i in range(9)]
    assert groups.kappas[0] == pytest.approx(kept_of(torch.stack(masked), groups), rel=1e-9)
    positions = find_groups(mu, ["first", "words"], k=2, members={"words": "position"})
    masked = [mu.marginal("words", joint=at("first")[..., i]).sum(2).mean(0) for i in range(9)]
    assert positions.kappas[0] == pytest.approx(kept_of(torch.stack(masked), positions), rel=1e-9)


def test_ids_have_no_groups_and_the_error_names_the_embedding():
    mu = RelevanceMeasure(Bag().eval(), torch.randint(20, (1, 6)), 1)
    for ask in (
        lambda: find_groups(mu, ["first", "input"], k=2),
        lambda: mu.flow(["first", "input"], over="groups", k=2),
        lambda: mu.marginal("input"),
    ):
        with pytest.raises(UnknownLayerError, match=r"only as ids .* Use 'words' instead of 'input'"):
            ask()


@pytest.mark.parametrize("item", [0, 1])
def test_groups_of_one_of_two_images_keep_the_share_of_masked_passes(item):
    torch.manual_seed(0)
    images = torch.rand(2, 2, 8, 8).double(), torch.rand(2, 1, 8, 8).double()
    mu = RelevanceMeasure(Two().double().eval(), images, 1)
    image = at("input", item=item)
    groups = find_groups(mu, ["add", image], k=3)
    masked = [mu.marginal(image, joint=at("add")[i]).sum(1).flatten(1).mean(0) for i in range(5)]
    assert groups.kappas[0] == pytest.approx(kept_of(torch.stack(masked), groups), rel=1e-9)


def test_groups_of_one_of_two_large_images_have_the_masses_of_their_pixels():
    images = torch.rand(1, 2, 60, 60).double(), torch.rand(1, 1, 60, 60).double()
    mu = RelevanceMeasure(Two().double().eval(), images, 1)
    image = at("input", item=1)
    groups = find_groups(mu, ["add", image], k=3)
    pixels, of_pixel = mu.marginal(image), labels_of(mu._tap(image), groups.members[1])
    for group, mass in enumerate(groups.masses[1]):
        assert mass == pytest.approx(float(pixels[0][groups.labels[1][of_pixel] == group].sum()), abs=1e-12)
