"""Prototypes recover planted clusters; membership and fit equal densities written out by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.dataset import Joint, Marginal, sweep
from nrm_plugin.dataset.examples import ReferencesError
from nrm_plugin.dataset.glocal_plots import prototypes_figure
from nrm_plugin.dataset.prototypes import find_prototypes, vectors_of_sweep
from nrm_plugin.errors import InputError, MissingExtraError

SIZES = (50, 30, 20)


@pytest.fixture(scope="module")
def blobs():
    """Vectors as small as the relevance of single channels, in three clusters, and the cluster of each."""
    draw = np.random.default_rng(0)
    centres = np.array([[1.0, 0, 0, 0.5], [0, 1, 0, 0.5], [0, 0, -1, 0.5]]) * 1e-4
    spread = np.array([1.0, 2.0, 0.5, 1.0]) * 5e-6
    values = np.concatenate([c + draw.normal(size=(n, 4)) * spread for c, n in zip(centres, SIZES, strict=True)])
    of = np.repeat([0, 1, 2], SIZES)
    order = draw.permutation(100)
    return values[order], of[order]


@pytest.mark.medium
@pytest.mark.parametrize("method", ["mixture", "kmeans"])
def test_planted_clusters_are_recovered(blobs, method):
    values, of = blobs
    prototypes = find_prototypes(torch.from_numpy(values), 3, method, samples=np.arange(100) * 3)
    assert np.array_equal(prototypes.members, of)  # ordered by coverage
    assert prototypes.coverage == pytest.approx([0.5, 0.3, 0.2])
    for number in range(3):
        mean = values[of == number].mean(0)
        np.testing.assert_allclose(prototypes.centers[number], mean, rtol=1e-4, atol=1e-10)
        distance = np.sqrt(((values - prototypes.centers[number]) ** 2).sum(1))
        by_hand = sorted(np.flatnonzero(of == number), key=lambda n, distance=distance: distance[n])
        assert prototypes.of(number) == [3 * n for n in by_hand]
    assert [group for group, _ in prototypes.strongest(2, 2)] == [2, 3]
    assert prototypes.strongest(2, 1)[0][1] == pytest.approx(-1e-4, rel=0.1)
    again = find_prototypes(values, 3, method)
    assert np.array_equal(again.centers, prototypes.centers)
    for seed in range(1, 6):  # scikit-learn returns them in other orders
        other = find_prototypes(values, 3, method, seed=seed)
        assert np.array_equal(other.members, of)
        assert [near.prototype for near in other.nearest(values)] == of.tolist()


@pytest.mark.medium
@pytest.mark.parametrize("method", ["mixture", "kmeans"])
def test_a_new_sample_is_assigned_to_its_nearest_prototype(blobs, method):
    values, of = blobs
    prototypes = find_prototypes(values, 3, method)
    new = np.random.default_rng(1).normal(size=(40, 4)) * 1e-4
    means = np.stack([values[of == number].mean(0) for number in range(3)])
    if method == "kmeans":
        fit = -np.sqrt(((values[:, None] - means) ** 2).sum(2)).min(1)
        fits = -np.sqrt(((new[:, None] - means) ** 2).sum(2))
        best, total = fits.argmax(1), fits.max(1)
    else:
        scale = values.var(0).mean()
        variance = np.stack([values[of == number].var(0) for number in range(3)]) + 1e-6 * scale
        densities = [
            np.log(np.array(SIZES) / 100) - 0.5 * (((x[:, None] - means) ** 2 / variance).sum(2)
                                                  + np.log(2 * np.pi * variance).sum(1)) for x in (values, new)
        ]  # fmt: skip
        fit, fits = densities[0], densities[1]
        best, total, fit = fits.argmax(1), np.logaddexp.reduce(fits, 1), np.logaddexp.reduce(fit, 1)
    for place, near in enumerate(prototypes.nearest(torch.from_numpy(new))):
        assert near.prototype == best[place]
        np.testing.assert_allclose(near.difference, new[place] - means[best[place]], rtol=1e-3, atol=1e-9)
        assert near.distance == pytest.approx(np.linalg.norm(near.difference))
        assert near.outlying == pytest.approx((fit < total[place]).mean(), abs=0.011)
        group, change = near.strongest(1)[0]
        assert abs(change) == pytest.approx(np.abs(near.difference).max())
        assert near.difference[group] == change
    own = [near.outlying for near in prototypes.nearest(values)]
    assert sorted(own) == pytest.approx(np.arange(100) / 100)
    assert prototypes.nearest(means)[0].outlying > 0.8
    assert prototypes.nearest(means * 30)[0].outlying == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count=0"),
        ({"count": 101}, "1 to the number of samples, 100"),
        ({"method": "best"}, "method='best'"),
        ({"samples": [1, 2]}, "must have 100 indices"),
        ({"vectors": np.full((3, 2), np.nan)}, "finite"),
        ({"vectors": np.zeros(3)}, r"\(samples, groups\)"),
    ],
)
def test_invalid_arguments_raise(blobs, options, words):
    with pytest.raises(InputError, match=words):
        find_prototypes(**{"vectors": blobs[0], **options})


def test_unknown_prototypes_and_other_groups_raise(blobs):
    prototypes = find_prototypes(blobs[0], 2)
    with pytest.raises(InputError, match="no prototype 2"):
        prototypes.of(2)
    with pytest.raises(InputError, match="4 groups, got 3"):
        prototypes.nearest(np.zeros((1, 3)))


def test_equal_explanations_are_one_prototype():
    prototypes = find_prototypes(np.ones((5, 3)), 1)
    np.testing.assert_allclose(prototypes.centers, 1)
    assert prototypes.nearest(np.ones((1, 3)))[0].distance < 1e-12


def test_without_scikit_learn_the_extra_is_named(blobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(MissingExtraError, match=r"nrm-plugin\[prototypes\]"):
        find_prototypes(blobs[0], 2)


@pytest.mark.slow
def test_the_figure_has_a_row_for_each_prototype(blobs):
    prototypes = find_prototypes(blobs[0], 3)
    images = {sample: torch.rand(1, 4, 4) for number in range(3) for sample in prototypes.of(number)[:2]}
    for dark in (False, True):
        figure = prototypes_figure(prototypes, images, 2, 3, "of $1", dark, names=lambda group: f"c{group}")
        figure.canvas.draw()
        assert len(figure.axes) == 9
        assert figure.axes[2].get_yticklabels()[0].get_text() == "c0"
    with pytest.warns(DeprecationWarning, match="argument pictures= of prototypes_figure .* Use images= instead"):
        assert len(prototypes_figure(prototypes, pictures=images, k=2).axes) == 9
    with pytest.raises(InputError, match="lacks sample"):
        prototypes_figure(prototypes, images, 3)
    with pytest.raises(InputError, match="a figure can show"):
        prototypes_figure(prototypes, images, 17)


@pytest.mark.medium
def test_vectors_of_a_sweep_are_marginals(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    data = TensorDataset(torch.randn(17, 4).double(), torch.randint(0, 3, (17,)))
    rare = at("0")[5] & ~at("input")
    queries = [
        Marginal("0", given=rare, name="given"),
        Marginal("0", joint=at("2")[1]),
        Marginal("0"),
        Joint("0", "input"),
    ]
    sweep(net, data, queries, tmp_path, target="label", batch_size=5, shard=5, progress=False)
    values, samples = vectors_of_sweep(tmp_path, "0")
    mu = RelevanceMeasure(net, data.tensors[0], data.tensors[1])
    np.testing.assert_allclose(values, mu.marginal("0"), rtol=1e-9, atol=1e-12)
    assert samples.tolist() == list(range(17))
    some, of = vectors_of_sweep(tmp_path, "0", target=1)
    assert of.tolist() == np.flatnonzero(data.tensors[1] == 1).tolist()
    np.testing.assert_allclose(some, values[of])
    for query, words in (("joint(0, input)", "no query"), ("given", "has undefined values"), ("1", "no query '1'")):
        with pytest.raises(ReferencesError, match=words):
            vectors_of_sweep(tmp_path, query)
    with pytest.raises(ReferencesError, match="no samples with target 9"):
        vectors_of_sweep(tmp_path, "0", target=9)
