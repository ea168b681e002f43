"""A deleted measure frees its memory at once, without Python's garbage collector."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torchvision
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat

from nrm_plugin import RelevanceMeasure, at
from tests.conftest import images, slow_but

COMPOSITES = {"default": lambda: None, "plus": EpsilonPlusFlat, "gamma": lambda: EpsilonGammaBox(low=-3.0, high=3.0)}


@pytest.mark.medium
@pytest.mark.parametrize("rules", slow_but(COMPOSITES, "plus"))
def test_a_deleted_measure_frees_its_memory(rules):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None, num_classes=4).eval()
    gc.collect()
    gc.disable()
    try:
        mu = RelevanceMeasure(net, images(32), 1, composite=COMPOSITES[rules]())
        mu.marginal(["input", "layer2"])
        mu(at("layer3")[0] & at("layer1")[1])
        mu.conditional(at("layer1")[0], "layer3")
        steps = [weakref.ref(vertex.step) for vertex in mu._recording.graph.vertices if vertex.step is not None]
        kernels = [weakref.ref(step().kernel) for step in steps]
        assert len(steps) > 30
        del mu
        assert not [reference() for reference in steps + kernels if reference() is not None]
    finally:
        gc.enable()
