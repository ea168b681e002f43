"""Fine-grained heat maps of an object on a plain ground."""

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
"""Minimum evidence at a late position, as a fraction of the largest; chosen on digits in docs/real-details.md."""
CANCELS = 2.0
"""Largest accepted ratio of pixel variation to late-layer variation; above it, too much pixel relevance cancels."""


def pixel_map(
    model: nn.Module, images: Tensor, target: Any = None, *, reference: Any, against: Any = REST, **settings: Any
) -> Tensor:
    r"""Computes fine-grained heat maps of objects on a plain ground, as ``nrm-plugin explain`` does.

    .. math:: \mu_c(n_0 = p \text{ and the walk crosses } E), \qquad E = \{q : \nu(q) > \tfrac14 \max \nu\}

    The map is the relevance :math:`\mu_c` of the pixels for the class alone, of the walks that cross the last of the
    :func:`~nrm_plugin.measure.layer_averages.late_layers` at positions :math:`q` with evidence for the class rather
    than other classes: at least a quarter of the largest, by the contrast :math:`\nu`. Both measures explain the
    difference from the reference.

    Args:
        model: An image classifier, in evaluation mode.
        images: Input images, ``(N, C, H, W)``; they are explained one by one.
        target: The class of each image, as in :class:`~nrm_plugin.RelevanceMeasure`.
        reference: The plain ground as an image, ``(C, H, W)`` or ``(N, C, H, W)``, normalized like the images; its
            colour is found by :func:`~nrm_plugin.measure.plain_ground.plain_ground`.
        against: The outputs to compare the class with; by default the other classes, weighted by their softmax.
        settings: Further keyword arguments for :class:`~nrm_plugin.RelevanceMeasure`.

    Returns:
        Heat maps ``(N, H, W)``. Positive values are evidence for the class.

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
    """Returns the pixel relevance for a class that passes through late positions with evidence for this class.

    Without late layers, or without such positions, all relevance of the pixels is returned.

    Args:
        alone: The measure of the class alone, with one image.
        contrast: The measure that selects the positions, of the same image.

    Returns:
        A heat map ``(1, H, W)``; positive values are evidence for the class.
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
    """Returns whether the relevance of single pixels is about as stable as that of late layers.

    In deep networks, most of the relevance of single pixels cancels, and only sums over larger areas are meaningful.
    The relevance is stable if the variation of the pixels is at most twice that of the late layers. Without late
    layers, the pixels are all there is.

    Args:
        mu: A measure with one image.
    """
    layers = late_layers(mu)
    return not layers or float(mu.variation("input")) <= CANCELS * max(float(mu.variation(name)) for name in layers)
