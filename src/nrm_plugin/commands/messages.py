"""Terminal output of the commands. Except for names, it is ASCII, which every terminal can display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..dataset.images import LoadedImage
from ..errors import printable
from ..measure.flow_graph import FlowGraph
from ..plots.flow_thumbnails import Photo
from . import photos
from .explanation import Explanation, Totals
from .image_references import reference_words
from .model_loading import LoadedModel
from .output_files import class_name
from .request import SECANTS, Against, Request

BEST = 5
"""Number of listed classes."""


def heading(loaded: LoadedModel, request: Request) -> str:
    """Returns the header line with the model, rules and device shared by all images of a run."""
    model = f"{printable(loaded.name)} (weights: {loaded.weights})"
    words = reference_words(request.reference)
    if request.composite == SECANTS:
        return f"{model} by slopes{words}, on {request.device}"
    limit = f", gain limit {request.gain_limit:g}" if request.residual == "redistribute" else ""
    return f"{model} by {request.composite}{words}, residual {request.residual}{limit}, on {request.device}"


def image(loaded: LoadedModel, source: LoadedImage, outputs: Tensor, target: int, against: Against) -> Iterator[str]:
    """Yields the output lines for an image: its path, notes and classes."""
    yield printable(source.path)
    yield from (f"  note: it {note}" for note in source.notes)
    yield from classes(loaded, outputs, target, against)


def crop_note(shown_image: Photo) -> Iterator[str]:
    """Yields a line about the unseen part of an image, if any."""
    text = photos.crop_note(shown_image)
    if text:
        yield f"  note: {text[0].lower()}{text[1:].removesuffix('.')}; --fit pad shows the model all of it"


def explained(loaded: LoadedModel, result: Explanation, paths: Sequence[Path]) -> Iterator[str]:
    """Yields the output lines for an explanation: heat maps, totals, layers, conditions and files."""
    yield from image(loaded, result.source, result.outputs, result.target, result.against)
    yield from crop_note(result.photo)
    yield from difference(loaded, result.target, result.against, result.difference)
    if result.pixel_map is not None:
        yield f"  reference: the plain background of the image{reference_words(result.reference)}"
        yield "    --reference blur compares with the blurred image, --reference none as without a plain background"
        yield "  fine heat map: the pixels, compared with the background and with images half covered by it"
    if result.layer_map is not None:
        about = f"{' and '.join(result.layer_map.layers)}{reference_words(result.layer_map.reference)}"
        yield f"  coarse heat map: mean over {about}"
    is_drawn = result.shows_pixels and result.pixel_map is None
    yield f"  {'fine heat map: ' if is_drawn else ''}relevance {_totals(result.totals, 'at the pixels')}"
    yield from (f"  note: {note}" for note in result.notes)
    for layer in result.layers:
        yield f"  {layer.name}: {_totals(layer.totals, 'crosses it')}, variation {layer.totals.variation:.3g}"
        yield from _columns([f"channel {channel:<5} {_percent(float(layer.mass[channel]))}" for channel in layer.top])
    for given in result.given:
        if given.relevance is not None:
            yield f"  given {given.condition.text}: mass {_percent(given.mass).strip()}"
        else:
            yield f"  given {given.condition.text}: no heat map, see below"
    yield from files(paths)


def files(paths: Sequence[Path]) -> Iterator[str]:
    """Yields a line for each written file."""
    yield from (f"  -> {printable(path)}" for path in paths)


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a table with left-aligned columns."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def layers(graph: FlowGraph) -> Iterator[str]:
    """Yields one line per layer of a flow."""
    for layer in graph.layers:
        mass, groups = sum(layer.masses), len(layer.groups) + layer.others
        parts = [f"{_percent(mass).strip()} in {len(layer.groups)} of {groups} groups"]
        parts += [f"{_percent(layer.rest).strip()} in the rest"] if layer.others else []
        parts += [f"{_percent(layer.sink).strip()} absorbed above"] if round(layer.sink, 4) else []
        parts += [f"{_percent(layer.bypass).strip()} around it"] if round(layer.bypass, 4) else []
        yield f"  {layer.name}: {', '.join(parts)}"
    if graph.carried is not None:
        yield f"  through the shown groups of all layers: {_percent(graph.carried).strip()}"


def difference(loaded: LoadedModel, target: int, against: Against, value: float | None) -> Iterator[str]:
    """Yields a line about the explained difference between outputs, if any."""
    if against is None or value is None:
        return
    name = _name(loaded, target)
    others = "the other classes" if isinstance(against, str) else _name(loaded, against)
    ahead = "" if value > 0 else f", as {name} is behind; positive relevance is evidence for {name} all the same"
    yield f"  explained: {name} rather than {others}, a difference of {value:.4g}{ahead}"


def _name(loaded: LoadedModel, index: int) -> str:
    return class_name(loaded, index) or f"class {index}"


def classes(loaded: LoadedModel, outputs: Tensor, target: int, against: Against) -> Iterator[str]:
    """Yields lines about the classes with the largest outputs, the explained class and the contrast."""
    softmax = torch.softmax(outputs.double(), 0)
    best = outputs.argsort(descending=True, stable=True)[:BEST].tolist()
    listed = list(dict.fromkeys([*best, target, *([against] if isinstance(against, int) else [])]))
    names = {index: class_name(loaded, index) for index in listed}
    width = max(len(name) for name in names.values())
    for index in listed:
        mark = "  <- explained" if index == target else "  <- compared with" if index == against else ""
        is_single = len(outputs) == 1
        number = f"output {float(outputs[index]):.4g}" if is_single else f"{100 * float(softmax[index]):6.2f}%"
        yield f"  {index:4} {names[index]:{width}}{'  ' if width else ' '}{number}{mark}"


def _totals(totals: Totals, where: str) -> str:
    text = f"{_percent(totals.mass).strip()} {where}, {_percent(totals.sink).strip()} absorbed above"
    return text + (f", {_percent(totals.bypass).strip()} around it" if round(totals.bypass, 4) else "")


def _percent(value: float) -> str:
    # Adding zero turns a -0.00 into 0.00.
    return f"{round(100 * value, 2) + 0.0:7.2f}%"


def _columns(cells: Sequence[str], across: int = 2) -> Iterator[str]:
    width = max((len(cell) for cell in cells), default=0)
    for start in range(0, len(cells), across):
        yield ("    " + "   ".join(cell.ljust(width) for cell in cells[start : start + across])).rstrip()
