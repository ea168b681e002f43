"""Variation of measures against a reference, compared with rules without a reference, on trained networks.

Source: docs/differences.md. The command is ``python -m benchmarks.differences --variation``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from benchmarks.default_composite import POLICIES, Net, candidates, nets, rounded
from nrm_plugin import NRMDefault, RelevanceMeasure
from nrm_plugin.commands.image_references import BLUR
from nrm_plugin.composites import Normalized

SAMPLES = 128
Row = dict[str, Any]


def measured() -> dict[str, list[Row]]:
    """Returns the rows of all measures, by trained network."""
    return {net.name: [{"measure": name, **row} for name, row in rows_of(net)] for net in nets(SAMPLES)}


def rows_of(net: Net) -> Iterator[tuple[str, Row]]:
    """Yields the variation of each measure of one network."""
    for name, settings in measures(net).items():
        mu = RelevanceMeasure(net.model, net.images, net.target, **settings)
        taps = torch.stack([mu.variation(layer) for layer in ["input", *net.layers]]).amax(0)
        row = {"taps": spread(taps), "walks": spread(mu.walk_variation())}
        print(net.name, name, row, flush=True)
        yield name, row


def measures(net: Net) -> dict[str, dict[str, Any]]:
    """Returns the arguments of each measure, by name."""
    composites = candidates(net.images.shape[1])
    others = other_class(net.target)
    exact = Normalized(composites["LRP-0"], gain_limit=math.inf)
    return {
        "reference: black or mean color": {"reference": net.fill[0].expand_as(net.images[0])},
        "reference: blurred": {"reference": blurred(net.images)},
        "reference: another class, against it": {"reference": net.images[others], "against": net.target[others]},
        "reference: another class, against it, with `NRMDefault` on differences": {
            "reference": net.images[others], "against": net.target[others], "composite": NRMDefault(),
        },
        "`NRMDefault`": {"composite": NRMDefault()},
        "LRP-ε, ε = 0.25": {"composite": Normalized(composites["ε 0.25 everywhere"], **POLICIES["G = 2"])},
        "LRP-0": {"composite": Normalized(composites["LRP-0"], **POLICIES["G = 2"])},
        "LRP-0, `gain_limit=inf`": {"composite": exact},
    }  # fmt: skip


def other_class(target: Tensor) -> Tensor:
    """Returns the index of the next sample of another class, ``(N,)``."""
    order = torch.arange(len(target))
    later = torch.stack([order.roll(-step) for step in range(len(target))], 1)
    found: Tensor = later.gather(1, (target[later] != target[:, None]).long().argmax(1, keepdim=True))[:, 0]
    return found


def blurred(images: Tensor) -> Tensor:
    """Blurs images as ``nrm-plugin explain --reference blur`` does."""
    deviation = BLUR * images.shape[-1]
    side = 2 * min(round(3 * deviation), images.shape[-1] - 1) + 1
    result: Tensor = gaussian_blur(images, [side, side], [deviation, deviation])
    return result


def spread(values: Tensor) -> list[float]:
    """Returns the median, 95th percentile and maximum over samples."""
    return [rounded(values.quantile(share)) for share in (0.5, 0.95, 1.0)]
