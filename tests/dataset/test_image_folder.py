"""Folders of images.

Covers: nrm_plugin.dataset.preprocessing.
"""

from __future__ import annotations

import pytest

from nrm_plugin.dataset import SweepError
from nrm_plugin.dataset.image_folder import PreprocessedImageFolder
from nrm_plugin.dataset.preprocessing import STANDARD, preprocessing


def test_a_folder_without_images_raises(tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(SweepError, match=r"no images in .*extensions that are read: \.bmp, \.gif"):
        PreprocessedImageFolder(tmp_path, preprocessing(STANDARD))
