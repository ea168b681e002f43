"""Output files of the commands: settings, headings, figures and file names that never overwrite other results."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import platform
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from zennit.composites import COMPOSITES

from ..dataset.atomic_files import AtomicFile
from ..errors import NRMError, printable
from ..plots.fonts import use_installed_fonts
from ..plots.heatmaps import DPI, save
from ..plots.ribbons import DARK, LIGHT
from .image_references import reference_words
from .model_loading import LoadedModel
from .request import SECANTS, Against, Request
from .weight_files import NONE

PACKAGES = ("nrm-plugin", "torch", "torchvision", "zennit", "captum")
TITLE = 34
"""Number of characters that fit on a line above a heat map."""
LETTERS = 21
"""Number of heading characters per heat map in a row."""

_noted: set[str] = set()
"""Characters already reported as missing from all fonts."""


class OutputError(NRMError, OSError):
    """Raised if a result cannot be written. No partial file is left behind."""


def check_folder(folder: Path) -> None:
    """Creates a folder and checks that it is writable. Errors are thus raised before the computation.

    Raises:
        OSError: If the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write to {printable(folder)}: {reason}. Give another folder with --out DIR.") from error


# -- names ----------------------------------------------------------------------------------------------------------


def free_stem(out: Path, stem: str, ends: Sequence[str], taken: set[str], is_same: Callable[[Path], bool]) -> str:
    """Returns a file-name prefix that overwrites only results of the same query.

    Args:
        out: Folder of the output files.
        stem: Preferred prefix, such as the name of the image.
        ends: Suffixes of the file names. The first one belongs to the file that contains the settings.
        taken: Prefixes that are in use. The new one is added.
        is_same: Function that returns True if an existing settings file belongs to the same query and can be
            overwritten.
    """
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        is_free = not any((out / f"{name}-{end}").exists() for end in ends)
        if name.casefold() not in taken and (is_free or is_same(out / f"{name}-{ends[0]}")):
            break
    taken.add(name.casefold())
    return name


def json_stem(out: Path, stem: str, ends: Sequence[str], taken: set[str], settings: Mapping[str, Any]) -> str:
    """Returns a file-name prefix like :func:`free_stem`, for JSON results.

    An existing file counts as the same query if its ``"settings"`` are equal.
    """
    return free_stem(out, stem, ends, taken, lambda path: _stored_settings(path) == json.loads(json.dumps(settings)))


def _stored_settings(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def name_part(layer: str) -> str:
    """Converts a layer name to part of a file name, valid on any system."""
    return re.sub(r"[^\w.\-]", "_", layer)


# -- settings -------------------------------------------------------------------------------------------------------


def image_settings(
    loaded: LoadedModel, request: Request, path: Path, digest: str, target: int, against: Against
) -> dict[str, Any]:
    """Returns all settings of the image, the model and the rules that affect the results."""
    return {
        "image": printable(path.name),
        "image_sha256": digest,
        "model": printable(loaded.name),
        "weights": loaded.weights,
        "target": target,
        "target_name": class_name(loaded, target),
        "against": NONE if against is None else against,
        "composite": request.composite,
        "residual": request.residual,
        "gain_limit": "inf" if request.gain_limit == math.inf else request.gain_limit,
        "layers": list(request.layers),
        "preparation": loaded.preprocessing.settings,
        **({} if request.reference is None else {"reference": request.reference}),
        **({} if request.map is None else {"map": request.map}),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect the results."""
    return {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}


# -- text -----------------------------------------------------------------------------------------------------------


def class_name(loaded: LoadedModel, index: int) -> str:
    """Returns the name of a class, or an empty string if unknown."""
    return printable(loaded.categories[index]) if index < len(loaded.categories) else ""


def target_title(loaded: LoadedModel, index: int) -> str:
    """Returns the class name for a figure heading."""
    name = class_name(loaded, index)
    return f"“{short(name)}”" if name else f"class {index}"


def made_by(loaded: LoadedModel, request: Request) -> str:
    """Returns the model, the rules and the reference for a figure, such as "vgg16 · NRMAbsolute · no reference"."""
    rules = "secant slopes" if request.composite == SECANTS else COMPOSITES[request.composite].__name__
    words = reference_words(request.reference).removeprefix(", ") or "no reference"
    return f"{printable(loaded.name)} · {rules} · {words}"


def explained_title(loaded: LoadedModel, index: int, against: Against, reference: str | None = None) -> str:
    """Returns a figure heading with the class, its contrast and the reference."""
    target, end = target_title(loaded, index), short(reference_words(reference), 60)
    if against is None:
        return f"{target}{end}"
    others = "the other classes" if isinstance(against, str) else target_title(loaded, against)
    return f"{target} rather than {others}{end}"


def weights_title(loaded: LoadedModel) -> str:
    """Returns a note for figure headings if the weights are random, and otherwise an empty string."""
    return "  (random weights)" if loaded.weights == NONE else ""


def short(text: str, length: int = TITLE) -> str:
    """Shortens a text in the middle and escapes dollar signs for matplotlib."""
    clean = printable(text)
    half = (length - 1) // 2
    clean = clean if len(clean) <= length else f"{clean[:half]}…{clean[-half:]}"
    return clean.replace("$", r"\$")


def wrapped(text: str, width: int = 24) -> str:
    """Wraps a text above a heat map to at most three lines, broken at spaces and commas."""
    lines = [""]
    for word in re.findall(r"[^\s,]*[\s,]*", text):
        if lines[-1] and len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    first = [short(line.strip(), width + 6) for line in lines[:3]]
    return "\n".join([*first, "…"] if len(lines) > 3 else first)


def heading_lines(lines: Sequence[str], heat_maps: int, letters: int = LETTERS) -> str:
    """Wraps heading lines to the width of an image and its heat maps, with ``letters`` characters for each."""
    width = letters * (min(3, heat_maps) + 1)
    return "\n".join(textwrap.fill(line, width, break_long_words=True) for line in lines)


# -- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary file, which atomically replaces ``path`` when it is complete.

    Raises:
        OutputError: If the file cannot be written. An existing file is left unchanged.
    """
    try:
        with AtomicFile(path) as temporary:
            yield temporary
    except OSError as error:
        raise OutputError(
            f"cannot write {printable(path)}: {error.strerror or error}. Free some space, change the permissions, or "
            "give another folder with --out DIR."
        ) from error


# -- figures --------------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: Path, dark: bool = False, dpi: int = DPI) -> None:
    """Saves a figure and prints a note about characters that no installed font contains."""
    missing = {letter for letter in use_installed_fonts(figure) if letter not in _noted}
    if missing:
        _noted.update(missing)
        print(
            f"nrm-plugin: note: no installed font has {' '.join(sorted(missing))}, so figures show boxes instead. "
            "Install one, such as Noto Sans CJK; text, JSON and HTML are complete.",
            file=sys.stderr,
        )
    with writing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        save(figure, temporary, (DARK if dark else LIGHT).paper, path.suffix.removeprefix("."), dpi)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON on a single line. NaN is not allowed."""
    text = json.dumps(content, allow_nan=False)
    with writing(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")
