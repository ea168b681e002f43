"""The files that a benchmark writes: the committed results, figures and pages, or files in a folder of their own."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tables
from benchmarks.real import packages

IMAGES = tables.ROOT / "docs/images"


@dataclass(frozen=True)
class Outputs:
    """Places of the files that a benchmark writes.

    Args:
        folder: The folder for results and figures, or None for the committed files and the pages.
    """

    folder: Path | None = None

    @property
    def results(self) -> Path:
        """The folder of results."""
        return self._created(tables.RESULTS)

    @property
    def images(self) -> Path:
        """The folder of figures."""
        return self._created(IMAGES)

    def _created(self, committed: Path) -> Path:
        if self.folder is None:
            return committed
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def render(self, name: str) -> None:
        """Writes the tables of one results file into the pages, unless the results are in a folder of their own."""
        if self.folder is None:
            tables.write(name)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--out``."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write results and figures into this folder; by default, the committed files and the pages are written, "
        "or with --quick files in the cache",
    )


def chosen(options: argparse.Namespace) -> Outputs:
    """Returns the outputs that ``--out`` and ``--quick`` select."""
    quick = packages.cache() / "quick" if getattr(options, "quick", False) else None
    return Outputs(options.out or quick)


def publish(folder: Path) -> list[Path]:
    """Copies the results and figures of a folder to the committed files, and writes the pages; returns the files."""
    files = sorted(folder.glob("*.json")) + sorted(folder.glob("*.png"))
    places = {file: (tables.RESULTS if file.suffix == ".json" else IMAGES) / file.name for file in files}
    for file, place in places.items():
        shutil.copyfile(file, place)
    for file in files:
        if file.suffix == ".json":
            tables.write(file.stem)
    return list(places.values())
