"""The general properties of Captum's attribution methods, tested as Captum tests its classes, on Captum's objects.

Runs with every version of Captum from 0.7 to 0.9: `make test-hosts` runs it with the older ones.

Covers: nrm_plugin.attribution.dataloader, nrm_plugin.attribution.joint_nrm, nrm_plugin.attribution.layer_nrm,
nrm_plugin.attribution.neuron_nrm.
"""

from __future__ import annotations

import copy
import inspect

import captum
import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import (
    LRP,
    DataLoaderAttribution,
    GradientAttribution,
    InputXGradient,
    LayerAttribution,
    LayerConductance,
    LayerIntegratedGradients,
    LayerLRP,
    NeuronAttribution,
    NeuronGradient,
    NoiseTunnel,
    configure_interpretable_embedding_layer,
    remove_interpretable_embedding_layer,
    visualization,
)
from captum.attr._utils.input_layer_wrapper import ModelInputWrapper
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zennit.composites import EpsilonPlus, EpsilonPlusFlat, LayerMapComposite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from nrm_plugin import NRM, DataLoaderNRM, JointNRM, LayerNRM, NeuronNRM, RelevanceMeasure, at
from nrm_plugin.errors import InputError, NRMError, TargetError, UnknownLayerError
from tests.conftest import images, lrp_0, slow_but, torchvision_net, untouched

matplotlib.use("Agg")
DOUBLE = torch.float64


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv2, self.relu2, self.fc = nn.Conv2d(4, 5, 2), nn.ReLU(), nn.Linear(20, 6)

    def forward(self, x):
        x = self.pool(self.relu1(self.conv1(x)))
        return self.fc(self.relu2(self.conv2(x)).flatten(1))


class Inputs(nn.Module):
    """Three inputs, and arguments that get no relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 6)

    def forward(self, left, right, third, factor=None, power=1):
        hidden = torch.relu(self.left(left) + self.right(right)) + torch.cat([third, third], 1)
        out = self.head(hidden)
        return out if factor is None else out * factor**power


class Dims(nn.Module):
    """An output of shape (N, 3, 2) or (N, 3, 2, 2)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, int(np.prod(shape)))
        self.shape = shape

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x))).reshape(-1, *self.shape)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv, self.fc = nn.Embedding(11, 4), nn.Conv1d(4, 6, 2), nn.Linear(6, 3)

    def forward(self, tokens):
        hidden = torch.relu(self.conv(self.embedding(tokens).transpose(1, 2)))
        return self.fc(hidden.amax(2))


def made(kind, *args):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args).double().eval()


def noise(*shape, seed=1):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def three():
    return noise(3, 4), noise(3, 3, seed=2), noise(3, 3, seed=3)


METHODS = {
    "input": (lambda net: NRM(net), {"target": 1}),
    "layer": (lambda net: LayerNRM(net, net.conv2), {"target": 1}),
    "layers": (lambda net: LayerNRM(net, [net.fc, net.conv1]), {"target": 1}),
    "all layers": (lambda net: LayerNRM(net), {"target": 1}),
    "layer input": (lambda net: LayerNRM(net, net.conv2), {"target": 1, "attribute_to_layer_input": True}),
    "neuron": (lambda net: NeuronNRM(net, net.conv2), {"neuron_selector": (1, 0, slice(None))}),
    "joint": (lambda net: JointNRM(net, net.conv2, net.conv1), {"target": 1}),
}
methods = pytest.mark.parametrize("method", METHODS)


def flat(relevance):
    return [relevance] if isinstance(relevance, torch.Tensor) else [part for item in relevance for part in flat(item)]


def same(relevance, expected):
    for one, other in zip(flat(relevance), flat(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_captum_version_is_supported():
    assert tuple(int(part) for part in captum.__version__.split(".")[:2]) in [(0, 7), (0, 8), (0, 9)]


# -- form ---------------------------------------------------------------------------------------------------------


def names(function, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD):
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind is kind]


def test_arguments_are_in_captums_order():
    assert names(NRM.attribute) == names(LRP.attribute)
    assert names(LayerNRM.attribute) == names(LayerLRP.attribute)
    assert names(LayerNRM.__init__)[:4] == ["self", "model", *names(LayerConductance.__init__)[2:4]]
    assert names(NeuronNRM.attribute)[:5] == names(NeuronGradient.attribute)
    assert names(NRM.compute_convergence_delta)[:3] == names(LRP.compute_convergence_delta)
    defaults = inspect.signature(LayerLRP.attribute).parameters
    for name, parameter in inspect.signature(LayerNRM.attribute).parameters.items():
        assert name not in defaults or parameter.default == defaults[name].default


def test_classes_are_subclasses_of_captums():
    net = made(Conv)
    assert issubclass(NRM, GradientAttribution)
    assert issubclass(LayerNRM, LayerAttribution)
    assert issubclass(NeuronNRM, NeuronAttribution)
    for explainer in (NRM(net), LayerNRM(net, net.fc), NeuronNRM(net, net.fc)):
        assert explainer.has_convergence_delta()
        assert explainer.multiplies_by_inputs
        assert explainer.forward_func is net
        assert hasattr(explainer.attribute, "__wrapped__")
        with pytest.raises(NotImplementedError):
            explainer.attribute_future()
    assert LayerNRM.interpolate(torch.ones(1, 1, 2, 2), (4, 4)).shape == (1, 1, 4, 4)


def test_a_composite_in_the_place_of_device_ids_raises():
    net = made(Conv)
    with pytest.raises(TypeError, match=r"third argument is device_ids.*composite=EpsilonPlus"):
        LayerNRM(net, net.fc, EpsilonPlus())
    same(
        LayerNRM(net, net.fc, [0]).attribute(noise(2, 2, 8, 8), 1), LayerNRM(net, "fc").attribute(noise(2, 2, 8, 8), 1)
    )


# -- hooks --------------------------------------------------------------------------------------------------------


@methods
def test_hooks_are_removed_after_success(method):
    net, x = made(Conv), noise(2, 2, 8, 8)
    make, arguments = METHODS[method]
    with untouched(net, x):
        make(net).attribute(x, **arguments)
        make(net).attribute(x, **arguments)
    x.requires_grad_()
    make(net).attribute(x, **arguments)
    assert x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("way", ["target", "layer", "forward", "shape", "neuron"])
@methods
def test_hooks_are_removed_after_failure(method, way):
    net, x = made(Conv), noise(2, 2, 8, 8)
    make, arguments = METHODS[method]
    explainer, errors = make(net), (NRMError, RuntimeError)
    if way == "target":
        arguments = {key: 99 for key in arguments if key == "target"} or {"neuron_selector": (99, 0, 0)}
    if way == "neuron":
        arguments = {"target": 1, "unit": "%"} if "target" in arguments else {"neuron_selector": (1, 0)}
        errors = (ValueError,)
    if way == "layer":
        if method in ("input", "all layers"):
            return
        other = nn.Linear(2, 2)
        explainer.layer, explainer.upper = other, other
        explainer.layer = [other] if method == "layers" else other
    if way == "forward":
        net.fc.forward = broken
    if way == "shape":
        x = noise(2, 3, 8, 8)
    with untouched(net, x), pytest.raises(errors):
        explainer.attribute(x, **arguments)
    if way == "forward":
        del net.fc.forward
    make(net).attribute(noise(2, 2, 8, 8), **METHODS[method][1])


def broken(x):
    raise RuntimeError("broken on purpose")


# -- targets ------------------------------------------------------------------------------------------------------


TARGETS_2D = [
    2,
    -1,
    torch.tensor(2),
    torch.tensor([2]),
    [0, 3, 5],
    torch.tensor([0, 3, 5]),
    torch.tensor([0, 3, 5], dtype=torch.int32),
    [torch.tensor(0), torch.tensor(3), torch.tensor(5)],
    np.array([0, 3, 5]),
    (4,),
    [(0,), (3,), (5,)],
]


def of_sample(target, sample):
    if isinstance(target, (int, tuple)) or getattr(target, "ndim", 1) == 0 or len(target) == 1:
        return target
    return target[sample] if isinstance(target, list) else int(target[sample])


@pytest.mark.parametrize("target", TARGETS_2D, ids=lambda target: str(target).replace("\n", ""))
@pytest.mark.parametrize("method", slow_but([name for name in METHODS if name != "neuron"], "layer"))
def test_a_batch_equals_its_single_samples_for_every_form_of_target(method, target):
    net, x = made(Conv), noise(3, 2, 8, 8)
    explainer = METHODS[method][0](net)
    arguments = {**METHODS[method][1], "target": target}
    batched = flat(explainer.attribute(x, **arguments))
    for sample in range(3):
        single = explainer.attribute(x[sample : sample + 1], **{**arguments, "target": of_sample(target, sample)})
        same(flat(single), [part[sample : sample + 1] for part in batched])


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((3, 2), (2, 1)),
        ((3, 2), [(0, 1), (2, 0)]),
        ((3, 2, 2), (2, 1, 0)),
        ((3, 2, 2), [(0, 1, 1), (2, 0, 0)]),
        ((3, 2), torch.tensor([[0, 1], [2, 0]])),
    ],
    ids=str,
)
def test_outputs_with_more_dimensions_take_tuples(shape, target):
    """Under LRP-0 without bias, relevance is input times gradient, which Captum computes for the same targets."""
    net, x = made(Dims, *shape), noise(2, 4)
    for layer in (net.hidden, net.head):
        nn.init.zeros_(layer.bias)
    relevance = NRM(net, lrp_0(), residual="sink").attribute(x, target)
    captums = [tuple(row) for row in target.tolist()] if isinstance(target, torch.Tensor) else target
    same(relevance, InputXGradient(net).attribute(x.clone().requires_grad_(), captums).detach())
    layers = LayerNRM(net, [net.hidden, net.head], composite=lrp_0(), residual="sink").attribute(x, target)
    output = net(x)[:, 2, 1] if target == (2, 1) else layers[1].sum(1)
    torch.testing.assert_close(layers[0].sum(1), output)


@pytest.mark.parametrize("squeezed", [True, False])
def test_a_single_output_needs_no_target(squeezed):
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x):
            return self.fc(x).squeeze(1) if squeezed else self.fc(x)

    net, x = made(Single), noise(3, 4)
    relevance, delta = NRM(net).attribute(x, return_convergence_delta=True)
    assert relevance.shape == x.shape
    same(delta, torch.zeros(3, dtype=DOUBLE))
    with pytest.raises(TargetError, match="target="):
        NRM(made(Conv)).attribute(noise(2, 2, 8, 8))


# -- inputs and further arguments ---------------------------------------------------------------------------------


ARGUMENTS = [None, 2.0, (2.0, 2), (torch.tensor([[1.0], [2.0], [0.5]], dtype=DOUBLE), 1), ()]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda value: str(value)[:12])
def test_several_inputs_and_further_arguments(arguments):
    net, inputs = made(Inputs), three()
    with untouched(net, *inputs):
        relevance, delta, sink = NRM(net).attribute(
            inputs, [1, 4, 0], arguments, return_convergence_delta=True, return_sink=True
        )
    assert isinstance(relevance, tuple)
    assert [part.shape for part in relevance] == [part.shape for part in inputs]
    given = arguments if isinstance(arguments, tuple) else () if arguments is None else (arguments,)
    output = net(*inputs, *given)[range(3), [1, 4, 0]]
    same(delta, torch.zeros(3, dtype=DOUBLE))
    same(sum(part.sum(1) for part in relevance) + sink, output)
    for sample in range(3):
        one = tuple(value[sample : sample + 1] if isinstance(value, torch.Tensor) else value for value in given)
        single = NRM(net).attribute(tuple(part[sample : sample + 1] for part in inputs), [1, 4, 0][sample], one)
        same(single, tuple(part[sample : sample + 1] for part in relevance))


def test_a_tuple_of_one_input_returns_a_tuple():
    net, x = made(Conv), noise(2, 2, 8, 8)
    relevance = NRM(net).attribute((x,), 1)
    assert isinstance(relevance, tuple)
    same(relevance, (NRM(net).attribute(x, 1),))
    same(NRM(net).attribute([x], 1), relevance)


def test_the_convergence_delta_accounts_for_the_sink():
    net, x = made(Conv), noise(2, 2, 8, 8)
    for residual in ("sink", "redistribute"):
        explainer = NRM(net, EpsilonPlusFlat(epsilon=0.5), residual=residual)
        relevance, delta, sink = explainer.attribute(x, 1, return_convergence_delta=True, return_sink=True)
        same(delta, torch.zeros(2, dtype=DOUBLE))
        same(explainer.compute_convergence_delta(relevance, net(x)[:, 1], sink), torch.zeros(2, dtype=DOUBLE))
        assert float(sink.abs().min()) > 1e-6
        lost = relevance.clone()
        lost[:, 0, 0, 0] += 1
        same(explainer.compute_convergence_delta(lost, net(x)[:, 1], sink), -torch.ones(2, dtype=DOUBLE))
        maps, deltas, sinks = LayerNRM(net, ["fc", "conv1"], composite=explainer.composite).attribute(
            x, 1, return_convergence_delta=True, return_sink=True
        )
        for values, open_, absorbed in zip(maps, deltas, sinks, strict=True):
            same(open_, torch.zeros(2, dtype=DOUBLE))
            same(values.flatten(1).sum(1) + absorbed, net(x)[:, 1])
        _, share = explainer.attribute(x, 1, return_sink=True, unit="measure")
        same(share * net(x)[:, 1], sink)


def test_conditional_and_joint_relevance():
    net, x = made(Conv), noise(2, 2, 8, 8)
    mu, event = RelevanceMeasure(net, x, 1), at("conv2")[[0, 2, 4]]
    same(NRM(net).attribute(x, 1, joint=event, unit="measure"), mu.marginal("input", joint=event))
    same(LayerNRM(net, "conv1").attribute(x, 1, given=event, unit="measure"), mu.marginal("conv1", given=event))
    channels = [NRM(net).attribute(x, 1, joint=at("conv2")[k]) for k in range(5)]
    same(sum(channels), NRM(net).attribute(x, 1))


def test_verbose_prints_the_rule_of_every_step(capsys):
    net, x = made(Conv), noise(2, 2, 8, 8)
    for explainer, arguments in (
        (NRM(net), {"target": 1}),
        (LayerNRM(net, net.fc), {"target": 1}),
        (NeuronNRM(net, "fc"), {"neuron_selector": 1}),
    ):
        explainer.attribute(x, **arguments)
        assert not capsys.readouterr().out
        explainer.attribute(x, **arguments, verbose=True)
        assert "ConservingEpsilon" in capsys.readouterr().out


# -- layers -------------------------------------------------------------------------------------------------------


def test_wrapped_inputs_have_a_layer_each():
    """Captum's ModelInputWrapper, which lets layer methods attribute to inputs."""
    net, inputs = made(Inputs), three()
    wrapped = ModelInputWrapper(net)
    layers = [wrapped.input_maps[name] for name in ("left", "right", "third")]
    relevance = LayerNRM(wrapped, layers).attribute(inputs, 1)
    same(relevance, list(NRM(net).attribute(inputs, 1)))
    single = LayerNRM(wrapped, wrapped.input_maps["right"]).attribute(inputs, 1)
    same(single, relevance[1])


def test_layers_can_be_modules_names_taps_lists_and_containers():
    net, x = made(Conv), noise(2, 2, 8, 8)
    stacked = nn.Sequential(net, nn.Linear(6, 3)).double()
    expected = LayerNRM(net, net.conv2).attribute(x, 1)
    for layer in ("conv2", at("conv2"), at(net.conv2)):
        same(LayerNRM(net, layer).attribute(x, 1), expected)
    same(LayerNRM(net, [net.conv2, "conv2"]).attribute(x, 1), [expected, expected])
    whole = LayerNRM(stacked, stacked[0]).attribute(x, 1)
    same(whole, LayerNRM(stacked, stacked[1]).attribute(x, 1, attribute_to_layer_input=True))
    with pytest.raises(UnknownLayerError, match="not a module of the measured model"):
        LayerNRM(net, copy.deepcopy(net).conv1).attribute(x, 1)
    same(LayerNRM(net, (net.conv2, "conv2")).attribute(x, 1), [expected, expected])


def test_the_input_of_a_layer_is_the_output_below_it():
    net, x = made(Conv), noise(2, 2, 8, 8)
    relevance = LayerNRM(net, [net.conv2, net.fc]).attribute(x, 1, attribute_to_layer_input=True)
    below = LayerNRM(net, [net.pool, net.relu2]).attribute(x, 1)
    same(relevance, [below[0], below[1].flatten(1)])


def test_tokens_have_the_relevance_of_their_embeddings():
    """As Captum's LayerIntegratedGradients; and the same as through its interpretable embeddings."""
    net, tokens = made(Text), torch.tensor([[1, 5, 2, 2, 9], [0, 3, 3, 10, 4]])
    with untouched(net):
        relevance, delta = LayerNRM(net, net.embedding).attribute(tokens, 1, return_convergence_delta=True)
    assert relevance.shape == LayerIntegratedGradients(net, net.embedding).attribute(tokens, target=1, n_steps=2).shape
    same(delta, torch.zeros(2, dtype=DOUBLE))
    with pytest.warns(UserWarning, match="interpretable"):
        interpretable = configure_interpretable_embedding_layer(net, "embedding")
    embedded = interpretable.indices_to_embeddings(tokens)
    try:
        same(NRM(net).attribute(embedded, 1), relevance)
    finally:
        remove_interpretable_embedding_layer(net, interpretable)
    same(LayerNRM(net, net.conv).attribute(tokens, 1).sum((1, 2)), net(tokens)[:, 1].detach())
    same(NRM(net).measure(tokens, 1).marginal("embedding") * net(tokens)[:, 1].reshape(2, 1, 1).detach(), relevance)
    with pytest.raises(InputError, match=r"LayerNRM\(model, model.embedding\)"):
        NRM(net).attribute(tokens, 1)
    with pytest.raises(InputError, match=r"nn.Embedding"):
        LayerNRM(made(Conv), "fc").attribute(torch.ones(1, 2, 8, 8).long(), 1)


# -- parallel -----------------------------------------------------------------------------------------------------


@methods
def test_data_parallel_on_cpu_equals_the_model(method):
    net, x = made(Conv), noise(3, 2, 8, 8)
    make, arguments = METHODS[method]
    parallel = nn.DataParallel(net)
    expected = make(net).attribute(x, **arguments)
    explainer = make(net)
    for holder in (explainer, getattr(explainer, "_inputs", explainer)):
        holder.model = parallel
    with untouched(net, x):
        same(explainer.attribute(x, **arguments), expected)


def test_layers_of_data_parallel_have_both_names():
    net, x = made(Conv), noise(3, 2, 8, 8)
    parallel = nn.DataParallel(net)
    expected = LayerNRM(net, "conv2").attribute(x, 1)
    for layer in ("conv2", "module.conv2", net.conv2, parallel.module.conv2):
        same(LayerNRM(parallel, layer, device_ids=[0]).attribute(x, 1), expected)
    assert torch.count_nonzero(LayerNRM(parallel, parallel).attribute(x, 1)) == 3
    same(NeuronNRM(parallel, "module.conv2").attribute(x, (0, 1, 1)), NeuronNRM(net, "conv2").attribute(x, (0, 1, 1)))
    same(JointNRM(parallel, "module.fc", "module.conv2").attribute(x, 1), JointNRM(net, "fc", "conv2").attribute(x, 1))


# -- inside Captum's tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("method", ["input", "layer", "neuron"])
def test_the_noise_tunnel_accepts_every_method(method, kind):
    net, x = made(Conv), noise(2, 2, 8, 8)
    make, arguments = METHODS[method]
    explainer = make(net)
    noisy_inputs = []
    handle = net.register_forward_pre_hook(lambda module, args: noisy_inputs.append(args[0].detach().clone()))
    torch.manual_seed(0)
    relevance, delta = NoiseTunnel(explainer).attribute(
        x, nt_type=kind, nt_samples=4, stdevs=0.1, **arguments, return_convergence_delta=True
    )
    handle.remove()
    assert delta.shape == (8,)
    same(delta, torch.zeros(8, dtype=DOUBLE))
    each = explainer.attribute(noisy_inputs[0], **arguments).reshape(2, 4, *relevance.shape[1:])
    mean, squares = each.mean(1), (each**2).mean(1)
    same(relevance, {"smoothgrad": mean, "smoothgrad_sq": squares, "vargrad": squares - mean**2}[kind])
    assert float((each - each[:, :1]).abs().max()) > 1e-6


def test_the_noise_tunnel_accepts_several_inputs_targets_and_arguments():
    net, inputs = made(Inputs), three()
    factor = torch.tensor([[1.0], [2.0], [0.5]], dtype=DOUBLE)
    relevance = NoiseTunnel(NRM(net)).attribute(
        inputs, nt_samples=3, nt_samples_batch_size=1, stdevs=0.0, target=[1, 4, 0],
        additional_forward_args=(factor, 2),
    )  # fmt: skip
    same(relevance, NRM(net).attribute(inputs, [1, 4, 0], (factor, 2)))


def test_metrics_accept_every_method():
    net, inputs = made(Inputs), three()
    explainer = NRM(net)
    attributions = explainer.attribute(inputs, 1)

    @infidelity_perturb_func_decorator(True)
    def perturb(*given):
        return tuple(value * 0.9 for value in given[0])

    assert infidelity(net, perturb, inputs, attributions, target=1).shape == (3,)
    torch.manual_seed(0)
    sensitivity = sensitivity_max(explainer.attribute, inputs, target=1, n_perturb_samples=3, perturb_radius=0.01)
    assert sensitivity.shape == (3,)
    assert bool(((sensitivity > 0) & (sensitivity < 5)).all())
    net, x = made(Conv), noise(2, 2, 8, 8)
    layer = LayerNRM(net, net.conv1)

    def explain(*args, **kwargs):  # Captum passes a tuple and expects one, also of its own layer methods
        return (layer.attribute(*args, **kwargs),)

    assert sensitivity_max(explain, x, target=1, perturb_radius=0.0).abs().max() < 1e-9
    assert sensitivity_max(explain, x, target=1, perturb_radius=0.1).abs().min() > 1e-3


def test_infidelity_of_a_linear_model_is_zero():
    """Linear, without bias, under LRP-0: removing an input reduces the output by its relevance."""
    net, x = made(nn.Linear, 4, 3), noise(5, 4)
    nn.init.zeros_(net.bias)
    attributions = NRM(net, lrp_0(), residual="sink").attribute(x, 2)

    @infidelity_perturb_func_decorator(True)
    def without_two(given):
        return given * torch.tensor([1.0, 0, 0, 1.0], dtype=DOUBLE)

    assert float(infidelity(net, without_two, x, attributions, target=2).max()) < 1e-20
    assert float(infidelity(net, without_two, x, 2 * attributions, target=2).max()) > 1e-3


def test_visualization_draws_the_maps():
    net, x = made(Conv), noise(2, 2, 8, 8)
    relevance = LayerNRM.interpolate(LayerNRM(net, net.conv1).attribute(x, 1), (8, 8))
    heat_map = relevance[0].permute(1, 2, 0).numpy()
    figure, axes = visualization.visualize_image_attr(heat_map, None, "heat_map", "all", use_pyplot=False)
    drawn = axes.images[0].get_array()
    assert drawn.shape == (8, 8)
    assert np.corrcoef(drawn.ravel(), heat_map.sum(2).ravel())[0, 1] > 0.9
    figure, axes = visualization.visualize_image_attr_multiple(
        heat_map, np.random.rand(8, 8, 3), ["original_image", "blended_heat_map"], ["all", "positive"], use_pyplot=False
    )
    assert len(figure.axes) >= 2


# -- whole datasets ----------------------------------------------------------------------------------------------


def test_captums_data_loader_accepts_feature_ablation_only():
    with pytest.raises(AssertionError, match="does not support"):
        DataLoaderAttribution(NRM(made(Conv)))


@pytest.mark.medium
@pytest.mark.parametrize("method", ["input", "layer", "layers", "neuron"])
def test_the_data_loader_class_equals_the_method_batch_by_batch(method):
    net, x = made(Conv), noise(7, 2, 8, 8)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    make, arguments = METHODS[method]
    arguments = {key: value for key, value in arguments.items() if key != "target"}
    target = None if method == "neuron" else lambda batch: batch[1]
    whole = make(net).attribute(x, **arguments, **({} if target is None else {"target": labels}))
    loader = DataLoader(TensorDataset(x, labels), 3)
    over = DataLoaderNRM(make(net))
    relevance = over.attribute(loader, (0, 2), target, **arguments)
    assert type(relevance) is type(whole)
    same(relevance, whole)
    for reduce, factor in (("sum", 1), ("mean", 1 / 7)):
        reduced = over.attribute(loader, (0, 2), target, reduce=reduce, **arguments)
        same(flat(reduced), [part.sum(0) * factor for part in flat(whole)])


def test_the_data_loader_class_passes_inputs_by_their_roles():
    net, (left, right, third) = made(Inputs), three()
    factor = torch.tensor([[1.0], [2.0], [0.5]], dtype=DOUBLE)
    loader = DataLoader(TensorDataset(left, right, third, factor), 2)
    relevance = DataLoaderNRM(NRM(net)).attribute(loader, (0, 0, 0, 1), target=1)
    same(relevance, NRM(net).attribute((left, right, third), 1, factor))
    invalid = {(0, 1): "does not match a batch of 4", (1, 1, 1, 1): "0 at least once", (0, 0, 0, 7): "0, 0, 7"}
    for roles, words in invalid.items():
        with pytest.raises(ValueError, match=words):
            DataLoaderNRM(NRM(net)).attribute(loader, roles, target=1)
    with pytest.raises(ValueError, match="loader is empty"):
        DataLoaderNRM(NRM(net)).attribute([], target=1)
    with pytest.raises(ValueError, match="'median' is unknown"):
        DataLoaderNRM(NRM(net)).attribute(loader, target=1, reduce="median")
    with pytest.raises(TypeError, match=r"captum.attr.DataLoaderAttribution"):
        DataLoaderNRM(InputXGradient(net))


# -- numbers of Zennit and Captum ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_layers_in_sink_mode_are_zennits_relevance(worst):
    """Hooks registered after those of Zennit's composite, as in its how-to; Captum's unit is the output."""
    model, x = torchvision_net("vgg16_bn"), images(64)
    outputs = {}
    explained = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    plain = copy.deepcopy(model)  # Zennit 1.0 replaces parameters
    with EpsilonPlusFlat().context(plain):
        for name, module in plain.named_modules():
            if name in explained:

                def keep(module, inputs, output, name=name):
                    output.retain_grad()
                    outputs[name] = output

                module.register_forward_hook(keep)
        output = plain(x.clone().requires_grad_())
        output.backward(output.detach() * torch.eye(10)[[3, 3]])
    relevance = LayerNRM(model, explained, composite=EpsilonPlusFlat(), residual="sink").attribute(x, 3)
    assert len(relevance) == 16
    for name, values in zip(explained, relevance, strict=True):
        error = float((values - outputs[name].grad).norm() / outputs[name].grad.norm())
        worst("LayerNRM and Zennit, vgg16_bn, float32", error)
        assert error < 1e-5, name


def captums_rules(epsilon):
    """The defaults of Captum's LRP: ε on every linear layer and pooling, the identity on activations."""
    rules = [(Activation, Pass()), (AvgPool, Norm(epsilon)), (Linear, Epsilon(epsilon))]
    return LayerMapComposite(rules)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vgg16_inputs_are_captums_lrp(dtype, worst):
    """Both divide by z + 1e-9 sign(z). Captum does so after max pooling, too, where the rule here only routes.

    That and the order of sums are all that differs: 1e-9 over the smallest |z| that carries relevance, about 1e-6 of
    the map in float64. In float32 the rounding of z itself is amplified by the walk variation of LRP-0.
    """
    model, x = copy.deepcopy(torchvision_net("vgg16")).to(dtype).requires_grad_(False), images(64).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # Captum's LRP reads a tensor that an in-place ReLU would overwrite
    relevance = NRM(model, captums_rules(1e-9), residual="sink").attribute(x, 3)
    expected = LRP(copy.deepcopy(model)).attribute(x.clone().requires_grad_(), 3).detach()
    error = float((relevance - expected).norm() / expected.norm())
    worst(f"NRM and Captum's LRP, vgg16, {dtype}", error)
    assert error < (1e-6 if dtype == DOUBLE else 1e-2)
    layer = LayerNRM(model, model.features[10], composite=captums_rules(1e-9), residual="sink").attribute(x, 3)
    twin = copy.deepcopy(model)
    theirs = LayerLRP(twin, twin.features[10]).attribute(x.clone().requires_grad_(), 3).detach()
    assert float((layer - theirs).norm() / theirs.norm()) < (1e-6 if dtype == DOUBLE else 1e-2)
