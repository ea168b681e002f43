"""One convolutional architecture per family, measured by the functions of the benchmark of all architectures."""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlusFlat
from zennit.types import AvgPool

from benchmarks.architectures import (
    COMPOSITES,
    LIMITS,
    PAGE,
    RESULTS,
    build,
    faults,
    has_attention,
    listed,
    measured,
    run,
    settle,
    tables,
    target_of,
)
from nrm_plugin import Absolute, RelevanceMeasure
from nrm_plugin.functional.function_kernels import HalvesKernel, SplitKernel, sum_to_shape
from tests.conftest import slow_but

SHAPES: dict[str, tuple[int, ...]] = {
    "alexnet": (3, 64, 64),
    "convnext_tiny": (3, 32, 32),
    "densenet121": (3, 32, 32),
    "efficientnet_b0": (3, 32, 32),
    "efficientnet_v2_s": (3, 32, 32),
    "googlenet": (3, 48, 48),
    "inception_v3": (3, 75, 75),
    "lraspp_mobilenet_v3_large": (3, 48, 48),
    "fcn_resnet50": (3, 32, 32),
    "mnasnet0_5": (3, 48, 48),
    "mobilenet_v2": (3, 48, 48),
    "mobilenet_v3_small": (3, 48, 48),
    "r3d_18": (3, 4, 24, 24),
    "r2plus1d_18": (3, 4, 24, 24),
    "regnet_x_400mf": (3, 48, 48),
    "regnet_y_400mf": (3, 48, 48),
    "resnet18": (3, 48, 48),
    "resnext50_32x4d": (3, 32, 32),
    "shufflenet_v2_x0_5": (3, 48, 48),
    "squeezenet1_1": (3, 48, 48),
    "vgg11_bn": (3, 32, 32),
}
NETS = slow_but(SHAPES, "resnet18", "squeezenet1_1")
EXCEPTIONS = {
    ("alexnet", "EpsilonPlusFlat"),  # ε on three dense layers, each of which adds variation
    ("densenet121", "EpsilonPlusFlat"),  # Zennit's Norm averages signed numbers, which may nearly cancel
}
"""Pairs for which Zennit's rules lead to a variation above the limit at the input."""


@functools.cache
def settled(name: str) -> tuple[nn.Module, Tensor]:
    """A model with batch-norm statistics of one batch, and a further input."""
    model, shape = build(name), SHAPES[name]
    settle(model, shape)
    return model, torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))


def row_of(name: str, composite: str) -> dict[str, Any]:
    model, x = settled(name)
    return {"composite": composite, **measured(model, x, target_of(model, x), COMPOSITES[composite])}


@pytest.mark.medium
@pytest.mark.parametrize("name", NETS)
def test_relevance_is_conserved_and_the_limits_hold(name, worst):
    for composite in ("NRMDefault", "EpsilonPlusFlat", "NRMAbsolute"):
        row = row_of(name, composite)
        worst(f"conservation, {composite}", row["error_taps"])
        worst(f"residual at the input, {composite}", abs(row["residual"]))
        assert row["taps"] > 20
        assert row["blocks"] > 1
        assert row["error"] <= row["error_taps"] <= LIMITS["conservation"]
        assert faults(row) == (["V input"] if (name, composite) in EXCEPTIONS else [])


@pytest.mark.slow
def test_absolute_shares_in_pooling_layers_reduce_the_variation_of_densenet():
    """As docs/architectures.md states."""
    model, x = settled("densenet121")
    signed = measured(model, x, target_of(model, x), EpsilonPlusFlat())
    absolute = measured(model, x, target_of(model, x), EpsilonPlusFlat(layer_map=[(AvgPool, Absolute())]))
    assert signed["variation_input"] > 1.5
    assert absolute["variation_input"] == pytest.approx(1, abs=1e-4)


@pytest.mark.medium
def test_shufflenet_absorbs_relevance_in_its_depthwise_convolutions():
    model, x = settled("shufflenet_v2_x0_5")
    mu = RelevanceMeasure(model, x, target_of(model, x), composite=EpsilonPlusFlat())
    depthwise = {name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1}
    absorbed = {name: float(mass) for name, mass in mu.sinks().items()}
    in_depthwise = sum(mass for name, mass in absorbed.items() if name in depthwise)
    assert in_depthwise > 0.3
    assert in_depthwise == pytest.approx(sum(absorbed.values()), abs=1e-4)


@pytest.mark.medium
def test_relevance_duplicated_at_a_sum_is_detected(monkeypatch):
    """Autograd alone passes it to both branches, which a module hook on the block does not reveal."""
    monkeypatch.setattr(
        SplitKernel, "pull", lambda self, relevance: tuple(sum_to_shape(relevance, shape) for shape in self.shapes)
    )
    monkeypatch.setattr(
        HalvesKernel, "pull", lambda self, relevance: tuple(sum_to_shape(relevance, shape) for shape in self.shapes)
    )
    row = row_of("resnet18", "NRMAbsolute")
    assert row["error_taps"] > 0.1
    assert "conservation" in faults(row)


def test_nan_violates_every_limit():
    row = dict.fromkeys(("error_taps", "residual", "variation_input", "variation_blocks"), math.nan)
    for composite in COMPOSITES:
        assert faults({"composite": composite, **row}) == ["conservation", "sink", "V input", "V blocks"]


def test_no_builder_of_torchvision_is_omitted_silently(monkeypatch):
    names = list(listed())
    assert len(names) >= 95
    assert {name for name in names if has_attention(name)} == {
        name for name in names if re.match("vit_|swin|maxvit|mvit", name)
    }
    page = tables({"environment": {}, "rows": []})
    assert all(f"{name} (NRMDefault)" in page or has_attention(name) for name in names)
    assert all(name in page for name in names)

    def broken(name):
        raise RuntimeError("no such | weights")

    monkeypatch.setattr("benchmarks.architectures.build", broken)
    rows = list(run("resnet18", ["NRMDefault", "NRMAbsolute"], None))
    assert [row["failed"] for row in rows] == ["RuntimeError: no such | weights"] * 2
    page = tables({"environment": {}, "rows": rows})
    assert "| resnet18 | ? | RuntimeError: no such ∣ weights |" in page
    assert "| NRMDefault | 0 of 1 |" in page


def test_only_figures_above_their_limit_are_bold_on_the_page():
    figures = {"error_taps": 2e-7, "residual": 0.2, "constants": 0.0, "variation_input": 1.0, "variation_blocks": 7.0}
    row = {"model": "resnet18", "shape": [3, 96, 96], "seconds": 0.5, **figures}
    rows = [{**row, "composite": "NRMDefault"}, {**row, "composite": "EpsilonPlusFlat", "variation_input": 1.6}]
    page = tables({"environment": {}, "rows": rows})
    assert "| resnet18 | 96×96 | 2e-07 | 0.5 | 1 | 7 | 0.200 | **1.6** | 7 |  |  |  |" in page


def test_the_committed_results_are_complete_within_the_limits_and_shown_on_the_page():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {(row["model"], row["composite"]): row for row in results["rows"]}
    assert set(rows) == {(name, composite) for name in listed() if not has_attention(name) for composite in COMPOSITES}
    assert not [key for key, row in rows.items() if "failed" in row]
    assert not [key for key, row in rows.items() if "conservation" in faults(row)]
    assert not [key for key, row in rows.items() if not key[1].startswith("Epsilon") and faults(row)]
    assert tables(results) in PAGE.read_text(encoding="utf-8")
