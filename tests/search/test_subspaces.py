"""Subspaces: the tap against enumerated walks, the fits against their objectives, and the unchanged model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zennit.composites import EpsilonPlus, NameMapComposite

from nrm_plugin import RelevanceMeasure, Subspaces, activations, at, drsa, patches, prca, top_walks, with_subspaces
from nrm_plugin.demo import load_digits, load_model
from nrm_plugin.errors import InputError, UnknownLayerError
from nrm_plugin.search.subspaces import disentanglement
from tests.conftest import untouched
from tests.nets import rule_maps, tiny_nets, zennit_composite
from tests.oracles import Node, enumerate_walks

slowly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
LAYER = {"chain_mlp": "relu1", "no_bias_relu": "relu1", "conv_chain": "pool1", "conv1d_chain": "pool", "fork": "mid",
         "skip": "relu2"}  # fmt: skip


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


# -- the tap, by walks ----------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """Every part of a tensor of one sample, channels first; the rest is the last part."""

    def __init__(self, projectors: list[np.ndarray]) -> None:
        super().__init__()
        self.projectors = projectors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x[0].numpy()
        flat = a.reshape(len(a), -1)
        return torch.from_numpy(np.stack([(P @ flat).reshape(a.shape) for P in self.projectors]))[None]


class Total(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)


def parts_rule(projectors: list[np.ndarray]):
    """T from the sum to the parts, entry by entry: a_i P_ii' / a_i', and 1 to the rest where a_i' is silent."""

    def rule(module: nn.Module, parts: torch.Tensor) -> np.ndarray:
        a = parts.sum(0).numpy()
        channels, places = len(a), a[0].size
        flat = a.reshape(channels, places)
        T = np.zeros((len(projectors), channels, places, channels, places))
        silent = np.abs(flat) <= 1e-4 * np.abs(flat).max()
        for j in range(channels):
            for place in range(places):
                if silent[j, place]:
                    T[-1, j, place, j, place] = 1
                    continue
                for k, P in enumerate(projectors):
                    for i in range(channels):
                        T[k, i, place, j, place] = flat[i, place] * P[i, j] / flat[j, place]
        return T.reshape(len(projectors) * a.size, a.size)

    return rule


def layer_rule(module: Projections, a: torch.Tensor) -> np.ndarray:
    return np.tile(np.eye(a.numel()), (1, len(module.projectors)))


def with_parts(case, layer: str, projectors: list[np.ndarray]) -> list[Node]:
    """The spec of a case with the parts of a layer and their sum after it."""
    spec = []
    for node in case.spec:
        parents = tuple(("sum", 0) if parent == (layer, 0) else parent for parent in node.parents)
        spec.append(node._replace(parents=parents))
        if node.tap == layer:
            spec.append(Node("parts", 0, "linear", Projections(projectors), ((layer, 0),)))
            spec.append(Node("sum", 0, "linear", Total(), (("parts", 0),)))
    return spec


@pytest.mark.slow
@slowly
@given(case=tiny_nets(list(LAYER), max_batch=2), seed=st.integers(0, 1000), data=st.data())
def test_every_event_with_subspaces_is_the_sum_of_its_walks(case, seed, data):
    layer = LAYER[case.name]
    channels = activations(case.net, case.x, [layer])[layer].shape[1]
    sizes = data.draw(st.sampled_from([(1,), (1, 1), (channels,), (channels - 1, 1) if channels > 1 else (1,)]))
    if sum(sizes) > channels:
        sizes = (1,)
    U = orthonormal(channels, sum(sizes), seed)
    projectors, first = [], 0
    for size in sizes:
        projectors.append(U[:, first : first + size] @ U[:, first : first + size].T)
        first += size
    projectors.append(np.eye(channels) - sum(projectors))
    rules = data.draw(rule_maps(case))
    residual = data.draw(st.sampled_from(["sink", "redistribute"]))
    net = with_subspaces(case.net, {layer: Subspaces(torch.from_numpy(U), sizes)})
    named = zennit_composite(case.spec, rules).name_map
    composite = NameMapComposite([([n + ".layer" if n == layer else n for n in names], r) for names, r in named])
    mu = RelevanceMeasure(net, case.x, start=case.start, composite=composite, residual=residual)
    tap = f"{layer}.subspaces"
    assert mu.shape(tap)[1] == len(sizes) + 1
    sample = data.draw(st.integers(0, case.batch - 1))
    spec = with_parts(case, layer, projectors)
    own = {**rules, "parts": layer_rule, "sum": parts_rule(projectors)}
    walks = enumerate_walks(spec, case.x[sample], case.start[sample], own, residual, 2.0)
    close = {"rtol": 0, "atol": 1e-9 * max(1.0, walks.variation())}
    np.testing.assert_allclose(mu.marginal(tap)[sample], walks.marginal("parts"), **close)
    # The inserted layer changes no other tap.
    plain = RelevanceMeasure(
        case.net, case.x, start=case.start, composite=zennit_composite(case.spec, rules), residual=residual
    )
    for name in ("input", layer):
        np.testing.assert_allclose(mu.marginal(name), plain.marginal(name), **close)
    width = int(np.prod(mu.shape(tap)[2:]))
    head = case.spec[-1].tap
    outputs = int(np.prod(mu.shape("output")[1:]))
    for k in range(len(sizes) + 1):
        through = walks.crosses("parts", 0, range(k * width, (k + 1) * width))
        heat_map = walks.marginal("input", 0, through)
        np.testing.assert_allclose(mu.marginal("input", joint=at(tap)[k])[sample], heat_map, **close)
        o, i = seed % outputs, seed % case.x[0].numel()
        inside = torch.zeros(case.x[0].numel(), dtype=torch.bool)
        inside[i] = True
        event = at("output")[o] & at(tap)[k] & ~at("input")[inside.view(case.x.shape[1:])]
        expected = walks.mass(through & walks.crosses(head, 0, [o]) & ~walks.crosses("input", 0, [i]))
        np.testing.assert_allclose(float(mu(event)[sample]), expected, **close)
        below = mu.conditional(at("input")[inside.view(case.x.shape[1:])], tap)[sample, k] * mu.marginal(tap)[sample, k]
        together = walks.mass(through & walks.crosses("input", 0, [i]))
        np.testing.assert_allclose(float(below.sum()), together, **close)
    np.testing.assert_allclose(float(mu.walk_variation()[sample]), walks.variation(), rtol=1e-6)


# -- queries --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    model, (images, labels) = load_model().double(), load_digits()
    images = images.double()
    mu = RelevanceMeasure(model, images[:40], labels[:40], composite=EpsilonPlus())
    layer = "features.8"
    return model, images, labels, layer, activations(model, images[:40], [layer])[layer], mu.marginal(layer)


@pytest.mark.medium
def test_subspaces_add_up_to_the_layer_and_the_heat_map(digits):
    model, images, labels, layer, values, relevance = digits
    for subspaces in (prca(values, relevance, [1, 1, 2]), drsa(values, relevance, [3, 3, 3], steps=20, restarts=1)):
        mu = RelevanceMeasure(
            with_subspaces(model, {layer: subspaces}), images[:2], labels[:2], composite=EpsilonPlus()
        )
        plain = RelevanceMeasure(model, images[:2], labels[:2], composite=EpsilonPlus())
        tap = f"{layer}.subspaces"
        each = mu.marginal(tap, over="channel")
        torch.testing.assert_close(each.sum(1), plain.marginal(layer).flatten(1).sum(1), rtol=0, atol=1e-10)
        maps = mu.marginal("input", joint=[at(tap)[k] for k in range(4)])
        torch.testing.assert_close(maps.sum(0), plain.marginal("input"), rtol=0, atol=1e-10)
        assert float((maps[0] - maps[1]).abs().max()) > 1e-4
        torch.testing.assert_close(
            mu.marginal(tap), subspaces.split(values[:2], plain.marginal(layer)), rtol=0, atol=1e-10
        )
        # (U_k^T a)^T (U_k^T c), computed without the package.
        context = (plain.marginal(layer) / values[:2]).nan_to_num(0, 0, 0)
        a, c = values[:2].movedim(1, -1) @ subspaces.basis, context.movedim(1, -1) @ subspaces.basis
        first = subspaces.sizes[0]
        torch.testing.assert_close(
            (a * c)[..., :first].flatten(1).sum(1), each[:, 0], rtol=0, atol=1e-3 * float(each.abs().max())
        )


def test_subspaces_are_layers_of_flows_and_searches(digits):
    model, images, labels, layer, values, relevance = digits
    net = with_subspaces(model, {layer: prca(values, relevance, [2, 2])})
    mu = RelevanceMeasure(net, images[:1], labels[:1], composite=EpsilonPlus())
    tap = f"{layer}.subspaces"
    graph = mu.flow(["features.12", tap, "input"], {"input": patches((16, 16), 2)}, top=None,
                    names={tap: ["first", "second", "rest"]})  # fmt: skip
    assert graph.layers[1].labels == ("first", "second", "rest")
    corner = at("input")[:, :8, 8:]
    assert graph.joints[1][1, 1] == pytest.approx(float(mu(at(tap)[1] & corner)), abs=1e-10)
    assert graph.joints[0][5, 2] == pytest.approx(float(mu(at("features.12")[5] & at(tap)[2])), abs=1e-10)
    best = top_walks(mu, ["features.12", tap], 1, budget=float("inf")).walks[0]
    assert abs(best.mass) == pytest.approx(float(mu.joint("features.12", tap).abs().max()))


def test_tokens_have_their_channels_last():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Flatten()).double().eval()
    x = torch.randn(2, 5, 3).double()
    subspaces = Subspaces(torch.from_numpy(orthonormal(4, 2, 1)), (1, 1), dim=-1)
    mu = RelevanceMeasure(with_subspaces(net, {"1": subspaces}), x, 1)
    each = mu.marginal("1.subspaces", over="channel")
    assert mu.shape("1.subspaces") == (2, 3, 5, 4)
    assert each.shape == (2, 3)
    torch.testing.assert_close(each.sum(1), mu.marginal("1").flatten(1).sum(1))


def test_the_model_is_unchanged_and_has_the_same_outputs(digits):
    model, images, _, layer, *_ = digits
    subspaces = Subspaces(torch.eye(32).double()[:, :3], (1, 2))
    with untouched(model, images):
        net = with_subspaces(model, {layer: subspaces})
        assert torch.equal(net(images[:5]), model(images[:5]))
        RelevanceMeasure(net, images[:2], 1).marginal("input")
    assert [id(p) for p in net.parameters()] == [id(p) for p in model.parameters()]
    assert not net.training


# -- the fits -------------------------------------------------------------------------------------------------------


def test_principal_directions_are_eigenvectors_of_the_symmetrized_covariance(digits):
    *_, values, relevance = digits
    a = values.movedim(1, -1).flatten(0, -2).numpy()
    size = np.abs(values.numpy()).reshape(len(values), -1).max(1)
    silent = np.abs(a) <= 1e-4 * np.repeat(size, len(a) // len(size))[:, None]
    r = relevance.movedim(1, -1).flatten(0, -2).numpy()
    c = np.where(silent, 0, r / np.where(silent, 1, a))
    S = sum(np.outer(p, q) + np.outer(q, p) for p, q in zip(a, c, strict=True))
    weights, vectors = np.linalg.eigh(S)
    subspaces = prca(values, relevance, [1, 1, 1]).basis.numpy()
    for k in range(3):
        assert abs(subspaces[:, k] @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-8)
    relevances = [np.sum((a @ U) * (c @ U)) for U in (subspaces, *(orthonormal(32, 3, seed) for seed in range(20)))]
    assert relevances[0] == pytest.approx(weights[-3:].sum() / 2)
    assert relevances[0] > max(relevances[1:])


@pytest.mark.medium
def test_planted_subspaces_are_recovered():
    """Two planes, each relevant for half of the samples."""
    draw = np.random.default_rng(3)
    U = orthonormal(8, 4, 0)
    a, c = np.zeros((200, 8)), np.zeros((200, 8))
    for n in range(200):
        plane = U[:, :2] if n % 2 else U[:, 2:]
        direction = plane @ draw.normal(size=2)
        a[n], c[n] = direction + 0.01 * draw.normal(size=8), direction + 0.01 * draw.normal(size=8)
    a, c = torch.from_numpy(a), torch.from_numpy(c)
    subspaces = drsa(a, a * c, [2, 2])
    overlap = [float((subspaces.basis[:, k : k + 2].T @ torch.from_numpy(U[:, :2])).square().sum()) for k in (0, 2)]
    assert sorted(overlap) == pytest.approx([0, 2], abs=0.02)
    torch.testing.assert_close(subspaces.basis.T @ subspaces.basis, torch.eye(4).double())


def test_the_objective_equals_its_formula():
    draw = torch.Generator().manual_seed(0)
    a, c = torch.randn(2, 9, 5, generator=draw, dtype=torch.float64)
    U = torch.from_numpy(orthonormal(5, 4, 1))
    total = 0.0
    for first, last in ((0, 1), (1, 4)):
        squares = 0.0
        for n in range(9):
            relevances = sum(float(U[:, j] @ a[n]) * float(U[:, j] @ c[n]) for j in range(first, last))
            squares += max(0.0, relevances) ** 2 / 9
        total += squares**0.25 / 2
    assert float(disentanglement(a, c, U, (1, 3))) == pytest.approx(total**2)


def test_invalid_arguments_raise():
    values = torch.rand(3, 4, 2, 2)
    with pytest.raises(InputError, match="orthonormal"):
        Subspaces(torch.ones(4, 2), (2,))
    with pytest.raises(InputError, match="add up"):
        Subspaces(torch.eye(4), (1, 2))
    with pytest.raises(InputError, match="at most 4 in total"):
        prca(values, values, 5)
    with pytest.raises(InputError, match="must have the same shape"):
        drsa(values, values[:, :3], [1])
    with pytest.raises(InputError, match="4 channels, but the layer has 2 in dimension 2"):
        Subspaces(torch.eye(4), (4,), dim=2).parts(values)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU()))
    eye = Subspaces(torch.eye(4), (4,))
    with pytest.raises(UnknownLayerError, match="no layer named '2'"):
        with_subspaces(net, {"2": eye})
    with pytest.raises(InputError, match="contains another layer"):
        with_subspaces(net, {"1": eye, "1.0": eye})


def test_all_relevance_of_a_silent_layer_is_in_the_rest():
    subspaces = Subspaces(torch.eye(4)[:, :2], (1, 1))
    parts = subspaces.split(torch.zeros(1, 4), torch.ones(1, 4))
    assert parts[0].tolist() == [[0] * 4, [0] * 4, [1] * 4]
    assert prca(torch.zeros(3, 4), torch.ones(3, 4), 1).basis.shape == (4, 1)
    assert drsa(torch.zeros(3, 4), torch.ones(3, 4), [1], steps=2).basis.shape == (4, 1)
