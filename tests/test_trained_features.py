"""Transcoders trained on a decoder that is trained here: totals, joints, scores and influence on held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nrm_plugin import (
    Dictionary,
    NRMAbsolute,
    RelevanceMeasure,
    at,
    attribution_graph,
    completeness,
    feature_groups,
    reconstruction_errors,
    replacement,
    with_features,
)
from tests.feature_nets import Decoder

TEXT = Path(__file__).parents[1] / "docs" / "measure.md"
LENGTH, WIDTH, FEATURES = 24, 32, 96


def text_ids() -> tuple[Tensor, int]:
    text = TEXT.read_text(encoding="utf-8")
    letters = sorted(set(text))
    return torch.tensor([letters.index(letter) for letter in text]), len(letters)


def batches(ids: Tensor, count: int, size: int = 64):
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        starts = torch.randint(0, len(ids) - LENGTH - 1, (size,), generator=draw)
        yield torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])


def trained_decoder(ids: Tensor, tokens: int) -> Decoder:
    net = Decoder(tokens, WIDTH, heads=2, depth=2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for rows in batches(ids, 300):
        loss = functional.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 2.6
    return net.eval()


def trained_transcoder(net: Decoder, ids: Tensor, layer: str) -> Dictionary:
    draw, seen = torch.Generator().manual_seed(1), []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for rows in batches(ids, 30):
            net(rows[:, :-1])
    handle.remove()
    x, y = (torch.cat(parts).flatten(0, 1) for parts in zip(*seen, strict=True))
    shapes = ((WIDTH, FEATURES), (FEATURES, WIDTH), (FEATURES,), (WIDTH,))
    weights = [(torch.randn(shape, generator=draw) * 0.15).requires_grad_() for shape in shapes]
    optimizer = torch.optim.Adam(weights, 3e-3)
    for _ in range(400):
        rows = torch.randint(0, len(x), (512,), generator=draw)
        f = torch.relu(x[rows] @ weights[0] + weights[2])
        missed = (f @ weights[1] + weights[3] - y[rows]).square().sum(1).mean()
        (missed + 0.02 * (f * weights[1].norm(dim=1)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder, decoder, bias, decoder_bias = (weight.detach() for weight in weights)
    one = Dictionary(encoder, decoder, bias, decoder_bias, reads="input")
    assert float(one.error(x, y).square().sum()) < 0.2 * float((y - y.mean(0)).square().sum())
    return one


@pytest.fixture(scope="module")
def case():
    ids, tokens = text_ids()
    with torch.random.fork_rng():
        net = trained_decoder(ids, tokens)
        dictionaries = {layer: trained_transcoder(net, ids, layer) for layer in ("blocks.0.mlp", "blocks.1.mlp")}
    return net, with_features(net, dictionaries), torch.stack([ids[100:112], ids[500:512]])


@pytest.mark.slow
@pytest.mark.parametrize("composite", [None, NRMAbsolute()], ids=["default", "absolute"])
def test_trained_features_close_the_totals_and_joints_are_masked_passes(case, composite, worst):
    net, model, ids = case
    net, model = net.double(), model.double()
    top = net(ids)[:, -1].argmax(-1)
    mu = RelevanceMeasure(model, ids, top, composite=composite, output=lambda y: y[:, -1])
    upper, lower = "blocks.1.mlp.features", "blocks.0.mlp.features"
    for tap in (upper, lower):
        total = mu.marginal(tap).flatten(1).sum(1) + mu.sink(tap) + mu.bypass(tap)
        error = float((total - 1).abs().max() / mu.walk_variation().max())
        worst("totals of features and error, relative to the walk variation", error)
        assert error < 1e-12
    groups = feature_groups(model, "blocks.0.mlp")
    active = mu.marginal(upper, over=groups).abs().sum(0)[:FEATURES].topk(8).indices.tolist()
    joint = mu.joint(upper, lower, over=(groups, groups))
    for k in [*active, FEATURES]:
        masked = mu.marginal(lower, over=groups, joint=at(upper)[..., groups == k])
        difference = float((joint[:, k] - masked).abs().max() / mu.variation(lower).max())
        worst("joints of features minus masked passes", difference)
        assert difference < 1e-12
    inputs = mu.marginal(upper)
    for i in [*mu.marginal(lower, over=groups).abs().sum(0)[:FEATURES].topk(4).indices.tolist(), FEATURES]:
        transposed = mu.conditional(at(lower)[..., groups == i], upper) * inputs
        by_group = torch.stack([transposed[..., groups == k].flatten(1).sum(1) for k in range(FEATURES + 1)], 1)
        difference = float((joint[:, :, i] - by_group).abs().max() / mu.variation(lower).max())
        worst("joints of features minus transposed passes", difference)
        assert difference < 1e-12


@pytest.mark.slow
def test_the_graph_of_trained_features_is_made_of_events(case, worst):
    net, model, ids = case
    model = model.double()
    top = net.double()(ids)[:, -1].argmax(-1)
    mu = RelevanceMeasure(model, ids, top, composite=NRMAbsolute(), output=lambda y: y[:, -1])
    graph = attribution_graph(mu, model, top=10**6, sample=0)
    for name, score, event in (("replacement", graph.replacement(), replacement(mu, model)),
                               ("completeness", graph.completeness(), completeness(mu, model))):  # fmt: skip
        worst(f"{name} of the graph minus the event", abs(score - float(event[0])))
        assert score == pytest.approx(float(event[0]), abs=1e-6)
    assert 0.05 < graph.replacement() < 0.999
    influence = graph.influence()
    errors = [k for k, node in enumerate(graph.nodes) if node.kind == "error"]
    assert float(influence[errors].sum()) == pytest.approx(float(mu(reconstruction_errors(model))[0]), abs=1e-6)
