"""Walks end at the inputs that the caller passed, whatever else requires a gradient: compared with plain constants.

Covers: nrm_plugin.recording.graph, nrm_plugin.kernels.forward_state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zennit.composites import EpsilonPlus
from zennit.core import Composite

from nrm_plugin import NRM, LayerNRM, Normalized, NRMDefault, RelevanceMeasure, at

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """A linear layer, and a function of its output and of a tensor that the module does not own."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], extra: Tensor) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.o = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
        self.function, self.extra = function, [extra]

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.function(torch.relu(self.a(x)), self.extra[0]))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "weight of F.linear": (lambda h, w: functional.linear(h, w), drawn(5, 5)),
    "matrix product": (lambda h, w: h @ w, drawn(5, 5)),
    "scale": (lambda h, w: h * w, drawn(5)),
    "shift": (lambda h, w: h + w, drawn(5)),
    "difference": (lambda h, w: w - h, drawn(5)),
    "concatenation": (lambda h, w: torch.cat([h[:, :3], w.expand(len(h), 2)], 1), drawn(2)),
    "stack": (lambda h, w: torch.stack([h, w.expand_as(h)], 1).sum(1), drawn(5)),
    "where": (lambda h, w: torch.where(h > 0.3, h, w.expand_as(h)), drawn(5)),
    "computed from it": (lambda h, w: h * torch.tanh(w * 2) + w.exp(), drawn(5)),
    "batch norm": (lambda h, w: functional.batch_norm(h, w, w.abs() + 1, w, w), drawn(5)),
    "layer norm": (lambda h, w: functional.layer_norm(h, (5,), w, w), drawn(5)),
    "bilinear": (lambda h, w: torch.einsum("ni,ij->nj", h, w), drawn(5, 5)),
    "in place": (lambda h, w: h.clone().mul_(w).add_(w), drawn(5)),
    "list of terms": (lambda h, w: sum([h, w, 2 * w]), drawn(5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["leaf", "computed before"])
def test_tensors_of_the_surroundings_are_constants(name: str, kind: str) -> None:
    function, extra = FUNCTIONS[name]
    owned = extra.clone().requires_grad_()
    foreign = owned if kind == "leaf" else owned * 1.0
    plain, other = (RelevanceMeasure(Net(function, tensor).eval(), X, 1) for tensor in (extra, foreign))
    assert other.layers == plain.layers
    for layer in plain.layers:
        assert torch.equal(other.marginal(layer), plain.marginal(layer)), layer
        assert torch.equal(other.sink(layer), plain.sink(layer)), layer
    events = at("a")[[0, 2]] & ~at("input")[1]
    assert torch.equal(other(events), plain(events))
    heat_maps = [NRM(Net(function, tensor).eval()).attribute(X, target=1) for tensor in (extra, foreign)]
    assert torch.equal(*heat_maps)
    assert heat_maps[0].abs().sum() > 0


def test_layers_outside_the_modules_are_functional_layers() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8).double(), nn.ReLU(), nn.Linear(8, 3).double()]

    class Listed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

    expected = NRM(nn.Sequential(*layers).eval()).attribute(X, target=2)
    assert torch.allclose(NRM(Listed().eval()).attribute(X, target=2), expected, atol=1e-12)
    assert all(parameter.requires_grad for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_initial_states_are_constants(kind: type[nn.RNNBase]) -> None:
    class Started(nn.Module):
        def __init__(self, grad: bool) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.r, self.o, self.grad = kind(3, 4, batch_first=True).double(), nn.Linear(4, 2).double(), grad

        def forward(self, x: Tensor) -> Tensor:
            state = torch.ones(1, len(x), 4, dtype=x.dtype, requires_grad=self.grad)
            return self.o(self.r(x, (state, state) if kind is nn.LSTM else state)[0][:, -1])

    x = torch.randn(2, 5, 3, dtype=torch.float64)
    plain, other = (RelevanceMeasure(Started(grad).eval(), x, 1) for grad in (False, True))
    assert torch.allclose(other.marginal("input"), plain.marginal("input"))
    assert torch.allclose(other.sink("input", kind="constants"), plain.sink("input", kind="constants"))


def test_further_arguments_are_constants() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.o = nn.Linear(6, 5).double(), nn.Linear(10, 2).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.o(torch.cat([self.a(x), y], 1))

    y = drawn(4, 5)
    for extra in (y.clone().requires_grad_(), y.clone().requires_grad_() * 1):
        plain, other = (
            LayerNRM(Scaled().eval(), "a").attribute(X, target=1, additional_forward_args=tensor)
            for tensor in (y, extra)
        )
        assert torch.equal(plain, other)


def computed_in_another_thread(tensor: Tensor) -> Tensor:
    """Autograd numbers the nodes of each thread; these numbers are larger than those of this thread."""
    results: list[Tensor] = []

    def compute() -> None:
        for _ in range(3000):
            result = tensor.clone().requires_grad_() * 1.0
        results.append(result)

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("name", ["weight of F.linear", "matrix product", "shift", "difference", "scale", "stack"])
def test_what_another_thread_computed_is_a_constant(name: str) -> None:
    function, extra = FUNCTIONS[name]
    foreign = computed_in_another_thread(extra)
    plain, other = (RelevanceMeasure(Net(function, tensor).eval(), X, 1) for tensor in (extra, foreign))
    assert other.layers == plain.layers
    for layer in plain.layers:
        assert torch.equal(other.marginal(layer), plain.marginal(layer)), layer


@pytest.mark.parametrize("kind", ["plain", "leaf", "computed before"])
def test_buffers_are_constants(kind: str) -> None:
    net = Net(lambda h, w: h, X).eval()
    scale = drawn(5)
    buffer = scale.clone().requires_grad_(kind != "plain")
    net.register_buffer("scale", buffer * 1 if kind == "computed before" else buffer)
    net.function = lambda h, w: h * net.scale + net.scale
    expected = RelevanceMeasure(Net(lambda h, w: h * scale + scale, X).eval(), X, 1)
    mu = RelevanceMeasure(net, X, 1)
    assert mu.layers == expected.layers
    assert torch.equal(mu.marginal("input"), expected.marginal("input"))
    assert net.scale.requires_grad == (kind != "plain")


def test_weights_that_parameters_generate_are_those_of_a_layer() -> None:
    """A hypernetwork in the forward pass, a weight computed before, and a parametrized weight with its cache."""
    torch.manual_seed(4)
    generator, code = nn.Linear(2, 25).double(), nn.Parameter(drawn(2))
    weight = generator(code).view(5, 5)
    expected = RelevanceMeasure(Net(lambda h, w: functional.linear(h, w), weight.detach()).eval(), X, 1)
    inside = Net(lambda h, w: functional.linear(h, generator(code).view(5, 5)), X)
    inside.generator, inside.code = generator, code
    before = Net(lambda h, w: functional.linear(h, w), weight)
    for net in (inside, before):
        assert torch.allclose(RelevanceMeasure(net.eval(), X, 1).marginal("input"), expected.marginal("input"))
    net = Net(lambda h, w: h, X).eval()
    expected = RelevanceMeasure(net, X, 1)
    nn.utils.parametrizations.weight_norm(net.a)
    with nn.utils.parametrize.cached():
        net(X)
        assert torch.allclose(RelevanceMeasure(net, X, 1).marginal("input"), expected.marginal("input"))


class Pair(nn.Module):
    """Two inputs, the first of which it may overwrite."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.o, self.in_place = nn.Linear(6, 5).double(), nn.Linear(5, 3).double(), in_place

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.mul_(2).relu_() if self.in_place else torch.relu(x * 2)
        return self.o(torch.relu(self.a(x) + self.a(y) * 0.5))


def test_each_input_is_its_own_whatever_memory_it_shares() -> None:
    both = torch.cat([X, X], 1)
    expected = RelevanceMeasure(Pair().eval(), (X.clone(), X.clone()), 1)
    history = X.clone().requires_grad_() * 1.0
    for inputs in ((X, X), (both[:, :6], both[:, 6:]), (history, history)):
        for in_place in (False, True):
            before = inputs[0].detach().clone()
            mu = RelevanceMeasure(Pair(in_place).eval(), inputs, 1)
            for name in ("input[0]", "input[1]"):
                assert torch.allclose(mu.marginal(name), expected.marginal(name), atol=1e-12), (name, in_place)
            assert torch.equal(inputs[0], before)
    assert not torch.allclose(expected.marginal("input[0]"), expected.marginal("input[1]"))


def test_learned_queries_and_class_tokens_absorb() -> None:
    class Detector(nn.Module):
        def __init__(self, grad: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.o = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
            self.queries = [drawn(3, 5).requires_grad_(grad)]
            self.token = [drawn(1, 5).requires_grad_(grad)]

        def forward(self, x: Tensor) -> Tensor:
            queries = self.queries[0][None].expand(len(x), -1, -1)
            memory = torch.cat([self.token[0].expand(len(x), 1, -1), self.a(x)[:, None]], 1)
            return self.o(functional.scaled_dot_product_attention(queries, memory, memory).mean(1))

    plain, other = (RelevanceMeasure(Detector(grad).eval(), X, 1) for grad in (False, True))
    assert torch.equal(other.marginal("input"), plain.marginal("input"))
    assert torch.equal(other.sink("input", kind="constants"), plain.sink("input", kind="constants"))
    assert float(plain.sink("input", kind="constants").abs().min()) > 1e-3


@pytest.mark.parametrize("composite", [EpsilonPlus, NRMDefault])
def test_parameters_outside_of_the_model_are_constants_in_a_context(composite: type[Composite]) -> None:
    """Zennit's hooks know no inputs, so a parameter among the inputs, or any other leaf, has relevance."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8).double(), nn.ReLU(), nn.Linear(8, 3).double()]

    class Listed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

    def relevance(model: nn.Module, x: Tensor, by_keyword: bool = False) -> Tensor:
        with Normalized(composite()).context(model.eval()) as modified:
            output = modified(x=x) if by_keyword else modified(x)
            return torch.autograd.grad(output[:, 1].sum(), x)[0]

    expected = relevance(nn.Sequential(*layers), X.clone().requires_grad_())
    assert torch.allclose(relevance(Listed(), X.clone().requires_grad_()), expected, atol=1e-12)
    optimized = nn.Parameter(X.clone())
    assert torch.allclose(relevance(Listed(), optimized), expected, atol=1e-12)
    assert torch.allclose(relevance(Listed(), optimized, by_keyword=True), expected, atol=1e-12)
    assert all(parameter.requires_grad for layer in layers for parameter in layer.parameters())
