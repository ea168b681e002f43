"""Quantus with the classes of this package as ``explain_func``, and with its composites: `make test-hosts`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES, EpsilonPlusFlat

from benchmarks.default_composite import Net
from benchmarks.faithfulness import pixels, quantus_metrics
from benchmarks.faithfulness.quantus_metrics import Evaluation
from nrm_plugin import NRM, LayerNRM, Normalized, RelevanceMeasure
from tests.conftest import lrp_0

quantus = pytest.importorskip("quantus", reason="Quantus is not installed; `make test-hosts` installs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of Quantus about its defaults and numpy


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
    """Wraps NRM for Quantus, which passes and expects arrays."""
    x, labels = torch.as_tensor(np.asarray(inputs)), torch.as_tensor(np.asarray(targets))
    return NRM(model, composite, residual=residual).attribute(x, labels).numpy()


def explain_layer(model, inputs, targets, **kwargs):
    x = torch.as_tensor(np.asarray(inputs))
    attributions = LayerNRM(model, "2").attribute(x, torch.as_tensor(np.asarray(targets)))
    return LayerNRM.interpolate(attributions.sum(1, keepdim=True), x.shape[2:]).numpy()


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
def test_its_metrics_run_on_our_attributions(net, data, metric, function):
    x, y = data
    scores = METRICS[metric]()(net, x, y, explain_func=function, explain_func_kwargs={}, device="cpu")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    values = np.asarray(scores, dtype=float)
    assert len(values) == 4
    assert np.isfinite(values).all()
    assert values.std() > 0


def test_a_metric_gives_the_same_score_for_a_function_and_for_its_attributions(net, data):
    x, y = data
    attributions = explain(net, x, y)
    by_function = METRICS["sparseness"]()(net, x, y, explain_func=explain, device="cpu")
    by_attributions = METRICS["sparseness"]()(net, x, y, a_batch=attributions, device="cpu")
    np.testing.assert_allclose(by_function, by_attributions)
    other = METRICS["sparseness"]()(net, x, y, a_batch=attributions**3, device="cpu")
    assert not np.allclose(by_function, other)


def test_pixel_flipping_distinguishes_relevance_from_noise(data):
    """In a linear model, removing the most relevant pixels reduces the output most."""
    x, y = data
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 5, bias=False)).eval()
    attributions = explain(linear, x, y, composite=lrp_0(), residual="sink")
    flips = METRICS["pixel flipping"]
    curves = flips()(linear, x, y, a_batch=attributions, device="cpu")
    for rival in (np.random.default_rng(1).normal(size=x.shape).astype(np.float32), -attributions):
        assert np.mean(curves) < np.mean(flips()(linear, x, y, a_batch=rival, device="cpu")) - 0.05


@pytest.mark.parametrize("name", ["nrm_epsilon_plus", "nrm_epsilon_plus_flat"])
def test_its_zennit_wrapper_accepts_our_composites(net, data, name):
    x, y = data
    explanations = quantus.explain(
        net, x, y, xai_lib="zennit", composite=COMPOSITES[name], attributor=Gradient, device="cpu", normalise=False
    )
    plain = COMPOSITES[name.removeprefix("nrm_")]
    mu = RelevanceMeasure(net, torch.as_tensor(x), torch.as_tensor(y), composite=Normalized(plain()))
    relevance = mu.marginal("input").numpy()
    for theirs, ours in zip(np.asarray(explanations), relevance, strict=True):
        cosine = theirs.reshape(-1) @ ours.reshape(-1) / (np.linalg.norm(theirs) * np.linalg.norm(ours))
        assert abs(cosine) > 0.9999


def test_the_composite_changes_the_explanation(net, data):
    x, y = data
    assert not np.allclose(explain(net, x, y, composite=EpsilonPlusFlat()), explain(net, x, y))


# -- its use in the faithfulness benchmark --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coloured():
    """A net for images of two channels, and the heat maps of one explainer, in batches smaller than the dataset."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3)).eval().requires_grad_(False)
    net = Net("coloured", model, torch.rand(7, 2, 16, 16), torch.arange(7), torch.zeros(1, 2, 1, 1), 1.0)

    def explain(model, images, target):
        return RelevanceMeasure(model, images, target, residual="sink").marginal("input").sum(1, keepdim=True)

    heat = explain(model, net.images, net.target)
    return net, Evaluation(model, net.images, net.target, heat, explain, batch=3)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("most_first", [True, False])
@pytest.mark.parametrize("fill", pixels.FILLS)
def test_our_pixel_flipping_equals_its(coloured, fill, most_first, softmax):
    net, evaluation = coloured
    other, order = pixels.filled(net, fill), pixels.patch_ranks(evaluation.heat, most_first)
    ours = pixels.flipped(net, evaluation.heat, most_first, other)[softmax][1:]
    theirs = quantus_metrics.pixel_flipping(evaluation, order, 4 * pixels.AT_ONCE, other, softmax)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    reverse = quantus_metrics.pixel_flipping(evaluation, -order, 4 * pixels.AT_ONCE, other, softmax)
    assert float((ours - reverse)[:-1].abs().max()) > 1e-4


def imputed(image, removed):
    """Replaces removed pixels by the weighted mean of their neighbors, removed or not: one dense linear system."""
    height, width = removed.shape
    unknown = [tuple(position) for position in np.argwhere(removed)]
    left, right = np.eye(len(unknown)), np.zeros((len(unknown), len(image)))
    for row, (y, x) in enumerate(unknown):
        near = [(y + dy, x + dx, 1 / 12 if dy and dx else 1 / 6) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        near = [(j, i, weight) for j, i, weight in near if 0 <= j < height and 0 <= i < width]
        total = sum(weight for *_, weight in near)
        for j, i, weight in near:
            if removed[j, i]:
                left[row, unknown.index((j, i))] -= weight / total
            else:
                right[row] += weight / total * image[:, j, i]
    filled = image.copy()
    filled[:, removed] = np.linalg.solve(left, right).T
    return filled


def test_road_equals_a_dense_solution_for_images_with_channels(coloured):
    net, evaluation = coloured
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(512, 3)).eval().requires_grad_(False)  # sensitive to few pixels
    target = linear(net.images).argmax(1)
    heat = (linear[1].weight[target].reshape(net.images.shape) * net.images).sum(1, keepdim=True)
    evaluation = replace(evaluation, model=linear, target=target, heat=heat)
    checked = 0
    for most_first in (True, False):
        scores = quantus_metrics.road(evaluation, most_first)
        assert 0 < scores.mean() < 1
        for n in range(7):
            order = heat[n].flatten().argsort(descending=most_first).numpy()
            same, margins = [], []
            for percentage in quantus_metrics.PERCENTAGES:
                removed = np.zeros(256, dtype=bool)
                removed[order[: 256 * percentage // 100]] = True
                image = imputed(net.images[n].double().numpy(), removed.reshape(16, 16))
                output = linear(torch.as_tensor(image[None]).float())[0]
                same.append(int(output.argmax()) == int(target[n]))
                margins.append(float(output.topk(2).values.diff().abs()))
            if min(margins) > 0.03:  # otherwise its noise of 0.01 could change a prediction
                assert float(scores[n]) == pytest.approx(np.mean(same))
                checked += 1
    assert checked >= 5


def test_sensitivity_is_the_largest_relative_change(coloured):
    _, evaluation = coloured
    draw = np.random.RandomState(0)
    expected = []
    for start in range(0, 7, 3):
        images, target = evaluation.images[start : start + 3], evaluation.target[start : start + 3]
        changes = []
        for _ in range(quantus_metrics.TRIES):
            noise = draw.uniform(-0.05, 0.05, (len(images), 512)).reshape(images.shape)
            perturbed = evaluation.explain(evaluation.model, (images + torch.as_tensor(noise)).float(), target)
            heat = evaluation.heat[start : start + 3]
            changes.append((perturbed - heat).flatten(1).norm(dim=1) / heat.flatten(1).norm(dim=1))
        expected.append(torch.stack(changes).amax(0))
    torch.testing.assert_close(quantus_metrics.sensitivity(evaluation), torch.cat(expected), rtol=1e-3, atol=1e-5)


def test_sensitivity_and_cascade_are_defined_for_a_heat_map_of_zeros(coloured):
    _, evaluation = coloured
    heat = evaluation.heat.clone()
    heat[2] = 0
    with_zeros = replace(evaluation, heat=heat)
    assert float(quantus_metrics.sensitivity(with_zeros)[2]) == quantus_metrics.MOST
    assert quantus_metrics.cascade(with_zeros)[:, 2].abs().max() == 0
    assert all(bool(values.isfinite().all()) for values in quantus_metrics.measured(with_zeros).values())


def test_random_logit_compares_with_another_output(coloured):
    _, evaluation = coloured
    targets = []

    def explain(model, images, target):
        targets.append(target)
        return evaluation.explain(model, images, target)

    similarity = quantus_metrics.random_logit(replace(evaluation, explain=explain))
    others = torch.cat(targets)
    assert bool((others != evaluation.target).all())
    assert bool(((others >= 0) & (others < 3)).all())
    heat = evaluation.explain(evaluation.model, evaluation.images, others)
    rows = zip(evaluation.heat.flatten(1), heat.flatten(1), strict=True)
    expected = [abs(stats.spearmanr(a.numpy(), b.numpy()).statistic) for a, b in rows]
    torch.testing.assert_close(similarity, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)


def test_a_cascade_randomizes_layers_from_the_last_to_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(4, 4), nn.ReLU())), nn.Flatten()).eval()
    before = [layer.weight.clone() for layer in model[0:20:2]]
    images, changed = torch.rand(2, 1, 2, 2), []

    def explain(net, inputs, target):
        changed.append([not torch.equal(layer.weight, old) for layer, old in zip(net[1:21:2], before, strict=True)])
        return torch.stack([net[1].weight.flatten()[:4].reshape(1, 2, 2)] * len(inputs)).detach()

    net = nn.Sequential(nn.Flatten(), *model)
    heat = explain(net, images, None)
    changed.clear()
    curve = quantus_metrics.cascade(Evaluation(net, images, torch.zeros(2, dtype=torch.long), heat, explain, 2))
    assert curve.shape == (quantus_metrics.STAGES + 1, 2)
    assert changed[0] == [False] * 10
    assert changed[1] == [False] * 9 + [True]
    assert changed[-1] == [True] * 10
    assert [sum(row) for row in changed] == sorted(sum(row) for row in changed)
    assert all(row == sorted(row) for row in changed)  # from the top down
    assert bool((curve[:-1] == 1).all())  # the heat map depends on the lowest layer alone
    assert bool((curve[-1] < 1).all())
    assert all(torch.equal(layer.weight, old) for layer, old in zip(net[1:21:2], before, strict=True))
