"""The measure of the difference to a reference: identities, an enumeration of walks, DeepLIFT, and bad arguments.

Covers: nrm_plugin.measure.references, nrm_plugin.measure.difference_start, nrm_plugin.measure.start,
nrm_plugin.measure.recording_properties, nrm_plugin.model.references, nrm_plugin.measure.secant_composite.
"""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
import torchvision
from captum.attr import DeepLift
from torch import Tensor, nn
from zennit.composites import EpsilonPlusFlat, LayerMapComposite
from zennit.rules import Epsilon

from nrm_plugin import ABSORBED, NRM, JointNRM, LayerNRM, NeuronNRM, NRMAbsolute, NRMDefault, Plan, RelevanceMeasure, at
from nrm_plugin.errors import (
    DifferenceError,
    FoldingError,
    InputError,
    NullEventError,
    PrecisionWarning,
    TargetError,
    UnsupportedOperationError,
)
from tests.conftest import slow_but
from tests.differences import draw, layer_norm, multipliers, slope, softmax

TIGHT = {"rtol": 0.0, "atol": 1e-12}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)]
    net = nn.Sequential(*layers, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        net[1].running_mean.copy_(draw(4, seed=5))
        net[1].weight.copy_(draw(4, seed=6))
    return net


X, X0 = draw(3, 4, seed=3), draw(3, 4, seed=4)


def walks(net: nn.Sequential, x: Tensor, reference: Tensor, target: int) -> dict[tuple[int, ...], float]:
    """The mass of every walk of an MLP, by neurons of the layers from the input up, for one sample."""
    pairs, slopes = [(x, reference)], []
    for layer in net:
        one, two = (layer(value).detach() for value in pairs[-1])
        if isinstance(layer, nn.Linear):
            slopes.append(layer.weight.detach().T)
        else:
            run = pairs[-1][0] - pairs[-1][1]
            point = pairs[-1][0].clone().requires_grad_()
            (derivative,) = torch.autograd.grad(layer(point).sum(), point)
            slopes.append(torch.diag(torch.where(run == 0, derivative, (one - two) / torch.where(run == 0, 1, run))))
        pairs.append((one, two))
    total = pairs[-1][0][target] - pairs[-1][1][target]
    result = {}
    for walk in itertools.product(*(range(len(one)) for one, _ in pairs[:-1]), [target]):
        mass = (x[walk[0]] - reference[walk[0]]) / total
        for matrix, (lower, upper) in zip(slopes, itertools.pairwise(walk), strict=True):
            mass = mass * matrix[lower, upper]
        result[walk] = float(mass)
    return result


@pytest.mark.medium
def test_events_are_sums_over_enumerated_walks_even_through_neurons_without_a_difference():
    net, x, x0 = mlp(), X.clone(), X0.clone()
    with torch.no_grad():
        net[0].weight[2, 2:] = 0
    x0[0, :2] = x[0, :2]  # neuron 2 of the first layer has no difference, and passes on walks that cancel
    mu = RelevanceMeasure(net, x, 1, reference=x0)
    known = [walks(net, *pair, 1) for pair in zip(x, x0, strict=True)]
    names = ["input", "0", "1", "2", "3", "4"]
    events = {
        at("1")[2] & at("input")[0]: lambda w: w[2] == 2 and w[0] == 0,
        at("0")[1] & at("3")[3]: lambda w: w[1] == 1 and w[4] == 3,
        at("1")[0] | at("input")[3]: lambda w: w[2] == 0 or w[0] == 3,
        ~(at("2")[0] & at("1")[3]): lambda w: not (w[3] == 0 and w[2] == 3),
    }
    for event, holds in events.items():
        masses = [sum(m for w, m in one.items() if holds(w)) for one in known]
        expected = torch.tensor(masses, dtype=torch.float64)
        torch.testing.assert_close(mu(event), expected, **TIGHT)
    for level, name in enumerate(names):
        expected = torch.zeros(3, len(mu.marginal(name)[0])).double()
        for sample, one in enumerate(known):
            for walk, mass in one.items():
                expected[sample, walk[level]] += mass
        torch.testing.assert_close(mu.marginal(name), expected, **TIGHT)
    variation = torch.tensor([sum(map(abs, one.values())) for one in known], dtype=torch.float64)
    torch.testing.assert_close(mu.walk_variation(), variation, **TIGHT)
    joint = torch.zeros(3, 4, 5).double()
    for sample, one in enumerate(known):
        for walk, mass in one.items():
            joint[sample, walk[4], walk[1]] += mass
    torch.testing.assert_close(mu.joint("3", "0", "neuron"), joint, **TIGHT)


def test_walks_through_a_neuron_without_a_difference_cancel_but_exist():
    net = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
    other = nn.Linear(2, 1).double()

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = net, other

        def forward(self, x):
            return self.net(x) + self.other(x)

    x, x0 = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    model = Sum()
    mu = RelevanceMeasure(model, x, reference=x0)
    z = net[0](x).detach()
    derivative = 1 - torch.tanh(z) ** 2
    expected = (derivative * net[2].weight / (model(x) - model(x0)).detach())[:, 0].detach()
    torch.testing.assert_close(mu(at("net.0") & at("input")[0]), expected, **TIGHT)
    torch.testing.assert_close(mu(at("net.0") & at("input")[1]), -expected, **TIGHT)
    torch.testing.assert_close(mu(at("net.0")), torch.zeros(1).double(), **TIGHT)
    with pytest.raises(NullEventError):
        mu(at("input"), given=at("net.0"))


@pytest.mark.parametrize("build", [mlp, convolutional])
def test_every_cut_sums_to_one_and_nothing_is_absorbed(build):
    net = build()
    x = X if build is mlp else draw(3, 2, 8, 8, seed=3)
    x0 = X0 if build is mlp else draw(3, 2, 8, 8, seed=4)
    mu = RelevanceMeasure(net, x, 2, reference=x0)
    torch.testing.assert_close(mu.output, (net(x) - net(x0))[:, 2].detach(), **TIGHT)
    torch.testing.assert_close(mu.outputs, net(x).detach(), **TIGHT)
    for layer in mu.layers:
        torch.testing.assert_close(mu.marginal(layer).flatten(1).sum(1), torch.ones(3).double(), **TIGHT)
        torch.testing.assert_close(mu.sink(layer), torch.zeros(3).double(), **TIGHT)
    torch.testing.assert_close(mu(ABSORBED), torch.zeros(3).double(), **TIGHT)


def test_the_marginal_at_the_input_is_rescale_of_deeplift():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = DeepLift(mlp()).attribute(X, X0, target=1)
    mu = RelevanceMeasure(mlp(), X, 1, reference=X0)
    torch.testing.assert_close(mu.marginal("input") * mu.output[:, None], expected, **TIGHT)


def test_a_transformer_block_has_the_multipliers_of_its_definition():
    torch.manual_seed(0)
    q, k, v, out, up, down = (nn.Linear(6, 6).double() for _ in range(6))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([q, k, v, out, up, down])

        def forward(self, x):
            h = nn.functional.layer_norm(x, (6,))
            x = x + out(nn.functional.scaled_dot_product_attention(q(h), k(h), v(h)))
            h = nn.functional.layer_norm(x, (6,))
            return (x + nn.functional.silu(up(h)) * down(h)).sum((1, 2)).unsqueeze(1)

    def pairs(x):
        h = layer_norm(x)
        weights = softmax(torch.matmul(torch.zeros_like(q(h)), k(h).mT) + scores(q(h), k(h)))
        x = x + out(product(weights, v(h)))
        h = layer_norm(x)
        return (x + times(slope(up(h), nn.functional.silu), down(h))).sum((1, 2))

    from tests.differences import Product, Times

    def product(a, b):
        return Product.apply(a, b)

    def times(a, b):
        return Times.apply(a, b)

    def scores(a, b):
        return Product.apply(a, b.mT) / 6**0.5

    x, x0 = draw(2, 4, 6, seed=7), draw(2, 4, 6, seed=8)
    mu = RelevanceMeasure(Block(), x, reference=x0)
    marginal = mu.marginal("input")
    for number in range(2):
        m, total = multipliers(pairs, x[number], x0[number])
        torch.testing.assert_close(mu.output[number], total, **TIGHT)
        torch.testing.assert_close(marginal[number], m * (x - x0)[number] / total, **TIGHT)


def test_a_start_vector_may_sum_to_zero():
    net = mlp()
    start = torch.tensor([1.0, -1.0, 0.0]).double()
    mu = RelevanceMeasure(net, X, start=start, reference=X0)
    each = [RelevanceMeasure(net, X, target, reference=X0) for target in (0, 1)]
    torch.testing.assert_close(mu.output, each[0].output - each[1].output, **TIGHT)
    parts = [one.marginal("1") * one.output[:, None] for one in each]
    against = RelevanceMeasure(net, X, 0, against=1, reference=X0)
    torch.testing.assert_close(against.marginal("1"), mu.marginal("1"), **TIGHT)
    rest = RelevanceMeasure(net, X, 0, against="rest", reference=[X0, X0 + 1])
    torch.testing.assert_close(rest.marginal("input").sum(1), torch.ones(3).double(), **TIGHT)
    torch.testing.assert_close(mu.marginal("1") * mu.output[:, None], parts[0] - parts[1], **TIGHT)


def test_tangents_are_gradient_times_difference_and_the_sink_is_what_the_first_order_misses():
    net = convolutional()
    x, x0 = draw(3, 2, 8, 8, seed=3), draw(3, 2, 8, 8, seed=4)
    mu = RelevanceMeasure(net, x, 2, reference=x0, slopes="tangent")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[:, 2].sum(), leaf)
    relevance = mu.marginal("input") * mu.output.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(relevance, gradient * (x - x0), **TIGHT)
    missed = mu.output - relevance.flatten(1).sum(1)
    torch.testing.assert_close(mu.sink("input") * mu.output, missed, **TIGHT)


def test_rules_on_differences():
    net, x, x0 = convolutional(), draw(3, 2, 8, 8, seed=3), draw(3, 2, 8, 8, seed=4)
    secant = RelevanceMeasure(net, x, 2, reference=x0)
    epsilon = Epsilon(1e-13)
    rules = LayerMapComposite([(nn.Linear, epsilon), (nn.Conv2d, epsilon), (nn.AdaptiveAvgPool2d, epsilon)])
    mu = RelevanceMeasure(net, x, 2, reference=x0, composite=rules)
    torch.testing.assert_close(mu.marginal("input"), secant.marginal("input"), rtol=0, atol=1e-9)
    for composite in (NRMAbsolute(), EpsilonPlusFlat(), None):
        mu = RelevanceMeasure(net, x, 2, reference=x0, composite=composite)
        sums = mu.marginal("input").flatten(1).sum(1) + mu.sink("input")
        torch.testing.assert_close(sums, torch.ones(3).double(), **TIGHT)
    calm = RelevanceMeasure(net, x, 2, reference=x0, composite=NRMAbsolute())
    assert bool((calm.walk_variation() < 2).all() and (secant.walk_variation() > 4).all())


def test_one_linear_layer_under_a_rule_has_the_rule_of_the_difference_without_a_bias():
    layer = nn.Linear(4, 3).double()
    mu = RelevanceMeasure(layer, X, 1, reference=X0, composite=NRMAbsolute())
    parts = ((X - X0) * layer.weight[1]).abs().detach()
    torch.testing.assert_close(mu.marginal("input"), parts / parts.sum(1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("composite", [NRMDefault, NRMAbsolute])
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: nn.functional.max_pool1d(x.unsqueeze(1), 2).squeeze(1),
        lambda x: x[:, ::2] * x[:, 1::2],
        lambda x: torch.maximum(x[:, ::2], x[:, 1::2]),
        lambda x: torch.einsum("na,na->na", x[:, ::2], x[:, 1::2]),
    ],
)
def test_relevance_that_a_rule_leaves_where_there_is_no_difference_is_absorbed(operation, composite):
    linear = nn.Linear(3, 1).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 1.0, -1.0]]))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(operation(x))

    x, x0 = torch.tensor([[1.0, 3, 5, 1, 4, 1]]).double(), torch.tensor([[3.0, 1, 2, 1, 1.1, 1]]).double()
    mu = RelevanceMeasure(Net().eval(), x, reference=x0, composite=composite())
    (left,) = mu.marginal(at("linear", side="input"))[:, 0].abs()
    assert 1e-9 < left < 1e-5, "the floor of the rule"
    torch.testing.assert_close(mu.sink("input").abs(), left[None], rtol=1e-6, atol=0)
    torch.testing.assert_close(mu.marginal("input").sum(1) + mu.sink("input"), torch.ones(1).double(), **TIGHT)
    torch.testing.assert_close(mu.marginal("input")[0, :2], torch.zeros(2).double(), **TIGHT)
    assert float(mu.variation("input")) < 6
    assert float(mu.walk_variation()) < 6


def test_forms_of_a_reference():
    net = mlp()
    whole = RelevanceMeasure(net, X, 1, reference=X0[:1].expand(3, 4))
    for reference in (X0[0], X0[:1]):
        torch.testing.assert_close(
            RelevanceMeasure(net, X, 1, reference=reference).marginal("1"), whole.marginal("1"), **TIGHT
        )

    class Two(nn.Module):
        def forward(self, a, b, mask=None):
            return net(a * b if mask is None else (a * b).masked_fill(mask, 0.0))

    pair = RelevanceMeasure(Two(), (X, X.cos()), 1, reference=(X0, X0.cos()))
    keyed = RelevanceMeasure(Two(), {"a": X, "b": X.cos()}, 1, reference={"b": X0.cos(), "a": X0})
    torch.testing.assert_close(pair.marginal(at("input", item=0)), keyed.marginal(at("input", item="a")), **TIGHT)
    mask = torch.tensor([[True, False, False, False]]).expand(3, 4)
    masked = {"a": X, "b": X, "mask": mask}
    expected = RelevanceMeasure(Two(), masked, 1, reference={"b": X0, "a": X0})
    for same in (mask, mask.clone(), mask[0], mask[:1]):
        mu = RelevanceMeasure(Two(), masked, 1, reference={"b": X0, "a": X0, "mask": same})
        assert torch.equal(mu.marginal("tanh"), expected.marginal("tanh"))
    for other in (~mask, mask[:, :3], mask.long(), None):
        with pytest.raises(DifferenceError, match="a different value for 'mask' than the inputs"):
            RelevanceMeasure(Two(), masked, 1, reference={"b": X0, "a": X0, "mask": other})
    for given, message in (({"a": X0}, "no value for the input 'b'"), ({"a": X0, "b": X0, "c": X0}, "value for 'c'")):
        with pytest.raises(DifferenceError, match=message):
            RelevanceMeasure(Two(), {"a": X, "b": X}, 1, reference=given)
    with pytest.raises(DifferenceError, match="more entries than the 2 inputs"):
        RelevanceMeasure(Two(), (X, X), 1, reference=(X0, X0, mask))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(9, 5, padding_idx=0).double(), nn.Linear(5, 2).double()

    def forward(self, ids):
        weights = (ids != 0).double()
        h = torch.tanh(self.embedding(ids)) * weights.unsqueeze(-1)
        return self.out(h.sum(1) / weights.sum(1, keepdim=True))


def test_ids_have_a_reference_of_ids():
    net, ids = Embedded(), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    other = torch.tensor([[1, 8, 3, 0], [4, 5, 6, 1]])
    mu = RelevanceMeasure(net, ids, 1, reference=other)
    rows = mu.marginal("embedding").sum(-1)
    torch.testing.assert_close(rows.sum(1), torch.ones(2).double(), **TIGHT)
    torch.testing.assert_close(rows[ids == other], torch.zeros(6).double(), **TIGHT)
    with pytest.raises(DifferenceError, match=r"'mul' in .* depends on values .* numbers of shape"):
        RelevanceMeasure(net, ids, 1, reference=torch.tensor([[1, 0, 3, 0], [4, 5, 6, 1]]))
    with pytest.raises(DifferenceError, match="the reference of ids must be ids"):
        RelevanceMeasure(net, ids, 1, reference=other.double())
    with pytest.raises(IndexError) as caught:
        RelevanceMeasure(net, ids, 1, reference=ids + 9)
    assert "at the reference" in caught.value.__notes__[0]
    assert torch.equal(
        LayerNRM(net, "embedding").attribute(ids[1:], 1, baselines=8.0),
        LayerNRM(net, "embedding").attribute(ids[1:], 1, baselines=torch.full_like(ids[1:], 8)),
    )
    for number in (0.5, float("nan")):
        with pytest.raises(InputError, match=rf"baselines= is {number}.* give an id"):
            LayerNRM(net, "embedding").attribute(ids, 1, baselines=number)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (X, "equals the input"),
        (torch.cat([X[:1], X0[1:]]), "sample 0"),
        (X0[:2], "has shape"),
        (X0.float(), "dtype"),
        (X0 * float("nan"), "nan or inf"),
        (0.0, "expected a tensor"),
        (X0.long(), "the reference of ids must be ids"),
        (X0.to_sparse(), "is sparse"),
        (X0.to("meta"), "is on device meta"),
        (torch.nested.nested_tensor([X0[0], X0[1]], layout=torch.jagged), "is nested"),
        ((), "has no value for the input. "),
        ((X0, X0), "more entries than the 1 inputs.* is a list"),
        ({"x": X0}, "a value for 'x', which is not among the inputs"),
    ],
)
def test_bad_references_are_errors_and_leave_the_model_as_it_is(reference, message):
    net = mlp()
    with pytest.raises(DifferenceError, match=message):
        RelevanceMeasure(net, X, 1, reference=reference)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_outputs_without_a_difference_are_errors():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double()
    with torch.no_grad():
        net[0].bias.fill_(-100)
    with pytest.raises(TargetError, match="is the same for the input"):
        RelevanceMeasure(net, X, 1, reference=X0)
    with pytest.raises(TargetError, match="is the same for the input"):
        RelevanceMeasure(mlp(), X, start=torch.zeros(3), reference=X0)
    exponential = Branches(lambda h: (1000 * h).exp())
    with pytest.raises(InputError, match="output at the reference has nan or inf"):
        RelevanceMeasure(exponential.eval(), 0 * X, reference=X0)


def test_a_difference_of_few_digits_is_a_warning_that_says_how_many():
    net, single = mlp(), mlp().float()
    x, step = X.float(), (X0 - X).float()
    for size, is_precise in ((1.0, True), (0.1, True), (2e-4, False), (1e-4, False)):
        x0 = x + size * step
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mu = RelevanceMeasure(single, x, 1, reference=x0)
        exact = RelevanceMeasure(net, x.double(), 1, reference=x0.double())
        error = ((mu.output - exact.output) / exact.output).abs().max()
        assert (not caught) == is_precise
        if caught:
            share = float(re.search(r"rounding error of (\S+) in float32", str(caught[0].message))[1])
            assert caught[0].category is PrecisionWarning
            assert share / 100 < error < 10 * share
        else:
            assert error < 1e-3
    with pytest.raises(TargetError, match="is the same"):
        RelevanceMeasure(single, x, 1, reference=x + 1e-6 * step)


@pytest.mark.recorded
@pytest.mark.parametrize(
    "explain",
    [
        lambda net, x, x0: RelevanceMeasure(net, x, 1, reference=x0),
        lambda net, x, x0: Plan(net, x, reference=x0)(x, 1, reference=x0),
        lambda net, x, x0: NRM(net).attribute(x, target=1, baselines=x0),
        lambda net, x, x0: LayerNRM(net, net[0]).attribute(x, target=1, baselines=x0),
    ],
)
def test_warnings_name_the_line_of_the_user(explain):
    x = X.float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explain(mlp().float(), x, x + 1e-4 * (X0 - X).float())
    assert caught
    assert {(one.filename, one.category) for one in caught} == {(__file__, PrecisionWarning)}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"slopes": "chord"}, ValueError),
        ({"slopes": "tangent", "reference": None}, ValueError),
        ({"residual": "sink"}, TypeError),
        ({"gain_limit": 3}, TypeError),
    ],
)
def test_settings_that_do_not_fit_a_reference_are_errors(settings, error):
    with pytest.raises(error):
        RelevanceMeasure(mlp(), X, 1, **{"reference": X0, **settings})


class Branches(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.inner, self.body = nn.Linear(4, 4).double(), body

    def forward(self, x):
        return self.body(self.inner(x)).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda h: h.relu() if float(h.detach().sum()) > 0 else h.tanh(), "different operations"),
        (lambda h: h.relu() if float(h.detach().sum()) > 0 else h, "different operations"),
        (lambda h: h * (h > 0), "a mask"),
        (lambda h: torch.where(h > 0, h, 0.0), "a mask"),
        (lambda h: h[:, h.detach()[0].argsort()[:2]], "indices"),
        (lambda h: h.sort(1)[0] * torch.arange(4), "indices"),
        (lambda h: h.topk(2, 1)[0], "indices"),
        (lambda h: h[:, : int(h.detach().sum() > 0) + 1], "1 and 2|2 and 1"),
        (lambda h: h * h.detach().abs().amax(), "numbers"),
    ],
)
def test_other_paths_indices_and_constants_are_errors_that_say_where(body, message):
    x, x0 = X, -X
    with pytest.raises(DifferenceError, match=message) as caught:
        RelevanceMeasure(Branches(body).eval(), x, reference=x0)
    assert "in 'the model'" in str(caught.value) or "shape" in str(caught.value)


def test_samples_that_mix_have_a_measure_as_one_sample():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()

        def forward(self, x):
            A = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.4, 0.3], [0.0, 0.5, 0.5]]).double()
            return A @ self.b(torch.relu(A @ self.a(x)))

    net = Graph()
    mu = RelevanceMeasure(net, X, (1, 0), reference=X0, batched=False)
    torch.testing.assert_close(mu.output, (net(X) - net(X0))[1, :1].detach(), **TIGHT)
    torch.testing.assert_close(mu.marginal("input").sum(), torch.ones(()).double(), **TIGHT)
    torch.testing.assert_close(mu.marginal("a").sum(), torch.ones(()).double(), **TIGHT)


@pytest.mark.medium
@pytest.mark.parametrize("kind", slow_but([nn.LSTM, nn.GRU, nn.RNN], nn.LSTM))
def test_recurrent_nets_with_time_first_have_rows_of_samples(kind):
    torch.manual_seed(0)
    inner, out = kind(4, 5).double(), nn.Linear(5, 2).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = inner, out

        def forward(self, x):
            return self.out(self.inner(x.transpose(0, 1))[0][-1])

    x, x0 = draw(3, 6, 4, seed=1), draw(3, 6, 4, seed=2)
    mu = RelevanceMeasure(Net(), x, 1, reference=x0)
    for number in range(3):
        one = RelevanceMeasure(Net(), x[number : number + 1], 1, reference=x0[number])
        torch.testing.assert_close(mu.marginal("input")[number], one.marginal("input")[0], **TIGHT)
        torch.testing.assert_close(one.marginal("input").sum(), torch.ones(()).double(), **TIGHT)
    assert mu.marginal("inner").shape[:1] == (3,)


def test_layers_of_captum_take_baselines():
    net = mlp()
    relevance, delta, sink = LayerNRM(net, "1").attribute(
        X, 1, baselines=X0, return_convergence_delta=True, return_sink=True
    )
    expected = RelevanceMeasure(net, X, 1, reference=X0)
    torch.testing.assert_close(relevance, expected.marginal("1") * expected.output[:, None], **TIGHT)
    torch.testing.assert_close(delta, torch.zeros(3).double(), **TIGHT)
    torch.testing.assert_close(sink, torch.zeros(3).double(), **TIGHT)


@pytest.mark.medium
def test_other_classes_of_captum_take_baselines():
    net = convolutional()
    x, x0 = draw(3, 2, 8, 8, seed=3), draw(3, 2, 8, 8, seed=4)
    expected = RelevanceMeasure(net, x, 1, reference=x0)
    relevance, delta = NRM(net).attribute(x, 1, baselines=x0, return_convergence_delta=True)
    torch.testing.assert_close(relevance.flatten(1).sum(1), (net(x) - net(x0))[:, 1].detach(), **TIGHT)
    torch.testing.assert_close(delta, torch.zeros(3).double(), **TIGHT)
    torch.testing.assert_close(
        NRM(net).attribute((x,), 1, baselines=(0.5,))[0], NRM(net).attribute(x, 1, baselines=x * 0 + 0.5), **TIGHT
    )
    joint = JointNRM(net, "4", "0").attribute(x, 1, baselines=x0, unit="measure")
    torch.testing.assert_close(joint, expected.joint("4", "0"), **TIGHT)
    change = (net[:5](x) - net[:5](x0)).detach()
    for selector, total in ((2, 0, 1), change[:, 2, 0, 1]), ((slice(1, 3), 0, 0), change[:, 1:3, 0, 0].sum(1)):
        neuron = NeuronNRM(net, net[4]).attribute(x, selector, baselines=x0)
        torch.testing.assert_close(neuron.flatten(1).sum(1), total, **TIGHT)
    ruled = NRM(net, NRMAbsolute()).attribute(x, 1, baselines=x0)
    rules = RelevanceMeasure(net, x, 1, reference=x0, composite=NRMAbsolute())
    torch.testing.assert_close(ruled, rules.marginal("input") * rules.output.reshape(3, 1, 1, 1), **TIGHT)
    with pytest.raises(InputError, match="2 entries for 1 inputs"):
        NRM(net).attribute(x, 1, baselines=(x0, x0))
    for baselines in ("blur", lambda x: x, x0.numpy(), {"x": x0}, [[x0]]):
        with pytest.raises(InputError, match=r"baselines= is .* expected a tensor or a number"):
            NRM(net).attribute(x, 1, baselines=baselines)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, above):
        return 3 * ctx.saved_tensors[0] ** 2 * above


class Cubed(nn.Module):
    def forward(self, x):
        return Cube.apply(x)


def test_a_function_with_its_own_backward_takes_part_in_a_module_of_its_own():
    net = nn.Sequential(nn.Linear(4, 4), Cubed(), nn.Linear(4, 1)).double()
    mu = RelevanceMeasure(net, X, reference=X0)
    slopes = [layer.weight.detach() for layer in (net[0], net[2])]
    z, z0 = net[0](X).detach(), net[0](X0).detach()
    multiplier = slopes[1] * (z**2 + z * z0 + z0**2)
    expected = (X - X0) * (multiplier @ slopes[0]) / mu.output[:, None]
    torch.testing.assert_close(mu.marginal("input"), expected, **TIGHT)
    with pytest.raises(UnsupportedOperationError, match="'Cube'"):
        RelevanceMeasure(Branches(lambda h: Cube.apply(h)), X, reference=X0).marginal("input")


def test_several_references_are_a_mixture():
    net, references = convolutional(), [draw(3, 2, 8, 8, seed=seed) for seed in (4, 5, 6)]
    x, targets = draw(3, 2, 8, 8, seed=3), torch.tensor([0, 1, 2])
    mu = RelevanceMeasure(net, x, targets, reference=references)
    each = [RelevanceMeasure(net, x, targets, reference=reference) for reference in references]
    weights = [one.output / sum(two.output for two in each) for one in each]

    def mixed(query):
        parts = [query(one) for one in each]
        return sum(part * w.reshape(-1, *(1,) * (part.ndim - 1)) for part, w in zip(parts, weights, strict=True))

    torch.testing.assert_close(mu.output, sum(one.output for one in each) / 3, **TIGHT)
    assert (mu.batch, mu.shape("0"), mu.outputs.shape) == (3, (3, 4, 8, 8), (3, 3))
    queries = [
        lambda m: m.marginal("input"),
        lambda m: m.marginal("0", "channel"),
        lambda m: m.marginal("input", joint=at("4")[2]),
        lambda m: m(at("4")[1] & at("input")[:, :4]),
        lambda m: m.joint("4", "0"),
        lambda m: m.sink("input"),
        lambda m: m.bypass("0"),
    ]
    for query in queries:
        torch.testing.assert_close(query(mu), mixed(query), **TIGHT)
    event, condition = at("input")[:, :4], at("4")[1]
    expected = mixed(lambda m: m(event & condition)) / mixed(lambda m: m(condition))
    torch.testing.assert_close(mu(event, given=condition, min_ratio=0), expected, rtol=1e-9, atol=0)
    maps = mu.marginal("input", given=condition, min_ratio=0)
    torch.testing.assert_close(maps.flatten(1).sum(1), torch.ones(3).double(), rtol=0, atol=1e-10)
    with pytest.raises(DifferenceError, match="several references"):
        mu.conditional(event, "4")
    for reference, settings in (([], {}), ([x[0]], {"batched": False})):
        with pytest.raises(DifferenceError, match=r"empty mixture|require samples"):
            RelevanceMeasure(net, x, 0, reference=reference, **settings)


def test_a_mixture_of_references_rejects_constants_for_positions_in_the_batch():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x):
            h = self.a(x)
            index = torch.tensor([[0, 1], [2, 3], [4, 5]])  # one row for each of three samples
            return self.b(h.scatter_add(1, index, torch.tanh(h[:, 2:4])))

    net, x = Positions().eval(), torch.randn(3, 4, dtype=torch.float64)
    assert RelevanceMeasure(net, x, 1, reference=0.3 * x).marginal("input").shape == (3, 4)
    with pytest.raises(FoldingError, match=r"copies of each sample.*sample.*additional_forward_args"):
        RelevanceMeasure(net, x, 1, reference=[0.3 * x, 0 * x])


def test_a_mixture_repeats_the_further_arguments_of_samples():
    net = mlp()

    class Masked(nn.Module):
        def forward(self, x, mask, factor):
            return net(x * mask) * factor

    mask, factor = draw(3, 4, seed=9), torch.tensor(2.0).double()
    mu = RelevanceMeasure(Masked(), X, 1, reference=[X0, X0 + 1], additional_forward_args=(mask, factor))
    expected = 2 * net(X * mask) - net(X0 * mask) - net((X0 + 1) * mask)
    torch.testing.assert_close(mu.output, expected[:, 1].detach(), **TIGHT)
    torch.testing.assert_close(mu.marginal("input").sum(1), torch.ones(3).double(), rtol=0, atol=1e-11)


FAMILIES = """
alexnet convnext_tiny densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v3_small regnet_y_400mf resnet18
shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11_bn vit_b_16
""".split()
"""One small model of each family of torchvision."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_sums_to_one(name):
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net = torchvision.models.get_model(name, weights=None, **options).eval().double()
    for parameter in net.parameters():
        if not bool(parameter.any()) and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)  # such as the last layer of a vision transformer
    size = 299 if name == "inception_v3" else 224 if name.startswith(("vit", "maxvit")) else 96
    x = torch.randn(1, 3, getattr(net, "image_size", size), getattr(net, "image_size", size)).double()
    x0 = x.clone()
    x0[:, :, size // 2 :] = torch.randn_like(x0[:, :, size // 2 :]) / 4
    mu = RelevanceMeasure(net, x, 1, reference=x0)
    relevance, size = mu.marginal("input"), float(mu.variation("input"))
    torch.testing.assert_close(mu.output, (net(x) - net(x0))[:, 1].detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(relevance.flatten(1).sum(1), torch.ones(1).double(), rtol=0, atol=1e-12 * max(100, size))
    assert float(mu(ABSORBED).abs()) < 1e-10
    assert not bool((relevance[x == x0].abs() > 1e-60).any())
