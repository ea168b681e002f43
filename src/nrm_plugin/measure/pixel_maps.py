"""Pixel-level heat maps for images of an object on a plain background."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Gamma
from zennit.types import Convolution

from ..composites import Normalized
from ..errors import InputError
from .layer_averages import late_layers, smoothed
from .measure import RelevanceMeasure

COVERED = 8
"""Number of references in which half of the image is covered."""
SQUARES = 7
"""Number of squares along the shorter side of an image that are covered or not."""
GAMMA = 0.05
"""The γ of the rule for convolutions."""
WIDTH = 0.25
"""Standard deviation of the Gaussian that smooths relevance, as a fraction of the shorter side."""
POWER = 3
"""Exponent of the smoothed relevance (docs/real-details.md)."""
CANCELS = 2.0
"""Maximum ratio between the tap variations of the pixels and of the late layers."""


def pixel_map(model: nn.Module, images: Tensor, target: Any = None, *, reference: Any, **settings: Any) -> Tensor:
    """Computes pixel-level heat maps for images of an object on a plain background, as in ``nrm-plugin explain``.

    The relevance of the pixels is the mean over several references: the plain background, and images half of whose
    squares are covered by it (:func:`covered`). A pixel is then evaluated with different parts of the object present.
    Differences are propagated by :func:`light_gamma`. For display, the map is :func:`focused`.

    Args:
        model: An image classifier, in evaluation mode.
        images: Input images of shape ``(N, C, H, W)``; they are explained one by one.
        target: The class of each image, as in :class:`~nrm_plugin.RelevanceMeasure`.
        reference: Image of the background alone, of shape ``(C, H, W)`` or ``(N, C, H, W)``, normalized like
            ``images``; :func:`~nrm_plugin.measure.plain_ground.plain_ground` returns its color.
        settings: Further keyword arguments for :class:`~nrm_plugin.RelevanceMeasure`, such as ``against``, or
            ``composite``; ``composite=None`` propagates differences by secants.

    Returns:
        Heat maps of shape ``(N, H, W)``. Positive values are evidence for the class.

    Raises:
        InputError: If the inputs are not images.
        NRMError: As in :class:`~nrm_plugin.RelevanceMeasure`; in particular if an image is identical to its reference.

    Examples:
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        ... )
        >>> pixel_map(net, torch.rand(5, 3, 16, 16), target=1, reference=torch.zeros(3, 16, 16)).shape
        torch.Size([5, 16, 16])

    Source: new in this package; compared with other methods in docs/real-details.md.
    """
    if images.ndim != 4:
        raise InputError(f"expected images (N, C, H, W), got {tuple(images.shape)}.")
    grounds = torch.as_tensor(reference).to(images).expand_as(images)
    settings = {"composite": light_gamma(), **settings}
    is_given_each = isinstance(target, (list, tuple)) or (isinstance(target, Tensor) and target.ndim > 0)
    maps = []
    for place in range(len(images)):
        image, ground = (part[place : place + 1] for part in (images, grounds))
        own = target[place] if is_given_each else target
        mu = RelevanceMeasure(model, image, own, reference=covered(image, ground), **settings)
        maps.append(focused_pixels(mu))
    return torch.cat(maps)


def focused_pixels(mu: RelevanceMeasure) -> Tensor:
    """Returns the relevance of the pixels, summed over colors and :func:`focused`, of shape ``(1, H, W)``.

    Args:
        mu: The measure of a single image.
    """
    return focused(float(mu.sign) * mu.marginal("input").sum(1))


def light_gamma() -> Normalized:
    """Returns rules for differences: γ = 0.05 for convolutions, and LRP-ε for linear layers.

    A small γ already reduces how much the relevance of neighboring pixels cancels.
    """
    return Normalized(LayerMapComposite([(Convolution, Gamma(GAMMA)), (nn.Linear, Epsilon())]))


def covered(images: Tensor, ground: Tensor) -> list[Tensor]:
    """Returns the plain background, and the images with half of their squares, drawn at random, covered by it.

    The images come in pairs: what one covers, the other shows. The squares are a seventh of the shorter side of an
    image and the same in every call. Images in which nothing is covered are omitted.

    Args:
        images: Images of shape ``(N, C, H, W)``.
        ground: Images of the background, of the same shape.

    Returns:
        At most nine tensors of shape ``(N, C, H, W)``.
    """
    height, width = images.shape[2:]
    side = -(-min(height, width) // SQUARES)
    draw = torch.Generator().manual_seed(0)
    half = torch.rand(COVERED // 2, -(-height // side), -(-width // side), generator=draw) < 0.5
    shown = torch.cat([half, ~half]).repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width]
    references = [torch.where(one, images, ground) for one in shown.to(images.device)]
    return [ground.contiguous(), *(one for one in references if not torch.equal(one, images))]


def focused(heat: Tensor) -> Tensor:
    r"""Reduces the evidence for a class at pixels whose surroundings contain little evidence for it.

    .. math:: h_p \mapsto h_p \, \bigl(\max(\bar h_p, 0) / \max_q \bar h_q\bigr)^3 \quad\text{where } h_p > 0

    Here, :math:`\bar h` is the heat map, smoothed by a Gaussian. Evidence against the class is kept. If no smoothed
    value is positive, the map is returned unchanged. The result is for display; it does not sum to the output.

    Args:
        heat: Heat maps of shape ``(N, H, W)``; positive values are evidence for the class.
    """
    smooth = smoothed(heat[:, None], WIDTH, 4)[:, 0].clamp(min=0)
    largest = smooth.amax((1, 2), keepdim=True)
    weights = torch.where(largest > 0, smooth / largest.clamp(min=torch.finfo(heat.dtype).tiny), 1.0)
    return torch.where(heat > 0, heat * weights**POWER, heat)


def is_fine_grained(mu: RelevanceMeasure) -> bool:
    """Returns True if the pixels have at most twice the tap variation of the late layers.

    In deep networks, most of the relevance of single pixels cancels, and only sums over larger areas are meaningful.
    Returns True if there are no late layers.

    Args:
        mu: The measure of a single image.
    """
    layers = late_layers(mu)
    return not layers or float(mu.variation("input")) <= CANCELS * max(float(mu.variation(name)) for name in layers)
