"""A folder of pictures as a data set."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from .images import open_picture, shown
from .preprocessing import Preparation
from .sweep_layout import SweepError, write_bytes

PICTURES = frozenset(".bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
"""Ends of the names of files that are read."""


class PictureFolder(Dataset[tuple[Tensor, int]]):
    """The pictures in a folder and in the folders inside of it, by name, prepared for a model.

    A folder at the top is a class: that of its name where the model has one of it, else that of its place among them.
    A picture that lies outside of these has the label -1.

    Args:
        folder: The folder.
        prepare: How pictures become inputs.
        categories: Names of the classes of the model, where they are known.

    Attributes:
        paths: The files, as they are numbered.
        labels: Their classes.
        fingerprint: Hash of the names and labels.

    Raises:
        SweepError: There is no such folder, or no picture in it.
    """

    def __init__(self, folder: Path, prepare: Preparation, categories: Sequence[str] = ()) -> None:
        if not folder.is_dir():
            raise SweepError(f"there is no folder {shown(folder)}.")
        self.folder, self.prepare = folder, prepare
        found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
        self.paths = sorted(found, key=lambda path: path.relative_to(folder).as_posix())
        if not self.paths:
            raise SweepError(f"there is no picture in {shown(folder)}; looked for {', '.join(sorted(PICTURES))}.")
        inside = [path.relative_to(folder).parts for path in self.paths]
        names = sorted({parts[0] for parts in inside if len(parts) > 1})
        classes = _classes(names, categories)
        self.labels = [classes[parts[0]] if len(parts) > 1 else -1 for parts in inside]
        self.fingerprint = hashlib.blake2b(self._listed(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.prepare(open_picture(self.paths[index]).image)[0], self.labels[index]

    def _listed(self) -> bytes:
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["sample", "file", "label"])
        names = (path.relative_to(self.folder).as_posix() for path in self.paths)
        rows.writerows(zip(range(len(self)), names, self.labels, strict=True))
        return text.getvalue().encode("utf-8", "surrogateescape")

    def write_list(self, path: Path) -> None:
        """Writes which sample is which file, as CSV."""
        write_bytes(path, self._listed())


def _classes(names: Sequence[str], categories: Sequence[str]) -> dict[str, int]:
    folded = [name.casefold() for name in categories]
    known = {name: folded.index(name.casefold()) for name in names if folded.count(name.casefold()) == 1}
    if len(known) == len(names):
        return known
    return {name: place for place, name in enumerate(names)}


__all__ = ["PictureFolder"]
