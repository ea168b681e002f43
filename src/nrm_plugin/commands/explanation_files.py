"""Files of one explanation: heat maps as PNG, numbers as safetensors with all settings, channels as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..plots.heatmaps import heat_maps, image_and_heat_map
from ..plots.ribbons import percent
from .explanation import ConditionalExplanation, Explanation, LayerExplanation
from .model_loading import LoadedModel
from .output_files import (
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
"""One in this number of pixels may exceed the colour scale."""
LONGEST_HEADER = 10**8
"""Largest header size of a safetensors file, in bytes."""
HEAT_MAP, NUMBERS, GIVEN = "relevance.png", "relevance.safetensors", "given.png"


def write(loaded: LoadedModel, request: Request, result: Explanation, out: Path, taken: set[str]) -> list[Path]:
    """Writes the files of one image.

    Args:
        loaded: The model.
        request: The request.
        result: The explanation.
        out: Folder.
        taken: Used file names, as in :func:`~nrm_plugin.commands.output_files.free_stem`.

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
    save_figure(_overview(loaded, result), heat_map)
    _save_tensors(tensors(result), numbers, {**about, "device": request.device, "versions": json.dumps(versions())})
    for layer in result.layers:
        start = out / f"{stem}-{name_part(layer.name)}"
        if layer.top:
            save_figure(_channels(loaded, result, layer), Path(f"{start}.png"))
        _save_table(layer, Path(f"{start}.csv"))
    if conditionals:
        save_figure(_conditionals(loaded, result, conditionals), others[-1])
    return [heat_map, numbers, *others]


def _kinds(layer: LayerExplanation) -> tuple[str, ...]:
    """Returns the kinds of files of a layer; no figure if no channel has relevance."""
    return ("png", "csv") if layer.top else ("csv",)


# -- numbers --------------------------------------------------------------------------------------------------------


def settings(loaded: LoadedModel, request: Request, result: Explanation) -> dict[str, str]:
    """Returns all settings that affect the numbers, as metadata for the file; lists and dictionaries become JSON."""
    about = image_settings(loaded, request, result.source.path, result.source.digest, result.target, result.against)
    about["given"] = [condition.text for condition in request.given]
    return {key: json.dumps(value) if isinstance(value, list | dict) else str(value) for key, value in about.items()}


def tensors(result: Explanation) -> dict[str, Tensor]:
    """Returns the numbers of an image, by their names in the file."""
    number = result.outputs.new_tensor
    named = {
        "image": result.image,
        "outputs": result.outputs,
        "relevance": result.relevance,
        "sink": number(result.totals.sink),
        "bypass": number(result.totals.bypass),
        **({} if result.difference is None else {"difference": number(result.difference)}),
    }
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
    return isinstance(stored, dict) and all(stored.get(key) == value for key, value in about.items())


def _save_tensors(numbers: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    # save_file creates files that only their owner can read.
    with writing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(numbers, about))


def _save_table(layer: LayerExplanation, path: Path) -> None:
    """Writes all channels, in descending order of absolute mass."""
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["channel", "mass"])
        for channel in layer.mass.abs().argsort(descending=True, stable=True).tolist():
            table.writerow([channel, f"{float(layer.mass[channel]):.9g}"])


# -- figures --------------------------------------------------------------------------------------------------------


def color_limit(maps: Sequence[Tensor]) -> float | None:
    """Chooses the value of the darkest colour for heat maps ``(H, W)``, so that extreme pixels do not hide all others.

    At most one in :data:`CLIPPED` pixels exceeds this value. Returns None if the value is zero.
    """
    values = torch.stack(list(maps)).abs().flatten() if maps else torch.zeros(1)
    inside = values.sort().values[: max(1, len(values) - len(values) // CLIPPED)]
    return float(inside[-1]) or None


def _overview(loaded: LoadedModel, result: Explanation) -> Figure:
    totals = result.totals
    numbers = f"mass {percent(totals.mass)}, sink {percent(totals.sink)}"
    if totals.bypass:
        numbers += f", bypass {percent(totals.bypass)}"
    left = f"{short(result.source.path.name)}\n{short(loaded.name)}"
    left += ", random weights" if weights_title(loaded) else ""
    explained = _explained(loaded, result).replace(" rather than ", "\nrather than ")
    right = f"relevance for {explained}\n{numbers}"
    pixels = result.relevance.sum(0)
    return image_and_heat_map(result.image, pixels, (left, right), limit=color_limit([pixels]))


def _title(loaded: LoadedModel, result: Explanation) -> str:
    return f"{short(result.source.path.name)}: relevance for {_explained(loaded, result)}{weights_title(loaded)}"


def _explained(loaded: LoadedModel, result: Explanation) -> str:
    return explained_title(loaded, result.target, result.against)


def _channels(loaded: LoadedModel, result: Explanation, layer: LayerExplanation) -> Figure:
    titles = [f"channel {channel}  ({percent(float(layer.mass[channel]))})" for channel in layer.top]
    lines = [_title(loaded, result), f"joint relevance of the channels of {short(layer.name, 60)} with the pixels"]
    maps = list(layer.heat_maps)
    return heat_maps(maps, titles, heading_lines(lines, len(maps)), result.image, limit=color_limit(maps))


def _conditionals(loaded: LoadedModel, result: Explanation, drawn: Sequence[ConditionalExplanation]) -> Figure:
    maps = [given.relevance.sum(0) for given in drawn if given.relevance is not None]
    titles = [f"given {wrapped(given.condition.text)}\nmass {percent(given.mass)}" for given in drawn]
    limit = color_limit(maps)
    if len(maps) == 1:
        left = _title(loaded, result).replace(": ", ":\n", 1).replace(" rather than ", "\nrather than ")
        return image_and_heat_map(result.image, maps[0], (left, titles[0]), limit=limit)
    heading = heading_lines([_title(loaded, result)], len(maps))
    return heat_maps(maps, titles, heading, result.image, limit=limit)
