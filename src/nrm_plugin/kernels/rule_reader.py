"""Reading a Zennit rule on one call of a module as a kernel.

Three forms, tried in this order: the identity (``Pass``), branches on an affine module (every built-in rule), and
for everything else the function that hands relevance down, with column sums found by differentiating it.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, Hook, ParamMod
from zennit.rules import Epsilon, Gamma, Pass

from ..errors import NonlinearRuleError, UnsupportedRuleError
from ..model.affine import LINEAR_RULES, Call, Image, is_by_modifiers, overrides
from ..rules import Absolute, ConservingEpsilon, Relative
from .base import IdentityKernel, Kernel, Scale, VjpKernel, linear_in_relevance
from .branch_reader import branches_of


class PlainGradient(Hook):
    """The rule of a layer that a composite leaves uncovered, as Zennit treats it: the plain gradient."""


def wants_image(hook: Hook) -> bool:
    """Whether a rule runs the unmodified layer on its unmodified input, so that it need not be run again."""
    return type(hook) in (Epsilon, ConservingEpsilon)


def read_rule(
    hook: Hook,
    module: nn.Module,
    call: Call,
    inputs: Tensor,
    output: Tensor,
    where: str,
    image: Image | None = None,
    is_output_known: bool = True,
    scale: Scale | None = None,
) -> Kernel:
    """The kernel of a rule at one call.

    Args:
        hook: The rule, as a composite maps it.
        module: A shell of the module; it may be written to.
        call: How to run the module on its first input.
        inputs: That input, detached, ``(N, *in)``.
        output: What it returned, ``(N, *out)``.
        where: Name of the layer, for messages.
        image: What it returned without its bias, where that is known.
        is_output_known: Whether ``output`` has the values that the module returns, not only their shape.
        scale: The normalization of its columns, taken into the kernel where that saves work.

    Raises:
        UnsupportedRuleError: The rule changes how the module runs, or fits no form.
    """
    if overrides(hook, "pre_forward") or overrides(hook, "post_forward") or overrides(hook, "pre_backward"):
        raise UnsupportedRuleError(
            f"the rule {type(hook).__name__} of layer {where!r} overrides Zennit's own forward hooks, so it cannot be "
            "read as a kernel. Override `forward` and `backward` only, or write the rule with BasicHook's modifiers."
        )
    if type(hook) is Pass:
        if inputs.shape != output.shape:
            raise UnsupportedRuleError(
                f"layer {where!r} ({type(module).__name__}) has the rule Pass, but turns shape {tuple(inputs.shape)} "
                f"into {tuple(output.shape)}. Give it a rule that hands relevance to its inputs."
            )
        return IdentityKernel()
    if type(hook) is PlainGradient:
        return _plain_gradient(module, call, inputs)
    if is_by_modifiers(hook):
        reader = (hook, module, call, inputs, output, image, is_output_known, scale)
        return branches_of(*reader) or _modifiers(hook, module, call, inputs)
    if not is_output_known:
        with torch.no_grad():
            output = call(module, inputs)
    return _backward_of(hook, module, call, inputs, output)


def reads_output(hook: Hook) -> bool:
    """Whether a rule may read the values of the unmodified output, not only those of its own modified layers."""
    return type(hook) not in (*LINEAR_RULES, Absolute, ConservingEpsilon, Relative) or type(hook) is Gamma


def check_linear(kernel: Kernel, hook: Hook, output: Tensor, where: str) -> None:
    """Raises unless the rule is linear in the relevance that it hands down.

    Raises:
        NonlinearRuleError: With the rule and the layer.
    """
    if not linear_in_relevance(kernel, output[:1].expand_as(output)):
        raise NonlinearRuleError(
            f"the rule {type(hook).__name__} of layer {where!r} is not linear in the relevance that it hands down: "
            "relevance of opposite sign is treated differently. Such a rule (deconvnet, guided backpropagation) gives "
            "no measure over walks. Choose a composite whose rules are linear, such as EpsilonPlus."
        )


def _mapped(hook: BasicHook, relevance: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    mapped = hook.gradient_mapper(relevance, outputs)
    return [mapped] if isinstance(mapped, Tensor) else list(mapped)


def _modifiers(hook: BasicHook, module: nn.Module, call: Call, inputs: Tensor) -> VjpKernel:
    """Any rule written with modifiers, on any module."""
    sources = [modifier(inputs).detach().requires_grad_() for modifier in hook.input_modifiers]
    outputs = []
    with torch.enable_grad():
        for source, param_mod, out_mod in zip(sources, hook.param_modifiers, hook.output_modifiers, strict=True):
            with ParamMod.ensure(param_mod)(module) as modified:
                outputs.append(out_mod(call(modified, source)))

    def pull(relevance: Tensor) -> tuple[Tensor, ...]:
        mapped = _mapped(hook, relevance, outputs)
        gradients = torch.autograd.grad(outputs, sources, mapped, True, torch.is_grad_enabled())
        return (hook.reducer(sources, gradients),)

    return VjpKernel(pull)


def _plain_gradient(module: nn.Module, call: Call, inputs: Tensor) -> VjpKernel:
    source = inputs.detach().requires_grad_()
    with torch.enable_grad():
        output = call(module, source)

    def pull(relevance: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, source, relevance, True, torch.is_grad_enabled())

    return VjpKernel(pull)


def _backward_of(hook: Hook, module: nn.Module, call: Call, inputs: Tensor, output: Tensor) -> VjpKernel:
    """A rule with a ``backward`` of its own; it may read the plain gradient and what its ``forward`` stored."""
    gradient = _plain_gradient(module, call, inputs)
    if _takes_kwargs(hook):
        hook.forward(module, (inputs,), {}, output)
    else:
        hook.forward(module, (inputs,), output)

    def pull(relevance: Tensor) -> tuple[Tensor, ...]:
        plain = gradient.function(relevance)
        handed = hook.backward(module, plain, (relevance,))
        if handed is None:
            return plain
        first = handed[0] if isinstance(handed, (tuple, list)) else handed
        return plain if first is None else (first,)

    return VjpKernel(pull)


def _takes_kwargs(hook: Hook) -> bool:
    """Zennit 1 hands ``(module, args, kwargs, output)`` to hooks not written for ``(module, input, output)``."""
    return len(inspect.signature(hook.forward).parameters) == 4
