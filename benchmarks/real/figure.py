"""The figure of docs/real.md: photographs of two objects, with explanations of both, and GradCAM.

``python -m benchmarks.real.figure`` computes the heat maps with EfficientNet-Lite0 and writes docs/images/real.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import outputs
from nrm_plugin.plots.heatmaps import draw_heat_map, draw_image

from . import photos
from .methods import METHODS, Question, heat_map
from .networks import Network, efficientnet_lite

SHOWN = (("zebra", "firetruck"), ("tiger", "violin"), ("pink_flamingo", "badger"), ("elephant", "747"))
"""Names of the photographs of each row, left and right."""
LATE_LAYERS = "reference blur, last two resolutions, against the rest"
COLUMNS = (
    (LATE_LAYERS, 0, "{},\nlate layers"),
    (LATE_LAYERS, 1, "{},\nlate layers"),
    ("default, against the rest", 0, "{},\npixels"),
    ("GradCAM", 0, "{},\nGradCAM"),
)
"""Method, explained object and title of each heat map."""
SMOOTHED = 7
"""Side of the square over which the relevance of pixels is averaged for the figure."""


def image_of(net: Network, names: tuple[str, str]) -> tuple[Tensor, list[int]]:
    """Returns two photographs side by side on gray, ``(3, H, W)`` in [0, 1], and the class of each, alone on gray."""
    height, width = net.size
    by_name = {stamp.name: stamp for stamp in photos.stamps()}
    stamps = [by_name[name] for name in names]
    ground = photos.background("grey", height, width // 2)
    image = torch.cat([photos.placed(stamp.cut_out(height, width // 2), ground)[0] for stamp in stamps], 2)
    alone = [photos.placed(stamp.cut_out(*net.size), photos.background("grey", *net.size))[0] for stamp in stamps]
    return image, net.logits(net.normalized(torch.stack(alone))).argmax(1).tolist()


def drawn(net: Network) -> Figure:
    """Returns the figure."""
    rows = [image_of(net, names) for names in SHOWN]
    inputs = net.normalized(torch.stack([image for image, _ in rows]))
    plain = net.normalized(torch.full_like(net.mean, photos.GREY))
    figure = Figure(figsize=(2.3 * (1 + len(COLUMNS)), 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(COLUMNS), squeeze=False)
    for row, (image, _) in zip(axes, rows, strict=True):
        draw_image(row[0], image)
    axes[0][0].set_title("image", fontsize=9)
    for column, (name, which, title) in enumerate(COLUMNS, 1):
        targets = torch.tensor([classes[which] for _, classes in rows])
        method = METHODS[name]
        heat = heat_map(method, Question(net, inputs, targets, plain, inputs, method.against))
        if name == "default, against the rest":
            heat = nn.functional.avg_pool2d(heat[:, None], SMOOTHED, stride=1, padding=SMOOTHED // 2)[:, 0]
        for row, (image, _), one, target in zip(axes, rows, heat, targets.tolist(), strict=True):
            draw_heat_map(row[column], one, image, limit=float(one.abs().quantile(0.995)))
            row[column].set_title(title.format(net.classes[target].split(" (")[0]), fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    outputs.add_option(parser)
    files = outputs.chosen(parser.parse_args(arguments))
    drawn(efficientnet_lite(0)).savefig(files.images / "real.png", dpi=85)


if __name__ == "__main__":
    main()
