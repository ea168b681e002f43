"""Validation of a model before it is recorded: its class, device, dtype, parameters and training mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary
from zennit.core import BasicHook, Hook

from ..errors import GradModeError, InputError, ModelStateError, RandomnessWarning, UnsupportedRuleError, warn
from .devices import random_states
from .model_protection import named_tensors, values_state
from .quantized import plain_tensors
from .shapes_without_values import is_valueless
from .trace_guards import unwatched

RANDOM = {"torchvision": ("StochasticDepth", "p"), "timm": ("DropPath", "drop_prob")}
"""Class name and drop-rate attribute of the stochastic-depth layer in each package, keyed by package."""

MODES = {
    "batch_norm": 5,
    "rrelu": 3,
    **dict.fromkeys("dropout alpha_dropout feature_dropout feature_alpha_dropout".split(), 2),
    **dict.fromkeys("dropout1d dropout2d dropout3d".split(), 2),
}
"""Position of the argument ``training`` of functions that draw random numbers or mix samples in training mode."""


def unwrapped(model: Any) -> Any:
    """Returns the module inside a non-module wrapper, such as nnsight's. Returns any other model unchanged."""
    inner = None if isinstance(model, (nn.Module, type)) else getattr(model, "_module", None)
    return inner if isinstance(inner, nn.Module) else model


def check_module(model: Any) -> None:
    """Raises :class:`InputError` if the model is not a ``torch.nn.Module``."""
    if isinstance(model, nn.Module):
        return
    what, remedy = f"{type(model).__name__}", "For a function, wrap it in a module that contains its layers."
    if isinstance(model, type) and issubclass(model, nn.Module):
        what, remedy = f"the class {model.__name__}", f"Pass an instance: {model.__name__}(…)."
    raise InputError(f"the model must be a torch.nn.Module, to whose layers rules are assigned, got {what}. {remedy}")


def check_model(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Raises an error if the model cannot be recorded on these inputs.

    Raises:
        InputError: If the device or dtype differs between the model and the inputs.
        ModelStateError: If the model is in training mode, still has hooks from a composite, is compiled, or has invalid
            weights.
    """
    check_untransformed(tensors)
    modules = dict(model.named_modules())
    check_hookable(modules)
    for name, module in modules.items():
        _check_mode(name, module)
    check_unhooked(modules, "Construct the measure outside `composite.context(model)`, and pass `composite=`.")
    own = named_tensors(model)
    is_offloaded = any("_hf_hook" in module.__dict__ for module in modules.values())
    for name, parameter in own:
        _check_mutable(name, parameter)
        if isinstance(parameter, nn.Parameter):
            _check_parameter(name, parameter, is_offloaded)
    floating = [tensor for _, tensor in own if tensor.is_floating_point()]
    if is_valueless():  # weights may be on device meta, and run on the device of the inputs
        floating = [tensor for tensor in floating if tensor.device.type != "meta"]
    for tensor in tensors:
        if floating and tensor.device not in {parameter.device for parameter in floating}:
            raise InputError(
                f"the input is on {tensor.device}, the model on {floating[0].device}. Move one: "
                f"`inputs.to({str(floating[0].device)!r})`."
            )
        if floating and tensor.dtype not in {parameter.dtype for parameter in floating}:
            raise InputError(
                f"the input has dtype {tensor.dtype}, the model {floating[0].dtype}. Convert one of them: "
                "`inputs.double()` and `model.double()`, or `.float()` for both."
            )


@contextmanager
def check_drawn(model: nn.Module, note: Callable[[], None]) -> Iterator[None]:
    """Context manager that checks whether the model draws random numbers inside it.

    Args:
        model: Model whose random draws are checked.
        note: Callback for random numbers that are drawn in evaluation mode.

    Raises:
        ModelStateError: If the model draws random numbers while a module is in training mode.
    """
    with unwatched():
        before = random_states()
    yield
    with unwatched():
        is_drawn = not all(map(torch.equal, before, random_states()))
    if not is_drawn:
        return
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if not training:
        note()
    else:
        listed = ", ".join(map(repr, training[:3])) + (", …" if len(training) > 3 else "")
        raise ModelStateError(
            f"the model draws random numbers, and some of its modules are in training mode ({listed}), so the measure "
            "would not describe a fixed network. Call `model.eval()`."
        )


def warn_of_draws(calls: Sequence[str] | None) -> None:
    """Warns that the model draws random numbers in evaluation mode. Names the functions that may draw them."""
    if calls is None:  # none were drawn
        return
    names = list(dict.fromkeys(calls))
    listed = f": {', '.join(names[:3])}{', …' if len(names) > 3 else ''}" if names else ""
    warn(
        f"the model draws random numbers although it is in evaluation mode{listed}. The measure describes a single "
        "draw, which depends on torch's random state and is reused in all of its passes. Set the state by "
        "torch.manual_seed(), average over several states, or make the model deterministic.",
        RandomnessWarning,
    )


def check_unhooked(modules: Mapping[str, nn.Module], remedy: str) -> None:
    """Raises :class:`ModelStateError` if a layer has hooks of another composite. They would interfere with ours."""
    for name, module in modules.items():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(getattr(hook, "__self__", None), Hook):
                raise ModelStateError(f"{_layer(name, module)} already has hooks of a Zennit composite. {remedy}")


def check_unpatched() -> None:
    """Raises :class:`UnsupportedRuleError` if another package has replaced Zennit's relevance propagation.

    For example, LXT's ``monkey_patch_zennit`` replaces it permanently for the whole process.
    """
    for method in (BasicHook.forward, BasicHook.backward):
        if method.__module__ != "zennit.core":
            raise UnsupportedRuleError(
                f"zennit.core.BasicHook.{method.__name__} was replaced by {method.__module__}, as LXT's "
                "monkey_patch_zennit() does: gradients are then relevance divided by activation, which gives wrong "
                "numbers when mixed with Zennit's convention. The patch cannot be undone, so run this in another "
                "process than the one that calls monkey_patch_zennit(). LXT without that call is supported."
            )


def check_function(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Raises :class:`ModelStateError` if a function such as dropout is called in training mode."""
    if name not in MODES:
        return
    at = MODES[name]
    training = kwargs.get("training", kwargs.get("train", args[at] if len(args) > at else False))
    is_off = "dropout" in name and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) == 0
    if training and not is_off:
        what = "mixes the samples of a batch" if name == "batch_norm" else "draws random numbers"
        raise ModelStateError(
            f"{name!r} in {where or 'the model'!r} is called with training=True, so it {what}, and samples have no "
            "measures of their own. Call `model.eval()`, and pass `training=self.training` to the function."
        )


def _layer(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def check_hookable(modules: Mapping[str, nn.Module]) -> None:
    """Raises :class:`ModelStateError` if a module bypasses the hooks of its layers, as compiled modules do."""
    for name, module in modules.items():
        _check_kind(name, module)


def check_untransformed(values: Iterable[Any]) -> None:
    """Raises :class:`GradModeError` if a tensor is inside a ``torch.func`` transform, which bypasses hooks."""
    if any(isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values):
        raise GradModeError(
            "a tensor is inside a transform of torch.func (vmap, grad, jacrev, …), which replaces autograd. Call the "
            "model outside of it: use a batch instead of vmap, and torch.autograd.grad instead of torch.func.grad."
        )


class Uncompiled:
    """Handle that disables ``module.compile()`` until it is removed. Compiled layers would not run hooks."""

    def __init__(self, model: nn.Module) -> None:
        attributes = [module.__dict__ for module in model.modules()]
        self._compiled = [(item, item["_compiled_call_impl"]) for item in attributes if item.get("_compiled_call_impl")]
        for item, _ in self._compiled:
            item["_compiled_call_impl"] = None

    def remove(self) -> None:
        """Enables compilation again."""
        for item, compiled in self._compiled:
            item["_compiled_call_impl"] = compiled


def _check_kind(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelStateError(
            f"{_layer(name, module)} is a TorchScript module, whose layers accept no hooks. Pass the Python module "
            "that it was compiled from."
        )
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # already imported if the model was compiled
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        raise ModelStateError(
            f"{_layer(name, module)} was created by torch.compile, which bypasses the hooks of its layers. Pass the "
            "model before compilation, `compiled._orig_mod`."
        )
    if hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable"):
        raise ModelStateError(
            f"the forward of {_layer(name, module)} was replaced by torch.compile, which bypasses the hooks of its "
            "layers. Restore it: `del module.forward`."
        )


def _check_mutable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise ModelStateError(
            f"the weight or buffer {name!r} was created under torch.inference_mode, so torch neither differentiates it "
            "nor notices when it changes. Build, load or copy the model outside of it: `copy.deepcopy(model)`."
        )


def _check_parameter(name: str, parameter: nn.Parameter, is_offloaded: bool = False) -> None:
    if is_lazy(parameter):
        raise ModelStateError(
            f"parameter {name!r} of a lazy layer has no shape yet. Run the model once: `model(inputs)`."
        )
    if is_valueless():
        return
    if parameter.device.type == "meta" and is_offloaded:
        raise ModelStateError(
            f"parameter {name!r} is offloaded by accelerate: it has values only while its layer runs, but a measure "
            "needs them for its passes. Load the model without offload, such as device_map='auto' with enough memory "
            "on all devices together, in half precision or quantized."
        )
    if parameter.device.type == "meta":
        raise ModelStateError(
            f"parameter {name!r} is on device meta, where tensors hold no values. Load the weights: "
            "`model.to_empty(device='cpu')`, then `model.load_state_dict(…)`."
        )
    state = values_state(parameter)
    if _FINITE.get(parameter) == state:
        return
    # The sum takes one pass over the weights and no new memory. If it overflows, the elements are checked.
    for part in plain_tensors(parameter.detach()):
        if part.is_floating_point() and not bool(part.sum().isfinite()) and not bool(part.isfinite().all()):
            raise ModelStateError(f"parameter {name!r} contains nan or inf. Load or train the model again.")
    _FINITE[parameter] = state


_FINITE: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()
"""Version and address at which each parameter was last found to be finite. These are not checked again."""


def _check_mode(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
        why = "is in training mode" if module.training else "keeps no running statistics"
        remedy = "Call `model.eval()`." if module.training else "Use track_running_stats=True, or freeze statistics."
        raise ModelStateError(
            f"{_layer(name, module)} {why}, so it mixes the samples of a batch, and samples have no measures of "
            f"their own. {remedy}"
        )
    if module.training and (amount := _randomness(module)) > 0:
        effect = "draw random slopes" if isinstance(module, nn.RReLU) else f"drop activations at random (p={amount})"
        raise ModelStateError(
            f"{_layer(name, module)} is in training mode and would {effect}, so the measure would not describe a fixed "
            "network. Call `model.eval()`."
        )


def _randomness(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    if isinstance(module, nn.RReLU):
        return 1.0
    for kind in type(module).__mro__:
        name, attribute = RANDOM.get(kind.__module__.partition(".")[0], ("", ""))
        if kind.__name__ == name:
            return float(getattr(module, attribute, None) or 0.0)
    return 0.0


__all__ = [
    "Uncompiled",
    "check_drawn",
    "check_function",
    "check_hookable",
    "check_model",
    "check_module",
    "check_unhooked",
    "check_unpatched",
    "check_untransformed",
    "warn_of_draws",
]
