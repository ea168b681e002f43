"""Ablation of neurons by replacing their activations during the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, brief
from ..model.devices import on_device_of
from ..recording.module_outputs import module_outputs

Fill = Literal["zero", "mean", "resample"]
FILLS: tuple[Fill, ...] = ("zero", "mean", "resample")


@contextmanager
def ablation(
    model: nn.Module, kept: Mapping[str, Tensor], fill: Fill = "zero", reference: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Context manager that ablates all neurons except the kept ones by replacing their activations.

    Args:
        model: The network; the hooks are removed on exit.
        kept: Boolean masks of the kept outputs, keyed by module name, of shape ``(C,)``, ``(N, C)``, ``(*shape)`` or
            ``(N, *shape)``, with channels in dimension 1.
        fill: Replacement values: ``"zero"``; ``"mean"`` for the mean of the reference activations; or ``"resample"`` to
            assign to sample ``n`` the activations of reference sample ``n``, modulo the number of reference samples.
        reference: Activations of each module on reference samples, as returned by :func:`activations`; required unless
            ``fill`` is ``"zero"``.

    Raises:
        ValueError: If ``fill`` is unknown or requires a reference that is not given.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> with ablation(net, {"1": torch.zeros(4, dtype=torch.bool)}):
        ...     torch.equal(net(x), net[2].bias.expand(5, 2))
        True
    """
    if fill not in FILLS:
        raise ValueError(f"fill={brief(fill)} is unknown; choose one of {', '.join(map(repr, FILLS))}.")
    if fill != "zero" and any(layer not in (reference or {}) for layer in kept):
        raise ValueError(f"fill={brief(fill)} needs reference=, as returned by activations(model, samples, layers).")
    with ExitStack() as stack:
        for layer, mask in kept.items():
            replacement = None if fill == "zero" or reference is None else reference[layer]
            handle = model.get_submodule(layer).register_forward_hook(_replacing(mask, fill, replacement))
            stack.callback(handle.remove)
        yield


def _replacing(mask: Tensor, fill: Fill, reference: Tensor | None) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        shape = output.shape
        kept = mask.to(output.device)
        if kept.shape not in (shape, shape[1:]):
            kept = kept.expand(shape[0], shape[1]).reshape(shape[0], shape[1], *(1,) * (len(shape) - 2))
        if reference is None:
            return torch.where(kept, output, output.new_zeros(()))
        values = on_device_of(reference, output)
        if fill == "mean":
            return torch.where(kept, output, values.mean(0))
        samples = torch.arange(shape[0], device=values.device) % len(values)
        return torch.where(kept, output, values[samples])

    return hook


def activations(model: nn.Module, inputs: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """Returns the output of each module, as a tensor of shape ``(N, *shape)``, from one forward pass.

    If a module is called several times, its last output is returned.

    Raises:
        UnknownLayerError: If there is no module with one of the given names.
        InputError: If a module is not called or does not return a tensor.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> activations(net, torch.randn(5, 3), ["1"])["1"].shape
        torch.Size([5, 4])
    """
    with module_outputs(model, layers) as outputs, torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    for layer, calls in outputs.items():
        if not calls or not isinstance(calls[-1], Tensor):
            why = "does not return a tensor" if calls else "was not called"
            raise InputError(f"{brief(layer)} {why}, so it has no activations.")
    return {layer: calls[-1] for layer, calls in outputs.items()}
