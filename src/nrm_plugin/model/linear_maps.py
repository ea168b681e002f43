"""Linear maps of affine layers and their transposes, applied to batches of vectors.

``up`` maps tensors of shape ``(K, N, *in)`` to ``(K, N, *out)``, and ``down`` is its transpose. Neither map includes a
bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]


class LinearMap(NamedTuple):
    """Linear map of a layer, with its transpose and its gradient with respect to the weight.

    Attributes:
        down: The transposed map, from shape ``(K, N, *out)`` to ``(K, N, *in)``.
        up: The map, from shape ``(K, N, *in)`` to ``(K, N, *out)``.
        weight_gradient: Function of an input of shape ``(1, *in)`` and relevance of shape ``(1, *out)`` that returns
            the weight gradient of the inner product of output and relevance, or None if there is no closed form.
        convolution: Weight, options and input shape, if the layer is a convolution.
    """

    down: Map
    up: Map
    weight_gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    convolution: tuple[Tensor, tuple[Any, ...], torch.Size] | None = None


_CONVOLUTIONS: dict[Any, int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


def blocked_maps(weight: Tensor, modify: Map, entries: int = 1 << 19) -> LinearMap:
    """Returns the linear map of a fully connected layer, computing its modified weight block by block.

    In many networks, most weights belong to the classifier, and copying them for each rule would take longer than
    running the layer.

    Args:
        weight: The weight, of shape ``(out, in)``.
        modify: The elementwise modification of the weight by a rule.
        entries: Number of weights per block.
    """
    rows = max(1, entries // weight.shape[1])
    starts = range(0, weight.shape[0], rows)

    def down(relevance: Tensor) -> Tensor:
        parts = [_times(relevance[..., at : at + rows], modify(weight[at : at + rows])) for at in starts]
        return sum(parts[1:], start=parts[0])

    def up(values: Tensor) -> Tensor:
        return torch.cat([_times(values, modify(weight[at : at + rows]).t()) for at in starts], -1)

    return LinearMap(down, up, _linear_gradient)


def explicit_maps(module: nn.Module, weight: Tensor, inputs: Tensor) -> LinearMap | None:
    """Returns the linear map of a torch layer in closed form, or None for padding modes other than zeros.

    Args:
        module: A linear or convolutional layer that does not override ``forward``.
        weight: The weight to use in place of the layer's own.
        inputs: A tensor with the shape of the layer's input.
    """
    if type(module).forward is nn.Linear.forward:
        if _is_even(weight):
            return _even_linear_maps(weight)
        return _linear_maps(weight)
    kind = next((kind for kind in _CONVOLUTIONS if type(module).forward is kind.forward), None)
    if kind is None or inputs.ndim != _CONVOLUTIONS[kind] + 2:
        return None
    options = _options(module, kind)
    if options is None:
        return None
    if _is_even(weight) and not options[3]:
        return _even_convolution_maps(weight, options, inputs.shape[1:])
    return _convolution_maps(weight, options, inputs.shape[1:])


def window_maps(module: nn.Module, weight: Tensor, inputs: Tensor) -> LinearMap | None:
    """Returns the linear map of a layer with all-ones weights, whose output is the same in all channels.

    ``up`` returns a single channel, which broadcasts. Returns None for groups, transposed layers, and layers
    that :func:`explicit_maps` does not support.

    Args:
        module: As in :func:`explicit_maps`.
        weight: The weight of the layer; only its shape, dtype and device are used.
        inputs: As in :func:`explicit_maps`.
    """
    plain = explicit_maps(module, weight, inputs)
    if plain is None:
        return None
    if plain.convolution is None:
        return _sums_over(-1, inputs.shape[-1], plain)
    _, options, shape = plain.convolution
    stride, padding, _, transposed, _, groups = options
    if transposed or groups > 1:
        return None
    if weight.shape[2:].numel() == 1 and set(stride) == {1} and set(padding) == {0}:
        return _sums_over(2, shape[0], plain)
    sums = _convolution_maps(weight.new_ones(1, 1, *weight.shape[2:]), options, torch.Size((1, *shape[1:])))

    def down(relevance: Tensor) -> Tensor:
        return sums.down(relevance.sum(2, keepdim=True)).expand(*relevance.shape[:2], *shape)

    return LinearMap(down, lambda values: sums.up(values.sum(2, keepdim=True)), plain.weight_gradient)


def _sums_over(dim: int, width: int, plain: LinearMap) -> LinearMap:
    """Returns the linear map of a layer with all-ones weights whose windows contain a single position."""

    def down(relevance: Tensor) -> Tensor:
        single = relevance.sum(dim, keepdim=True)
        return single.expand(*single.shape[:dim], width, *single.shape[dim:][1:])

    return LinearMap(down, lambda values: values.sum(dim, keepdim=True), plain.weight_gradient)


def _is_even(weight: Tensor) -> bool:
    """Returns True if the weights of each output channel share one memory location, as in an expanded tensor."""
    inner = [stride for stride, size in zip(weight.stride()[1:], weight.shape[1:], strict=True) if size > 1]
    return weight.stride(0) != 0 and bool(inner) and not any(inner)


def _linear_gradient(values: Tensor, relevance: Tensor) -> Tensor:
    return relevance.reshape(-1, relevance.shape[-1]).t() @ values.reshape(-1, values.shape[-1])


def _linear_maps(weight: Tensor) -> LinearMap:
    return LinearMap(
        lambda relevance: _times(relevance, weight), lambda values: _times(values, weight.t()), _linear_gradient
    )


def _times(values: Tensor, matrix: Tensor) -> Tensor:
    """Computes ``values @ matrix`` as one matrix product. For transposed batches, torch would multiply row by row."""
    product = values.reshape(-1, values.shape[-1]) @ matrix
    return product.reshape(*values.shape[:-1], matrix.shape[1])


def _even_linear_maps(weight: Tensor) -> LinearMap:
    scale, width = weight[:, 0], weight.shape[1]

    def down(relevance: Tensor) -> Tensor:
        single: Tensor = (relevance @ scale).unsqueeze(-1)
        return single.expand(*relevance.shape[:-1], width)

    def up(values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True) * scale

    return LinearMap(down, up, _linear_gradient)


def _even_convolution_maps(weight: Tensor, options: tuple[Any, ...], shape: torch.Size) -> LinearMap:
    """Returns the linear map of a convolution whose weights are constant within each output channel.

    Channels are summed within each group, and the sums are convolved with ones.
    """
    groups = options[-1]
    ones = weight.new_ones(groups, 1, *weight.shape[2:])
    per_group = weight.shape[0] // groups
    scale = weight.as_strided((weight.shape[0],), (weight.stride(0),)).reshape(
        groups, per_group, *(1,) * (weight.ndim - 2)
    )
    sums = _convolution_maps(ones, options, torch.Size((groups, *shape[1:])))

    def down(relevance: Tensor) -> Tensor:
        grouped = relevance.reshape(*relevance.shape[:2], groups, per_group, *relevance.shape[3:])
        single = sums.down((grouped * scale).sum(3)).unsqueeze(3)
        width = shape[0] // groups
        return single.expand(*single.shape[:3], width, *single.shape[4:]).reshape(*relevance.shape[:2], *shape)

    def up(values: Tensor) -> Tensor:
        grouped = values.reshape(*values.shape[:2], groups, shape[0] // groups, *values.shape[3:])
        image = sums.up(grouped.sum(3)).unsqueeze(3) * scale
        return image.reshape(*values.shape[:2], groups * per_group, *image.shape[4:])

    plain = _convolution_maps(weight, options, shape)
    return LinearMap(down, up, plain.weight_gradient)


def _convolution_maps(weight: Tensor, options: tuple[Any, ...], shape: torch.Size) -> LinearMap:
    def down(relevance: Tensor) -> Tensor:
        flat = relevance.reshape(-1, *relevance.shape[2:])
        # Only the shape of this tensor is read; an expanded tensor would be copied.
        like = relevance.new_empty((len(flat), *shape))
        wanted = [True, False, False]
        product, _, _ = torch.ops.aten.convolution_backward(flat, like, weight, None, *options, wanted)
        return product.reshape(*relevance.shape[:2], *shape)  # type: ignore[no-any-return]

    def up(values: Tensor) -> Tensor:
        image = torch.ops.aten.convolution(values.reshape(-1, *shape), weight, None, *options)
        return image.reshape(*values.shape[:2], *image.shape[1:])  # type: ignore[no-any-return]

    def weight_gradient(values: Tensor, relevance: Tensor) -> Tensor:
        wanted = [False, True, False]
        _, gradient, _ = torch.ops.aten.convolution_backward(relevance, values, weight, None, *options, wanted)
        return gradient  # type: ignore[no-any-return]

    return LinearMap(down, up, weight_gradient, (weight, options, shape))


FEW = 16
"""Number of input channels up to which the backward pass of a convolution takes roughly constant time."""


def side_by_side(maps: list[LinearMap]) -> Map | None:
    """Merges ``B`` transposed convolutions into a single one, from shape ``(K, N, *out)`` to ``(K, N, B, *in)``.

    Returns None unless all maps are convolutions with the same options and few input channels in total.
    """
    known = [one.convolution for one in maps if one.convolution is not None]
    if len(known) < len(maps):
        return None
    _, options, shape = known[0]
    *_, transposed, _, groups = options
    if transposed or groups > 1 or len(known) * shape[0] > FEW or any(one[1:] != (options, shape) for one in known):
        return None
    joined = _convolution_maps(
        torch.cat([one[0] for one in known], 1), options, torch.Size((len(known) * shape[0], *shape[1:]))
    )

    def down(relevance: Tensor) -> Tensor:
        products = joined.down(relevance)
        return products.reshape(*products.shape[:2], len(known), *shape)

    return down


def _options(module: Any, kind: type[nn.Module]) -> tuple[Any, ...] | None:
    """Returns stride, padding, dilation, transposed, output padding and groups in the order of aten's arguments."""
    if module.padding_mode != "zeros":
        return None
    transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
    padding = module.padding
    if padding == "valid":
        padding = [0] * _CONVOLUTIONS[kind]
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(size % 2 for size in total):
            return None
        padding = [size // 2 for size in total]
    # The output padding of a transposed layer may depend on the output size requested in a call.
    if transposed and any(module.output_padding):
        return None
    outward = list(module.output_padding)
    return list(module.stride), list(padding), list(module.dilation), transposed, outward, module.groups


def recorded_maps(run: Map, inputs: Tensor) -> tuple[LinearMap, Tensor]:
    """Returns the linear map of an arbitrary linear function, transposed by automatic differentiation.

    Args:
        run: The function, which maps tensors of shape ``(N, *in)`` to ``(N, *out)``.
        inputs: The point of differentiation, of shape ``(N, *in)``.

    Returns:
        The linear map and the output at ``inputs``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        image = run(leaf)

    def down(relevance: Tensor) -> Tensor:
        create = torch.is_grad_enabled()
        if len(relevance) == 1:
            return torch.autograd.grad(image, leaf, relevance[0], True, create)[0].unsqueeze(0)
        return torch.autograd.grad(image, leaf, relevance, True, create, is_grads_batched=True)[0]

    def up(values: Tensor) -> Tensor:
        return torch.stack([run(value) for value in values])

    return LinearMap(down, up), image.detach()


__all__ = ["LinearMap", "Map", "blocked_maps", "explicit_maps", "recorded_maps", "side_by_side", "window_maps"]
