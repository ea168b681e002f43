"""Reading of image files as RGB, with notes on conversions."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import NRMError, printable

LIMIT = 178_956_970
"""Maximum number of decoded pixels, as in Pillow."""
LARGE = LIMIT // 2
"""Number of pixels above which a JPEG file is decoded at a reduced size to save memory."""
REDUCED = 2048
"""Minimum side length after this reduction, far larger than the input size of models."""
MAX_ASPECT = 200
"""Maximum aspect ratio. Beyond it, resizing could exhaust memory."""
DARK = 4096
"""Pixel value below which a 16-bit image is reported as dark. Such images probably have only 12 bits."""

URL = re.compile(r"[a-zA-Z]{2,}:/")

DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""Errors that Pillow raises for damaged files, depending on the format."""


class ImageError(NRMError, ValueError):
    """Raised if a file cannot be read as an image."""


@dataclass(frozen=True)
class LoadedImage:
    """Decoded image file.

    Attributes:
        path: Path of the file.
        image: The upright image in RGB mode.
        digest: SHA-256 of the file.
        notes: Notes for the user about conversions.
    """

    path: Path
    image: Image.Image
    digest: str
    notes: tuple[str, ...] = ()


def load_image(path: Path) -> LoadedImage:
    """Reads the first frame of an image file as an upright 8-bit RGB image on a white background.

    Args:
        path: File in PNG, JPEG, WebP, TIFF, GIF, BMP or another format supported by Pillow.

    Raises:
        ImageError: If the file does not exist, is not an image, is damaged or too large, or has an unknown value range.
    """
    name = printable(path)
    check_image_file(path)
    notes: list[str] = []
    try:
        with _no_limit(), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with Image.open(file) as source:
                image = _decoded(source, name, notes)
                image = _rgb(_upright(image, notes), name, notes)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image in a supported format. {_format_hint(path)}") from error
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory. Resize it first.") from error
    except DAMAGE as error:
        why = printable(getattr(error, "strerror", None) or error) or type(error).__name__
        raise ImageError(
            f"{name} cannot be read completely and may be damaged: {why}. Get an intact copy, or save it again with an "
            "image editor."
        ) from error
    return LoadedImage(path, image, digest, tuple(notes))


def is_image(path: Path) -> bool:
    """Returns True if the header of a file identifies it as an image, regardless of the file name."""
    try:
        with _no_limit(), Image.open(path):
            return True
    except (*DAMAGE, MemoryError):  # UnidentifiedImageError is an OSError
        return False


def check_image_file(path: Path) -> None:
    """Raises :class:`ImageError` unless the path is a readable, non-empty file."""
    name = printable(path)
    try:
        if URL.match(str(path)):
            raise ImageError(f"{name} is a URL, not a file. Download the image and pass the file.")
        if path.is_dir():
            raise ImageError(f"{name} is a folder. Pass the images in it, such as {name}/*.jpg.")
        if not path.exists():
            raise ImageError(f"the file {name} does not exist.")
        if not path.is_file():
            raise ImageError(f"{name} is not a regular file.")
        with path.open("rb") as file:
            if not file.read(1):
                raise ImageError(f"{name} is empty.")
    except OSError as error:  # the name is too long, or permission is denied
        raise ImageError(f"cannot open {name}: {error.strerror or error}.") from error


# -- decoding -------------------------------------------------------------------------------------------------------


@contextmanager
def _no_limit() -> Iterator[None]:
    """Context manager that lifts Pillow's size limit. Large JPEG files are decoded at reduced size."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example, damaged EXIF data; the notes report relevant problems
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decoded(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} has {width} × {height} pixels, an aspect ratio above {MAX_ASPECT}. Crop it to the relevant part."
        )
    if width * height > LARGE and image.format in ("JPEG", "MPO"):
        image.draft("RGB", (REDUCED, REDUCED))
        if image.size != (width, height):
            notes.append(f"has {width} × {height} pixels, and was read at {image.width} × {image.height}")
    if image.width * image.height > LIMIT:
        raise ImageError(
            f"{name} has {width} × {height} pixels, more than the limit of {LIMIT // 10**6} million. Resize it, or "
            "crop it to the relevant part."
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph with previews
        notes.append("contains several images; this is the first")
    image.load()
    return image


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data are untrusted, and the image can be read without them
        notes.append("has EXIF data that cannot be read, so it was not rotated")
        return image


def _rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _deep_grey(image, name, notes)
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        if colors.getchannel("A").getextrema() != (255, 255):
            notes.append("has transparent pixels, which became white")
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Scales 16-bit or floating-point grayscale to 8 bits. Pillow would clip values at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ImageError(
                f"{name} has floating-point values from {values.min():.4g} to {values.max():.4g} without a defined "
                "range. Save it with 8 or 16 bits, or with values between 0 and 1."
            )
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} has integer values from {values.min()} to {values.max()} without a defined range. Save it with 8 "
            "or 16 bits."
        )
    if values.max() < DARK:
        notes.append(f"has 16 bits, but no value above {values.max()} of 65535, so it is dark")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _format_hint(path: Path) -> str:
    if path.suffix.lower() in (".heic", ".heif"):
        return "HEIC images, the format of some phones, must be saved as JPEG first."
    return "Pass a PNG, JPEG, WebP, TIFF, GIF or BMP file."


__all__ = ["ImageError", "LoadedImage", "check_image_file", "is_image", "load_image"]
