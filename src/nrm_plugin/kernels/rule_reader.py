"""Conversion of a Zennit rule into a kernel, for one call of a module.

Three forms are tried in turn: the identity (``Pass``), a sum over branches on an affine module (all built-in rules),
and an arbitrary linear function of the relevance, whose derivative gives the column sums.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, Hook, ParamMod
from zennit.rules import Pass

from ..errors import NonlinearRuleError, UnsupportedRuleError
from ..model.autocast import current
from ..model.trace_guards import audit
from .base import IdentityKernel, Kernel
from .form import Form
from .forward_state import Saved
from .known_rules import is_by_modifiers, own_copy
from .layer_call import LayerCall, forward
from .mapper_factors import mapped
from .normalization import Normalization
from .rule_branch_reader import branch_kernel
from .vjp_kernel import VjpKernel


class PlainGradient(Hook):
    """Rule of layers to which the composite assigns none: the gradient, as in Zennit."""


def read_rule(call: LayerCall, normalization: Normalization | None = None) -> Kernel:
    """Returns the kernel of a rule for one call.

    Args:
        call: Recorded call of the layer.
        normalization: The normalization of the columns. The kernel includes the gain if this saves computation.

    Raises:
        UnsupportedRuleError: If the rule changes how the module runs, or has none of the three forms.
    """
    rule = call.rule
    if _replaces_hooks(type(rule)):
        raise UnsupportedRuleError(
            f"the rule {type(rule).__name__} of layer {call.name!r} overrides Zennit's own forward hooks, so it cannot "
            "be read as a kernel. Override `forward` and `backward` only, or write the rule with BasicHook's modifiers."
        )
    if type(rule) is Pass:
        return _identity(call)
    if type(rule) is PlainGradient:
        return _plain_gradient(call)
    if is_by_modifiers(rule):
        return branch_kernel(call, rule, normalization) or _by_modifiers(call, rule)
    return _by_backward(call)


def _replaces_hooks(kind: type[Hook]) -> bool:
    """Returns True if a class of rules overrides the hooks by which Zennit runs a rule."""
    return (
        kind.pre_forward is not Hook.pre_forward
        or kind.post_forward is not Hook.post_forward
        or kind.pre_backward is not Hook.pre_backward
    )


def read_rule_at(rule: Hook, module: nn.Module, inputs: Tensor, name: str) -> Kernel:
    """Returns the kernel of a rule for a module at a given input, without a recorded call.

    Args:
        rule: The rule; it is copied.
        module: The module, such as :class:`~nrm_plugin.model.affine_layers.Weightless`; it may be modified.
        inputs: The input of the module, of shape ``(N, *in)``.
        name: Layer name, for error messages.
    """
    with torch.no_grad():
        output = module.forward(inputs)
    # No forward pass is in progress that could overwrite these tensors.
    saved = Saved(inputs, values=False), Saved(output, values=False)
    form, precision = Form(output), current(output.device)
    return read_rule(LayerCall(own_copy(rule), module, forward, saved[0], form, name, saved[1], precision=precision))


def check_linear(kernel: Kernel, call: LayerCall) -> None:
    """Raises an error if a rule is not linear in the relevance.

    Raises:
        NonlinearRuleError: If the rule is not linear; the message names the rule and the layer.
    """
    if not is_linear_in_relevance(kernel, call.like[:1].expand_as(call.like)):
        raise NonlinearRuleError(
            f"the rule {type(call.rule).__name__} of layer {call.name!r} is not linear in the relevance: it treats "
            "positive and negative relevance differently. Such a rule (deconvnet, guided backpropagation) does not "
            "define a measure over walks. Choose a composite whose rules are linear, such as EpsilonPlus."
        )


def is_linear_in_relevance(kernel: Kernel, like: Tensor) -> bool:
    """Returns True if ``kernel.pull`` is linear, tested on random relevance of the shape of ``like``."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, *like.shape), generator=generator, dtype=like.dtype).to(like.device)
    first, second = noise[:1], noise[1:]
    kernel.complete_for(None)
    with torch.no_grad(), audit():
        combined = kernel.pull(first - 2 * second)
        apart = [one - 2 * two for one, two in zip(kernel.pull(first), kernel.pull(second), strict=True)]
        tolerance = math.sqrt(torch.finfo(like.dtype).eps)
        return all(
            bool((left - right).abs().max() <= tolerance * max(1e-30, float(right.abs().max())))
            for left, right in zip(combined, apart, strict=True)
            if left.numel()
        )


def _identity(call: LayerCall) -> IdentityKernel:
    if call.saved_input.shape != call.form.shape:
        raise UnsupportedRuleError(
            f"layer {call.name!r} ({type(call.module).__name__}) has the rule Pass, but maps shape "
            f"{tuple(call.saved_input.shape)} to {tuple(call.form.shape)}. Assign it a rule that propagates relevance "
            "to its inputs."
        )
    return IdentityKernel()


def _by_modifiers(call: LayerCall, rule: BasicHook) -> VjpKernel:
    """Returns the kernel of a rule that is defined by modifiers, for any module."""
    sources = [modifier(call.input).detach().requires_grad_() for modifier in rule.input_modifiers]
    outputs = []
    with torch.enable_grad():
        for source, param_mod, out_mod in zip(sources, rule.param_modifiers, rule.output_modifiers, strict=True):
            with ParamMod.ensure(param_mod)(call.module) as modified:
                outputs.append(out_mod(call.run(modified, source)))

    def pull(relevance: Tensor) -> tuple[Tensor, ...]:
        products = mapped(rule, relevance, outputs)
        gradients = torch.autograd.grad(outputs, sources, products, True, torch.is_grad_enabled())
        return (rule.reducer(sources, gradients),)

    return VjpKernel(pull)


def _plain_gradient(call: LayerCall) -> VjpKernel:
    source = call.input.detach().requires_grad_()
    with torch.enable_grad():
        output = call.run(call.module, source)

    def pull(relevance: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, source, relevance, True, torch.is_grad_enabled())

    return VjpKernel(pull)


def _by_backward(call: LayerCall) -> VjpKernel:
    """Returns the kernel of a rule with a custom ``backward``, which may use the gradient and its own state."""
    rule, module, inputs, output = call.rule, call.module, call.input, call.output
    if not call.is_output_known:
        with torch.no_grad():
            output = call.run(module, inputs)
    gradient = _plain_gradient(call)
    if _takes_kwargs(rule):
        rule.forward(module, (inputs,), {}, output)
    else:
        rule.forward(module, (inputs,), output)

    def pull(relevance: Tensor) -> tuple[Tensor, ...]:
        plain = gradient.function(relevance)
        returned = rule.backward(module, plain, (relevance,))
        if returned is None:
            return plain
        first = returned[0] if isinstance(returned, (tuple, list)) else returned
        return plain if first is None else (first,)

    return VjpKernel(pull)


def _takes_kwargs(rule: Hook) -> bool:
    """Returns True if ``rule.forward`` takes ``(module, args, kwargs, output)``, as in Zennit 1."""
    return len(inspect.signature(rule.forward).parameters) == 4
