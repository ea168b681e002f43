"""What is said where something is asked for that hardly anybody asks for; one test for each, by its message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from zennit.composites import EpsilonPlus
from zennit.core import BasicHook

from nrm_plugin import NRM, FuseBatchNorm, NRMDefault, RelevanceMeasure, at, coverage, register_kernel
from nrm_plugin.attribution.dataloader import DataLoaderNRM
from nrm_plugin.dataset import images as pictures
from nrm_plugin.dataset.images import open_picture
from nrm_plugin.errors import EventError, InputError, NRMError, UnknownLayerError, UnsupportedRuleError
from nrm_plugin.events.serialization import event_from_json, event_to_json
from nrm_plugin.measure.flow import FlowError, FlowGraph
from nrm_plugin.measure.flow_heat_maps import flow_maps
from nrm_plugin.measure.layer_profile import profile


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


@pytest.fixture
def mu(net: nn.Module) -> RelevanceMeasure:
    return RelevanceMeasure(net, torch.randn(2, 3), 1)


# -- the measure ------------------------------------------------------------------------------------------------------


def test_a_measure_says_what_it_is(net: nn.Module):
    mu = RelevanceMeasure(net, torch.randn(2, 3), 1, composite=EpsilonPlus(), residual="sink")
    said = r"RelevanceMeasure\(2 samples, \d taps, EpsilonPlus, residual='sink', gain_limit=2.0\)"
    assert re.fullmatch(said, repr(mu))


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda mu: mu.joints(["2", "0"], over=["channel"]), ValueError, r"over= has 1 entries for 2 layers"),
        (lambda mu: event_to_json("conv"), EventError, "expected an event such as .*got str: 'conv'"),
        (lambda mu: FuseBatchNorm().apply(nn.ReLU()), NRMError, "SequentialMergeBatchNorm"),
        (lambda mu: register_kernel(3), TypeError, "register_kernel takes functions, got int"),
    ],
)
def test_a_wrong_call_is_told(mu: RelevanceMeasure, ask: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        ask(mu)


@pytest.mark.parametrize(
    ("output", "error", "said"),
    [
        (at("2")[1], EventError, "is no tap that a measure can start at"),
        (at("2", side="sink"), EventError, "is no tap that a measure can start at"),
        (at("7"), UnknownLayerError, "'7'"),
    ],
)
def test_a_measure_starts_at_taps(net: nn.Module, output: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        RelevanceMeasure(net, torch.randn(2, 3), 1, output=output)


def test_a_profile_is_beside_the_same_model(mu: RelevanceMeasure):
    other = RelevanceMeasure(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), 1, residual="sink")
    with pytest.raises(InputError, match="a measure of another model"):
        profile(mu, plain=other)


def test_a_patched_zennit_is_refused(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    def backward(self: BasicHook, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        """As a package could replace it."""

    monkeypatch.setattr(BasicHook, "backward", backward)
    with pytest.raises(UnsupportedRuleError, match=rf"BasicHook\.backward was replaced by {re.escape(__name__)}"):
        RelevanceMeasure(net, torch.randn(2, 3), 1)


def test_coverage_names_shared_weights_and_constants_that_absorb():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(4, 2)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.cat([self.second(self.first(x)), torch.ones(len(x), 1)], 1))

    text = str(coverage(Tied().eval(), torch.randn(2, 3), NRMDefault()))
    (line,) = [line for line in text.splitlines() if line.startswith("second")]
    assert "shares weights with first" in line
    assert re.search(r"(?m)^constants that can absorb: \S+", text)


@pytest.mark.parametrize(
    "event",
    [at("a")[torch.empty(0, dtype=torch.int64)], at("a")[torch.arange(40)], at("a")[1:3, ..., torch.tensor([2])]],
)
def test_an_event_of_no_or_many_neurons_comes_back(event: Any):
    assert event_from_json(event_to_json(event)) == event
    assert ("40 numbers in (40,)" in repr(event)) == (event == at("a")[torch.arange(40)])


def test_roles_of_a_loader_fit_its_batches(net: nn.Module):
    with pytest.raises(ValueError, match=r"input_roles=\(0, 1\) has 2 roles, but a batch is a single tensor"):
        DataLoaderNRM(NRM(net)).attribute([torch.randn(2, 3)], input_roles=(0, 1))


# -- flow -------------------------------------------------------------------------------------------------------------


def test_graphs_of_flow_are_compared_and_told_from_other_things(net: nn.Module):
    graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
    same = FlowGraph.from_json(graph.to_json())
    assert same == graph
    assert hash(same) == hash(graph)
    assert graph != "a graph"
    assert graph != graph.smaller(top=1)


def test_what_is_no_graph_of_flow_is_told(net: nn.Module):
    said = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"]).to_dict()
    with pytest.raises(FlowError, match="its format is 'another'"):
        FlowGraph.from_json(str({**said, "format": "another"}).replace("'", '"').replace("None", "null"))
    said["layers"][0]["nodes"].reverse()
    with pytest.raises(FlowError, match="the last two nodes of a layer"):
        FlowGraph.from_json(str(said).replace("'", '"').replace("None", "null"))


def test_a_graph_of_the_input_alone_has_no_maps():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    mu = RelevanceMeasure(model, torch.rand(1, 1, 4, 4), 1)
    assert flow_maps(mu, mu.flow(["input"])) == {}
    assert set(flow_maps(mu, mu.flow(["0", "input"]))) == {"0/0", "0/1"}


# -- pictures and models from the shell -------------------------------------------------------------------------------


def test_a_turn_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(image: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF file")

    pixels = Image.effect_noise((9, 5), 90).convert("RGB")
    pixels.save(tmp_path / "x.png")
    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", broken)
    found = open_picture(tmp_path / "x.png")
    assert found.image.tobytes() == pixels.tobytes()
    assert found.notes == ("has EXIF data that cannot be read, so it was not turned",)
