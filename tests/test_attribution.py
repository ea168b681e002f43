"""The Captum classes return the numbers of the measure in Captum's forms, and work in Captum's tools.

Covers: nrm_plugin.attribution.base, nrm_plugin.attribution.nrm.
"""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerActivation, NeuronGradient, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from nrm_plugin import NRM, JointNRM, LayerNRM, NeuronNRM, Normalized, RelevanceMeasure, at
from nrm_plugin.errors import InputError, TargetError, UnknownLayerError
from tests.conftest import lrp_0, untouched


def build(bias=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, bias=bias), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 6, bias=bias),
    )  # fmt: skip
    return net.double().eval()


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, left, right, factor=1.0):
        return self.head(torch.relu(self.left(left) + self.right(right))) * factor


# -- differences of outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", [4, "rest", [5, 0]])
def test_relevance_of_a_difference_sums_to_the_difference(against):
    """The difference may be positive or negative."""
    net = build()
    for target in (2, [1, 3]):
        mu = RelevanceMeasure(net, X, target, against=against)
        relevance, delta, sink = NRM(net).attribute(
            X, target, return_convergence_delta=True, return_sink=True, against=against
        )
        torch.testing.assert_close(relevance.flatten(1).sum(1) + sink, mu.output)
        torch.testing.assert_close(relevance, mu.output.reshape(-1, 1, 1, 1) * mu.marginal("input"))
        assert float(delta.abs().max()) < 1e-9
        layer = LayerNRM(net, "2").attribute(X, target, against=against)
        torch.testing.assert_close(layer, mu.output.reshape(-1, 1, 1, 1) * mu.marginal("2"))
        joint = JointNRM(net, "2", "0").attribute(X, target, against=against)
        torch.testing.assert_close(joint, mu.output.reshape(-1, 1, 1) * mu.joint("2", "0"))
        share = NRM(net).attribute(X, target, unit="measure", against=against)
        torch.testing.assert_close(share, mu.marginal("input"))


def test_the_opposite_difference_has_the_opposite_relevance():
    """In units of the output; the measures themselves are equal."""
    net = build()
    one, other = NRM(net).attribute(X, 2, against=4), NRM(net).attribute(X, 4, against=2)
    torch.testing.assert_close(one, -other)
    assert torch.equal(RelevanceMeasure(net, X, 2, against=4).sign, -RelevanceMeasure(net, X, 4, against=2).sign)


def test_two_selections_of_neurons_are_compared():
    """The oracle is a layer with the difference of two rows."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(3, 4).double(), nn.Linear(4, 5).double(), X.flatten(1)[:, :3]
    net, twin = nn.Sequential(first, nn.ReLU(), second, nn.ReLU()), nn.Linear(4, 1).double()
    with torch.no_grad():
        twin.weight.copy_(second.weight[1:2] - second.weight[3:4])
        twin.bias.copy_(second.bias[1:2] - second.bias[3:4])
    relevance = NeuronNRM(net, net[2]).attribute(x, 1, against=3)
    torch.testing.assert_close(relevance, NRM(nn.Sequential(first, nn.ReLU(), twin)).attribute(x))


# -- neurons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [(2, 1, 1), (1, slice(0, 2), 3), (slice(None), 0, 0)])
def test_without_bias_a_neuron_under_lrp_0_is_gradient_times_input(selector):
    net = build(bias=False)
    expected = NeuronGradient(net, net[2]).attribute(X, selector) * X
    relevance = NeuronNRM(net, net[2], composite=Normalized(lrp_0(), residual="sink")).attribute(X, selector)
    torch.testing.assert_close(relevance, expected)


def test_a_function_of_the_layer_selects_as_in_captum():
    net = build(bias=False)

    def pick(h):
        return h[:, 1, 2, 0] + 2 * h[:, 0].sum((1, 2))

    expected = NeuronGradient(net, net[2]).attribute(X, pick) * X
    relevance = NeuronNRM(net, "2", composite=Normalized(lrp_0(), residual="sink")).attribute(X, pick)
    torch.testing.assert_close(relevance, expected)


def test_the_inputs_of_a_layer_can_be_selected():
    net = build(bias=False)
    expected = NeuronGradient(net, net[2]).attribute(X, (1, 2, 2), attribute_to_neuron_input=True) * X
    explainer = NeuronNRM(net, net[2], composite=Normalized(lrp_0(), residual="sink"))
    torch.testing.assert_close(explainer.attribute(X, (1, 2, 2), attribute_to_neuron_input=True), expected)


def test_attributions_and_sink_sum_to_the_activation():
    net = build()
    activation = LayerActivation(net, net[2]).attribute(X)[:, 2, 1, 1].detach()
    with untouched(net, X):
        mu = RelevanceMeasure(net, X, (2, 1, 1), output=at("2"))
        relevance = NeuronNRM(net, "2").attribute(X, (2, 1, 1))
    torch.testing.assert_close(mu.output, activation)
    torch.testing.assert_close(relevance.flatten(1).sum(1) + mu.sink("input") * activation, activation)
    unit = NeuronNRM(net, "2").attribute(X, (2, 1, 1), unit="measure")
    torch.testing.assert_close(unit, mu.marginal("input"))


def test_a_measure_may_start_at_an_activation_that_is_overwritten():
    """The ReLU after the first convolution is in place; the measure starts at its input."""
    net = build()
    mu = RelevanceMeasure(net, X, start=torch.ones(4, 6, 6).double(), output=at("0"), composite=lrp_0())
    torch.testing.assert_close(mu.output, net[0](X).flatten(1).mean(1))
    assert "2" not in mu.layers


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        (3, r"neuron_selector=3 does not select neurons of a layer of shape \(2, 5, 4, 4\): give 3 ints or slices"),
        ((9, 0, 0), r"neuron_selector=\(9, 0, 0\) is out of range"),
        ((True, 0, 0), r"does not select"),
        (lambda h: torch.ones(2), r"returned nothing that depends"),
    ],
)
def test_invalid_selectors_raise(selector, words):
    net = build()
    with untouched(net, X), pytest.raises(TargetError, match=words):
        NeuronNRM(net, "2").attribute(X, selector)


def test_unknown_layers_raise():
    net = build()
    with untouched(net, X), pytest.raises(UnknownLayerError, match="'7'"):
        NeuronNRM(net, "7").attribute(X, (0, 0, 0))


# -- joint --------------------------------------------------------------------------------------------------------


def test_the_joint_matrix_equals_that_of_the_measure():
    net = build()
    mu = RelevanceMeasure(net, X, 1)
    expected = mu.joint("2", "0")
    torch.testing.assert_close(JointNRM(net, net[2], "0").attribute(X, 1, unit="measure"), expected)
    scaled = JointNRM(net, "2", net[0]).attribute(X, 1)
    torch.testing.assert_close(scaled, expected * mu.output.reshape(-1, 1, 1))
    neurons = JointNRM(net, "5", "2").attribute(X, 1, over="neuron", unit="measure")
    assert neurons.shape == (2, 6, 80)
    torch.testing.assert_close(neurons[:, 1], mu.marginal("2").flatten(1))


# -- Captum tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64])
def test_captums_tools_accept_these_methods(dtype):
    net, x = build().to(dtype), X.to(dtype)
    explainer = NRM(net)
    smooth = NoiseTunnel(explainer).attribute(x, nt_samples=3, stdevs=0.0, target=1)
    torch.testing.assert_close(smooth, explainer.attribute(x, target=1))
    attributions = explainer.attribute(x, target=1)

    def perturb(inputs):
        noise = 0.01 * torch.ones_like(inputs)
        return noise, inputs - noise

    assert infidelity(net, perturb, x, attributions, target=1).shape == (2,)
    assert bool(torch.isfinite(sensitivity_max(explainer.attribute, x, target=1, n_perturb_samples=2)).all())


def test_several_inputs_return_a_tuple():
    torch.manual_seed(0)
    net = Two().double().eval()
    left, right = torch.randn(3, 4).double(), torch.randn(3, 3).double()
    relevance, delta = NRM(net).attribute(
        (left, right), target=2, additional_forward_args=2.0, return_convergence_delta=True
    )
    assert [part.shape for part in relevance] == [left.shape, right.shape]
    torch.testing.assert_close(delta, torch.zeros(3).double(), rtol=0, atol=1e-12)
    neuron = NeuronNRM(net, "left").attribute((left, right), 1)
    torch.testing.assert_close(neuron[1], torch.zeros_like(right))
    assert float(neuron[0].abs().sum()) > 0


def test_data_parallel_is_unwrapped():
    net = build()
    torch.testing.assert_close(
        LayerNRM(nn.DataParallel(net), "2").attribute(X, target=1), LayerNRM(net, net[2]).attribute(X, target=1)
    )
    torch.testing.assert_close(
        NeuronNRM(nn.DataParallel(net), "2").attribute(X, (0, 1, 2)), NeuronNRM(net, "2").attribute(X, (0, 1, 2))
    )


def test_all_layers_are_returned_by_one_call():
    net = build()
    mu = RelevanceMeasure(net, X, 1)
    relevance = LayerNRM(net).attribute(X, target=1, unit="measure")
    assert len(relevance) == len(mu.layers)
    for layer, values in zip(mu.layers, relevance, strict=True):
        torch.testing.assert_close(values, mu.marginal(layer))


def test_inputs_that_only_select_rows_have_an_error_that_names_the_layer_to_use():
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.table(x.long()).mean(1))

    with pytest.raises(InputError, match=r"LayerNRM\(model, 'table'\)"):
        NRM(Looked().eval()).attribute(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), target=1)
