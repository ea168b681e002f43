"""Folders of images as datasets."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import printable
from .atomic_files import write_bytes
from .images import is_image, load_image
from .preprocessing import Preprocessing
from .sweep_layout import SweepError

EXTENSIONS = frozenset(".bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
"""File extensions treated as images even if the file is damaged. Other files are identified by content."""
MAX_LISTED = 8
"""Maximum number of subfolders or files listed in a message."""


class PreprocessedImageFolder(Dataset[tuple[Tensor, int]]):
    """Dataset of the images in a folder and its subfolders, sorted by name.

    Each top-level subfolder corresponds to the class of the same name. If no subfolder has the name of a class, and the
    class names are unknown or as many as the subfolders, the subfolders are numbered as classes in sorted order. Images
    in other subfolders or outside subfolders have the label -1. torchvision's ``ImageFolder``, by contrast,
    requires a subfolder for each class and ignores the class names of the model.

    Args:
        folder: The folder with the images.
        preprocess: The preprocessing that converts images to model inputs.
        categories: Class names of the model, if known.

    Attributes:
        paths: The image files in order.
        left_out: Files that are not images and links to an enclosing folder.
        labels: Class index of each file, or -1 if unknown.
        unknown: Subfolders that are not classes of the model.
        fingerprint: Hash of the file names and labels.

    Raises:
        SweepError: If the folder does not exist or contains no images, or if a subfolder cannot be read.
    """

    def __init__(self, folder: Path, preprocess: Preprocessing, categories: Sequence[str] = ()) -> None:
        if not folder.is_dir():
            is_file, name = folder.exists(), printable(folder)
            raise SweepError(f"{name} is not a folder." if is_file else f"the folder {name} does not exist.")
        self.folder, self.preprocess, self.categories = folder, preprocess, tuple(categories)
        files = sorted(_files(folder), key=lambda path: path.relative_to(folder).as_posix())
        self.paths = [path for path in files if _is_image(path)]
        self.left_out = sorted(set(files) - set(self.paths))
        if not self.paths:
            raise SweepError(f"no images in {printable(folder)}. {self.note()}".strip())
        parts_of_paths = [path.relative_to(folder).parts for path in self.paths]
        names = sorted({parts[0] for parts in parts_of_paths if len(parts) > 1})
        classes = _classes(names, categories)
        self.unknown = [name for name in names if name not in classes]
        self.labels = [classes.get(parts[0], -1) if len(parts) > 1 else -1 for parts in parts_of_paths]
        self.fingerprint = hashlib.blake2b(self._csv(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.preprocess(load_image(self.paths[index]).image)[0], self.labels[index]

    def note(self) -> str:
        """Describes the omitted files in one sentence. Returns an empty string if there are none."""
        names = [printable(path.relative_to(self.folder).as_posix()) for path in self.left_out[:MAX_LISTED]]
        more = len(self.left_out) - len(names)
        listed = ", ".join([*names, *([f"and {more} more"] if more else [])])
        count = "1 file is" if len(self.left_out) == 1 else f"{len(self.left_out)} files are"
        return f"{count} not readable as images and left out: {listed}." if names else ""

    @property
    def preparation(self) -> dict[str, Any]:
        """The preprocessing settings."""
        return self.preprocess.settings

    def stamp(self, index: int) -> str:
        """Returns the size and modification time of a file. If both are the same, the file counts as unchanged."""
        try:
            status = self.paths[index].stat()
        except OSError:
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns}"

    def check_labels(self) -> None:
        """Raises :class:`SweepError` if images have no label because their subfolder is not a class of the model."""
        if self.unknown:
            listed = ", ".join(printable(name) + self._near(name) for name in self.unknown[:MAX_LISTED])
            more = f" and {len(self.unknown) - MAX_LISTED} more" if len(self.unknown) > MAX_LISTED else ""
            raise SweepError(
                f"not classes of the model: the subfolders {listed}{more} of {printable(self.folder)}, so their images "
                f"have no label. Rename them to the names of classes; the model has {len(self.categories)}."
            )

    def _near(self, name: str) -> str:
        near = difflib.get_close_matches(name.casefold(), [known.casefold() for known in self.categories], 1)
        return f" (near {near[0]!r})" if near else ""

    def _csv(self) -> bytes:
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["sample", "file", "label"])
        names = (path.relative_to(self.folder).as_posix() for path in self.paths)
        rows.writerows(zip(range(len(self)), names, self.labels, strict=True))
        return text.getvalue().encode("utf-8", "surrogateescape")

    def write_list(self, path: Path) -> None:
        """Writes the file name and label of each sample as CSV."""
        write_bytes(path, self._csv())


def _files(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders. Links to an enclosing folder are yielded but not followed."""
    real = os.path.realpath(folder)
    if real in above:
        yield folder
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:  # without its images, the classes would be numbered differently
        raise SweepError(f"cannot read the folder {printable(folder)}: {error.strerror or error}.") from error
    for entry in entries:
        path = folder / entry.name
        if path.is_dir():
            yield from _files(path, above | {real})
        else:
            yield path


def _is_image(path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() in EXTENSIONS or is_image(path))


def _classes(names: Sequence[str], categories: Sequence[str]) -> dict[str, int]:
    folded = [name.casefold() for name in categories]
    known = {name: folded.index(name.casefold()) for name in names if folded.count(name.casefold()) == 1}
    if known or (categories and len(categories) != len(names)):
        return known
    return {name: index for index, name in enumerate(names)}


__all__ = ["PreprocessedImageFolder"]
