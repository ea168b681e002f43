"""Functions of the class ``autograd.Function``: elementwise ones pass relevance as activations do, others raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.rules import Epsilon, Pass

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure, coverage
from nrm_plugin.errors import UnsupportedOperationError
from tests.conftest import in_turn
from tests.functional.kernel_matrices import Apply, draw


class Spike(Function):
    """A step with a surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (1 + 10 * ctx.saved_tensors[0].abs()) ** 2


class Window(Spike):
    """The same with a gradient that is zero for most elements."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0].abs() < 0.1)


class Rounded(Function):
    """A quantizer with a straight-through gradient; its context is set up apart, and it takes a number of bits."""

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return (x * 2**bits).round() / 2**bits

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Reversal(Function):
    """Returns its input, and reverses its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


class Sort(Function):
    """A softplus that has the name of an operation of torch, and returns a mask as well."""

    @staticmethod
    def forward(ctx: Any, beta: float, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = x > 0
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(x)
        return nn.functional.softplus(x, beta), mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[None, Tensor]:
        return None, gradient * ctx.saved_tensors[0].sigmoid()


class InPlace(Function):
    """A leaky ReLU that overwrites its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x > 0)
        return x.mul_(torch.where(x > 0, 1.0, 0.1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.where(ctx.saved_tensors[0], gradient, 0.1 * gradient)


class NoBackward(Function):
    """A function without a backward pass, for inference only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise NotImplementedError


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "spike": Spike.apply,
    "spike with a window": Window.apply,
    "straight-through": lambda x: Rounded.apply(x, 3),
    "two calls of one input": lambda x: Rounded.apply(x, 0) + Rounded.apply(x, 3),
    "gradient reversal": lambda x: Reversal.apply(x, 0.5),
    "softplus and a mask": lambda x: Sort.apply(2.0, x)[0],
    "in place": lambda x: InPlace.apply(x * 1),
    "no backward": NoBackward.apply,
    "on another": lambda x: Spike.apply(Reversal.apply(x, 2.0)),
}


class Net(nn.Module):
    """Two layers around a function, which a mode would see if it were called as an activation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 8), nn.Linear(8, 2), function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.function(self.a(x)))
        return result


def net(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(5)
    return Net(function).to(dtype).eval()


class Shifted(nn.Module):
    """An activation with the values of another function, as an oracle: a sum with a constant passes relevance on."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.function(x.detach().clone()) - x).detach()


@pytest.mark.parametrize(("name", "composite"), in_turn(ELEMENTWISE, [NRMAbsolute, EpsilonPlus]))
def test_an_elementwise_function_passes_relevance_as_an_activation_does(name, composite):
    function, x = ELEMENTWISE[name], draw(3, 4)
    mu = RelevanceMeasure(net(function), x, 1, composite=composite())
    expected = RelevanceMeasure(net(Shifted(function)), x, 1, composite=composite())
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
    torch.testing.assert_close(mu.sink("input"), expected.sink("input"))
    assert bool(mu.marginal("input").any())
    for k in range(3):
        alone = RelevanceMeasure(net(function), x[k : k + 1], 1, composite=composite())
        torch.testing.assert_close(alone.marginal("input"), mu.marginal("input")[k : k + 1])
    assert coverage(net(function), x).is_complete


@pytest.mark.parametrize("name", ["spike", "straight-through", "gradient reversal", "on another", "in place"])
def test_zennits_own_pass_is_the_measure(name):
    """Autograd runs the node of the function itself, and its gradient is replaced."""
    model, x = net(ELEMENTWISE[name]), draw(3, 4)
    composite = Normalized(EpsilonPlus(), residual="sink")
    with Gradient(model, composite) as attributor:
        _, relevance = attributor(x.clone(), torch.eye(2).double()[[1, 1, 1]])
    torch.testing.assert_close(relevance, RelevanceMeasure(model, x, 1, composite=composite).marginal("input"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_have_no_rounding_error_in_any_format(dtype):
    for function in (ELEMENTWISE["spike"], ELEMENTWISE["softplus and a mask"]):
        model = Apply(lambda x, f=function: f(x.to(dtype)).to(torch.float32)).eval()
        mu = RelevanceMeasure(model, draw(3, 4).float(), start=torch.ones(3, 4))
        torch.testing.assert_close(mu.marginal("input"), torch.full((3, 4), 0.25))


def mixing(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None) -> Any:
    """A function whose backward is its derivative, or another one."""

    class Mixing(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if backward is not None:
                return backward(gradient)
            with torch.enable_grad():
                leaf = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(forward(leaf), leaf, gradient)[0]

    return Mixing.apply


def one_coupling(x: Tensor) -> Tensor:
    result = x.clone()
    result[0, 5] = x[0, 5] + 1e-3 * x[0, 2]
    return result


def coupled_where_positive(x: Tensor) -> Tensor:
    last = torch.cat([x[:, :-1], x[:, -1:] + 0.1 * x[:, :1] * (x[:, 1:2] > -100).to(x)], 1)
    return torch.where(x.abs().amax() < 100, last, x)


def sparsemax(x: Tensor) -> Tensor:
    ordered = x.sort(-1, descending=True)[0]
    total, rank = ordered.cumsum(-1) - 1, torch.arange(1, x.shape[-1] + 1).to(x)
    size = (rank * ordered > total).sum(-1, keepdim=True)
    return (x - total.gather(-1, size - 1) / size).clamp(min=0)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": mixing(lambda x: x.roll(1, -1)),
    "shift of the batch": mixing(lambda x: x.roll(1, 0)),
    "permutation": mixing(lambda x: x[:, torch.tensor([0, 1, 2, 3, 4, 5, 7, 6])]),
    "one coupling": mixing(one_coupling),
    "coupling by value": mixing(coupled_where_positive),
    "mean": mixing(lambda x: x - 1e-2 * x.mean()),
    "softmax": mixing(lambda x: x.softmax(-1)),
    "sparsemax": mixing(sparsemax),
    "shift with a straight-through gradient": mixing(lambda x: x.roll(1, -1), lambda g: g),
    "one of several, straight-through": mixing(lambda x: (x == x.amax(-1, keepdim=True)).to(x), lambda g: g),
    "identity with a gradient that mixes": mixing(lambda x: x.clone(), lambda g: g.flip(-1)),
    "transposed": lambda x: (
        mixing(lambda x: x.T.contiguous())(x @ torch.ones(8, len(x)).to(x)) @ torch.ones(len(x), 8).to(x)
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_function_that_mixes_elements_raises_where_relevance_arrives(name):
    model, x = net(MIXING[name]), draw(3, 4)
    mu = RelevanceMeasure(model, x, 1)
    with pytest.raises(UnsupportedOperationError, match=r"(?s)autograd.Function 'mixing.*Mixing'.*mixes elements"):
        mu.marginal("input")
    assert not coverage(model, x).is_complete
    with (
        Gradient(model, Normalized(EpsilonPlus())) as attributor,
        pytest.raises(UnsupportedOperationError, match="mixes elements"),
    ):
        attributor(x.clone(), torch.eye(2).double()[[1, 1, 1]])


class Two(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class Halves(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu(), (-x).relu()

    @staticmethod
    def backward(ctx: Any, one: Tensor, two: Tensor) -> Tensor:
        return one - two


class Stop(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def once() -> Callable[[Tensor], Tensor]:
    """A function whose forward fails for any values but the first."""
    known: list[Tensor] = []

    class Once(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            known.append(x.detach().clone())
            if not torch.equal(known[0], x):
                raise RuntimeError("sizes do not match")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    return lambda x: Once.apply(x)


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "two inputs": (lambda x: Two.apply(x, x.relu()), "has 2 inputs that carry relevance"),
    "another shape": (lambda x: mixing(lambda x: x[:, :4])(x).repeat(1, 2), r"turns shape \(3, 8\) into \(3, 4\)"),
    "no gradient": (Stop.apply, "no gradient|mixes"),
    "a broken backward": (
        mixing(lambda x: x.clone(), lambda g: g.no_such_method()),
        "has a backward that raises AttributeError",
    ),
    "a forward for some values alone": (once(), "has a forward that raises RuntimeError"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_raise_and_say_why(name):
    function, reason = OTHERS[name]
    with pytest.raises(UnsupportedOperationError, match=rf"(?s){reason}.*in a separate module.*layer_map"):
        RelevanceMeasure(net(function), draw(3, 4), 1).marginal("input")


def test_a_function_of_several_outputs_raises():
    model, x = net(lambda x: torch.cat(Halves.apply(x), 1)[:, :8]), draw(3, 4)
    with pytest.raises(UnsupportedOperationError, match=r"(?s)autograd\.Function Halves.*to a separate module"):
        RelevanceMeasure(model, x, 1)
    with (
        Gradient(model, Normalized(EpsilonPlus())) as attributor,
        pytest.raises(UnsupportedOperationError, match=r"'Halves'.*returns several tensors"),
    ):
        attributor(x.clone(), torch.eye(2).double()[[1, 1, 1]])


def test_a_function_that_writes_to_a_part_of_a_tensor_raises():
    def run(x: Tensor) -> Tensor:
        x = x * 1
        InPlace.apply(x[:, :4])
        return x

    with pytest.raises(UnsupportedOperationError, match=r"writes in place to a part.*apply\(part.clone\(\)\)"):
        RelevanceMeasure(net(run), draw(3, 4), 1)
    RelevanceMeasure(net(lambda x: torch.cat([InPlace.apply(x[:, :4].clone()), x[:, 4:]], 1)), draw(3, 4), 1).marginal(
        "input"
    )


def test_a_function_that_writes_in_place_leaves_what_other_steps_saved():
    def run(x: Tensor) -> Tensor:
        x = x * 1
        y = x * x.flip(1).sigmoid() + 0.5 * x
        return InPlace.apply(x) + y

    def apart(x: Tensor) -> Tensor:
        x = x * 1
        y = x * x.flip(1).sigmoid() + 0.5 * x
        return nn.functional.leaky_relu(x, 0.1) + y

    x = draw(3, 4)
    expected = RelevanceMeasure(net(apart), x, 1, composite=NRMAbsolute()).marginal("input")
    torch.testing.assert_close(RelevanceMeasure(net(run), x, 1, composite=NRMAbsolute()).marginal("input"), expected)


class Roll(Function):
    """Has the name of an operation of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.roll(1, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.roll(-1, -1)


class Layer(nn.Module):
    """The function as a module, which is the remedy that the error message gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_the_remedy_works():
    x = draw(3, 4)
    by_pass = NRMAbsolute(layer_map=[(Layer, Pass())])
    mu = RelevanceMeasure(net(Layer(MIXING["sparsemax"])), x, 1, composite=by_pass)
    expected = RelevanceMeasure(net(Shifted(MIXING["sparsemax"])), x, 1, composite=NRMAbsolute())
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
    linear = NRMAbsolute(layer_map=[(Layer, Epsilon(1e-9))])
    mu = RelevanceMeasure(net(Layer(Roll.apply)), x, 1, composite=linear)
    expected = RelevanceMeasure(net(lambda x: x.roll(1, -1)), x, 1, composite=NRMAbsolute())
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"), atol=1e-7, rtol=1e-7)


def test_a_function_may_feed_a_gate():
    x = draw(3, 4)
    mu = RelevanceMeasure(net(lambda x: x * MIXING["softmax"](x).sigmoid()), x, 1)
    torch.testing.assert_close(
        mu.marginal("input"), RelevanceMeasure(net(lambda x: x * x.softmax(-1).sigmoid()), x, 1).marginal("input")
    )
