"""Image files of every format, damaged files, and files that are not images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nrm_plugin.dataset import images as image_files
from nrm_plugin.dataset.images import ImageError, load_image
from tests.commands.shell import PHOTO, photograph


def _array(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image.convert(mode)).astype(float)


GREY = np.asarray(PHOTO.convert("L"))


def _half_transparent() -> Image.Image:
    image = PHOTO.convert("RGBA")
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, : GREY.shape[1] // 2] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def _on_white() -> np.ndarray:
    pixels = _array(PHOTO).copy()
    pixels[:, : GREY.shape[1] // 2] = 255
    return pixels


def _exif(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


GREYS = _array(PHOTO.convert("L"))
KINDS: dict[str, tuple[str, Callable[[str], object], np.ndarray, float]] = {
    "grey": ("a.png", lambda path: PHOTO.convert("L").save(path), GREYS, 0),
    "grey and alpha": ("a.png", lambda path: PHOTO.convert("LA").save(path), GREYS, 0),
    "black and white": ("a.png", lambda path: PHOTO.convert("1").save(path), _array(PHOTO.convert("1")), 0),
    "transparent": ("a.png", lambda path: _half_transparent().save(path), _on_white(), 0),
    "transparent webp": ("a.webp", lambda path: _half_transparent().save(path, lossless=True), _on_white(), 0),
    "palette": ("a.png", lambda path: PHOTO.quantize(200).save(path), _array(PHOTO.quantize(200)), 0),
    "16 bits": ("a.png", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), GREYS, 0),
    "16 bits tiff": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), GREYS, 0),
    "32 bits tiff": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.int32) * 257).save(path), GREYS, 0),
    "floats": ("a.tif", lambda path: Image.fromarray((GREY / 255).astype(np.float32)).save(path), GREYS, 0),
    "cmyk": ("a.tif", lambda path: PHOTO.convert("CMYK").save(path), _array(PHOTO), 0),
    "cmyk jpeg": ("a.jpg", lambda path: PHOTO.convert("CMYK").save(path, quality=98), _array(PHOTO), 12),
    "turned": ("a.jpg", lambda path: PHOTO.save(path, quality=98, exif=_exif(6)),
               _array(PHOTO.rotate(-90, expand=True)), 12),
    "mirrored": ("a.png", lambda path: PHOTO.save(path, exif=_exif(2)), _array(PHOTO)[:, ::-1], 0),
    "broken exif": ("a.jpg", lambda path: PHOTO.save(path, quality=98, exif=b"Exif\0\0rubbish!"), _array(PHOTO), 12),
    "gif": ("a.gif", lambda path: PHOTO.quantize(200).save(path, save_all=True, append_images=[PHOTO.rotate(90)]),
            _array(PHOTO.quantize(200)), 0),
    "pages": ("a.tif", lambda path: PHOTO.save(path, save_all=True, append_images=[PHOTO.rotate(90)]),
              _array(PHOTO), 0),
    "wrong suffix": ("a.jpg", lambda path: PHOTO.save(path, format="PNG"), _array(PHOTO), 0),
    "no suffix": ("a", lambda path: PHOTO.save(path, format="PNG"), _array(PHOTO), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_format_are_the_same_photograph(kind: str, tmp_path: Path):
    name, save, expected, tolerance = KINDS[kind]
    save(str(tmp_path / name))
    loaded = load_image(tmp_path / name)
    pixels = _array(loaded.image)
    assert loaded.image.mode == "RGB"
    assert pixels.shape[:2] == expected.shape[:2]
    difference = np.abs(pixels - (expected if expected.ndim == 3 else expected[..., None]))
    assert difference.max() <= max(tolerance * 6, 1e-9)
    assert difference.mean() <= max(tolerance / 4, 1e-9)
    several = [note for note in loaded.notes if "several images" in note]
    assert bool(several) == (kind in ("gif", "pages"))


@pytest.mark.parametrize("limit", [0.4, 0.9], ids=["far above", "above"])
def test_a_huge_jpeg_is_decoded_at_reduced_size(limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "huge.jpg"
    photograph(0, 400).save(path, quality=95)
    pixels = 400 * 600
    monkeypatch.setattr(image_files, "LARGE", int(limit * pixels))
    monkeypatch.setattr(image_files, "LIMIT", int(limit * 2 * pixels))
    monkeypatch.setattr(image_files, "REDUCED", 100)
    loaded = load_image(path)
    assert loaded.image.size == (150, 100)
    assert loaded.notes == ("has 600 × 400 pixels, and was read at 150 × 100",)
    difference = np.abs(_array(loaded.image) - _array(photograph(0, 400).resize((150, 100), Image.Resampling.BOX)))
    assert difference.mean() < 4


@pytest.mark.medium
def test_a_size_beyond_the_limit_of_pillow_is_not_a_warning(tmp_path: Path):
    Image.new("RGB", (16000, 6000), "red").save(tmp_path / "red.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(tmp_path / "red.jpg")
    assert loaded.image.size == (8000, 3000)
    assert Image.MAX_IMAGE_PIXELS == image_files.LARGE


def test_16_bits_that_are_12_are_noted(tmp_path: Path):
    Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "scan.png")
    (note,) = load_image(tmp_path / "scan.png").notes
    assert f"no value above {int(GREY.max()) * 16} of 65535" in note


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "does not exist"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "empty.jpg": (Path.touch, "is empty"),
    "text.png": (lambda path: path.write_text("not an image"), "is not an image"),
    "phone.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "saved as JPEG first"),
    "thin.png": (lambda path: Image.new("RGB", (5000, 4)).save(path), "5000 × 4 pixels"),
    "wide.png": (lambda path: Image.new("1", (40000, 5000)).save(path), "more than the limit of 178 million"),
    "float.tif": (lambda path: Image.fromarray(GREY.astype(np.float32)).save(path), "a defined range"),
    "nan.tif": (lambda path: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path), "a defined range"),
    "int.tif": (lambda path: Image.fromarray(GREY.astype(np.int32) * 999).save(path), "a defined range"),
}
CUT = ["jpg", "png", "gif", "webp", "tif", "bmp"]


@pytest.mark.medium
@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_images_are_rejected(name: str, tmp_path: Path):
    make, words = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ImageError, match=words) as raised:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("suffix", CUT)
def test_truncated_images_are_rejected(suffix: str, share: float, tmp_path: Path):
    path = tmp_path / f"whole.{suffix}"
    PHOTO.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(ImageError, match=r"damaged|is not an image"):
        load_image(path)


@pytest.mark.parametrize("suffix", CUT)
def test_scrambled_images_are_read_or_rejected(suffix: str, tmp_path: Path):
    """Files with arbitrary bytes are either read as an image or raise ImageError."""
    draw = np.random.default_rng(0)
    path = tmp_path / f"scrambled.{suffix}"
    PHOTO.resize((30, 20)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(40):
        bytes_ = whole.copy()
        bytes_[draw.integers(0, len(whole), 6)] = draw.integers(0, 256, 6)
        path.write_bytes(bytes_.tobytes())
        try:
            loaded = load_image(path)
        except ImageError:
            continue
        assert loaded.image.mode == "RGB"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_rejected(tmp_path: Path):
    PHOTO.save(tmp_path / "mine.png")
    (tmp_path / "mine.png").chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        load_image(tmp_path / "mine.png")
