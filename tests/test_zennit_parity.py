"""With ``residual="sink"`` the measure is Zennit's relevance; a Normalized composite is one of Zennit's composites."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import (
    COMPOSITES,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    LayerMapComposite,
    MixedComposite,
    NameMapComposite,
)
from zennit.rules import Epsilon, Pass, ZPlus
from zennit.types import Activation, Linear

from nrm_plugin import Normalized, RelevanceMeasure, at
from tests.conftest import LINEAR, SIZES, composite, each_once, images, slow_but, torchvision_net, untouched

pytestmark = pytest.mark.zennit

TARGETS = [3, 7]
FAST = ("epsilon_plus_flat", "epsilon_gamma_box", "beta_smooth", "excitation_backprop")
IN_DOUBLE = ("lrp_0", "nrm_default")


def one_hot(output):
    start = torch.zeros_like(output)
    start[range(len(output)), TARGETS[: len(output)]] = 1
    return start


def zennit_relevance(model, x, rules):
    """Zennit alone, as in its how-to: the gradient at the outputs in hooks after those of the composite."""
    outputs, handles = {}, []
    with rules.context(model):
        for name, module in model.named_modules():

            def keep(module, inputs, output, name=name):
                output.retain_grad()
                outputs[name] = output

            if name:
                handles.append(module.register_forward_hook(keep))
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        outputs["input"] = leaf
        tensors = dict(outputs)
        gradients = torch.autograd.grad(output, list(tensors.values()), one_hot(output), allow_unused=True)
        for handle in handles:
            handle.remove()
    return dict(zip(tensors, gradients, strict=True))


def chain():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4, 12), nn.ReLU(), nn.Linear(12, 10),
    )  # fmt: skip
    return net.eval()


@pytest.fixture
def net():
    return chain()


@pytest.fixture
def x():
    return images(8)


# -- the same numbers ---------------------------------------------------------------------------------------------


def assert_same_at_every_tap(model, x, build, worst, label, tolerance=1e-5):
    with untouched(model, x):
        targets = TARGETS[: len(x)]
        mu = RelevanceMeasure(model, x, targets, composite=Normalized(build(), residual="sink", uncovered="gradient"))
        ours = mu.marginal(mu.layers)
    plain = zennit_relevance(not_in_place(model), x, build())
    compared = [layer for layer in mu.layers if layer in plain]
    assert len(compared) > 20
    for layer in compared:
        for sample in range(len(x)):
            theirs = plain[layer][sample]
            error = float((ours[layer][sample] - theirs).norm() / theirs.norm())
            worst(label, error)
            assert error <= tolerance, layer


def not_in_place(model):
    """A copy, as Zennit 1 replaces parameters; not in place, as its BetaSmooth would read the output of the ReLU."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return twin


@pytest.mark.medium
@pytest.mark.parametrize("name", slow_but([name for name in LINEAR if name not in IN_DOUBLE], *FAST))
@pytest.mark.parametrize("net_name", slow_but(SIZES, "alexnet"))
def test_marginals_are_zennits_relevance_at_every_tap(net_name, name, worst):
    model, x = torchvision_net(net_name), images(SIZES[net_name])
    assert_same_at_every_tap(model, x, lambda: composite(name, []), worst, f"parity, {net_name}, {name}")


@pytest.mark.medium
@pytest.mark.parametrize("name", IN_DOUBLE)
@pytest.mark.parametrize("net_name", slow_but(SIZES, "alexnet"))
def test_marginals_are_zennits_relevance_in_double_precision(net_name, name, worst):
    """The variation of LRP-0 reaches 1e9 here, and both rules flip with the sign of an output near zero.

    So in float32 two right answers differ: by more than 1 for LRP-0, by up to 2e-4 for the default.
    """
    model, x = copy.deepcopy(torchvision_net(net_name)).double(), images(SIZES[net_name]).double()
    assert_same_at_every_tap(model, x, lambda: composite(name, []), worst, f"parity, {net_name}, {name}, float64", 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box", "nrm_absolute"])
def test_marginals_are_zennits_relevance_after_batch_norm_was_merged(name, worst):
    model, x = torchvision_net("vgg16_bn"), images(64)

    def build():
        return composite(name, canonizers=[SequentialMergeBatchNorm()])

    assert_same_at_every_tap(model, x, build, worst, f"parity, vgg16_bn merged, {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "net_name"), each_once([name for name in LINEAR if name not in IN_DOUBLE], SIZES))
def test_marginals_are_zennits_relevance_on_images_of_full_size(net_name, name, worst):
    model, x = torchvision_net(net_name, width=4096), images(224, batch=1)
    assert_same_at_every_tap(model, x, lambda: composite(name, []), worst, f"parity at 224, {net_name}, {name}")


# -- a composite like any other -----------------------------------------------------------------------------------


def relevance_in_context(model, x, rules, **options):
    leaf = x.clone().requires_grad_()
    with rules.context(model) as modified:
        output = modified(leaf)
        return torch.autograd.grad(output, leaf, one_hot(output), **options)[0]


@pytest.mark.medium
@pytest.mark.parametrize("residual", ["sink", "redistribute"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_in_its_context_is_the_marginal_at_the_input(net, x, name, residual):
    rules = Normalized(composite(name, []), residual=residual, uncovered="gradient")
    expected = RelevanceMeasure(net, x, TARGETS, composite=rules).marginal("input")
    torch.testing.assert_close(relevance_in_context(net, x, rules), expected, rtol=1e-4, atol=1e-7)


def test_zennits_gradient_attributor_gives_the_marginal(net, x):
    rules = Normalized(EpsilonPlusFlat())
    expected = RelevanceMeasure(net, x, TARGETS, composite=rules).marginal("input")
    with Gradient(net, rules) as attributor:
        _, inside = attributor(x, one_hot)
    torch.testing.assert_close(inside, expected)
    _, called = Gradient(net, rules)(x, one_hot)
    torch.testing.assert_close(called, expected)


def test_it_nests_in_zennits_mixed_composite(net, x):
    rules = Normalized(EpsilonPlusFlat())
    mixed = MixedComposite([rules, LayerMapComposite(layer_map=[(nn.Dropout, Pass())])])
    expected = RelevanceMeasure(net, x, TARGETS, composite=rules).marginal("input")
    torch.testing.assert_close(relevance_in_context(net, x, mixed), expected)


def test_it_nests_next_to_rules_by_name(net, x):
    named = NameMapComposite([(["8"], Epsilon(1e-6)), (["0"], ZPlus())])
    others = LayerMapComposite(layer_map=[(Activation, Pass()), (Linear, Epsilon(1e-6))])
    plain = relevance_in_context(copy.deepcopy(net), x, MixedComposite([named, others]))
    wrapped = Normalized(MixedComposite([named, others]), residual="sink")
    torch.testing.assert_close(relevance_in_context(net, x, wrapped), plain, rtol=1e-4, atol=1e-6)
    inner = MixedComposite([Normalized(named, residual="sink"), Normalized(others, residual="sink")])
    torch.testing.assert_close(relevance_in_context(net, x, inner), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_batched_gradients_equal_a_loop(net, x, name):
    leaf = x.clone().requires_grad_()
    with Normalized(composite(name, []), uncovered="gradient").context(net):
        output = net(leaf)
        starts = torch.randn(3, *output.shape)
        batched = torch.autograd.grad(output, leaf, starts, retain_graph=True, is_grads_batched=True)[0]
        single = [torch.autograd.grad(output, leaf, start, retain_graph=True)[0] for start in starts]
    torch.testing.assert_close(batched, torch.stack(single), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "beta_smooth"])
def test_the_relevance_can_be_differentiated_again(net, x, name):
    """It is linear in the start, so its derivative in a direction is the relevance of that direction."""
    leaf = x.double().requires_grad_()
    model = net.double()
    with Normalized(composite(name, [])).context(model):
        output = model(leaf)
        start, direction = torch.randn(2, *output.shape, dtype=torch.double)
        start.requires_grad_()
        relevance = torch.autograd.grad(output, leaf, start, create_graph=True)[0]
        probe = torch.randn_like(relevance)
        slope = torch.autograd.grad((relevance * probe).sum(), start)[0]
        moved = torch.autograd.grad(output, leaf, direction)[0]
    torch.testing.assert_close((slope * direction).sum(), (moved * probe).sum())


def test_it_can_be_switched_off_inside_its_context(net, x):
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(net(leaf)[0, 3], leaf)[0]
    rules = Normalized(EpsilonPlus())
    with rules.context(net):
        with rules.inactive():
            switched_off = torch.autograd.grad(net(leaf)[0, 3], leaf)[0]
        active = torch.autograd.grad(net(leaf)[0, 3], leaf)[0]
    torch.testing.assert_close(switched_off, plain)
    assert not torch.allclose(active, plain)


def test_registering_it_twice_is_registering_it_once(net, x):
    rules = Normalized(EpsilonPlusFlat())
    expected = relevance_in_context(net, x, rules)
    with untouched(net, x):
        rules.register(net)
        rules.register(net)
        leaf = x.clone().requires_grad_()
        output = net(leaf)
        actual = torch.autograd.grad(output, leaf, one_hot(output))[0]
        rules.remove()
    torch.testing.assert_close(actual, expected)


def test_one_composite_serves_model_after_model(x):
    rules = Normalized(EpsilonPlusFlat())
    nets = [chain(), chain()]
    nn.init.normal_(nets[1][0].weight)
    first = [relevance_in_context(model, x, rules) for model in nets]
    again = [relevance_in_context(model, x, Normalized(EpsilonPlusFlat())) for model in nets]
    torch.testing.assert_close(first, again)


def test_its_hooks_can_be_copied(net, x):
    rules = Normalized(EpsilonPlusFlat(), residual="sink")
    hook = rules.module_map({}, "0", net[0])
    assert hook.copy() is not hook
    assert hook.copy().normalization == hook.normalization
    assert hook.copy().rule is hook.rule


def test_the_model_is_as_before_after_the_context(net, x):
    with untouched(net, x), Normalized(EpsilonPlusFlat()).context(net):
        assert net[0]._forward_hooks
        net(x.clone().requires_grad_()).sum().backward()


def test_the_model_is_as_before_after_the_body_of_the_context_raised(net, x):
    too_large, rules = images(20), Normalized(EpsilonPlusFlat())
    expected = RelevanceMeasure(net, x, TARGETS, composite=rules).marginal("input")
    with untouched(net, x), pytest.raises(RuntimeError, match="mat1 and mat2"), rules.context(net):
        net(too_large.requires_grad_())
    assert not torch.overrides._get_current_function_mode_stack()
    torch.testing.assert_close(relevance_in_context(net, x, rules), expected)


def test_a_forward_pass_that_raised_changes_no_later_number_in_the_same_context(net, x):
    rules = Normalized(EpsilonPlusFlat())
    expected = RelevanceMeasure(net, x, TARGETS, composite=rules).marginal("input")
    with rules.context(net):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            net(images(20).requires_grad_())
        leaf = x.clone().requires_grad_()
        output = net(leaf)
        actual = torch.autograd.grad(output, leaf, one_hot(output))[0]
    torch.testing.assert_close(actual, expected)


def test_a_model_that_is_called_without_gradients_in_its_context_just_runs(net, x):
    expected = net(x).detach()
    with Normalized(EpsilonPlusFlat()).context(net), torch.no_grad():
        torch.testing.assert_close(net(x), expected)


def test_the_parameters_get_no_gradient(net, x):
    with Normalized(EpsilonPlusFlat()).context(net):
        net(x.clone().requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_copies_and_pickles_of_a_model_work_after_its_measure(net, x):
    mu = RelevanceMeasure(net, x, TARGETS)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        again = RelevanceMeasure(twin, x, TARGETS)
        torch.testing.assert_close(again.marginal("input"), mu.marginal("input"))
        twin[0].weight.data.zero_()
    torch.testing.assert_close(mu(at("input")), mu.marginal("input").flatten(1).sum(1))


def test_our_composites_are_in_zennits_registry(net, x):
    assert {"nrm_default", "nrm_absolute"} <= set(COMPOSITES)
    actual = relevance_in_context(copy.deepcopy(net), x, COMPOSITES["nrm_absolute"]())
    assert float(actual.min()) >= 0


def test_zbox_has_the_relevance_of_zennit(net):
    x = images(8).clamp(-1, 1)
    rules = Normalized(EpsilonGammaBox(low=-1.0, high=1.0), residual="sink")
    mu = RelevanceMeasure(net, x, TARGETS, composite=rules)
    plain = relevance_in_context(copy.deepcopy(net), x, EpsilonGammaBox(low=-1.0, high=1.0))
    torch.testing.assert_close(mu.marginal("input"), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 32, 32)])
def test_a_box_may_have_the_shape_of_an_image_and_pixels_be_positive(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 8)).eval()
    x, low, high = torch.rand(2, 3, 32, 32), -torch.rand(shape), 1 + torch.rand(shape)
    mu = RelevanceMeasure(net, x, TARGETS, composite=Normalized(EpsilonGammaBox(low, high), residual="sink"))
    plain = relevance_in_context(copy.deepcopy(net), x, EpsilonGammaBox(low, high))
    torch.testing.assert_close(mu.marginal("input"), plain, rtol=1e-4, atol=1e-6)
