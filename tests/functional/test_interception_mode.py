"""Functions that the mode of a forward pass leaves alone or rejects: transforms of torch.func, and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.rules import Epsilon

from nrm_plugin import NRM, Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError

FORWARD_AD = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # which torch itself calls

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """A function of two layers and an input."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.function = nn.Linear(4, 6).double(), nn.Linear(6, 3).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def plain(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def of_closed_form(net: Net, x: Tensor) -> Tensor:
    return net.plain(x) + torch.func.grad(lambda z: (z**2).sum())(x)[:, :3]


def of_layers(net: Net, x: Tensor) -> Tensor:
    return net.plain(x) + torch.func.grad(lambda z: net.plain(z).sum())(x)[:, :3]


def of_each_sample(net: Net, x: Tensor) -> Tensor:
    return net.plain(x) + torch.func.vmap(torch.func.grad(lambda z: net.plain(z).sum()))(x)[:, :3]


TRANSFORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "grad of a closed form": of_closed_form,
    "grad of layers": of_layers,
    "grad of each sample": of_each_sample,
    "vmap of layers": lambda net, x: torch.vmap(net.plain)(x),
    "vmap of functions": lambda net, x: net.b(torch.vmap(lambda h: h.tanh() * 2)(net.a(x))),
    "jvp": lambda net, x: torch.func.jvp(net.plain, (x,), (torch.ones_like(x),))[0],
    "jacrev": lambda net, x: net.plain(x) + torch.func.jacrev(lambda z: net.plain(z).sum(0))(x).sum(0)[:, :3],
}


@FORWARD_AD
@pytest.mark.parametrize("name", TRANSFORMS)
def test_relevance_at_the_results_of_a_transform_raises(name):
    """A derivative was computed from steps, as a sum of relevance: outputs were off by 2, without an error."""
    net = Net(TRANSFORMS[name]).eval()
    for x in (X, X[:1]):
        with pytest.raises(UnsupportedOperationError, match=r"transform of torch\.func"):
            RelevanceMeasure(net, x, 1).marginal("input")


CONSTANTS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "mask": lambda net, x: net.b(net.a(x).relu() * torch.vmap(lambda i: (i > 2).to(x))(torch.arange(6))),
    "slope of a constant": lambda net, x: net.b(
        net.a(x).relu() * torch.func.grad(lambda z: (z**2).sum())(torch.arange(6.0).to(x))
    ),
    "layer on a constant": lambda net, x: net.b(net.a(x).relu() + torch.vmap(net.a)(torch.ones(1, 4).to(x))),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_may_come_from_a_transform(name):
    net = Net(CONSTANTS[name]).eval()
    ones = torch.ones(1, 4).double()
    values = {"mask": (torch.arange(6) > 2).double(), "slope of a constant": 2 * torch.arange(6.0).double()}
    added = net.a(ones).detach()

    def function(net: Net, x: Tensor) -> Tensor:
        hidden = net.a(x).relu()
        return net.b(hidden + added if name == "layer on a constant" else hidden * values[name])

    mu, expected = (RelevanceMeasure(one, X, 1, composite=NRMAbsolute()) for one in (net, Net(function).eval()))
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
    torch.testing.assert_close(mu.sink("input"), expected.sink("input"))


def test_a_module_with_a_rule_may_use_a_transform():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(6, 4).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: nn.functional.linear(row, self.weight))(x)

    torch.manual_seed(1)
    head, rows = nn.Linear(6, 3).double(), Rows()
    layer = nn.Linear(4, 6, bias=False).double()
    layer.weight = rows.weight
    composite = NRMDefault(layer_map=[(Rows, Epsilon(1e-9)), (nn.Linear, Epsilon(1e-9))], canonizers=[])
    mu, expected = (
        RelevanceMeasure(nn.Sequential(first, nn.ReLU(), head).eval(), X, 1, composite=composite)
        for first in (rows, layer)
    )
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))


def slope(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        return torch.autograd.grad(net.plain(point).sum(), point)[0]


def accumulated(backward: Callable[[Tensor], None]) -> Callable[[Net, Tensor], Tensor]:
    def function(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            backward(net.plain(point).sum())
        assert point.grad is not None
        return net.b(net.a(x + point.grad).relu())

    return function


def energy_and_forces(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.clone().requires_grad_()
        energy = net.plain(x)
        return energy + torch.autograd.grad(energy.sum(), x, create_graph=True)[0][:, :3]


def dual_numbers(net: Net, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return net.plain(forward_ad.make_dual(x, torch.ones_like(x)))


DERIVATIVES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "grad at a copy": lambda net, x: net.plain(x + slope(net, x)),
    "grad of a closed form": lambda net, x: net.plain(x) + torch.autograd.grad((x**2).sum(), x)[0][:, :3],
    "forces": energy_and_forces,
    "backward": accumulated(lambda total: total.backward()),
    "backward as a function": accumulated(lambda total: torch.autograd.backward([total])),
    "dual numbers": dual_numbers,
}


def in_context(net: nn.Module) -> Tensor:
    with Gradient(net, Normalized(EpsilonPlus())) as attributor:
        return attributor(X.clone(), torch.eye(3).double()[[1, 1, 1]])[1]


ENTRIES: dict[str, Callable[[nn.Module], object]] = {
    "measure": lambda net: RelevanceMeasure(net, X, 1),
    "Captum": lambda net: NRM(net).attribute(X, target=1),
    "context": in_context,
}


@FORWARD_AD
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_model_that_differentiates_in_its_forward_pass_raises(name, entry):
    """Regression test: a bare RuntimeError, and a silent ``backward()`` that used relevance in place of gradients."""
    net = Net(DERIVATIVES[name]).eval()
    flags = [weight.requires_grad for weight in net.parameters()]
    with pytest.raises(UnsupportedOperationError, match="derivative"):
        ENTRIES[entry](net)
    assert [weight.requires_grad for weight in net.parameters()] == flags
    assert not net.a._forward_hooks


def test_the_remedy_works():
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net(Net.plain)

        def forward(self, x: Tensor) -> Tensor:
            return slope(self.net, x)[:, :3] + self.net(x) * 0

    model = nn.Sequential(nn.Tanh(), Slope()).eval()
    mu = RelevanceMeasure(model, X, 1, composite=NRMDefault(layer_map=[(Slope, Epsilon(1e-6))], canonizers=[]))
    torch.testing.assert_close(mu.outputs, model(X).detach())
    assert mu.marginal("input").isfinite().all()
