"""Pixel-level heat maps for images of an object on a plain background."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..events.event import at
from ..model.contrast import REST
from .layer_averages import late_layers
from .measure import RelevanceMeasure

LEAST_EVIDENCE = 1 / 4
"""Minimum relevance of a position in the region, as a fraction of the maximum (docs/real-details.md)."""
CANCELS = 2.0
"""Maximum ratio between the tap variations of the pixels and of the late layers."""


def pixel_map(
    model: nn.Module, images: Tensor, target: Any = None, *, reference: Any, against: Any = REST, **settings: Any
) -> Tensor:
    r"""Computes pixel-level heat maps for images of an object on a plain background, as in ``nrm-plugin explain``.

    .. math:: \mu_c(n_0 = p \text{ and the walk crosses } E), \qquad E = \{q : \nu(q) > \tfrac14 \max \nu\}

    Here, :math:`\mu_c` is the measure of the class alone, and :math:`\nu` the measure that contrasts the class with
    ``against``; both explain the difference from the reference. The region :math:`E` consists of the positions
    :math:`q` in the last of the :func:`~nrm_plugin.measure.layer_averages.late_layers` at which the relevance of the
    contrast exceeds a quarter of its maximum. The map shows the relevance of the walks that cross this region.

    Args:
        model: An image classifier, in evaluation mode.
        images: Input images of shape ``(N, C, H, W)``; they are explained one by one.
        target: The class of each image, as in :class:`~nrm_plugin.RelevanceMeasure`.
        reference: Image of the background alone, of shape ``(C, H, W)`` or ``(N, C, H, W)``, normalized like
            ``images``; :func:`~nrm_plugin.measure.plain_ground.plain_ground` returns its color.
        against: The outputs to compare the class with; by default the other classes, weighted by their softmax.
        settings: Further keyword arguments for :class:`~nrm_plugin.RelevanceMeasure`.

    Returns:
        Heat maps of shape ``(N, H, W)``. Positive values are evidence for the class.

    Raises:
        InputError: If the inputs are not images, or if an image is identical to its reference.
        NRMError: As in :class:`~nrm_plugin.RelevanceMeasure`.

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
    references = torch.as_tensor(reference).to(images).expand_as(images)
    maps = []
    for place in range(len(images)):
        image, plain = (part[place : place + 1].contiguous() for part in (images, references))
        is_given_each = isinstance(target, (list, tuple)) or (isinstance(target, Tensor) and target.ndim > 0)
        own = target[place] if is_given_each else target
        alone = RelevanceMeasure(model, image, own, reference=plain, **settings)
        contrast = RelevanceMeasure(model, image, own, against=against, reference=plain, **settings)
        maps.append(through_evidence(alone, contrast))
    return torch.cat(maps)


def through_evidence(alone: RelevanceMeasure, contrast: RelevanceMeasure) -> Tensor:
    """Computes pixel relevance, restricted to walks through the positions of a late layer that favor the class.

    If there is no late layer or no such position, pixel relevance is not restricted.

    Args:
        alone: The measure of the class alone, for a single image.
        contrast: The measure of the class in contrast to other classes, for the same image. It selects the positions.

    Returns:
        A heat map of shape ``(1, H, W)``; positive values are evidence for the class.
    """
    event = None
    for last in late_layers(contrast)[:1]:
        relevance = float(contrast.sign) * contrast.marginal(last)
        evidence = relevance.sum(contrast.channel_dim(last), keepdim=True)
        is_evidence = evidence > LEAST_EVIDENCE * evidence.amax().clamp(min=0)
        event = at(last)[is_evidence.expand_as(relevance)[0].cpu()] if bool(is_evidence.any()) else None
    pixels = alone.marginal("input") if event is None else alone.marginal("input", joint=event)
    return float(alone.sign) * pixels.sum(1)


def is_fine_grained(mu: RelevanceMeasure) -> bool:
    """Returns True if the pixels have at most twice the tap variation of the late layers.

    In deep networks, most of the relevance of single pixels cancels, and only sums over larger areas are meaningful.
    Returns True if there are no late layers.

    Args:
        mu: The measure of a single image.
    """
    layers = late_layers(mu)
    return not layers or float(mu.variation("input")) <= CANCELS * max(float(mu.variation(name)) for name in layers)
