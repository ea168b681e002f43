r"""Activation steering: adds a vector to the output of a layer during the forward pass, or projects it out.

.. math:: a \to a + s v \qquad \text{or} \qquad a \to a - \frac{v v^\top}{v^\top v} a

Such vectors can be conditionals, :math:`\mu(A \mid j)` for every neuron ``j`` of a layer. Their elements are masses per
unit of relevance rather than activations, and their scale has to be chosen.

Source: Turner et al., arXiv 2308.10248 (addition); Arditi et al., arXiv 2406.11717 (removal); docs/features.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, UnknownLayerError, brief
from ..model.replaced_layers import first_tensor, with_first_tensor

Mode = Literal["add", "remove"]


@contextmanager
def steered(
    model: nn.Module, layer: str, vector: Tensor, scale: float = 1.0, mode: Mode = "add", dim: int = -1
) -> Iterator[nn.Module]:
    """Context manager that adds a vector to the output of a layer, or projects the vector out of it.

    A forward hook is registered after all other hooks of the layer and removed on exit, even if an error is raised.
    Nothing else in the model changes. If the layer returns a tuple, its first tensor is steered.

    Args:
        model: The network to steer.
        layer: Name of the layer, as in ``model.named_modules()``.
        vector: A direction in channel space, of shape ``(C,)``, which is applied at every position; or values that
            broadcast to the output of the layer, ``(…)`` or ``(N, …)``.
        scale: Factor that multiplies the added vector, or the fraction of the direction to remove.
        mode: ``"add"``, or ``"remove"`` to project onto the orthogonal complement of the vector. A vector of shape
            ``(C,)`` is projected out at each position, and other vectors over all neurons of a sample.
        dim: Channel dimension of the output, for a vector of shape ``(C,)``: -1 for tokens and vectors, 1 for images.

    Yields:
        The model.

    Raises:
        UnknownLayerError: If the layer is not in the model.
        InputError: If the vector is not finite, or if a vector to remove is zero; during the forward pass, if the
            shapes do not match.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> shift = RelevanceMeasure(net, x, 1).conditional(at("0")[2], "2").mean(0)
        >>> with steered(net, "2", shift, scale=2.0):
        ...     moved = net(x)
        >>> torch.allclose(moved, net(x) + 2 * shift)
        True
    """
    module = dict(model.named_modules()).get(layer)
    if module is None or not layer:
        raise UnknownLayerError(f"no layer named {brief(layer)} to steer; model.named_modules() lists them.")
    _check(vector, mode)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        values = first_tensor(output)
        if values is None:
            raise InputError(f"layer {layer!r} returns {brief(output)}, which contains no tensor to steer.")
        return with_first_tensor(output, _steered(values, vector.to(values), scale, mode, dim, layer))

    handle = module.register_forward_hook(hook)
    try:
        yield model
    finally:
        handle.remove()


def _check(vector: Tensor, mode: str) -> None:
    if mode not in ("add", "remove"):
        raise InputError(f"mode={brief(mode)} is unknown; choose 'add' or 'remove'.")
    if not isinstance(vector, Tensor) or not vector.is_floating_point() or not bool(vector.isfinite().all()):
        raise InputError(f"vector= must be a finite floating-point tensor, got {brief(vector)}.")
    if mode == "remove" and not bool(vector.any()):
        raise InputError("a zero vector has no direction to remove.")


def _steered(values: Tensor, vector: Tensor, scale: float, mode: str, dim: int, layer: str) -> Tensor:
    is_direction = vector.ndim == 1 and values.ndim > 1
    if is_direction:
        if values.shape[dim] != len(vector):
            raise InputError(
                f"the vector has {len(vector)} channels, but {layer!r} returns {tuple(values.shape)} with "
                f"{values.shape[dim]} in dimension {dim}; pass dim=."
            )
        view = [1] * values.ndim
        view[dim] = -1
        vector = vector.view(view)
    try:
        vector = vector.expand_as(values)
    except RuntimeError:
        raise InputError(
            f"a vector of shape {tuple(vector.shape)} does not broadcast to {tuple(values.shape)}, the output of "
            f"{layer!r}."
        ) from None
    if mode == "add":
        return values + scale * vector
    dims = [dim] if is_direction else list(range(1, values.ndim))
    share = (values * vector).sum(dims, keepdim=True) / vector.square().sum(dims, keepdim=True)
    return values - scale * torch.where(share.isfinite(), share, 0.0) * vector


__all__ = ["steered"]
