r"""Rules of a composite, applied to differences: :math:`a \to \Delta a`, :math:`z \to \Delta z`, without biases.

The rules apply to layers with weights, sums and averages. All other operations use secant (finite-difference) slopes.

Source: docs/differences.md.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..kernels.base import Kernel
from ..kernels.forward_state import Saved
from ..kernels.layer_call import LayerCall
from ..kernels.rule_reader import read_rule
from ..model.affine_layers import LAYERS, layer_like
from .averaging import POOLS
from .differences import DifferenceCall
from .function_call import FunctionCall, Slot
from .registry import KERNELS, KernelFactory
from .rule_lookup import RuleLookup
from .weighted_functions import layer_call

_SUMS = ("add", "sub", "rsub")
_PRODUCTS = ("matmul", "einsum", "tensordot")


def on_differences(both: DifferenceCall) -> FunctionCall:
    """Returns a copy of a call in which the input values are replaced by their differences."""
    deltas = [one.delta if one.is_zero is None else one.delta.masked_fill(one.is_zero, 0.0) for one in both.differences]
    pairs = zip(both.call.inputs, deltas, strict=True)
    return replace(both.call, inputs=tuple(replace(item, saved=Saved(delta, values=False)) for item, delta in pairs))


def has_rule(call: FunctionCall) -> bool:
    """Returns True if the composite has a rule for a call of a layer, sum, average, or product with a constant."""
    rules = call.settings.rules
    if call.name in LAYERS:
        weight = call.argument(1, "weight")
        is_layer = len(call.inputs) == 1 and isinstance(weight, Tensor) and isinstance(call.argument(0, "input"), Slot)
        return is_layer and rules.of_weight(weight, layer_like(call.name), call.path) is not None
    if call.name in _PRODUCTS:
        return len(call.inputs) == 1 and has_any_rule(rules)
    if call.name in _SUMS:
        return len(call.inputs) > 1 and has_any_rule(rules)
    return call.name in POOLS and len(call.inputs) == 1 and rules.of_module(nn.AvgPool2d(1)) is not None


def has_any_rule(rules: RuleLookup) -> bool:
    """Returns True if a composite has a rule for linear layers or convolutions."""
    layers = (layer_like("linear"), layer_like("conv2d"))
    return any(rules.of_module(layer) is not None for layer in layers)


def ruled(both: DifferenceCall) -> Kernel:
    """Returns the kernel of the composite's rule, applied to differences."""
    call = on_differences(both)
    if call.name in LAYERS:
        layer = layer_call(_without_bias(call), both.after)
        assert isinstance(layer, LayerCall)
        return read_rule(layer, None)
    return of_own(KERNELS[call.name], both)


def _without_bias(call: FunctionCall) -> FunctionCall:
    args = tuple(None if number == 2 else value for number, value in enumerate(call.args))
    return replace(call, args=args, kwargs={key: value for key, value in call.kwargs.items() if key != "bias"})


def of_own(factory: KernelFactory, both: DifferenceCall) -> Kernel:
    """Returns the kernel that a factory creates when it receives differences as input values."""
    return factory(on_differences(both))


__all__ = ["has_any_rule", "has_rule", "of_own", "on_differences", "ruled"]
