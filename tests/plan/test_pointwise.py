"""Input gradients of convolutions with kernels of one pixel, which plans compute as matrix products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from nrm_plugin import Plan
from nrm_plugin.plan.pointwise import PointwiseProducts
from nrm_plugin.plan.trace import Trace, Value

aten = torch.ops.aten


def form_of(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.shape, tensor.stride(), 0, tensor.dtype, tensor.device, False, False)


def rewritten(layer: nn.Module, relevance: Tensor, source: Tensor) -> tuple[list[object], Tensor]:
    """Rewrites the input gradient of a layer. Returns the operators and the result of the new operations."""
    weight = layer.weight.detach()
    tensors = {0: relevance, 1: source, 2: weight, 3: torch.empty_like(source)}
    trace = Trace(constants={2: weight}, forms={number: form_of(one) for number, one in tensors.items()}, count=4)
    options = (list(layer.stride), list(layer.padding), list(layer.dilation), False, [0], layer.groups)
    arguments = (Value(0), Value(1), Value(2), None, *options, [True, False, False])
    one = trace.operation(aten.convolution_backward.default, arguments, (3, None, None))
    one.is_sequence = True
    constants = dict(trace.constants)
    operations = PointwiseProducts(trace, constants).rewritten([one])
    values = {0: relevance, 1: source, **constants}
    for step in operations:
        args, kwargs = step.call.arguments([values[number] for number in step.reads])
        result = step.function(*args, **kwargs)
        for number, item in zip(step.results, result if step.is_sequence else [result], strict=True):
            if number is not None:
                values[number] = item
                assert trace.forms[number][:2] == (item.shape, item.stride())
    return [step.function for step in operations], values[3]


def gradient(layer: nn.Module, relevance: Tensor, source: Tensor) -> Tensor:
    """The input gradient by automatic differentiation."""
    leaf = source.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf), leaf, relevance)[0]


def functions_of_the_gradient(layer: nn.Module, shape: tuple[int, ...]) -> list[object]:
    """Rewrites a gradient of random values, compares it, and returns the operators that compute it."""
    torch.manual_seed(0)
    layer = layer.double()
    source = torch.randn(shape, dtype=torch.float64)
    relevance = torch.randn_like(layer(source))
    functions, result = rewritten(layer, relevance, source)
    torch.testing.assert_close(result, gradient(layer, relevance, source))
    return functions


CASES = {
    "one sample": (nn.Conv2d(5, 4, 1), (1, 5, 6, 7)),
    "two samples": (nn.Conv2d(5, 4, 1), (2, 5, 6, 7)),
    "one pixel": (nn.Conv2d(5, 4, 1), (1, 5, 1, 1)),
    "one pixel of three samples": (nn.Conv2d(5, 4, 1), (3, 5, 1, 1)),
    "steps of two": (nn.Conv2d(5, 4, 1, stride=2), (1, 5, 7, 8)),
    "steps of two and one": (nn.Conv2d(5, 4, 1, stride=(2, 1)), (1, 5, 7, 8)),
    "steps of three, two samples": (nn.Conv2d(5, 4, 1, stride=3), (2, 5, 8, 7)),
    "a single step": (nn.Conv2d(5, 4, 1, stride=4), (2, 5, 3, 4)),
    "one dimension": (nn.Conv1d(5, 4, 1, stride=2), (2, 5, 9)),
    "three dimensions": (nn.Conv3d(5, 4, 1, stride=(1, 2, 2)), (1, 5, 3, 4, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_product_is_the_input_gradient(name: str) -> None:
    assert aten.convolution_backward.default not in functions_of_the_gradient(*CASES[name])


OTHERS = {
    "padding": (nn.Conv2d(6, 4, 1, padding=1), (1, 6, 5, 5)),
    "groups": (nn.Conv2d(6, 4, 1, groups=2), (1, 6, 5, 5)),
    "a larger kernel": (nn.Conv2d(6, 4, (1, 2)), (1, 6, 5, 5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_kept(name: str) -> None:
    assert functions_of_the_gradient(*OTHERS[name]) == [aten.convolution_backward.default]


def test_relevance_in_another_memory_layout_is_kept() -> None:
    layer, source = nn.Conv2d(5, 4, 1), torch.randn(2, 5, 6, 6)
    relevance = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    functions, _ = rewritten(layer, relevance, source)
    assert functions == [aten.convolution_backward.default]


@pytest.mark.parametrize("samples", [1, 2])
def test_plans_take_matrix_products_without_more_memory(samples: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 30, 1, stride=2), nn.ReLU(), nn.Conv2d(30, 20, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(20, 20, 1), nn.Flatten()).double().eval()
    plan = Plan(net, torch.rand(samples, 3, 5, 5, dtype=torch.float64), composite=EpsilonPlus())
    for _ in range(3):
        mu = plan(torch.rand(samples, 3, 5, 5, dtype=torch.float64), 1)
        marginals = mu.marginal(mu.layers)
    leaves = plan(torch.ones(samples, 3, 5, 5, dtype=torch.float64), 1)
    assert set(leaves.marginal(leaves.layers)) == set(marginals)
    (program,) = {
        id(one.program): one.program for some in plan._forms.values() for one in some._programs.values()
    }.values()
    functions = [one.function for one in program.operations]
    assert aten.convolution_backward.default not in functions
    assert functions.count(aten.mm.default if samples == 1 else aten.bmm.default) >= 3
    views = [one for one in program.constants.values() if one.ndim in (2, 3) and not one.is_contiguous()]
    memories = {one.untyped_storage().data_ptr() for one in program.constants.values() if one.ndim == 4}
    assert views
    assert all(one.untyped_storage().data_ptr() in memories for one in views), "matrices are views of the weights"
