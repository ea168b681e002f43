"""Normalized as a Zennit composite, alone and with others, and its settings.

Covers: nrm_plugin.attribution.attributor, nrm_plugin.functional.canonizer, nrm_plugin.functional.interception_mode,
nrm_plugin.kernels.torch_function_modes, nrm_plugin.kernels.step.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from zennit.attribution import Gradient, IntegratedGradients, SmoothGrad
from zennit.composites import (
    COMPOSITES,
    EpsilonPlus,
    EpsilonPlusFlat,
    LayerMapComposite,
    MixedComposite,
    NameMapComposite,
)
from zennit.core import BasicHook, Composite, Hook, Stabilizer
from zennit.rules import Epsilon, Flat, Norm, Pass, ZPlus

from nrm_plugin import Absolute, Normalized, NRMAbsolute, NRMAttributor, NRMDefault, RelevanceMeasure, at
from nrm_plugin.composites import register
from nrm_plugin.errors import ModelStateError, NRMError, TargetError
from tests.conftest import NORMALIZED, slow_but, state_of, untouched

pytestmark = pytest.mark.zennit

SETTINGS = [
    {},
    {"residual": "sink"},
    {"gain_limit": 1.0},
    {"gain_limit": math.inf},
    {"sums": "signed"},
]


class Net(nn.Module):
    """A skip, in-place ReLUs, a reused layer, functional layers, an added parameter and one that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.mid = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)
        self.pool, self.lin, self.head = nn.AvgPool2d(2), nn.Linear(12, 12), nn.Linear(12, 5)
        self.shift, self.scale = nn.Parameter(torch.randn(12)), nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.pool(self.relu(x + self.mid(x))).flatten(1)
        x = self.relu(self.lin(self.relu(self.lin(x))))
        x = functional.relu(functional.linear(x, self.lin.weight, self.lin.bias)) + self.shift
        return self.head(x * self.scale)


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def start():
    return torch.tensor([[0.5, 0, -0.25, 1, 0], [0, 2.0, 0, 0, 1]], dtype=torch.float64)


def relevance(model, x, rules, start):
    leaf = x.clone().requires_grad_()
    with rules.context(model) as modified:
        return torch.autograd.grad(modified(leaf), leaf, start)[0]


def by_measure(model, x, rules, start):
    """Measure times start: the gradient expected in the context."""
    total = start.sum(1).reshape(-1, 1, 1, 1)
    return RelevanceMeasure(model, x, start=start, composite=rules).marginal("input") * total


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# -- in its context -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("plain", [EpsilonPlusFlat, NRMDefault, NRMAbsolute])
def test_the_gradient_in_its_context_is_the_measure_times_the_start(net, x, start, plain, settings):
    rules = Normalized(plain(), **settings)
    expected = by_measure(net, x, rules, start)
    with untouched(net, x):
        actual = relevance(net, x, rules, start)
    same(actual, expected)
    assert expected.abs().max() > 1e-3


def test_frozen_weights_change_no_number(net, x, start):
    """Weights that require gradients carry no relevance, in functions as little as in modules."""
    rules = Normalized(NRMDefault())
    expected = relevance(net, x, rules, start)
    net.shift.requires_grad_(False)
    net.lin.weight.requires_grad_(False)
    same(relevance(net, x, rules, start), expected)
    assert not net.shift.requires_grad
    assert net.scale.requires_grad


def test_the_relevance_of_a_layer_can_be_stored_as_in_zennits_how_to(net, x, start):
    rules = Normalized(EpsilonPlusFlat())
    expected = (
        RelevanceMeasure(net, x, start=start, composite=rules).marginal("pool") * start.sum(1)[:, None, None, None]
    )
    outputs = []
    with rules.context(net):
        handle = net.pool.register_forward_hook(lambda module, args, output: outputs.append(output))
        output = net(x.clone().requires_grad_())
        outputs[0].retain_grad()
        output.backward(start)
        handle.remove()
    same(outputs[0].grad, expected)


@pytest.mark.medium
def test_zennits_attributors_take_it(net, x, start):
    rules = Normalized(EpsilonPlusFlat())
    with untouched(net, x):
        output, actual = Gradient(net, rules)(x, start)
        same(actual, by_measure(net, x, rules, start))
        same(output, net(x))
        _, times_output = Gradient(net, rules)(x, lambda output: output * (torch.arange(5) == 2))
        same(times_output, by_measure(net, x, rules, output.detach() * (torch.arange(5) == 2)))
        with IntegratedGradients(net, rules, n_iter=4) as attributor:
            _, integrated = attributor(x, start)
    path = [by_measure(net, x * step / 4, rules, start) for step in (1, 2, 3, 4)]
    same(integrated, x * torch.stack(path).mean(0))


def test_smoothgrad_is_the_mean_over_noisy_inputs(net, x, start):
    rules = Normalized(EpsilonPlusFlat())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        _, actual = SmoothGrad(net, rules, noise_level=0.2, n_iter=3)(x, start)
        torch.manual_seed(3)
        std = 0.2 * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
        inputs = [x + torch.randn_like(x) * std, x + torch.randn_like(x) * std, x]
    same(actual, torch.stack([by_measure(net, each, rules, start) for each in inputs]).mean(0))


def test_the_relevance_can_be_differentiated_again_through_functions(net, x, start):
    """It is linear in the start, so its derivative is a transposed pass."""
    rules = Normalized(EpsilonPlusFlat())
    leaf, start = x.clone().requires_grad_(), start.requires_grad_()
    with rules.context(net):
        output = net(leaf)
        (actual,) = torch.autograd.grad(output, leaf, start, create_graph=True)
        (slope,) = torch.autograd.grad(actual[:, :, 1:3].sum(), start)
    mu = RelevanceMeasure(net, x, start=start.detach(), composite=rules)
    same(slope, mu.conditional(at("input")[:, 1:3], "output"))


# -- next to others -----------------------------------------------------------------------------------------------


def test_rules_by_name_and_by_layer_nest_inside_it(net, x, start):
    named = NameMapComposite([(["conv"], Flat()), (["head"], ZPlus())])
    rules = Normalized(MixedComposite([named, EpsilonPlus()]), residual="sink")
    mu = RelevanceMeasure(net, x, start=start, composite=rules)
    same(relevance(net, x, rules, start), by_measure(net, x, rules, start))
    flat = LayerMapComposite([(nn.Conv2d, Flat())])
    other = Normalized(MixedComposite([NameMapComposite([(["head"], ZPlus())]), EpsilonPlus()]), residual="sink")
    differs = (mu.marginal("input") - RelevanceMeasure(net, x, start=start, composite=other).marginal("input")).abs()
    assert differs.max() > 1e-3
    unlike = Normalized(MixedComposite([named, flat, EpsilonPlus()]), residual="sink")
    assert (by_measure(net, x, unlike, start) - by_measure(net, x, rules, start)).abs().max() > 1e-3


def test_in_a_mixed_composite_earlier_rules_take_precedence(net, x, start):
    """A rule next to it is not normalized."""
    rules = Normalized(EpsilonPlus(), residual="sink")
    mixed = MixedComposite([NameMapComposite([(["head"], ZPlus())]), rules])
    inside = Normalized(MixedComposite([NameMapComposite([(["head"], ZPlus())]), EpsilonPlus()]), residual="sink")
    actual = relevance(copy.deepcopy(net), x, mixed, start)  # Zennit 1.0 replaces the parameters of its own rules
    torch.testing.assert_close(actual, by_measure(net, x, inside, start), rtol=1e-4, atol=1e-6)
    same(relevance(net, x, MixedComposite([rules]), start), by_measure(net, x, rules, start))


def test_two_of_them_cannot_be_registered_on_one_model(net, x, start):
    """The inner one would link outputs that the outer one has linked."""
    outer, inner = Normalized(EpsilonPlus()), Normalized(NRMAbsolute())
    expected = relevance(net, x, outer, start)
    before = state_of(net)
    with outer.context(net):
        with pytest.raises(ModelStateError, match=r"layer 'conv' .*Leave the context .* or call its remove\(\)"):
            inner.register(net)
        with pytest.raises(ModelStateError, match="hooks of a Zennit composite"), inner.context(net):
            pass
        leaf = x.clone().requires_grad_()
        same(torch.autograd.grad(net(leaf), leaf, start)[0], expected)
    assert state_of(net) == before
    same(relevance(net, x, inner, start), by_measure(net, x, inner, start))


def test_registering_it_again_is_registering_it_once(net, x, start):
    rules = Normalized(EpsilonPlus())
    expected = relevance(net, x, rules, start)
    with untouched(net, x):
        rules.register(net)
        with rules.context(net):
            leaf = x.clone().requires_grad_()
            same(torch.autograd.grad(net(leaf), leaf, start)[0], expected)
        assert not net.conv._forward_hooks
        rules.remove()
        rules.remove()


@pytest.mark.medium
@pytest.mark.parametrize("duplicate", slow_but([copy.copy, copy.deepcopy], copy.copy))
def test_a_copy_is_independent(net, x, start, duplicate):
    rules = Normalized(EpsilonPlusFlat(), residual="sink", gain_limit=3.0, uncovered="gradient", sums="signed")
    expected = relevance(net, x, rules, start)
    twin = duplicate(rules)
    assert twin.normalization == rules.normalization
    assert (twin.uncovered, twin.sums) == ("gradient", "signed")
    with untouched(net, x):
        same(relevance(net, x, twin, start), expected)
    original = weakref.ref(rules)
    del rules
    gc.collect()
    assert duplicate is copy.copy or original() is None
    same(relevance(net, x, twin, start), expected)
    same(by_measure(net, x, twin, start), expected)


def test_a_copy_of_the_model_made_in_the_context_raises(net, x, start):
    """Python copies hooks along with a module."""
    rules = Normalized(EpsilonPlusFlat())
    with rules.context(net):
        twin = copy.deepcopy(net)
    with pytest.raises(ModelStateError, match=r"this Net is a copy .*Copy the model outside of the context"):
        twin(x)
    with pytest.raises(ModelStateError, match=r"layer 'conv' .*hooks of a Zennit composite"):
        RelevanceMeasure(twin, x, start=start, composite=rules)
    same(relevance(net, x, rules, start), by_measure(copy.deepcopy(net), x, rules, start))


@pytest.mark.slow
def test_repeated_use_needs_no_more_memory(net, x, start):
    rules = Normalized(EpsilonPlusFlat(), uncovered="gradient")
    expected = relevance(net, x, rules, start)

    def size():
        gc.collect()
        return sum(issubclass(type(item), Hook) for item in gc.get_objects())

    before = size()
    for _ in range(3):
        same(relevance(net, x, rules, start), expected)
    assert size() <= before


# -- switched off, and after an error -----------------------------------------------------------------------------


def test_inactive_switches_off_functions_as_well(net, x, start):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf), leaf, start)
    rules = Normalized(EpsilonPlus())
    with untouched(net, x), rules.context(net):
        with rules.inactive():
            same(torch.autograd.grad(net(leaf), leaf, start)[0], gradient)
            net(leaf).sum().backward(inputs=[net.shift])
        net.shift.grad = None
        with pytest.raises(ArithmeticError), rules.inactive():
            raise ArithmeticError
        actual = torch.autograd.grad(net(leaf), leaf, start)[0]
    same(actual, by_measure(net, x, rules, start))
    assert not torch.allclose(actual, gradient)


class Breaking(nn.Module):
    def forward(self, x):
        raise ArithmeticError("broken on purpose")


def test_the_model_is_as_before_wherever_it_raised(net, x, start):
    rules = Normalized(EpsilonPlusFlat())
    expected = relevance(net, x, rules, start)
    relu = net.relu
    for place in ("relu", "head", "lin"):
        original = getattr(net, place)
        setattr(net, place, Breaking())
        with untouched(net, x), pytest.raises(ArithmeticError, match="on purpose"), rules.context(net):
            net(x.clone().requires_grad_())
        setattr(net, place, original)
        assert not torch.overrides._get_current_function_mode_stack()
    assert net.relu is relu
    with untouched(net, x), pytest.raises(KeyboardInterrupt), rules.context(net):
        raise KeyboardInterrupt
    same(relevance(net, x, rules, start), expected)


def test_the_model_is_as_before_after_a_keyboard_interrupt(net, x, start):
    """After it torch calls no hooks, not even those with ``always_call``."""
    rules = Normalized(EpsilonPlusFlat())
    original, net.head.forward = net.head.forward, interrupted
    with pytest.raises(KeyboardInterrupt), rules.context(net):
        net(x.clone().requires_grad_())
    with pytest.raises(KeyboardInterrupt):
        RelevanceMeasure(net, x, start=start, composite=rules)
    net.head.forward = original
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not torch.overrides._get_current_function_mode_stack()
    same(relevance(net, x, rules, start), by_measure(net, x, rules, start))


def interrupted(x):
    raise KeyboardInterrupt


# -- in Zennit's registry -----------------------------------------------------------------------------------------


def test_the_composites_of_this_package_are_known_to_zennit(net, x, start):
    assert COMPOSITES["nrm_default"] is NRMDefault
    assert COMPOSITES["nrm_absolute"] is NRMAbsolute
    for name in ("nrm_default", "nrm_absolute"):
        rules = COMPOSITES[name](layer_map=[(nn.Linear, Epsilon())], zero_params="bias", canonizers=[])
        assert isinstance(rules, Composite)
        same(relevance(net, x, Normalized(rules), start), by_measure(net, x, Normalized(rules), start))
        assert isinstance(rules.module_map({}, "head", net.head), Epsilon)


def test_a_name_that_is_taken_raises():
    known = dict(COMPOSITES)
    with pytest.raises(NRMError, match=r"a composite named 'epsilon_plus' \(zennit.composites.EpsilonPlus\)"):
        register("epsilon_plus")(NRMDefault)
    with pytest.raises(NRMError, match="nrm_default"):
        register("nrm_default")(NRMAbsolute)
    assert known == COMPOSITES
    try:
        assert register("nrm_of_a_test")(NRMAbsolute) is NRMAbsolute
        # The same class, from a module that is loaded again.
        assert register("nrm_of_a_test")(NRMAbsolute) is NRMAbsolute
        assert COMPOSITES["nrm_of_a_test"] is NRMAbsolute
    finally:
        COMPOSITES.pop("nrm_of_a_test", None)


# -- rules written by the user -----------------------------------------------------------------------------------


class Squares(BasicHook):
    """Shares in proportion to squared contributions: T_ij = (a_i w_ij)^2 / (1 + Σ_i (a_i w_ij)^2)."""

    def __init__(self) -> None:
        super().__init__(
            input_modifiers=[lambda source: source**2],
            param_modifiers=[lambda parameter, name: parameter**2 if name == "weight" else 0 * parameter],
            output_modifiers=[lambda output: output],
            gradient_mapper=lambda R, outputs: [R / (1 + outputs[0])],
            reducer=lambda inputs, gradients: inputs[0] * gradients[0],
        )


class Two(BasicHook):
    """Two branches with factors that a reducer adds: 0.75 of the positive shares minus -0.25 of the negative ones."""

    def __init__(self, weight: float = 0.75) -> None:
        self.weight = weight
        stabilize = Stabilizer.ensure(1e-9)
        super().__init__(
            input_modifiers=[lambda source: source.abs(), lambda source: source.abs()],
            param_modifiers=[lambda w, _: w.clamp(min=0), lambda w, _: w.clamp(max=0)],
            output_modifiers=[lambda output: output, lambda output: output],
            gradient_mapper=lambda R, outputs: [R / stabilize(output) for output in outputs],
            reducer=lambda i, g: weight * i[0] * g[0] + (1 - weight) * i[1] * g[1],
        )


class Half(Hook):
    """Half of the plain gradient times the input: a rule with a backward of its own, and an argument."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def forward(self, module, input, output):
        self.stored_tensors["input"] = input[0].detach()

    def backward(self, module, grad_input, grad_output):
        return (self.share * self.stored_tensors["input"] * grad_input[0],)

    def copy(self):
        return type(self)(self.share)


def squares(a, w, b):
    z = (a[:, None] * w.T) ** 2
    return z / (1 + z.sum(0))


def two(a, w, b):
    up = a.abs()[:, None] * w.T.clamp(min=0)
    down = a.abs()[:, None] * w.T.clamp(max=0)
    top, bottom = up.sum(0) + b.clamp(min=0), down.sum(0) + b.clamp(max=0)
    return 0.75 * up / (top + 1e-9) + 0.25 * down / (bottom - 1e-9)


def half(a, w, b):
    return 0.5 * a[:, None] * w.T


def gained(T, residual, limit):
    """``(kernel, share of the sink)``, column by column, as in the documentation."""
    kernel, absorbed = T.clone(), torch.zeros(T.shape[1], dtype=T.dtype)
    for j in range(T.shape[1]):
        c = float(T[:, j].sum())
        g = 1.0
        if residual == "redistribute" and c > 0:
            g = 1 / c if c >= 1 / limit else 1 + (limit - 1) * limit * c
        kernel[:, j] *= g
        absorbed[j] = 1 - g * c
    return kernel, absorbed


POLICIES = [("sink", 2.0), *(("redistribute", limit) for limit in (1.0, 2.0, 5.0, math.inf))]


@pytest.mark.parametrize(("residual", "limit"), POLICIES)
@pytest.mark.parametrize(("rule", "matrix"), [(Squares(), squares), (Two(), two), (Half(), half)])
def test_a_rule_of_the_user_is_its_matrix(rule, matrix, residual, limit):
    draw = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    x = torch.randn((3, 4), generator=draw, dtype=torch.float64)
    start = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]], dtype=torch.float64)
    rules = Normalized(LayerMapComposite([(nn.Linear, rule), (nn.ReLU, Pass())]), residual=residual, gain_limit=limit)
    with untouched(net, x):
        mu = RelevanceMeasure(net, x, start=start, composite=rules)
        marginals, sinks = mu.marginal(["input", "1"]), mu.sinks()
    leaf = x.clone().requires_grad_()
    with rules.context(net):
        (gradient,) = torch.autograd.grad(net(leaf), leaf, start)
    for sample in range(3):
        a = x[sample]
        h = net[:2](a).detach()
        upper, up = gained(matrix(h, net[2].weight.detach(), net[2].bias.detach()), residual, limit)
        lower, down = gained(matrix(a, net[0].weight.detach(), net[0].bias.detach()), residual, limit)
        middle = upper @ start[sample]
        same(marginals["1"][sample], middle)
        same(marginals["input"][sample], lower @ middle)
        same(gradient[sample], lower @ middle)
        nothing = torch.zeros(3, dtype=torch.float64)  # a step that absorbs nothing is not listed
        same(sinks.get("2", nothing)[sample], up @ start[sample])
        same(sinks.get("0", nothing)[sample], down @ middle)


def test_a_rule_on_a_container_sees_one_layer():
    draw = torch.Generator().manual_seed(6)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).double().eval()
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    x = torch.randn((1, 4), generator=draw, dtype=torch.float64)
    rules = Normalized(NameMapComposite([(["0"], Epsilon(epsilon=1e-13))]), residual="sink")
    with untouched(net, x):
        mu = RelevanceMeasure(net, x, 1, composite=rules)
        weight = (net[0][1].weight @ net[0][0].weight).detach()
        same(mu.marginal("input")[0], weight[1] * x[0] / net(x)[0, 1].detach())
    assert "0.0" not in mu.layers
    same(relevance(net, x, rules, torch.eye(2, dtype=torch.float64)[[1]]), mu.marginal("input"))


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one():
    """One linear layer with columns of every kind: c > 1, c = 1, 1/G < c < 1, 0 < c < 1/G, c < 0, dead."""
    layer = nn.Linear(2, 6).double().eval()
    layer.weight.data = torch.tensor([[2.0, 1], [1, 1], [1, 1], [1, 0.5], [-1, 0], [0, 0]], dtype=torch.float64)
    layer.bias.data = torch.tensor([-1.0, 0, 1, 8, 4, 1], dtype=torch.float64)
    return layer, torch.tensor([[1.0, 1]], dtype=torch.float64)


SUMS = [1.5, 1.0, 2 / 3, 1.5 / 9.5, -1 / 3, 0.0]


@pytest.mark.parametrize(("residual", "limit"), POLICIES)
def test_the_gain_of_a_column_is_that_of_the_documentation(one, residual, limit):
    layer, x = one
    rules = Normalized(LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-13))]), residual=residual, gain_limit=limit)
    net = nn.Sequential(layer)
    expected = {
        ("sink", 2.0): [1, 1, 1, 1, 1, 1],
        ("redistribute", 1.0): [2 / 3, 1, 1, 1, 1, 1],
        ("redistribute", 2.0): [2 / 3, 1, 1.5, 1 + 2 * SUMS[3], 1, 1],
        ("redistribute", 5.0): [2 / 3, 1, 1.5, 1 + 20 * SUMS[3], 1, 1],
        ("redistribute", math.inf): [2 / 3, 1, 1.5, 1 / SUMS[3], 1, 1],
    }[residual, limit]
    for column, (c, g) in enumerate(zip(SUMS, expected, strict=True)):
        mu = RelevanceMeasure(net, x, column, composite=rules)
        shares = layer.weight[column].detach() / float(net(x)[0, column].detach())
        torch.testing.assert_close(mu.marginal("input")[0], g * shares, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(float(mu.sink("input")), 1 - g * c, rtol=1e-9, atol=1e-9)
        same(mu.marginal("0")[0], torch.eye(6, dtype=torch.float64)[column])


def test_sums_share_by_magnitude_or_by_sign():
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x):
            return self.up(x) + self.down(x)

    net, x = Add().double().eval(), torch.ones((1, 1), dtype=torch.float64)
    net.up.weight.data.fill_(3.0)
    net.down.weight.data.fill_(-1.0)
    plain = LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-13))])
    for sums, shares in {"absolute": (0.75, 0.25), "ratio": (0.75, 0.25), "signed": (1.5, -0.5)}.items():
        mu = RelevanceMeasure(net, x, composite=Normalized(plain, sums=sums))
        assert [float(mu(at("up"))), float(mu(at("down")))] == pytest.approx(list(shares), abs=1e-9)


@pytest.mark.medium
def test_uncovered_layers_have_their_plain_gradient_on_demand(net, x, start):
    plain = LayerMapComposite([(nn.Conv2d, Epsilon()), (nn.ReLU, Pass()), (nn.AvgPool2d, Norm())])
    rules = Normalized(plain, residual="sink", uncovered="gradient")
    mu = RelevanceMeasure(net, x, start=start, composite=rules)
    expected = (start / start.sum(1, keepdim=True)) @ net.head.weight.detach()
    same(mu.marginal(at("head", side="input")), expected)
    same(relevance(net, x, rules, start), by_measure(net, x, rules, start))


def test_absolute_is_a_rule_of_zennit_as_well(x):
    """It can stand in any composite, also in one that is not Normalized."""
    draw = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double().eval()
    net[1].weight.data.copy_(torch.randn((2, 16), generator=draw))
    contributions = (x.flatten(1)[:, None] * net[1].weight.detach()).abs()[:, 0]
    actual = relevance(net, x, LayerMapComposite([(nn.Linear, Absolute())]), torch.eye(2, dtype=torch.float64)[[0, 0]])
    expected = contributions / contributions.sum(1, keepdim=True)
    torch.testing.assert_close(actual.flatten(1), expected, rtol=1e-4, atol=1e-5)


# -- an attributor that returns the measure -----------------------------------------------------------------------


def test_our_attributor_returns_the_output_and_the_measure(net, x, start):
    plain = EpsilonPlusFlat()
    with untouched(net, x):
        output, mu = NRMAttributor(net, plain)(x, start)
        with NRMAttributor(net, plain, start) as attributor:
            again, other = attributor(x)
    same(output, net(x))
    same(again, net(x))
    same(mu.marginal("pool"), RelevanceMeasure(net, x, start=start, composite=plain).marginal("pool"))
    same(other.marginal("input"), mu.marginal("input"))
    _, theirs = Gradient(net, Normalized(EpsilonPlusFlat()))(x, start)
    same(mu.marginal("input") * start.sum(1).reshape(-1, 1, 1, 1), theirs)


def test_our_attributor_starts_at_functions_of_the_output_and_by_default_at_the_output(net, x):
    def second(output):
        return output * (torch.arange(5) == 2)

    for call in (NRMAttributor(net, attr_output=second), lambda x: NRMAttributor(net)(x, second)):
        _, mu = call(x)
        same(mu.marginal("lin:1"), RelevanceMeasure(net, x, 2).marginal("lin:1"))
    output, mu = NRMAttributor(net, residual="sink")(x)
    same(mu.output, (output**2).sum(1) / output.sum(1))
    assert mu.composite.normalization.residual == "sink"


def test_our_attributor_raises_where_no_measure_exists(net, x):
    with untouched(net, x), pytest.raises(TargetError, match="sums to 0"):
        NRMAttributor(net)(x, torch.tensor([[1.0, -1, 0, 0, 0]]).double().expand(2, 5))
    with pytest.raises(TypeError, match="has its own settings"):
        NRMAttributor(net, Normalized(EpsilonPlus()), residual="sink")


# -- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NORMALIZED if name != "nrm_relative"])
def test_a_name_with_nrm_is_zennits_composite_normalized(net, x, start, name):
    arguments = {"low": -3.0, "high": 3.0} if "box" in name else {}
    plain = COMPOSITES[name.removeprefix("nrm_")]
    for settings in ({}, {"residual": "sink", "uncovered": "gradient"}):
        rules = COMPOSITES[name](**settings, **arguments)
        expected = by_measure(net, x, Normalized(plain(**arguments), **settings), start)
        same(relevance(net, x, rules, start), expected)
        same(relevance(net, x, copy.deepcopy(rules), start), expected)
        assert type(copy.copy(rules)) is COMPOSITES[name]
    assert {"nrm_epsilon_plus", "nrm_epsilon_plus_flat", "nrm_epsilon_gamma_box"} <= set(NORMALIZED)


def test_several_of_them_nest_next_to_each_other(x, start):
    """One for some layers, another for the rest, each with its own settings."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)).double().eval()
    first = Normalized(NameMapComposite([(["0"], Flat())]), residual="sink")
    rest = Normalized(EpsilonPlus(epsilon=0.5), gain_limit=5.0)
    actual = relevance(net, x, MixedComposite([first, rest]), start)
    sunk = Normalized(MixedComposite([first.composite, rest.composite]), residual="sink")
    raised = Normalized(MixedComposite([first.composite, rest.composite]), gain_limit=5.0)
    assert (actual - by_measure(net, x, sunk, start)).abs().max() > 1e-3
    # The columns of Flat sum to one up to its stabilizer, so its settings change next to nothing.
    torch.testing.assert_close(actual, by_measure(net, x, raised, start), rtol=1e-6, atol=1e-9)
    both_sunk = MixedComposite([first, Normalized(EpsilonPlus(epsilon=0.5), residual="sink")])
    same(relevance(net, x, both_sunk, start), by_measure(net, x, sunk, start))
