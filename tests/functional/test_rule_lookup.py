"""A layer has its own rule however it stores or computes its weight, also where the functions inside it are steps."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from zennit.composites import EpsilonAlpha2Beta1Flat, EpsilonPlusFlat, NameMapComposite
from zennit.rules import Epsilon, Flat, WSquare

from nrm_plugin import RelevanceMeasure
from nrm_plugin.functional.rule_lookup import CompositeRules


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Called(nn.Module):
    """A model that is called with other parameters than its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.values = {name: 1.5 * value.detach() for name, value in net.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.net, self.values, (x,))


def shared(net: nn.Sequential) -> nn.Module:
    net[2].weight = net[0].weight
    return net


def doubled(net: nn.Sequential) -> nn.Module:
    parametrize.register_parametrization(net[0], "weight", Double())
    return net


def pruned(net: nn.Sequential) -> nn.Module:
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.random_structured(net[2], "weight", 0.3, dim=1)
    return net


def normalized(net: nn.Sequential) -> nn.Module:
    parametrizations.weight_norm(net[0])
    parametrizations.spectral_norm(net[2])
    return net.eval()


WEIGHTS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "shared": shared,
    "parametrized": doubled,
    "pruned": pruned,
    "normalized": normalized,
    "called with others": Called,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double().eval()


def plain(model: nn.Module) -> nn.Sequential:
    """The same function as plain layers, whose weights are the values that the layers use."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: seen.append((module.weight.clone(), module.bias.clone())))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    model(torch.ones(1, 4).double())
    for hook in hooks:
        hook.remove()
    copy = net()
    with torch.no_grad():
        for module, (weight, bias) in zip((copy[0], copy[2], copy[4]), seen, strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return copy


@pytest.mark.parametrize("composite", [EpsilonPlusFlat, EpsilonAlpha2Beta1Flat])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("is_difference", [False, True])
def test_weights_that_are_shared_or_computed_have_the_rule_of_the_layer(name, composite, is_difference):
    model = WEIGHTS[name](net())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = 0.3 * x + 0.1 if is_difference else None
    ours, oracle = (
        RelevanceMeasure(one, x, 1, composite=composite(), reference=reference) for one in (model, plain(model))
    )
    torch.testing.assert_close(ours.marginal("input"), oracle.marginal("input"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.sink("input"), oracle.sink("input"), rtol=1e-9, atol=1e-11)


def test_a_recurrent_layer_that_computes_its_weights_has_its_own_rule():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    rules = NameMapComposite([(["rnn"], WSquare()), (["out"], Epsilon())])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = RelevanceMeasure(Recurrent(), x, 1, composite=rules).marginal("input")
    model = Recurrent()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrize.register_parametrization(model.rnn, name, nn.Identity())
    found = RelevanceMeasure(model, x, 1, composite=rules).marginal("input")
    torch.testing.assert_close(found, expected)


def test_a_weight_is_looked_up_by_its_caller_its_owner_or_its_kind():
    model = shared(net())
    flat, epsilon = Flat(), Epsilon()
    rules = CompositeRules(NameMapComposite([(["0"], flat), (["2"], epsilon)]), model)
    weight, like = model[0].weight, nn.Linear(1, 1)
    assert rules.of_weight(weight, like, "0") is flat
    assert rules.of_weight(weight, like, "2") is epsilon
    assert rules.of_weight(weight[:2], like, "2") is epsilon
    assert rules.of_weight(model[4].weight, like, "0") is None, "another layer owns it"
    assert rules.of_weight(torch.ones(4, 4), like, "0") is flat
    assert rules.of_weight(torch.ones(4, 4), nn.Conv2d(1, 1, 1), "0") is None, "the caller is of another kind"


class Sparse(nn.Module):
    """A product with a sparse or dense parameter, and a layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.last = nn.Parameter(weight), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.weight @ x.T).T)


@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_models_may_have_sparse_parameters(convert):
    weight, x = torch.randn(4, 4).double(), torch.randn(2, 4).double()
    with warnings.catch_warnings(action="ignore"):  # torch calls its CSR format a prototype
        sparse, dense = Sparse(convert(weight)), Sparse(weight)
        for reference in (None, x.flip(0)):
            mu = RelevanceMeasure(sparse, x, 1, reference=reference)
            total = mu.marginal("input").sum(1) + mu.sink("input")
            torch.testing.assert_close(total, torch.ones(2).double())
    same = RelevanceMeasure(dense, x, 1, reference=reference)
    torch.testing.assert_close(mu.marginal("input"), same.marginal("input"))
