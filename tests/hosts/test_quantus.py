"""Quantus with these classes as its ``explain_func``, and with our composites in its own: `make test-hosts`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES, EpsilonPlusFlat

from nrm_plugin import NRM, LayerNRM, Normalized, RelevanceMeasure
from tests.conftest import lrp_0

quantus = pytest.importorskip("quantus", reason="Quantus is not here; `make test-hosts` runs this")
pytestmark = pytest.mark.filterwarnings("ignore")  # Quantus warns about its own defaults and numpy's


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    return draw.normal(size=(4, 1, 12, 12)).astype(np.float32), np.array([0, 1, 2, 3])


def explain(model, inputs, targets, composite=None, residual=None, **kwargs):
    """What Quantus asks for, around one of these classes: arrays in, arrays out."""
    x, labels = torch.as_tensor(np.asarray(inputs)), torch.as_tensor(np.asarray(targets))
    return NRM(model, composite, residual=residual).attribute(x, labels).numpy()


def explain_layer(model, inputs, targets, **kwargs):
    x = torch.as_tensor(np.asarray(inputs))
    found = LayerNRM(model, "2").attribute(x, torch.as_tensor(np.asarray(targets)))
    return LayerNRM.interpolate(found.sum(1, keepdim=True), x.shape[2:]).numpy()


METRICS = {
    "pixel flipping": lambda: quantus.PixelFlipping(
        features_in_step=12, perturb_baseline="black", disable_warnings=True, display_progressbar=False
    ),
    "max sensitivity": lambda: quantus.MaxSensitivity(nr_samples=2, disable_warnings=True, display_progressbar=False),
    "sparseness": lambda: quantus.Sparseness(disable_warnings=True, display_progressbar=False),
    "faithfulness": lambda: quantus.FaithfulnessCorrelation(
        nr_runs=5, subset_size=20, return_aggregate=False, disable_warnings=True, display_progressbar=False
    ),
}


@pytest.mark.parametrize("function", [explain, explain_layer])
@pytest.mark.parametrize("metric", METRICS)
def test_its_metrics_run(net, data, metric, function):
    x, y = data
    scores = METRICS[metric]()(net, x, y, explain_func=function, explain_func_kwargs={}, device="cpu")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    values = np.asarray(scores, dtype=float)
    assert len(values) == 4
    assert np.isfinite(values).all()
    assert values.std() > 0


def test_a_metric_scores_our_attributions_as_it_scores_them_given(net, data):
    x, y = data
    given = explain(net, x, y)
    by_function = METRICS["sparseness"]()(net, x, y, explain_func=explain, device="cpu")
    handed_over = METRICS["sparseness"]()(net, x, y, a_batch=given, device="cpu")
    np.testing.assert_allclose(by_function, handed_over)
    other = METRICS["sparseness"]()(net, x, y, a_batch=given**3, device="cpu")
    assert not np.allclose(by_function, other)


def test_pixel_flipping_tells_relevance_from_noise(data):
    """Of a linear model, whose truth is known: the most relevant pixels are those that it loses most by."""
    x, y = data
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 5, bias=False)).eval()
    found = explain(linear, x, y, composite=lrp_0(), residual="sink")
    flips = METRICS["pixel flipping"]
    curves = flips()(linear, x, y, a_batch=found, device="cpu")
    for rival in (np.random.default_rng(1).normal(size=x.shape).astype(np.float32), -found):
        assert np.mean(curves) < np.mean(flips()(linear, x, y, a_batch=rival, device="cpu")) - 0.05


@pytest.mark.parametrize("name", ["nrm_epsilon_plus", "nrm_epsilon_plus_flat"])
def test_its_zennit_wrapper_takes_our_composites(net, data, name):
    x, y = data
    found = quantus.explain(
        net, x, y, xai_lib="zennit", composite=COMPOSITES[name], attributor=Gradient, device="cpu", normalise=False
    )
    plain = COMPOSITES[name.removeprefix("nrm_")]
    mu = RelevanceMeasure(net, torch.as_tensor(x), torch.as_tensor(y), composite=Normalized(plain()))
    relevance = mu.marginal("input").numpy()
    for one, other in zip(np.asarray(found), relevance, strict=True):
        ratio = one.reshape(-1) @ other.reshape(-1) / (np.linalg.norm(one) * np.linalg.norm(other))
        assert abs(ratio) > 0.9999


def test_rules_reach_the_explanation(net, data):
    x, y = data
    one = explain(net, x, y, composite=EpsilonPlusFlat())
    assert not np.allclose(one, explain(net, x, y))
