"""Figures of the demo. ``docs/images/demo.png`` is the figure ``6-joint.png`` written by ``nrm-plugin demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..events.event import at
from ..measure.flow_heat_maps import flow_maps_and_pairs
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, patches
from ..model.contrast import REST
from ..plots.flow import flow_figure
from ..plots.flow_html import save_sankey
from ..plots.flow_thumbnails import Photo
from ..plots.heatmaps import Budget, budgets, heat_maps, image_and_heat_map
from ..plots.ribbons import percent
from .demo_values import Row, Sample
from .flow_groups import patch_names
from .joint_relevance import joint_figure, joint_relevance
from .output_files import save_figure, writing

UPPER, LOWER = "features.12", "features.7"
CHANNELS, CONDITIONS, PATCHES = 6, 7, 4
MADE = "bundled network · NRMDefault · no reference"
"""How the flows of the demo are computed, for their figures."""


def save_sample(model: nn.Module, sample: Sample, image: Tensor, out: Path, against: str = REST) -> list[Path]:
    """Saves three figures for one digit: joint relevance of two layers, pixel relevance, and channels.

    Args:
        model: The digit classifier.
        sample: The digit to explain.
        image: Image of the digit, of shape ``(1, 16, 16)``.
        out: Folder to which the figures are written.
        against: ``"rest"`` to contrast the digit with the other digits, or ``"none"``.
    """
    mu = _measure(model, image[None], sample, against)
    relevance = mu.marginal("input")[0].sum(0)
    title = str(sample).capitalize()
    joint = joint_relevance(mu, [UPPER, LOWER], CHANNELS)
    explained = _explained(sample, against)
    heading = f"{title}. Which pairs of channels carry relevance for {explained}?"
    figures = {
        "joint": joint_figure(mu, image, relevance, joint, heading=heading),
        "pixels": image_and_heat_map(image, relevance, ("image", _two_lines(f"relevance for {explained}")), title),
        "channels": _channels(mu, image, f"{title}. Relevance given a channel of {UPPER}"),
    }
    files = {out / f"{sample.name}-{kind}.png": figure for kind, figure in figures.items()}
    for path, figure in files.items():
        save_figure(figure, path)
    return list(files)


def _measure(model: nn.Module, images: Tensor, sample: Sample, against: str) -> RelevanceMeasure:
    """Returns the measure of the predicted digit. Its output exceeds the outputs of the other digits."""
    return RelevanceMeasure(model, images, sample.predicted, against=REST if against == REST else None)


def _explained(sample: Sample, against: str) -> str:
    return f"“{sample.predicted}”" + (" rather than the other digits" if against == REST else "")


def _two_lines(title: str) -> str:
    """Breaks a title into two lines. A single line would overlap the color bar."""
    return title.replace(" rather than ", "\nrather than ")


def _channels(mu: RelevanceMeasure, image: Tensor, heading: str) -> Figure:
    """Plots conditional heat maps of the most relevant channels."""
    mass = mu.marginal(UPPER, over="channel")[0]
    top = mass.abs().argsort(descending=True, stable=True)[:CONDITIONS].tolist()
    maps = mu.marginal("input", given=[at(UPPER).channel(channel) for channel in top])[:, 0].sum(1)
    if mu.explains_difference:
        maps = maps * mass[top].sign().reshape(-1, 1, 1)
    titles = [f"channel {channel}  ({percent(float(mass[channel]))})" for channel in top]
    return heat_maps(list(maps), titles, heading, image)


def save_budgets(rows: Sequence[Row], samples: Sequence[Sample], images: Tensor, composite: str, out: Path) -> Path:
    """Saves a figure of the relevance at each layer, with one panel per digit.

    Args:
        rows: One row per layer, with tensors of shape ``(N,)``.
        samples: The ``N`` digits.
        images: Images of the digits, of shape ``(N, 1, 16, 16)``.
        composite: Name of the composite, for the title.
        out: Folder to which the figure is written.
    """

    def values(column: str, number: int) -> list[float]:
        return [float(getattr(row, column)[number]) for row in rows]

    panels = [
        Budget(
            _classified(sample),
            mass=values("mass", number),
            sink=values("sink", number),
            bypass=values("bypass", number),
            reference=values("plain", number),
            image=images[number],
        )
        for number, sample in enumerate(samples)
    ]
    heading = f"Relevance of each layer with {composite}, from the output down"
    path = out / "budgets.png"
    save_figure(budgets([row.layer for row in rows], panels, heading, "plain Zennit"), path)
    return path


def _classified(sample: Sample) -> str:
    predicted = f"“{sample.predicted}”"
    return predicted if sample.predicted == sample.label else f"{sample.label} classified as {predicted}"


def save_flow(model: nn.Module, sample: Sample, image: Tensor, out: Path, against: str = REST) -> list[Path]:
    """Saves the flow from image patches to the predicted class as a figure and as an HTML page.

    Args:
        model: The digit classifier.
        sample: The digit to explain.
        image: Image of the digit, of shape ``(1, 1, 16, 16)``.
        out: Folder to which the files are written.
        against: As in :func:`save_sample`.
    """
    mu = _measure(model, image, sample, against)
    over = {"input": patches(image.shape[2:], PATCHES)}
    names: dict[str, Names] = {"input": patch_names(PATCHES), "output": [f"“{digit}”" for digit in range(10)]}
    if against == REST:
        names["output"] = [f"“{sample.predicted}”"]
    graph = mu.flow(["input", LOWER, UPPER, "output"], over, top=CHANNELS, names=names)
    maps, pairs = flow_maps_and_pairs(mu, graph, over)
    heading = f"{str(sample).capitalize()}. How relevance flows to {_explained(sample, against)}"
    files = [out / f"{sample.name}-flow.{kind}" for kind in ("png", "html")]
    shown = [node for node in graph.layers[-1].nodes if node.group is not None]
    regions = {node.key: torch.eq(over["input"], node.group or 0).numpy() for node in shown}
    photo = Photo(image[0], regions=regions)
    save_figure(flow_figure(graph, heading, maps=maps, image=photo, width=7.0, made=MADE), files[0])
    with writing(files[1]) as temporary:
        save_sankey(graph, temporary, heading, maps, image=photo, pairs=pairs, made=MADE)
    return files
