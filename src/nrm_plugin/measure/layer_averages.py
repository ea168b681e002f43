"""Heat maps averaged over several layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from ..errors import InputError
from ..model.contrast import REST
from ..model.devices import by_sample
from .layer_taps import is_only_pooled, separates
from .measure import RelevanceMeasure

BLUR = 1 / 8
"""Standard deviation of the Gaussian blur of reference images, as a fraction of their shorter side."""
RESOLUTIONS = 2
"""Number of resolutions that :func:`layer_map` averages, from the coarsest. Chosen in docs/real-details.md."""
LEAST = 4
"""Minimum number of positions along each side of a layer in :func:`layer_map`. Coarser layers do not localize."""
SAME_SHAPE = 1.5
"""Maximum ratio between the aspect ratios of a layer and of the image."""


def layer_map(
    model: nn.Module, images: Tensor, target: Any = None, *, against: Any = REST, reference: Any = None, **settings: Any
) -> Tensor:
    """Computes coarse heat maps that localize the evidence for a class, comparable to Grad-CAM.

    The map is the :func:`layer_average` over the :func:`late_layers` of a measure with a reference, as in the command
    ``nrm-plugin explain``.

    Args:
        model: An image classifier, in evaluation mode.
        images: Input images of shape ``(N, C, H, W)``.
        target: The class, as in :class:`~nrm_plugin.RelevanceMeasure`.
        against: The outputs to compare the class with; by default the other classes, weighted by their softmax.
        reference: The reference images; by default, :func:`blurred` versions of ``images``.
        settings: Further keyword arguments for :class:`~nrm_plugin.RelevanceMeasure`.

    Returns:
        Heat maps of shape ``(N, H, W)``. Positive values are evidence for the class.

    Raises:
        InputError: If the model has no late layers, or if an image is identical to its reference.
        NRMError: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Examples:
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        ... )
        >>> layer_map(net, torch.rand(5, 3, 16, 16), target=1).shape
        torch.Size([5, 16, 16])

    Source: new in this package; compared with Grad-CAM in docs/real-details.md.
    """
    reference = blurred(images) if reference is None else reference
    mu = RelevanceMeasure(model, images, target, against=against, reference=reference, **settings)
    layers = late_layers(mu)
    if not layers:
        raise InputError(
            f"a map of layers needs layers with positions, which all relevance crosses, on {RESOLUTIONS} grids of at "
            f"least {LEAST} × {LEAST} that are coarser than the image, as in convolutional networks; this model has "
            'none. The relevance of the pixels is RelevanceMeasure(model, images, target).marginal("input").'
        )
    return layer_average(mu, layers)


def blurred(images: Tensor) -> Tensor:
    """Blurs images of shape ``(N, C, H, W)`` by a Gaussian whose standard deviation is an eighth of the shorter side.

    Examples:
        >>> blurred(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 3, 8, 8])
    """
    return smoothed(images, BLUR, 3)


def smoothed(images: Tensor, width: float, reach: float) -> Tensor:
    """Convolves images of shape ``(N, C, H, W)`` with a Gaussian.

    Args:
        images: The images.
        width: Standard deviation, as a fraction of the shorter side.
        reach: Distance at which the Gaussian is cut off, in standard deviations.
    """
    short = min(images.shape[2:])
    deviation = width * short
    side = 2 * min(round(reach * deviation), short - 1) + 1
    # Applied along each axis, since torchvision's kernel for both axes has side × side weights.
    across = gaussian_blur(images, [side, 1], [deviation, 1.0])
    result: Tensor = gaussian_blur(across, [1, side], [1.0, deviation])
    return result


def late_layers(mu: RelevanceMeasure) -> list[str]:
    """Returns the last layer at each of the two coarsest resolutions of at least 4 × 4, starting from the output.

    Layers are chosen as in :func:`layers_by_resolution`. The list is empty if the model does not have two such
    resolutions that are coarser than the image. Vision transformers, for example, have only one such layer, the patch
    embedding.

    Raises:
        InputError: If the inputs are not images.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(64, 2))
        >>> late_layers(RelevanceMeasure(net, torch.rand(5, 3, 16, 16), target=1))
        ['1', '0']
    """
    layers = list(itertools.islice(_last_layers(mu, LEAST), RESOLUTIONS))
    return layers if len(layers) == RESOLUTIONS else []


def layers_by_resolution(mu: RelevanceMeasure) -> list[str]:
    """Returns one layer per spatial resolution, from the last layer to the input.

    Candidates are layers with positions, of shape ``(N, C, H, W)`` or ``(N, H, W, C)``, that no walk bypasses and that,
    unlike attention weights, have the aspect ratio of the image. They are grouped by their downsampling factor, rounded
    to a power of two, and the last layer with the lowest resolution is chosen from each group. Layers that merely pool
    the output of a larger layer, such as the last pooling layer of VGG16, are excluded.

    Args:
        mu: A measure with images of shape ``(N, C, H, W)`` as inputs.

    Raises:
        InputError: If the inputs are not images.
    """
    return [*_last_layers(mu), "input"]


def _last_layers(mu: RelevanceMeasure, least: int = 2) -> Iterator[str]:
    """Yields the layers of :func:`layers_by_resolution` with at least ``least`` positions along each side.

    The input is excluded.
    """
    (height, width), count = _grid(mu, "input"), mu._tap("input").tensor_shape[0]
    by_octave: dict[int, list[tuple[int, int, str]]] = {}
    for place, name in enumerate(mu.layers):
        # The shape of the tensor is known. If samples are not in its first dimension, locating them may take another
        # recording.
        tap = mu._tap(name)
        shape, channels = tap.tensor_shape, tap.tensor_channel_dim % 4
        if name in ("input", "output") or len(shape) != 4 or shape[0] != count or channels == 0:
            continue
        rows, columns = (size for dim, size in enumerate(shape) if dim not in (0, channels))
        if min(rows, columns) < least or abs(math.log(height * columns / (width * rows))) > math.log(SAME_SHAPE):
            continue
        octave = round(math.log2(height / rows))
        if octave > 0:
            by_octave.setdefault(octave, []).append((rows * columns, -place, name))
    for _, candidates in sorted(by_octave.items(), reverse=True):
        names = (name for _, _, name in sorted(candidates))
        computed = (name for name in names if not is_only_pooled(mu._recording, mu._tap(name)))
        yield from itertools.islice((name for name in computed if _is_crossed_by_all(mu, name)), 1)


def _is_crossed_by_all(mu: RelevanceMeasure, name: str) -> bool:
    """Returns True if all walks from the output to the input cross a layer, regardless of their relevance."""
    return separates(mu._recording, mu._tap("output"), mu._tap(name), mu._tap("input"))


def layer_average(mu: RelevanceMeasure, layers: Sequence[str] | None = None) -> Tensor:
    r"""Computes the relevance of each pixel position, averaged over layers.

    .. math:: \frac{1}{L} \sum_l \frac{\mathrm{up}(\mu_l)}{\sum_p |\mu_l(p)|}

    The measure is normalized at every layer, so the maps of different layers are comparable and can be averaged. Late
    layers localize the evidence, as in Grad-CAM; early layers show its outline. Maps are upsampled by bilinear
    interpolation and rescaled to preserve their sum.

    Args:
        mu: A measure with images of shape ``(N, C, H, W)`` as inputs.
        layers: Layers with positions, of shape ``(N, C, H, W)`` or ``(N, H, W, C)``; by default the result of
            :func:`layers_by_resolution`.

    Returns:
        Heat maps of shape ``(N, H, W)``, on the device of the images. Positive values are evidence for the target, even
        if the measure explains a negative difference.

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
    maps, device = [], mu._device("input")
    for name in names:
        _grid(mu, name)
    with mu._without_sums():
        marginals = mu.marginal(names)
    for name, marginal in marginals.items():
        relevance = marginal.sum(mu.channel_dim(name)).unsqueeze(1).to(device)
        share = relevance / relevance.abs().sum((2, 3), keepdim=True).clamp(min=torch.finfo(relevance.dtype).tiny)
        per_pixel = relevance.shape[2] * relevance.shape[3] / math.prod(size)
        maps.append(nn.functional.interpolate(share, size, mode="bilinear", align_corners=False)[:, 0] * per_pixel)
    mean = torch.stack(maps).mean(0)
    return by_sample(mu.sign, mean) * mean


def _grid(mu: RelevanceMeasure, name: str) -> tuple[int, int]:
    shape, channels = mu.shape(name), mu.channel_dim(name)
    if len(shape) != 4:
        raise InputError(f"layer {name!r} has no spatial positions: expected shape (N, C, H, W), got {tuple(shape)}.")
    rows, columns = (size for dim, size in enumerate(shape) if dim not in (0, channels))
    return rows, columns
