"""Folders of images.

Covers: nrm_plugin.dataset.preprocessing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from nrm_plugin.dataset import SweepError
from nrm_plugin.dataset.image_folder import PreprocessedImageFolder
from nrm_plugin.dataset.preprocessing import STANDARD, preprocessing


def test_a_folder_without_images_raises(tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(SweepError, match=r"no images in .*1 file is not readable as images and left out: text\.txt"):
        PreprocessedImageFolder(tmp_path, preprocessing(STANDARD))


def _save(path: Path, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, kind)


def _folder(path: Path) -> PreprocessedImageFolder:
    return PreprocessedImageFolder(path, preprocessing(STANDARD))


def test_images_are_known_by_their_content(tmp_path: Path):
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.avif": "AVIF", "d.jp2": "JPEG2000", "e": "PNG", "f.txt": "GIF",
             "g.JPG": "JPEG", "h.ico": "ICO", "i.tga": "TGA"}  # fmt: skip
    for name, kind in kinds.items():
        _save(tmp_path / name, kind)
    data = _folder(tmp_path)
    assert [path.name for path in data.paths] == list(kinds)
    assert data.note() == ""
    assert all(data[index][0].shape == (3, 224, 224) for index in range(len(data)))


def test_other_files_are_counted_and_named(tmp_path: Path):
    _save(tmp_path / "x" / "a.png")
    for number in range(10):
        (tmp_path / f"{number}.csv").write_text("1,2")
    (tmp_path / "broken.jpg").write_text("an image by its name is a failed sample, not left out")
    data = _folder(tmp_path)
    assert [path.name for path in data.paths] == ["broken.jpg", "a.png"]
    assert data.note() == (
        "10 files are not readable as images and left out: 0.csv, 1.csv, 2.csv, 3.csv, 4.csv, 5.csv, 6.csv, 7.csv, "
        "and 2 more."
    )


def test_a_subfolder_that_cannot_be_read_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without its images, the classes of the other subfolders would have other numbers."""
    for name in ("cat", "dog", "owl"):
        _save(tmp_path / name / "a.png")
    plain = os.scandir

    def denied(path):
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(SweepError, match=r"cannot read the folder .*cat: Permission denied"):
        _folder(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path: Path):
    _save(tmp_path / "elsewhere" / "a.png")
    data = tmp_path / "data"
    _save(data / "cat" / "b.png")
    (data / "dog").symlink_to(tmp_path / "elsewhere")
    (data / "cat" / "up").symlink_to(data)
    (data / "cat" / "self").symlink_to(data / "cat")
    (data / "gone").symlink_to("nowhere")
    folder = _folder(data)
    assert [path.relative_to(data).as_posix() for path in folder.paths] == ["cat/b.png", "dog/a.png"]
    assert folder.labels == [0, 1]
    assert [path.relative_to(data).as_posix() for path in folder.left_out] == ["cat/self", "cat/up", "gone"]
