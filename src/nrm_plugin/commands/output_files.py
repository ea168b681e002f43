"""What is written for each picture: heat maps as PNG, numbers as safetensors with all settings, channels as CSV."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import platform
import re
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..dataset.images import shown
from ..plots.heatmaps import heat_maps, image_and_heat_map, save
from ..plots.ribbons import percent
from .explanation import Answer, GivenAnswer, LayerAnswer, Request
from .model_loading import Subject

PACKAGES = ("nrm-plugin", "torch", "torchvision", "zennit", "captum")
OUTLIERS = 400
"""One of so many pixels may be beyond the colour scale."""
LONGEST_HEADER = 10**8
"""Of a safetensors file."""
LETTERS = 21
"""That fit above one picture of several, in the size of a heading."""
LONGEST = 34
"""Letters that fit above a picture."""
HEAT_MAP, NUMBERS, GIVEN = "relevance.png", "relevance.safetensors", "given.png"


def check_folder(folder: Path) -> None:
    """Makes a folder and writes to it, so that a wrong one is known before anything is computed.

    Raises:
        OSError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write to {shown(folder)}: {why}. Name another folder with --out DIR.") from error


def settings(subject: Subject, request: Request, answer: Answer) -> dict[str, str]:
    """Everything that the numbers depend on, as the metadata of their file; what is no text is JSON."""
    return {
        "image": shown(answer.picture.path.name),
        "image_sha256": answer.picture.digest,
        "model": shown(subject.name),
        "weights": subject.weights,
        "target": str(answer.target),
        "target_name": class_name(subject, answer.target),
        "composite": request.composite,
        "residual": request.residual,
        "gain_limit": str(request.gain_limit),
        "layers": json.dumps(list(request.layers)),
        "given": json.dumps([condition.text for condition in request.given]),
        "preparation": json.dumps(subject.prepare.settings),
    }


def tensors(answer: Answer) -> dict[str, Tensor]:
    """The numbers of a picture, by the names that they have in the file."""
    found = {
        "image": answer.image,
        "outputs": answer.outputs,
        "relevance": answer.relevance,
        "sink": answer.outputs.new_tensor(answer.share.sink),
        "bypass": answer.outputs.new_tensor(answer.share.bypass),
    }
    for layer in answer.layers:
        found[f"layer/{layer.name}/relevance"] = layer.relevance
        found[f"layer/{layer.name}/channels"] = layer.mass
        found[f"layer/{layer.name}/top"] = torch.tensor(layer.top, dtype=torch.int64)
        found[f"layer/{layer.name}/maps"] = layer.maps
        found[f"layer/{layer.name}/sink"] = answer.outputs.new_tensor(layer.share.sink)
        found[f"layer/{layer.name}/bypass"] = answer.outputs.new_tensor(layer.share.bypass)
    for number, given in enumerate(answer.given, 1):
        found[f"given/{number}/mass"] = answer.outputs.new_tensor(given.mass)
        if given.relevance is not None:
            found[f"given/{number}/relevance"] = given.relevance
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def write(subject: Subject, request: Request, answer: Answer, out: Path, taken: set[str]) -> list[Path]:
    """Writes the files of one picture under a name that is free, or that the same question had before.

    Args:
        subject: The model.
        request: What was asked.
        answer: What was found.
        out: Folder.
        taken: Names that other pictures of this call have; the new one is added.

    Returns:
        The files, the heat map first.

    Raises:
        OSError: They cannot be written.
    """
    about = settings(subject, request, answer)
    drawn = [given for given in answer.given if given.relevance is not None]
    ends = [HEAT_MAP, NUMBERS, *(f"{plain(layer.name)}.{kind}" for layer in answer.layers for kind in _kinds(layer))]
    ends += [GIVEN] if drawn else []
    stem = free_name(
        out, answer.picture.path.stem, ends, taken, lambda name: _is_same(out / f"{name}-{NUMBERS}", about)
    )
    files = [out / f"{stem}-{end}" for end in ends]
    _save(_overview(subject, answer), files[0])
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    _save_tensors(tensors(answer), files[1], {**about, "device": request.device, "versions": json.dumps(versions)})
    for layer in answer.layers:
        if layer.top:
            _save(_channels(subject, answer, layer), out / f"{stem}-{plain(layer.name)}.png")
        _save_table(layer, out / f"{stem}-{plain(layer.name)}.csv")
    if drawn:
        _save(_conditional(subject, answer, drawn), files[-1])
    return files


def _kinds(layer: LayerAnswer) -> tuple[str, ...]:
    """Without a picture where no channel has any relevance."""
    return ("png", "csv") if layer.top else ("csv",)


def free_name(out: Path, stem: str, ends: Sequence[str], taken: set[str], is_same: Callable[[str], bool]) -> str:
    """The beginning of names of files: none that belong to something else are written over.

    Args:
        out: Folder.
        stem: What it should be, such as the name of the picture.
        ends: What follows in the names.
        taken: Names that others of this call have; the new one is added.
        is_same: Whether the files of a name are the answer to the same question; these are replaced.
    """
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        is_free = not any((out / f"{name}-{end}").exists() for end in ends)
        if name.casefold() not in taken and (is_free or is_same(name)):
            break
    taken.add(name.casefold())
    return name


def _is_same(path: Path, about: Mapping[str, str]) -> bool:
    # The header alone; not by safe_open, which refuses names that are no text.
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            known = json.loads(file.read(length))["__metadata__"] if length < LONGEST_HEADER else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(known, dict) and all(known.get(key) == value for key, value in about.items())


def class_name(subject: Subject, index: int) -> str:
    """Name of a class; empty where it is not known."""
    return shown(subject.categories[index]) if index < len(subject.categories) else ""


def plain(layer: str) -> str:
    """The name of a layer as a part of a file name on any system."""
    return re.sub(r"[^\w.\-]", "_", layer)


def short(text: str, length: int = LONGEST) -> str:
    """Text with its middle left out where it is too long; dollar signs are no formulas."""
    clean = shown(text)
    half = (length - 1) // 2
    clean = clean if len(clean) <= length else f"{clean[:half]}…{clean[-half:]}"
    return clean.replace("$", r"\$")


def wrapped(text: str, width: int = 24) -> str:
    """Text in lines that fit above a small picture, broken at spaces and dots."""
    lines = [""]
    for word in re.findall(r"[^\s,]*[\s,]*", text):
        if lines[-1] and len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    kept = [short(line.strip(), width + 6) for line in lines[:3]]
    return "\n".join([*kept, "…"] if len(lines) > 3 else kept)


# -- pictures -------------------------------------------------------------------------------------------------------


def visible_limit(maps: Sequence[Tensor]) -> float | None:
    """The value of the darkest colour for maps ``(H, W)``: a few pixels far above all others would blank these.

    The largest value that no more than one of :data:`OUTLIERS` pixels exceeds; None where that is zero.
    """
    values = torch.stack(list(maps)).abs().flatten() if maps else torch.zeros(1)
    kept = values.sort().values[: max(1, len(values) - len(values) // OUTLIERS)]
    return float(kept[-1]) or None


def _what(subject: Subject, answer: Answer) -> str:
    random = "  (random weights)" if subject.weights == "none" else ""
    return f"{short(answer.picture.path.name)}: relevance for {_target(subject, answer)}{random}"


def _heading(lines: Sequence[str], maps: int) -> str:
    """Lines broken so that they fit above an image and so many maps beside it."""
    width = LETTERS * (min(3, maps) + 1)
    return "\n".join(textwrap.fill(line, width, break_long_words=True) for line in lines)


def _target(subject: Subject, answer: Answer) -> str:
    name = class_name(subject, answer.target)
    return f"“{short(name)}”" if name else f"class {answer.target}"


def _overview(subject: Subject, answer: Answer) -> Figure:
    share = answer.share
    numbers = f"mass {percent(share.mass)}, sink {percent(share.sink)}"
    if share.bypass:
        numbers += f", bypass {percent(share.bypass)}"
    left = f"{short(answer.picture.path.name)}\n{short(subject.name)}"
    left += ", random weights" if subject.weights == "none" else ""
    right = f"relevance for {_target(subject, answer)}\n{numbers}"
    pixels = answer.relevance.sum(0)
    return image_and_heat_map(answer.image, pixels, (left, right), limit=visible_limit([pixels]))


def _channels(subject: Subject, answer: Answer, layer: LayerAnswer) -> Figure:
    titles = [f"channel {channel}  ({percent(float(layer.mass[channel]))})" for channel in layer.top]
    lines = [_what(subject, answer), f"what the channels of {short(layer.name, 60)} draw on"]
    heading = _heading(lines, len(layer.maps))
    return heat_maps(list(layer.maps), titles, heading, answer.image, limit=visible_limit(list(layer.maps)))


def _conditional(subject: Subject, answer: Answer, drawn: Sequence[GivenAnswer]) -> Figure:
    maps = [given.relevance.sum(0) for given in drawn if given.relevance is not None]
    titles = [f"given {wrapped(given.condition.text)}\nmass {percent(given.mass)}" for given in drawn]
    limit = visible_limit(maps)
    if len(maps) == 1:
        left = _what(subject, answer).replace(": ", ":\n", 1)
        return image_and_heat_map(answer.image, maps[0], (left, titles[0]), limit=limit)
    return heat_maps(maps, titles, _heading([_what(subject, answer)], len(maps)), answer.image, limit=limit)


# -- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without warnings of letters that a font has not: a box stands for these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _save(figure: Figure, path: Path) -> None:
    with quietly():
        save(figure, path)


def _save_tensors(numbers: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    # Not by save_file, whose files nobody but their owner may read.
    path.write_bytes(safetensors.torch.save(numbers, about))


def _save_table(layer: LayerAnswer, path: Path) -> None:
    """All channels, those of most absolute mass first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["channel", "mass"])
        for channel in layer.mass.abs().argsort(descending=True, stable=True).tolist():
            table.writerow([channel, f"{float(layer.mass[channel]):.9g}"])
