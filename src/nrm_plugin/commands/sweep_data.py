"""Data of a sweep: a folder of images, or the user's own dataset."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..dataset.image_folder import PreprocessedImageFolder
from ..dataset.sweep_layout import SweepError
from ..errors import printable
from .model_loading import LoadedModel
from .user_models import imported

SAMPLES = "samples.csv"
"""Name of the file in a sweep folder that lists the file names of the samples."""


def data_of(name: str, loaded: LoadedModel) -> Any:
    """Opens an image folder or imports the user's own dataset.

    Raises:
        ModelError: If the module, file or name does not exist.
        SweepError: If the folder does not exist or if the user's function fails.
    """
    if not name:
        raise SweepError("the name of the folder or dataset is empty.")
    if ":" not in name or Path(name).exists():
        folder = PreprocessedImageFolder(Path(name), loaded.preprocessing, loaded.categories)
        if folder.left_out:
            print(f"nrm-plugin: note: in {printable(name)}, {folder.note()}", file=sys.stderr)
        return folder
    data = imported(name, "DATASET")
    if hasattr(data, "__getitem__") or not callable(data):
        return data
    try:
        return data()
    except Exception as error:  # whatever the user's code raises
        raise SweepError(f"calling {name} without arguments failed: {type(error).__name__}: {error}") from error
