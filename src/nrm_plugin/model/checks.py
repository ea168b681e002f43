"""Checks of a model before recording: its class, device, dtype, values and training mode."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary
from zennit.core import BasicHook, Hook

from ..errors import InputError, ModelStateError, UnsupportedRuleError

RANDOM: dict[str, float | str] = {
    "RReLU": 1.0,
    "MultiheadAttention": "dropout",
    "StochasticDepth": "p",
    "DropPath": "drop_prob",
}
"""Layers other than dropout that are random in training mode, with the attribute that holds the drop rate."""

MODES = {
    "batch_norm": 5,
    "rrelu": 3,
    **dict.fromkeys("dropout alpha_dropout feature_dropout feature_alpha_dropout".split(), 2),
    **dict.fromkeys("dropout1d dropout2d dropout3d".split(), 2),
}
"""Functions that are random or mix samples in training mode, with the position of the argument ``training``."""


def check_module(model: Any) -> None:
    """Raises :class:`InputError` unless the model is a module with layers that can be hooked."""
    if isinstance(model, nn.Module):
        return
    what, remedy = f"{type(model).__name__}", "For a function, wrap it in a module that holds its layers."
    if isinstance(model, type) and issubclass(model, nn.Module):
        what, remedy = f"the class {model.__name__}", f"Pass an instance: {model.__name__}(…)."
    raise InputError(f"the model is {what}, expected a torch.nn.Module, whose layers have rules. {remedy}")


def check_model(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Raises unless the model can be recorded on these inputs.

    Raises:
        InputError: The model is on another device or of another dtype than the inputs.
        ModelStateError: The model is in training mode, hooked by a composite, compiled, or has invalid weights.
    """
    for name, module in model.named_modules():
        _check_kind(name, module)
        _check_mode(name, module)
    check_unhooked(model, "Take the measure outside of `composite.context(model)`, and pass it by `composite=`.")
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    floating = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
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


def check_unhooked(model: nn.Module, remedy: str) -> None:
    """Raises :class:`ModelStateError` if a layer has hooks of a composite, since two composites would interfere."""
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(getattr(hook, "__self__", None), Hook):
                raise ModelStateError(f"{_layer(name, module)} has hooks of a Zennit composite already. {remedy}")


def check_unpatched() -> None:
    """Raises :class:`UnsupportedRuleError` if another package has replaced Zennit's relevance propagation.

    LXT's ``monkey_patch_zennit`` replaces it permanently for the whole process.
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
    """Raises :class:`ModelStateError` if a function is called in training mode, as for the equivalent module."""
    if name not in MODES:
        return
    at = MODES[name]
    training = kwargs.get("training", kwargs.get("train", args[at] if len(args) > at else False))
    is_off = "dropout" in name and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) == 0
    if training and not is_off:
        what = "mixes the samples of a batch" if name == "batch_norm" else "draws at random"
        raise ModelStateError(
            f"{name!r} in {where or 'the model'!r} is called with training=True, so it {what}, and samples have no "
            "measures of their own. Call `model.eval()`, and pass `training=self.training` to the function."
        )


def _layer(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def _check_kind(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelStateError(
            f"{_layer(name, module)} is TorchScript, whose layers take no hooks. Pass the Python module that it was "
            "compiled from."
        )
    if type(module).__name__ == "OptimizedModule":
        raise ModelStateError(
            f"{_layer(name, module)} was made by torch.compile, which bypasses the hooks of its layers. Pass the "
            "model before compilation, `compiled._orig_mod`."
        )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ModelStateError(
            f"parameter {name!r} of a lazy layer has no shape yet. Run the model once: `model(inputs)`."
        )
    if parameter.device.type == "meta":
        raise ModelStateError(
            f"parameter {name!r} is on device meta, where tensors hold no values. Load the weights: "
            "`model.to_empty(device='cpu')`, then `model.load_state_dict(…)`."
        )
    state = (parameter._version, parameter.data_ptr())
    if _FINITE.get(parameter) == state:
        return
    # The sum needs one pass over the weights and no new memory; if it overflows, the entries are checked.
    if not bool(parameter.detach().sum().isfinite()) and not bool(parameter.detach().isfinite().all()):
        raise ModelStateError(f"parameter {name!r} holds nan or inf. Load or train the model again.")
    _FINITE[parameter] = state


_FINITE: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()
"""Version and address of parameters known to be finite, which avoids reading all weights again."""


def _check_mode(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
        why = "is in training mode" if module.training else "keeps no running statistics"
        remedy = "Call `model.eval()`." if module.training else "Use track_running_stats=True, or freeze statistics."
        raise ModelStateError(
            f"{_layer(name, module)} {why}, so it mixes the samples of a batch, and samples have no measures of "
            f"their own. {remedy}"
        )
    amount = _randomness(module)
    if module.training and amount > 0:
        raise ModelStateError(
            f"{_layer(name, module)} is in training mode and random (p={amount}), so the measure "
            "would be that of a random network. Call `model.eval()`."
        )


def _randomness(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    amount = RANDOM.get(type(module).__name__, 0.0)
    return float(getattr(module, amount, None) or 0.0) if isinstance(amount, str) else float(amount)


__all__ = ["check_function", "check_model", "check_module", "check_unhooked", "check_unpatched"]
