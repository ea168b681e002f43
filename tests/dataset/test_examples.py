"""References from a sweep equal those of one pass with the model, and references can be saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nrm_plugin import at
from nrm_plugin.dataset import Activation, EventMass, Joint, Marginal, Peak, Sweep, sweep
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.dataset.examples import EVENTS, FoundReferences, ReferencesError, references
from nrm_plugin.errors import NRMError


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(45, 3)).double().eval()


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.rand((29, 1, 9, 9), generator=draw, dtype=torch.float64), torch.randint(0, 3, (29,), generator=draw)
    )


@pytest.fixture(scope="module")
def stored(net, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    queries = [
        Marginal("2", joint=at("0")[1]),
        Marginal("2", name="the second"),
        Marginal("0"),
        Activation("2", reduce="sum"),
        Peak("2"),
        Peak("2", of="activation"),
        Marginal("2", over="position", name="positions"),
        Joint("2", "0"),
        EventMass(at("2")[1] & at("0")[2], name="both"),
    ]
    sweep(net, data, queries, folder, target="label", batch_size=4, shard=8, progress=False)
    return folder


@pytest.fixture(scope="module")
def one_pass(net, data):
    return find_references(net, data, ["0", "2"], 6, events={"both": at("2")[1] & at("0")[2]}, batch_size=4)


def same(ours, theirs, positions=True):
    assert ours.groups == theirs.groups
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-9, atol=1e-12, equal_nan=True)
    distinct = theirs.values.abs() > 1e-9  # no ties
    for key in ("samples", "targets", *(["positions"] if positions else [])):
        assert torch.equal(getattr(ours, key)[distinct], getattr(theirs, key)[distinct]), key
    assert distinct.float().mean() > 0.5


@pytest.mark.medium
@pytest.mark.parametrize("by", ["relevance", "activation"])
@pytest.mark.parametrize("target", [None, 0, 2])
def test_references_from_a_sweep_equal_those_of_one_pass(stored, one_pass, by, target):
    same(references(stored, "2", k=6, by=by, target=target), one_pass.of("2", by, target))
    for group in range(5):
        one = references(Sweep.open(stored), "2", group, 6, by, target)
        assert one.groups == (group,)
        assert one.of(group) == references(stored, "2", k=6, by=by, target=target).of(group)
    if by == "relevance":  # no Peak of this layer
        same(references(stored, "0", k=6, target=target), one_pass.of("0", by, target), positions=False)
        assert (references(stored, "0", k=6).positions == -1).all()


def test_references_from_a_sweep_have_their_layer(stored):
    loaded = references(stored, "2")
    assert loaded.name != loaded.layer == "2"
    assert references(stored, "2", group=1, k=2).layer == "2"


def test_the_name_of_a_query_precedes_that_of_a_layer(stored, one_pass):
    assert references(stored, "the second").name == "the second"
    inside = references(stored, f"marginal(2, joint={at('0')[1]})", k=6)
    assert not torch.allclose(inside.values, one_pass.of("2").values)
    assert (inside.positions == -1).all()
    positions = references(stored, "positions", k=6)
    assert len(positions.groups) == 9
    assert (positions.positions == -1).all()  # Peak is of channels
    event = references(stored, "both", k=6)
    assert event.groups == ("both",)
    torch.testing.assert_close(event.values, one_pass.of(EVENTS).values, rtol=1e-9, atol=1e-12)
    assert event.of("both") == one_pass.of(EVENTS).of("both")


def test_a_pair_of_a_joint_matrix(net, data, stored):
    pair = references(stored, "joint(2, 0)", (3, 1), k=5)
    assert pair.groups == ("3,1",)
    events = find_references(net, data, events={"3,1": at("2").channel(3) & at("0").channel(1)}, k=5).of(EVENTS)
    torch.testing.assert_close(pair.values, events.values, rtol=1e-8, atol=1e-12)
    every = references(stored, "joint(2, 0)", k=5)
    assert len(every.groups) == 20
    torch.testing.assert_close(every.values[every.row("3,1")], pair.values[0])
    assert references(stored, "joint(2, 0)", 3, k=5).groups == ("3,0", "3,1", "3,2", "3,3")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"query": "5"}, "no query '5' with rows of relevance"),
        ({"query": "0", "by": "activation"}, "no query '0' with rows of activation"),
        ({"query": "2", "by": "size"}, "by='size'"),
        ({"query": "2", "k": 0}, "k=0"),
        ({"query": "2", "group": 5}, "has 5 groups"),
        ({"query": "2", "group": (1, 2)}, "has 5 groups"),
        ({"query": "joint(2, 0)", "group": (5, 0)}, "has 5 × 4 groups"),
        ({"query": "2", "target": 7}, "no values of samples with target 7"),
        ({"query": "peak(2)"}, "no query"),
    ],
)
def test_missing_queries_groups_and_targets_raise(stored, question, words):
    with pytest.raises(ReferencesError, match=words):
        references(stored, **question)


def test_a_folder_without_a_sweep_raises(tmp_path):
    with pytest.raises(NRMError, match="no sweep"):
        references(tmp_path, "2")


def test_saved_references_are_loaded_unchanged(net, data, tmp_path):
    one_pass = find_references(net, data, ["2"], 3, events={"e": at("2")[0]})
    one_pass.save(tmp_path / "found.safetensors")
    again = FoundReferences.load(tmp_path / "found.safetensors")
    assert repr(again) == repr(one_pass)
    for question in (("2", "relevance", None), ("2", "activation", 1), (EVENTS, "relevance", 0)):
        for key, value in vars(one_pass.of(*question)).items():
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
