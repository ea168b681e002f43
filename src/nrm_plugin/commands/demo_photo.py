"""Demo that runs ``explain`` and ``flow`` on a photograph with a downloaded network."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from ..demo.packages import fetched
from ..demo.photo_network import MEAN, PHOTO_PACKAGES, SIDE, STD, imagenet_names, photo_file
from .cli import parser

NETWORK = "nrm_plugin.demo.photo_network:load_photo_network"
LAYERS = ("input", "_blocks.5", "_blocks.10", "output")
GROUPS = 5
CLASSES = "classes.txt"


def explain_photo(photo: Path | None, out: Path) -> int:
    """Explains a photograph by heat maps and a flow. Prints the commands that it runs and returns the exit status.

    Args:
        photo: Image file. Defaults to the photograph bundled with the package.
        out: Folder to which the results are written.

    Raises:
        PackageError: If a package cannot be downloaded.
    """
    for package in PHOTO_PACKAGES:
        fetched(package)
    out.mkdir(parents=True, exist_ok=True)
    classes = out / CLASSES
    classes.write_text("\n".join(imagenet_names()) + "\n", encoding="utf-8")
    image = photo_file(out) if photo is None else photo
    status = 0
    for name, arguments in _commands(image, classes, out):
        print(f"$ nrm-plugin {shlex.join([name, *arguments])}\n", flush=True)
        options = parser().parse_args([name, *arguments])
        status = max(status, options.run(options))
        print()
    return status


def _commands(image: Path, classes: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the name and arguments of each command."""
    three = (",".join([f"{value}"] * 3) for value in (MEAN, STD))
    values = [f"{SIDE}", *three, f"{classes}", f"{out}"]
    options = [
        text for pair in zip(("--size", "--mean", "--std", "--classes", "--out"), values, strict=True) for text in pair
    ]
    yield "explain", [f"{image}", "--model", NETWORK, *options]
    yield "flow", [f"{image}", "--model", NETWORK, *options, "--layers", *LAYERS, "--groups", f"{GROUPS}"]
