"""Features as taps: against enumerated walks, against a model written with plain layers, and the unchanged model.

Covers: nrm_plugin.search.features, nrm_plugin.model.replaced_layers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from zennit.composites import EpsilonPlus, NameMapComposite

from nrm_plugin import (
    ABSORBED,
    Crosscoder,
    Dictionary,
    NRMAbsolute,
    RelevanceMeasure,
    at,
    completeness,
    feature_groups,
    reconstruction_errors,
    replacement,
    with_features,
)
from nrm_plugin.errors import InputError, UnknownLayerError
from nrm_plugin.search.features import WithFeatures
from tests.conftest import untouched
from tests.feature_nets import Decoder, random_dictionary, transcoders
from tests.nets import rule_maps, tiny_nets, zennit_composite
from tests.oracles import Epsilon, Node, enumerate_walks, normalized

slowly = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
LAYERS = {"chain_mlp": "relu1", "no_bias_relu": "relu1"}


# -- the tap, by walks ----------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Features and error of a vector of one sample, written out."""

    def __init__(self, dictionary: Dictionary) -> None:
        super().__init__()
        self.dictionary = dictionary

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.dictionary
        pre = x[0] @ one.encoder + one.encoder_bias
        f = torch.tensor([float(z) if z > one.threshold else 0.0 for z in pre], dtype=torch.float64)
        return torch.cat([f, x[0] - f @ one.decoder - one.decoder_bias])[None]


class Exact(nn.Linear):
    """A linear layer whose outputs are exactly zero where only rounding is left."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return torch.where(y.abs() < 1e-12, 0.0, y)


def parts_rule(module: Parts, a: torch.Tensor) -> np.ndarray:
    """T from the neurons of the layer to features (the encoder's rule) and errors (the identity)."""
    one = module.dictionary
    encoder = nn.Linear(*one.encoder.shape).double()
    encoder.weight.data, encoder.bias.data = one.encoder.T.clone(), one.encoder_bias.clone()
    return np.concatenate([Epsilon()(encoder, a), np.eye(a.numel())], 1)


def spec_with_parts(case, layer: str, dictionary: Dictionary) -> list[Node]:
    decoder = Exact(len(dictionary) + dictionary.width, dictionary.width).double()
    decoder.weight.data = torch.cat([dictionary.decoder.T, torch.eye(dictionary.width).double()], 1)
    decoder.bias.data = dictionary.decoder_bias.clone()
    spec = []
    for node in case.spec:
        parents = tuple(("sum", 0) if parent == (layer, 0) else parent for parent in node.parents)
        spec.append(node._replace(parents=parents))
        if node.tap == layer:
            spec.append(Node("parts", 0, "linear", Parts(dictionary), ((layer, 0),)))
            spec.append(Node("sum", 0, "linear", decoder, (("parts", 0),)))
    return spec


@pytest.mark.slow
@slowly
@given(case=tiny_nets(list(LAYERS), max_batch=2), seed=st.integers(0, 1000), data=st.data())
def test_every_event_with_features_is_the_sum_of_its_walks(case, seed, data):
    layer = LAYERS[case.name]
    values = RelevanceMeasure(case.net, case.x, start=case.start).shape(layer)
    dictionary = random_dictionary(values[1], 3, seed, threshold=data.draw(st.sampled_from([0.0, 0.3])))
    rules = data.draw(rule_maps(case))
    residual = data.draw(st.sampled_from(["sink", "redistribute"]))
    named = zennit_composite(case.spec, rules).name_map
    epsilon = zennit_composite([Node("encoder", 0, "linear", nn.Linear(1, 1), ())], {}).name_map[0][1]
    named = [([n + ".layer" if n == layer else n for n in names], r) for names, r in named]
    named += [([f"{layer}.encoder", f"{layer}.decoder"], epsilon)]
    mu = RelevanceMeasure(
        with_features(case.net, {layer: dictionary}), case.x, start=case.start,
        composite=NameMapComposite(named), residual=residual,
    )  # fmt: skip
    sample = data.draw(st.integers(0, case.batch - 1))
    own = {**rules, "parts": parts_rule, "sum": Epsilon()}
    walks = enumerate_walks(
        spec_with_parts(case, layer, dictionary), case.x[sample], case.start[sample], own, residual, 2.0
    )
    # A rule such as ZBox assigns relevance to silent neurons, whose sum of features and error is zero up to rounding.
    # The shares of ε-rules then depend on the sign of the rounding, which can differ between the two, and exceed 1e5.
    assume(max(walks.variation(), float(mu.walk_variation()[sample])) < 1e4)
    close = {"rtol": 0, "atol": 1e-9 * max(1.0, walks.variation())}
    tap = f"{layer}.features"
    np.testing.assert_allclose(mu.marginal(tap)[sample], walks.marginal("parts"), **close)
    np.testing.assert_allclose(mu.marginal("input")[sample], walks.marginal("input"), **close)
    errors = walks.crosses("parts", 0, range(3, 3 + dictionary.width))
    np.testing.assert_allclose(float(mu(at(tap)[3:])[sample]), walks.mass(errors), **close)
    for k in range(3):
        through = walks.crosses("parts", 0, [k])
        joint = mu.marginal("input", joint=at(tap)[k])[sample]
        np.testing.assert_allclose(joint, walks.marginal("input", 0, through), **close)
        both = mu(at("input")[..., 0] & at(tap)[k] & ~at("output")[0])[sample]
        inside = [i for i in range(case.x[0].numel()) if i % case.x.shape[-1] == 0]
        event = through & walks.crosses("input", 0, inside) & ~walks.crosses("output", 0, [0])
        np.testing.assert_allclose(float(both), walks.mass(event), **close)


def test_the_rule_of_the_oracle_is_normalized_by_columns():
    """The oracle's gain acts on columns, so that features and errors in one matrix are independent."""
    dictionary = random_dictionary(4, 3, 0)
    a = torch.randn(4).double()
    T, sink = normalized(parts_rule(Parts(dictionary), a), "redistribute", 2.0)
    np.testing.assert_allclose(T.sum(0) + sink, 1)
    np.testing.assert_allclose(T[:, 3:], np.eye(4))


# -- a decoder with attention ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
    net = Decoder().double().eval()
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    return net, with_features(net, transcoders(net)), ids


@pytest.fixture(scope="module")
def mu(traced):
    _, net, ids = traced
    return RelevanceMeasure(net, ids, lambda outputs: outputs[:, -1].argmax(-1), output=lambda y: y[:, -1])


def test_features_and_errors_close_the_totals(traced, mu):
    _, net, _ = traced
    for layer in ("blocks.0.mlp", "blocks.1.mlp"):
        tap = f"{layer}.features"
        groups = mu.marginal(tap, over=feature_groups(net, layer))
        assert groups.shape == (2, 17)
        total = groups.sum(1) + mu.sink(tap) + mu.bypass(tap)
        torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=1e-12)
        error = mu(reconstruction_errors(net, layer))
        torch.testing.assert_close(error, groups[:, 16], rtol=0, atol=1e-12)
        assert float(groups[:, 16].abs().min()) > 1e-3
        layer_mass = mu.marginal(layer).flatten(1).sum(1)
        torch.testing.assert_close(groups.sum(1), layer_mass - mu(at(f"{layer}.decoder", "sink")), rtol=0, atol=1e-12)


@pytest.mark.medium
def test_joints_of_features_equal_masked_passes(traced, mu):
    _, net, _ = traced
    upper, lower = "blocks.1.mlp.features", "blocks.0.mlp.features"
    groups = feature_groups(net, "blocks.0.mlp")
    joint = mu.joint(upper, lower, over=(groups, groups))
    for k in range(17):
        masked = mu.marginal(lower, over=groups, joint=at(upper)[..., groups == k])
        torch.testing.assert_close(joint[:, k], masked, rtol=0, atol=1e-12)
    # The law of total mass: a feature above is followed by a feature below, or its walks bypass them.
    rest = torch.stack([mu(at(upper)[..., groups == k] & ~at(lower)) for k in range(17)], 1)
    torch.testing.assert_close(joint.sum(2) + rest, mu.marginal(upper, over=groups), rtol=0, atol=1e-12)
    assert float(joint[:, :16, :16].abs().max()) > 1e-3


def test_features_equal_a_model_written_with_plain_layers(traced, mu):
    """The same sums as a module of plain linear layers, whose taps are the terms."""
    net, _, ids = traced
    twin = Decoder().double().eval()
    twin.load_state_dict(net.state_dict())
    for block, dictionary in zip(twin.blocks, transcoders(net).values(), strict=True):
        block.mlp = Plain(block.mlp, dictionary)
    other = RelevanceMeasure(twin, ids, lambda outputs: outputs[:, -1].argmax(-1), output=lambda y: y[:, -1])
    for layer in ("blocks.0.mlp", "blocks.1.mlp"):
        both = mu.marginal(f"{layer}.features")
        torch.testing.assert_close(both[..., :16], other.marginal(f"{layer}.act"), rtol=0, atol=1e-10)
    torch.testing.assert_close(mu.marginal("embed"), other.marginal("embed"), rtol=0, atol=1e-10)


class Plain(nn.Module):
    """A transcoder next to an MLP: the error is the MLP plus a constant, so that its relevance passes to the MLP."""

    def __init__(self, layer: nn.Module, dictionary: Dictionary) -> None:
        super().__init__()
        self.layer, self.act = layer, nn.ReLU()
        self.encoder, self.decoder = nn.Linear(8, 16).double(), nn.Linear(24, 8).double()
        self.encoder.weight.data, self.encoder.bias.data = dictionary.encoder.T, dictionary.encoder_bias
        self.decoder.weight.data = torch.cat([dictionary.decoder, torch.eye(8).double()]).T
        self.decoder.bias.data = dictionary.decoder_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f, y = self.act(self.encoder(x)), self.layer(x)
        with torch.no_grad():
            kept = functional.linear(f, self.decoder.weight[:, :16], self.decoder.bias)
        return self.decoder(torch.cat([f, y - kept], -1))


@pytest.mark.medium
@pytest.mark.parametrize("composite", [None, EpsilonPlus(), NRMAbsolute()], ids=["default", "plus", "absolute"])
def test_errors_that_are_absorbed_end_their_walks(traced, composite):
    net, _, ids = traced
    kept = {"output": lambda y: y[:, -1], "composite": composite}
    passing = RelevanceMeasure(with_features(net, transcoders(net)), ids, 3, **kept)
    model = with_features(net, transcoders(net), errors="absorb")
    mu = RelevanceMeasure(model, ids, 3, **kept)
    errors = reconstruction_errors(model)
    torch.testing.assert_close(mu(errors & ~ABSORBED), torch.zeros(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mu(errors), passing(errors), rtol=0, atol=1e-12)
    first = mu.marginal("blocks.1.mlp.features")
    torch.testing.assert_close(first, passing.marginal("blocks.1.mlp.features"), rtol=0, atol=1e-12)


@pytest.mark.medium
def test_a_reference_absorbs_nothing_and_its_totals_are_one(traced):
    net, model, ids = traced
    changed = ids.clone()
    changed[:, 1] = (ids[:, 1] + 1) % 11
    mu = RelevanceMeasure(model, ids, 3, reference=changed, output=lambda y: y[:, -1])
    plain = RelevanceMeasure(net, ids, 3, reference=changed, output=lambda y: y[:, -1])
    torch.testing.assert_close(mu.output, plain.output, rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.marginal("embed").flatten(1).sum(1), torch.ones(2).double(), rtol=0, atol=1e-9)
    # Relevance of the linear step above is multiplier times difference: W_D f and the error by the same multiplier.
    y, y0 = (_values(model, x, "blocks.1.mlp") for x in (ids, changed))
    f, f0 = (_values(model, x, "blocks.1.mlp.features") for x in (ids, changed))
    multiplier = mu.marginal("blocks.1.mlp") / (y - y0)
    weights = model.get_submodule("blocks.1.mlp.decoder").weight
    expected = (f - f0) * (torch.where(y == y0, 0.0, multiplier) @ weights)
    torch.testing.assert_close(mu.marginal("blocks.1.mlp.features"), expected, rtol=0, atol=1e-9)


def _values(model: nn.Module, x: torch.Tensor, layer: str) -> torch.Tensor:
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0]


# -- crosscoders, skip paths, layers that return tuples -------------------------------------------------------------


def test_a_crosscoder_equals_its_sums(traced):
    net, _, ids = traced
    one, two = transcoders(net).values()
    across = torch.randn(16, 8, generator=torch.Generator().manual_seed(5)).double()
    sites = ("blocks.0.mlp", "blocks.1.mlp")
    model = with_features(net, Crosscoder(dict(zip(sites, (one, two), strict=True)), {sites: across}))
    torch.testing.assert_close(model(ids), net(ids), rtol=0, atol=1e-12)
    lower, upper = (_values(model, ids, f"{site}.features") for site in sites)
    y = _values(net, ids, sites[1])
    rebuilt = lower[..., :16] @ across + upper[..., :16] @ two.decoder + two.decoder_bias
    torch.testing.assert_close(upper[..., 16:], y - rebuilt, rtol=0, atol=1e-12)
    mu = RelevanceMeasure(model, ids, 3, output=lambda out: out[:, -1], composite=NRMAbsolute())
    total = mu.marginal("embed").flatten(1).sum(1) + mu.sink("embed") + mu.bypass("embed")
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=1e-12)
    # Absolute shares of the sum of the upper layer, part by part.
    share = torch.cat([lower[..., :16, None] * across, upper[..., :16, None] * two.decoder,
                       torch.diag_embed(upper[..., 16:])], -2).abs()  # fmt: skip
    share = share / share.sum(-2, keepdim=True)
    arrived = (share * mu.marginal(sites[1]).unsqueeze(-2)).sum(-1)
    torch.testing.assert_close(arrived[..., 16:], mu.marginal(f"{sites[1]}.features"), rtol=0, atol=1e-6)


def test_a_decoder_to_an_earlier_layer_raises(traced):
    net, _, ids = traced
    sites = ("blocks.1.mlp", "blocks.0.mlp")
    crosscoder = Crosscoder(transcoders(net), {sites: torch.zeros(16, 8)})
    with pytest.raises(InputError, match="which the model calls earlier"):
        with_features(net, crosscoder)(ids)


def test_a_skip_path_is_a_group_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double().eval()
    base = random_dictionary(3, 5, 1, reads="input")
    skip = torch.randn(3, 3).double()
    one = Dictionary(base.encoder, base.decoder, base.encoder_bias, base.decoder_bias, skip=skip, reads="input")
    model, x = with_features(net, {"0": one}), torch.randn(4, 3).double()
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=1e-12)
    parts = _values(model, x, "0.features")
    torch.testing.assert_close(parts[:, 8:], x @ skip.T, rtol=0, atol=1e-12)
    mu = RelevanceMeasure(model, x, 1)
    assert feature_groups(model, "0").tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6]
    masses = mu.marginal("0.features", over=feature_groups(model, "0"))
    torch.testing.assert_close(masses.sum(1) + mu.sink("0.features"), torch.ones(4).double(), rtol=0, atol=1e-9)


class Tuples(nn.Module):
    """Returns a list, and is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), 2.0

    def forward(self, *, state: torch.Tensor) -> list:
        return [None, self.linear(state) * self.scale, "cache"]


class AroundTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.top = Tuples(), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, state, cache = self.inner(state=x)
        assert cache == "cache"
        return self.top(state / self.inner.scale)


@pytest.mark.parametrize("reads", ["input", "output"])
def test_a_layer_may_return_a_list_and_take_keywords(reads):
    torch.manual_seed(0)
    net = AroundTuples().double().eval()
    model = with_features(net, {"inner": random_dictionary(3, 4, 0, reads=reads)})
    x = torch.randn(2, 3).double()
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=1e-12)
    mu = RelevanceMeasure(model, x, 0)
    total = mu.marginal("inner.features").sum(1) + mu.sink("inner.features")
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=1e-9)


# -- scores as events -------------------------------------------------------------------------------------------------


def test_scores_are_one_without_errors_and_zero_without_features():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    x = torch.randn(3, 3).double()
    eye, none = torch.eye(4).double(), torch.zeros(4, 4).double()
    exact = with_features(net, {"0": Dictionary(eye, eye, threshold=-math.inf)})
    empty = with_features(net, {"0": Dictionary(none, none)})
    for model, expected in ((exact, 1.0), (empty, 0.0)):
        mu = RelevanceMeasure(model, x, 1, composite=NRMAbsolute())
        torch.testing.assert_close(replacement(mu, model), torch.full((3,), expected).double(), rtol=0, atol=1e-4)
    mu = RelevanceMeasure(exact, x, 1, composite=NRMAbsolute())
    torch.testing.assert_close(completeness(mu, exact), torch.ones(3).double(), rtol=0, atol=1e-4)
    mu = RelevanceMeasure(empty, x, 1, composite=NRMAbsolute())
    torch.testing.assert_close(completeness(mu, empty), torch.full((3,), 0.5).double(), rtol=0, atol=1e-4)


# -- the model, and invalid arguments ---------------------------------------------------------------------------------


def test_the_model_is_unchanged(traced):
    net, _, ids = traced
    with untouched(net):
        model = with_features(net, transcoders(net))
        torch.testing.assert_close(model(ids), net(ids), rtol=0, atol=1e-12)
        RelevanceMeasure(model, ids, 3, output=lambda y: y[:, -1]).marginal("embed")
    assert not any(isinstance(module, WithFeatures) for module in net.modules())
    assert not any(p.requires_grad for module in model.modules() if isinstance(module, WithFeatures)
                   for p in (*module.encoder.parameters(), *module.decoder.parameters()))  # fmt: skip
    assert not model.training
    assert all(not module.board.features for module in model.modules() if isinstance(module, WithFeatures))


def test_weights_are_in_the_format_of_the_model():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16().eval()
    model = with_features(net, {"0": random_dictionary(4, 6, 0)})
    mu = RelevanceMeasure(model, torch.randn(2, 3).bfloat16(), 1)
    assert model.get_submodule("0.encoder").weight.dtype == torch.bfloat16
    total = mu.marginal("0.features").sum(1) + mu.sink("0.features")
    torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-5)


def test_invalid_arguments_raise(traced):
    net, model, ids = traced
    one = random_dictionary(8, 16, 0)
    with pytest.raises(UnknownLayerError, match=r"no layer named 'blocks\.7'"):
        with_features(net, {"blocks.7": one})
    with pytest.raises(InputError, match="contains another layer with features"):
        with_features(net, {"blocks.0": one, "blocks.0.mlp": one})
    with pytest.raises(InputError, match="errors='drop' is unknown"):
        with_features(net, {"blocks.0": one}, errors="drop")
    with pytest.raises(InputError, match=r"'head' returns \(2, 6, 11\), but its dictionary is for 8"):
        with_features(net, {"head": one})(ids)
    narrow = with_features(net, {"blocks.0.mlp": Dictionary(torch.zeros(5, 3), torch.zeros(3, 8), reads="input")})
    with pytest.raises(InputError, match=r"reads \(2, 6, 8\), but its dictionary is for 5 neurons"):
        narrow(ids)
    with pytest.raises(InputError, match="no features at 'head'"):
        feature_groups(model, "head")
    with pytest.raises(InputError, match="this model has no features;"):
        reconstruction_errors(net)
    with pytest.raises(InputError, match="has no single output"):
        with_features(AroundDicts().eval(), {"inner": random_dictionary(3, 4, 0)})(torch.zeros(1, 3))


class Dicts(nn.Module):
    def forward(self, x: torch.Tensor) -> dict:
        return {"state": x}


class AroundDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Dicts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)["state"]
