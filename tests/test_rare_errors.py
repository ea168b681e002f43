"""Errors and messages of rare cases in several packages, one test each."""

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
from nrm_plugin.dataset import images
from nrm_plugin.dataset.images import load_image
from nrm_plugin.errors import EventError, InputError, NRMError, UnknownLayerError, UnsupportedRuleError
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


def test_the_repr_of_a_measure_shows_its_settings(net: nn.Module):
    mu = RelevanceMeasure(net, torch.randn(2, 3), 1, composite=EpsilonPlus(), residual="sink")
    pattern = r"RelevanceMeasure\(2 samples, \d taps, EpsilonPlus, residual='sink', gain_limit=2.0\)"
    assert re.fullmatch(pattern, repr(mu))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda mu: mu.joints(["2", "0"], over=["channel"]), ValueError, r"over= has 1 entries for 2 layers"),
        (lambda mu: FuseBatchNorm().apply(nn.ReLU()), NRMError, "SequentialMergeBatchNorm"),
        (lambda mu: register_kernel(3), TypeError, "register_kernel takes functions, got int"),
    ],
)
def test_an_invalid_call_raises(mu: RelevanceMeasure, call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(mu)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (at("2")[1], EventError, "is not a tap at which a measure can start"),
        (at("2", side="sink"), EventError, "is not a tap at which a measure can start"),
        (at("7"), UnknownLayerError, "'7'"),
    ],
)
def test_a_measure_can_only_start_at_a_tap(net: nn.Module, output: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        RelevanceMeasure(net, torch.randn(2, 3), 1, output=output)


def test_a_profile_compares_measures_of_the_same_model(mu: RelevanceMeasure):
    other = RelevanceMeasure(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), 1, residual="sink")
    with pytest.raises(InputError, match="a measure of another model"):
        profile(mu, plain=other)


def test_a_patched_zennit_raises(net: nn.Module, monkeypatch: pytest.MonkeyPatch):
    def backward(self: BasicHook, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        """A replacement by another package."""

    monkeypatch.setattr(BasicHook, "backward", backward)
    with pytest.raises(UnsupportedRuleError, match=rf"BasicHook\.backward was replaced by {re.escape(__name__)}"):
        RelevanceMeasure(net, torch.randn(2, 3), 1)


def test_coverage_reports_shared_weights_and_absorbing_constants():
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
    assert re.search(r"(?m)^constants that can absorb relevance: \S+", text)


def test_input_roles_must_match_the_batches_of_a_loader(net: nn.Module):
    with pytest.raises(ValueError, match=r"input_roles=\(0, 1\) has 2 roles, but a batch is a single tensor"):
        DataLoaderNRM(NRM(net)).attribute([torch.randn(2, 3)], input_roles=(0, 1))


# -- flow -------------------------------------------------------------------------------------------------------------


def test_flow_graphs_are_hashable_and_compared_by_value(net: nn.Module):
    graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
    same = FlowGraph.from_json(graph.to_json())
    assert same == graph
    assert hash(same) == hash(graph)
    assert graph != "a graph"
    assert graph != graph.smaller(top=1)


def test_invalid_json_of_a_flow_graph_raises(net: nn.Module):
    serialized = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"]).to_dict()
    with pytest.raises(FlowError, match="its format is 'another'"):
        FlowGraph.from_json(str({**serialized, "format": "another"}).replace("'", '"').replace("None", "null"))
    serialized["layers"][0]["nodes"].reverse()
    with pytest.raises(FlowError, match="the last two nodes of a layer"):
        FlowGraph.from_json(str(serialized).replace("'", '"').replace("None", "null"))


def test_a_flow_graph_of_the_input_alone_has_its_own_heat_map():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    mu = RelevanceMeasure(model, torch.rand(1, 1, 4, 4), 1)
    assert set(flow_maps(mu, mu.flow(["input"]))) == {"input/0"}
    assert set(flow_maps(mu, mu.flow(["0", "input"]))) == {"0/0", "0/1", "input/0"}


# -- images and models on the command line ----------------------------------------------------------------------------


def test_an_unreadable_exif_orientation_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(image: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF file")

    pixels = Image.effect_noise((9, 5), 90).convert("RGB")
    pixels.save(tmp_path / "x.png")
    monkeypatch.setattr(images.ImageOps, "exif_transpose", broken)
    loaded = load_image(tmp_path / "x.png")
    assert loaded.image.tobytes() == pixels.tobytes()
    assert loaded.notes == ("has EXIF data that cannot be read, so it was not rotated",)
