"""Metrics of heat maps: removal of patches, mass inside a mask, and which of two objects is explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from benchmarks.faithfulness.metrics import area, ranks

GRID = 14
"""Patches per side, so that a patch has 16 × 16 of 224 × 224 pixels."""
STEPS = tuple(round(GRID**2 * step / 10) for step in range(11))
"""Numbers of removed patches."""
Logits = Callable[[Tensor], Tensor]


def patch_order(heat: Tensor, most_first: bool) -> Tensor:
    """Returns the rank of the patch of each pixel, from 0, ``(N, 1, H, W)``, for heat maps ``(N, H, W)``."""
    means = nn.functional.adaptive_avg_pool2d(heat[:, None], GRID)
    order = ranks(means.flatten(1), most_first).reshape(means.shape)
    return nn.functional.interpolate(order.float(), size=heat.shape[1:], mode="nearest")


def removal(
    logits: Logits, inputs: Tensor, targets: Tensor, heat: Tensor, fill: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Returns the target logits and softmax while patches are replaced, ``(S, N)`` each, for both orders.

    Args:
        logits: Outputs of the network, ``(N, K)``.
        inputs: ``(N, C, H, W)``.
        targets: Explained class, ``(N,)``.
        heat: Heat maps, ``(N, H, W)``.
        fill: Replacement of the pixels where a mask ``(N, 1, H, W)`` is true.
    """
    curves: dict[str, Tensor] = {}
    ends = [outputs(logits(images), targets) for images in (inputs, fill(inputs, torch.ones_like(inputs[:, :1]) > 0))]
    for name, most_first in (("most first", True), ("least first", False)):
        order = patch_order(heat, most_first)
        between = [outputs(logits(fill(inputs, order < step)), targets) for step in STEPS[1:-1]]
        for number, kind in enumerate(("logit", "softmax")):
            curves[f"{name}, {kind}"] = torch.stack([one[number] for one in (ends[0], *between, ends[1])])
    return curves


def outputs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logit and softmax of the targets, ``(N,)`` each."""
    place = targets[:, None]
    return logits.gather(1, place)[:, 0], logits.softmax(1).gather(1, place)[:, 0]


def areas(curves: dict[str, Tensor], fill: str) -> dict[str, Tensor]:
    """Returns the areas under the curves of one fill, ``(N,)``.

    SRG is the mean target logit if the least relevant patches are removed first, minus the mean if the most relevant
    are. Deletion is the area of the softmax if the most relevant are set to a plain color first. Insertion restores a
    blurred image, the most relevant first, which is the curve of blurring the least relevant first.
    """
    shares = [step / GRID**2 for step in STEPS]
    most, least = (area(curves[f"{order} first, logit"], shares) for order in ("most", "least"))
    found = {f"SRG, {fill}": least - most}
    if fill == "plain":
        found["deletion"] = area(curves["most first, softmax"], shares)
    if fill == "blur":
        found["insertion"] = area(curves["least first, softmax"], shares)
    return found


# -- fills ----------------------------------------------------------------------------------------------------------


def fills(plain: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Returns fills of removed pixels by name: a plain color, a blurred image, noise, and the surrounding pixels.

    Args:
        plain: The plain color in the units of the model's inputs, ``(C, 1, 1)``.
    """

    def noise(inputs: Tensor, removed: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        lowest, highest = inputs.amin((0, 2, 3), keepdim=True), inputs.amax((0, 2, 3), keepdim=True)
        values = torch.rand(inputs.shape[1:], generator=draw)
        return torch.where(removed, lowest + values * (highest - lowest), inputs)

    return {
        "plain": lambda inputs, removed: torch.where(removed, plain, inputs),
        "blur": lambda inputs, removed: torch.where(removed, blurred(inputs), inputs),
        "noise": noise,
        "neighbours": inpainted,
    }


def blurred(inputs: Tensor) -> Tensor:
    """Returns images ``(N, C, H, W)``, blurred along one axis after the other."""
    width = min(inputs.shape[2:]) // 8
    across = gaussian_blur(inputs, [4 * width + 1, 1], [float(width), 1.0])
    return gaussian_blur(across, [1, 4 * width + 1], [1.0, float(width)])


def inpainted(inputs: Tensor, removed: Tensor) -> Tensor:
    """Fills removed pixels with the mean of the known pixels of the smallest square of a pyramid that has any.

    Squares have 2, 4, 8, … pixels per side. An image without a known pixel becomes 0.
    """
    height, width = inputs.shape[2:]
    weight = (~removed).to(inputs.dtype)
    total = filled = inputs * weight
    empty, side = removed, 1
    while bool(empty.any()) and side < max(height, width):
        side *= 2
        weight, total = (
            nn.functional.avg_pool2d(part, 2, ceil_mode=True, divisor_override=1) for part in (weight, total)
        )
        means, known = (
            part.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
            for part in (total / weight.clamp(min=1e-12), weight > 0)
        )
        filled, empty = torch.where(empty & known, means, filled), empty & ~known
    return filled


# -- masks ----------------------------------------------------------------------------------------------------------


def inside(heat: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Returns positive relevance inside the mask per area, and if the largest pixel lies inside, ``(N,)`` each."""
    positive = heat.clamp(min=0).flatten(1)
    masks = masks.flatten(1)
    share = (positive * masks).sum(1) / positive.sum(1).clamp(min=1e-30)
    largest = heat.flatten(1).argmax(1, keepdim=True)
    return {"inside": share / masks.double().mean(1), "pointing": masks.gather(1, largest)[:, 0].double()}


def own(heat: Tensor, masks: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Returns the share of positive relevance on the explained object, and if its net relevance is larger.

    Args:
        heat: ``(N, H, W)``.
        masks, others: Pixels of the explained and of the other object, boolean ``(N, H, W)``.
    """
    positive = heat.clamp(min=0)
    ours, theirs = ((positive * mask).sum((1, 2)) for mask in (masks, others))
    is_larger = (heat * masks).sum((1, 2)) > (heat * others).sum((1, 2))
    # A map without positive relevance on either object does not prefer one of them.
    own = torch.where(ours + theirs > 0, ours / (ours + theirs).clamp(min=1e-30), torch.full_like(ours, 0.5))
    return {"own": own, "wins": is_larger.double()}


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Returns the correlation of the patch means of two heat maps ``(N, H, W)``, ``(N,)``; 0 where one is constant."""
    first, second = (nn.functional.adaptive_avg_pool2d(heat[:, None], GRID).flatten(1) for heat in (one, other))
    first, second = (part - part.mean(1, keepdim=True) for part in (first, second))
    scale = (first.square().sum(1) * second.square().sum(1)).sqrt()
    return torch.where(scale > 0, (first * second).sum(1) / scale.clamp(min=1e-30), torch.zeros_like(scale))


__all__: Sequence[str] = ("areas", "correlation", "fills", "inpainted", "inside", "own", "patch_order", "removal")
