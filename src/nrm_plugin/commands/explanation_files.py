"""Output files of one explanation: heat maps as PNG, tensors and settings as safetensors, channels as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..plots.arrays import Values
from ..plots.flow_thumbnails import photo_pixels
from ..plots.heatmaps import cell_sums, heat_maps, image_and_heat_map
from ..plots.ribbons import percent
from .explanation import ConditionalExplanation, Explanation, LayerExplanation, Totals
from .image_references import reference_words
from .model_loading import LoadedModel
from .options import AUTO, LAYER_CELLS, MOST_CELLS, PIXELS
from .output_files import (
    TITLE,
    explained_title,
    free_stem,
    heading_lines,
    image_settings,
    name_part,
    save_figure,
    short,
    versions,
    weights_title,
    wrapped,
    writing,
)
from .request import Request

CLIPPED = 400
"""Number of pixels among which at most one may exceed the color scale."""
LEAST_LOST = 0.005
"""Fraction of relevance lost above the pixels beyond which the title mentions the loss."""
LONGEST_HEADER = 10**8
"""Maximum header size of a safetensors file, in bytes."""
OF_THE_MACHINE = ("device", "versions")
"""Metadata keys whose values can differ between runs with the same settings."""
HEAT_MAP, NUMBERS, GIVEN = "relevance.png", "relevance.safetensors", "given.png"


def write(
    loaded: LoadedModel, request: Request, result: Explanation, out: Path, taken: set[str], cells: int | str = AUTO
) -> list[Path]:
    """Writes the output files of one image.

    Args:
        loaded: The explained model.
        request: The request that was explained.
        result: The explanation to write.
        out: Folder to which the files are written.
        taken: File names that are in use, as in :func:`~nrm_plugin.commands.output_files.free_stem`.
        cells: Resolution of the heat maps; see :func:`cells_of`.

    Returns:
        The files, with the heat map first.

    Raises:
        OSError: If a file cannot be written.
    """
    about = settings(loaded, request, result)
    conditionals = [given for given in result.given if given.relevance is not None]
    of_layers = [f"{name_part(layer.name)}.{kind}" for layer in result.layers for kind in _kinds(layer)]
    ends = [NUMBERS, HEAT_MAP, *of_layers, *([GIVEN] if conditionals else [])]
    stem = free_stem(out, result.source.path.stem, ends, taken, lambda path: _is_same(path, about))
    numbers, heat_map, *others = [out / f"{stem}-{end}" for end in ends]
    save_figure(_overview(loaded, result, cells), heat_map)
    of_the_machine = dict(zip(OF_THE_MACHINE, (request.device, json.dumps(versions())), strict=True))
    _save_tensors(tensors(result), numbers, {**about, **of_the_machine})
    for layer in result.layers:
        start = out / f"{stem}-{name_part(layer.name)}"
        if layer.top:
            save_figure(_channels(loaded, result, layer, cells), Path(f"{start}.png"))
        _save_table(layer, Path(f"{start}.csv"))
    if conditionals:
        save_figure(_conditionals(loaded, result, conditionals, cells), others[-1])
    return [heat_map, numbers, *others]


def _kinds(layer: LayerExplanation) -> tuple[str, ...]:
    """Returns the suffixes of the files written for a layer. There is no figure if no channel has relevance."""
    return ("png", "csv") if layer.top else ("csv",)


# -- numbers --------------------------------------------------------------------------------------------------------


def settings(loaded: LoadedModel, request: Request, result: Explanation) -> dict[str, str]:
    """Returns all settings that affect the results as metadata strings. Lists and dictionaries are encoded as JSON."""
    about = image_settings(loaded, request, result.source.path, result.source.digest, result.target, result.against)
    about["given"] = [condition.text for condition in request.given]
    if result.layer_map is not None:
        about["layer_map"] = {"layers": result.layer_map.layers, "reference": result.layer_map.reference or "none"}
    return {key: json.dumps(value) if isinstance(value, list | dict) else str(value) for key, value in about.items()}


def tensors(result: Explanation) -> dict[str, Tensor]:
    """Returns the result tensors of one image, keyed by their names in the file."""
    number = result.outputs.new_tensor
    named = {
        "image": result.image,
        "outputs": result.outputs,
        "relevance": result.relevance,
        "sink": number(result.totals.sink),
        "bypass": number(result.totals.bypass),
        **({} if result.difference is None else {"difference": number(result.difference)}),
    }
    if result.pixel_map is not None:
        named["pixel_map"] = result.pixel_map
    if result.layer_map is not None:
        named["layer_map"] = result.layer_map.relevance
    for layer in result.layers:
        named[f"layer/{layer.name}/relevance"] = layer.relevance
        named[f"layer/{layer.name}/channels"] = layer.mass
        named[f"layer/{layer.name}/top"] = torch.tensor(layer.top, dtype=torch.int64)
        named[f"layer/{layer.name}/maps"] = layer.heat_maps
        named[f"layer/{layer.name}/sink"] = number(layer.totals.sink)
        named[f"layer/{layer.name}/bypass"] = number(layer.totals.bypass)
    for place, given in enumerate(result.given, 1):
        named[f"given/{place}/mass"] = number(given.mass)
        if given.relevance is not None:
            named[f"given/{place}/relevance"] = given.relevance
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def _is_same(path: Path, about: Mapping[str, str]) -> bool:
    # Only the header is read; safe_open raises for file names that are not text.
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            stored = json.loads(file.read(length))["__metadata__"] if length < LONGEST_HEADER else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(stored, dict) and {key: stored[key] for key in stored if key not in OF_THE_MACHINE} == about


def _save_tensors(numbers: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    # save_file creates files that are readable only by their owner.
    with writing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(numbers, about))


def _save_table(layer: LayerExplanation, path: Path) -> None:
    """Writes the mass of each channel, in descending order of absolute mass."""
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["channel", "mass"])
        for channel in layer.mass.abs().argsort(descending=True, stable=True).tolist():
            table.writerow([channel, f"{float(layer.mass[channel]):.9g}"])


# -- figures --------------------------------------------------------------------------------------------------------


def color_limit(maps: Sequence[Values]) -> float | None:
    """Computes a color limit for heat maps of shape ``(H, W)`` that is robust to outliers.

    At most one in :data:`CLIPPED` pixels exceeds the limit. Returns None if the limit is zero.
    """
    values = torch.stack([torch.as_tensor(one) for one in maps]).abs().flatten() if maps else torch.zeros(1)
    inside = values.sort().values[: max(1, len(values) - len(values) // CLIPPED)]
    return float(inside[-1]) or None


def _overview(loaded: LoadedModel, result: Explanation, cells: int | str) -> Figure:
    left = f"{short(result.source.path.name)}\n{short(loaded.name)}"
    left += ", random weights" if weights_title(loaded) else ""
    left += "\n(the model saw the frame)" if result.photo.whole is not None else ""
    drawn = _drawn(result)
    sums = [cell_sums(values, cells_of(cells, values.shape)) for _, values in drawn]
    heading = heading_lines([f"relevance for {_explained(loaded, result)}"], len(sums), TITLE)
    shown = np.moveaxis(photo_pixels(result.photo), -1, 0) / 255 if result.photo.whole is not None else None
    limits = [color_limit([one]) for one in sums]
    titles = [left, *(title for title, _ in drawn)]
    return image_and_heat_map(result.image, sums, titles, heading, limits, shown=shown)


def _drawn(result: Explanation) -> list[tuple[str, Tensor]]:
    """Returns the heat maps of shape ``(H, W)`` with their titles."""
    drawn = []
    if result.pixel_map is not None:
        drawn.append(("the evidence, pixel by pixel\nfor the class alone", result.pixel_map))
    if result.layer_map is not None:
        # The heading names the reference of all results.
        own = "" if result.layer_map.reference == result.reference else reference_words(result.layer_map.reference)
        title = f"where the evidence is, by late layers{short(own)}".replace(", compared", ",\ncompared")
        drawn.append((title, result.layer_map.relevance))
    if result.shows_pixels and result.pixel_map is None:
        title = f"the evidence, pixel by pixel\n{wrapped(totals_text(result.totals), TITLE)}"
        drawn.append((title, result.relevance.sum(0)))
    return drawn


def totals_text(totals: Totals) -> str:
    """Describes how much relevance reaches the pixels and how much is absorbed or bypasses them."""
    lost = ((totals.sink, "is absorbed on the way"), (totals.bypass, "bypasses them"))
    parts = [f"{percent(value)} {words}" for value, words in lost if abs(value) >= LEAST_LOST]
    reached = percent(totals.mass) if parts else "all of it" if totals.mass > 0 else "all of it, against the class,"
    return ", ".join([f"{reached} reaches the pixels", *parts])


def cells_of(cells: int | str, size: Sequence[int], layer: Sequence[int] | None = None) -> list[int]:
    """Returns the number of heat-map cells along each dimension.

    Args:
        cells: Number of cells, or ``AUTO``, ``PIXELS`` or ``LAYER_CELLS`` of :mod:`~nrm_plugin.commands.options`.
        size: Size of the map in pixels.
        layer: Spatial size of the layer, or None for the input.
    """
    if isinstance(cells, int):
        return [cells] * len(size)
    if cells == PIXELS:
        return list(size)
    if layer is not None and len(layer) == len(size):
        least = 1 if cells == LAYER_CELLS else MOST_CELLS // 2
        return [max(least, length) for length in layer]
    return [MOST_CELLS] * len(size)


def _title(loaded: LoadedModel, result: Explanation) -> str:
    return f"{short(result.source.path.name)}: relevance for {_explained(loaded, result)}{weights_title(loaded)}"


def _explained(loaded: LoadedModel, result: Explanation) -> str:
    return explained_title(loaded, result.target, result.against, result.reference)


def _channels(loaded: LoadedModel, result: Explanation, layer: LayerExplanation, cells: int | str) -> Figure:
    titles = [f"channel {channel}  ({percent(float(layer.mass[channel]))})" for channel in layer.top]
    lines = [_title(loaded, result), f"joint relevance of the channels of {short(layer.name, 60)} with the pixels"]
    size = cells_of(cells, layer.heat_maps.shape[1:], layer.relevance.shape[1:])
    maps = [cell_sums(values, size) for values in layer.heat_maps]
    return heat_maps(maps, titles, heading_lines(lines, len(maps)), result.image, limit=color_limit(maps))


def _conditionals(
    loaded: LoadedModel, result: Explanation, drawn: Sequence[ConditionalExplanation], cells: int | str
) -> Figure:
    pixels = [given.relevance.sum(0) for given in drawn if given.relevance is not None]
    maps = [cell_sums(values, cells_of(cells, values.shape)) for values in pixels]
    titles = [f"given {wrapped(given.condition.text)}\nmass {percent(given.mass)}" for given in drawn]
    limit = color_limit(maps)
    if len(maps) == 1:
        left = _title(loaded, result).replace(": ", ":\n", 1).replace(" rather than ", "\nrather than ")
        return image_and_heat_map(result.image, maps[0], (left, titles[0]), limit=limit)
    heading = heading_lines([_title(loaded, result)], len(maps))
    return heat_maps(maps, titles, heading, result.image, limit=limit)
