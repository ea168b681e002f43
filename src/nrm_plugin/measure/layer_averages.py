"""Heat maps averaged over several layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .measure import RelevanceMeasure


def layers_by_resolution(mu: RelevanceMeasure) -> list[str]:
    """Returns one layer per spatial resolution, from the last layer to the input.

    Candidates are the layers with positions ``(N, C, H, W)`` that no walk bypasses. Each is assigned to the power of
    two by which their grid is smaller than the image. For each power of two, the last layer with the smallest grid is
    chosen.

    Args:
        mu: The measure of images ``(N, C, H, W)``.

    Raises:
        InputError: If the inputs are not images.
    """
    height = _grid(mu, "input")[0]
    chosen: dict[int, tuple[int, str]] = {}
    for name in mu.layers:
        shape = mu.shape(name)
        if len(shape) != 4 or name == "output" or min(shape[2:]) < 2:
            continue
        octave, size = round(math.log2(height / shape[2])), math.prod(shape[2:])
        is_smaller = octave not in chosen or size <= chosen[octave][0]
        if name == "input" or (octave > 0 and is_smaller and not mu.bypass(name).any()):
            chosen[octave] = size, name
    return [chosen[octave][1] for octave in sorted(chosen, reverse=True)]


def layer_average(mu: RelevanceMeasure, layers: Sequence[str] | None = None) -> Tensor:
    r"""Returns the relevance of each position of an image, averaged over layers.

    .. math:: \frac{1}{L} \sum_l \frac{\mathrm{up}(\mu_l)}{\sum_p |\mu_l(p)|}

    The measure is normalized at every layer, so the maps of different layers are comparable and can be averaged. Late
    layers locate the evidence, as in Grad-CAM; early layers show its outline. Maps are upsampled by bilinear
    interpolation that preserves their sum.

    Args:
        mu: The measure of images ``(N, C, H, W)``.
        layers: Layers with positions ``(N, C, H, W)``; by default those of :func:`layers_by_resolution`.

    Returns:
        Heat maps ``(N, H, W)``. Positive values are evidence for the target, even if an explained difference is
        negative.

    Raises:
        InputError: If the inputs or a layer have no positions.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(5, 3, 8, 8), target=1)
        >>> layers_by_resolution(mu), layer_average(mu).shape
        (['1', 'input'], torch.Size([5, 8, 8]))
    """
    names = layers_by_resolution(mu) if layers is None else list(layers)
    size = _grid(mu, "input")
    maps = []
    for name, marginal in mu.marginal(names).items():
        _grid(mu, name)
        relevance = marginal.sum(1, keepdim=True)
        share = relevance / relevance.abs().sum((2, 3), keepdim=True).clamp(min=torch.finfo(relevance.dtype).tiny)
        per_pixel = relevance.shape[2] * relevance.shape[3] / math.prod(size)
        maps.append(nn.functional.interpolate(share, size, mode="bilinear", align_corners=False)[:, 0] * per_pixel)
    return mu.sign.reshape(-1, 1, 1) * torch.stack(maps).mean(0)


def _grid(mu: RelevanceMeasure, name: str) -> tuple[int, int]:
    shape = mu.shape(name)
    if len(shape) != 4:
        raise InputError(f"layer {name!r} has no spatial positions: expected shape (N, C, H, W), got {tuple(shape)}.")
    return shape[2], shape[3]
