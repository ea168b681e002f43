"""Quantus with these classes as its ``explain_func``, and with our composites in its own: `make test-hosts`."""

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


# -- the benchmark of faithfulness, which asks it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def coloured():
    """A net of two colours, its samples, and maps of one of its explainers; in batches smaller than the samples."""
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
def test_our_pixel_flipping_is_its(coloured, fill, most_first, softmax):
    net, question = coloured
    other, order = pixels.filled(net, fill), pixels.patch_ranks(question.heat, most_first)
    ours = pixels.flipped(net, question.heat, most_first, other)[softmax][1:]
    theirs = quantus_metrics.pixel_flipping(question, order, 4 * pixels.AT_ONCE, other, softmax)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    reverse = quantus_metrics.pixel_flipping(question, -order, 4 * pixels.AT_ONCE, other, softmax)
    assert float((ours - reverse)[:-1].abs().max()) > 1e-4


def imputed(image, gone):
    """Of pixels that are gone, the weighted mean of their neighbours, which may be gone too: one dense system."""
    height, width = gone.shape
    unknown = [tuple(place) for place in np.argwhere(gone)]
    left, right = np.eye(len(unknown)), np.zeros((len(unknown), len(image)))
    for row, (y, x) in enumerate(unknown):
        near = [(y + dy, x + dx, 1 / 12 if dy and dx else 1 / 6) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        near = [(j, i, weight) for j, i, weight in near if 0 <= j < height and 0 <= i < width]
        total = sum(weight for *_, weight in near)
        for j, i, weight in near:
            if gone[j, i]:
                left[row, unknown.index((j, i))] -= weight / total
            else:
                right[row] += weight / total * image[:, j, i]
    filled = image.copy()
    filled[:, gone] = np.linalg.solve(left, right).T
    return filled


def test_road_of_images_in_colour(coloured):
    net, question = coloured
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(512, 3)).eval().requires_grad_(False)  # whose answer soon changes
    target = linear(net.images).argmax(1)
    heat = (linear[1].weight[target].reshape(net.images.shape) * net.images).sum(1, keepdim=True)
    question = replace(question, model=linear, target=target, heat=heat)
    checked = 0
    for most_first in (True, False):
        found = quantus_metrics.road(question, most_first)
        assert 0 < found.mean() < 1
        for n in range(7):
            order = heat[n].flatten().argsort(descending=most_first).numpy()
            same, margins = [], []
            for percentage in quantus_metrics.PERCENTAGES:
                gone = np.zeros(256, dtype=bool)
                gone[order[: 256 * percentage // 100]] = True
                image = imputed(net.images[n].double().numpy(), gone.reshape(16, 16))
                output = linear(torch.as_tensor(image[None]).float())[0]
                same.append(int(output.argmax()) == int(target[n]))
                margins.append(float(output.topk(2).values.diff().abs()))
            if min(margins) > 0.03:  # its noise of 0.01 could decide the others
                assert float(found[n]) == pytest.approx(np.mean(same))
                checked += 1
    assert checked >= 5


def test_sensitivity_is_the_largest_relative_change(coloured):
    _, question = coloured
    draw = np.random.RandomState(0)
    expected = []
    for start in range(0, 7, 3):
        images, target = question.images[start : start + 3], question.target[start : start + 3]
        changes = []
        for _ in range(quantus_metrics.TRIES):
            noise = draw.uniform(-0.05, 0.05, (len(images), 512)).reshape(images.shape)
            change = question.explain(question.model, (images + torch.as_tensor(noise)).float(), target)
            before = question.heat[start : start + 3]
            changes.append((change - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
        expected.append(torch.stack(changes).amax(0))
    torch.testing.assert_close(quantus_metrics.sensitivity(question), torch.cat(expected), rtol=1e-3, atol=1e-5)


def test_a_map_of_zeros_has_a_sensitivity_and_a_cascade(coloured):
    _, question = coloured
    empty = question.heat.clone()
    empty[2] = 0
    asked = replace(question, heat=empty)
    assert float(quantus_metrics.sensitivity(asked)[2]) == quantus_metrics.MOST
    assert quantus_metrics.cascade(asked)[:, 2].abs().max() == 0
    assert all(bool(values.isfinite().all()) for values in quantus_metrics.measured(asked).values())


def test_random_logit_explains_another_output(coloured):
    _, question = coloured
    asked = []

    def explain(model, images, target):
        asked.append(target)
        return question.explain(model, images, target)

    found = quantus_metrics.random_logit(replace(question, explain=explain))
    others = torch.cat(asked)
    assert bool((others != question.target).all())
    assert bool(((others >= 0) & (others < 3)).all())
    rows = zip(
        question.heat.flatten(1), question.explain(question.model, question.images, others).flatten(1), strict=True
    )
    expected = [abs(stats.spearmanr(a.numpy(), b.numpy()).statistic) for a, b in rows]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)


def test_a_cascade_starts_with_the_last_layer_and_ends_with_all():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(4, 4), nn.ReLU())), nn.Flatten()).eval()
    before = [layer.weight.clone() for layer in model[0:20:2]]
    images, seen = torch.rand(2, 1, 2, 2), []

    def explain(net, inputs, target):
        seen.append([not torch.equal(layer.weight, kept) for layer, kept in zip(net[1:21:2], before, strict=True)])
        return torch.stack([net[1].weight.flatten()[:4].reshape(1, 2, 2)] * len(inputs)).detach()

    net = nn.Sequential(nn.Flatten(), *model)
    heat = explain(net, images, None)
    seen.clear()
    curve = quantus_metrics.cascade(Evaluation(net, images, torch.zeros(2, dtype=torch.long), heat, explain, 2))
    assert curve.shape == (quantus_metrics.STAGES + 1, 2)
    assert seen[0] == [False] * 10
    assert seen[1] == [False] * 9 + [True]
    assert seen[-1] == [True] * 10
    assert [sum(row) for row in seen] == sorted(sum(row) for row in seen)
    assert all(row == sorted(row) for row in seen)  # from the top down
    assert bool((curve[:-1] == 1).all())  # of the lowest layer alone is this map
    assert bool((curve[-1] < 1).all())
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(net[1:21:2], before, strict=True))
