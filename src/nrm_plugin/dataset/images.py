"""Picture files of any kind as plain pixels, with a word on what was done to them."""

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

from ..errors import NRMError

LIMIT = 178_956_970
"""Most pixels that are decoded; Pillow's own limit."""
LARGE = LIMIT // 2
"""JPEG files above this are decoded at a fraction of their size, which costs a fraction of the memory."""
ENOUGH = 2048
"""Sides that such a fraction keeps at least; far above what models look at."""
THIN = 200
"""Largest quotient of the sides: scaled to the size of a model, the longer one would fill the memory."""
FAINT = 4096
"""A 16-bit picture without brighter values is likely one of 12 bits or fewer."""

ADDRESS = re.compile(r"[a-zA-Z]{2,}:/")

DAMAGE = (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
"""What Pillow raises for a damaged file depends on its format."""


class PictureError(NRMError, ValueError):
    """A file that no picture can be read from."""


@dataclass(frozen=True)
class Picture:
    """One picture file.

    Attributes:
        path: The file, as it was given.
        image: Its pixels, in mode RGB, upright.
        digest: SHA-256 of the file.
        notes: What a user should know about how it was read.
    """

    path: Path
    image: Image.Image
    digest: str
    notes: tuple[str, ...] = ()


def shown(text: object) -> str:
    """Text that can be printed anywhere: without control characters and without bytes that are no text."""
    clean = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
    return clean.encode("utf-8", "backslashreplace").decode("utf-8")


def open_picture(path: Path) -> Picture:
    """The picture in a file: upright, on white, 8 bits of red, green and blue, the first of several.

    Args:
        path: PNG, JPEG, WebP, TIFF, GIF, BMP or whatever else Pillow reads.

    Raises:
        PictureError: There is no such file, it is no picture, damaged, too large, or of unknown brightness.
    """
    name = shown(path)
    check_file(path)
    notes: list[str] = []
    try:
        with _no_limit(), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with Image.open(file) as source:
                image = _decoded(source, name, notes)
                image = _rgb(_upright(image, notes), name, notes)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} is not a picture that can be read. {_format_hint(path)}") from error
    except MemoryError as error:
        raise PictureError(f"{name} does not fit into memory. Scale it down first.") from error
    except DAMAGE as error:
        why = shown(getattr(error, "strerror", None) or error) or type(error).__name__
        raise PictureError(
            f"{name} cannot be read to its end, so it may be damaged: {why}. Get a whole copy of it, or open it in a "
            "picture editor and save it again."
        ) from error
    return Picture(path, image, digest, tuple(notes))


def check_file(path: Path) -> None:
    """Raises :class:`PictureError` unless there is a file with something in it that may be read."""
    name = shown(path)
    try:
        if ADDRESS.match(str(path)):
            raise PictureError(f"{name} is an address, not a file. Download the picture, and give the file.")
        if path.is_dir():
            raise PictureError(f"{name} is a folder. Name the pictures in it, such as {name}/*.jpg.")
        if not path.exists():
            raise PictureError(f"there is no file {name}.")
        if not path.is_file():
            raise PictureError(f"{name} is no regular file.")
        with path.open("rb") as file:
            if not file.read(1):
                raise PictureError(f"{name} is empty.")
    except OSError as error:  # a name that is too long, no permission
        raise PictureError(f"cannot open {name}: {error.strerror or error}.") from error


# -- inside ---------------------------------------------------------------------------------------------------------


@contextmanager
def _no_limit() -> Iterator[None]:
    """Pillow refuses by the size that a file announces; here JPEG may be decoded smaller, so the check comes later."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF blocks and the like; the notes tell what matters
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decoded(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    width, height = image.size
    if max(width, height) > THIN * min(width, height):
        raise PictureError(
            f"{name} has {width} × {height} pixels, and one side is more than {THIN} times the other. Cut it to what "
            "should be looked at."
        )
    if width * height > LARGE and image.format in ("JPEG", "MPO"):
        image.draft("RGB", (ENOUGH, ENOUGH))
        if image.size != (width, height):
            notes.append(f"has {width} × {height} pixels, and was read at {image.width} × {image.height}")
    if image.width * image.height > LIMIT:
        raise PictureError(
            f"{name} has {width} × {height} pixels, more than the {LIMIT // 10**6} million that are read. Scale it "
            "down, or cut it to what should be looked at."
        )
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph with its preview is MPO
        notes.append("holds several pictures; this is the first")
    image.load()
    return image


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the block is data of a stranger, and the picture is there without it
        notes.append("has EXIF data that cannot be read, so it was not turned")
        return image


def _rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _deep_grey(image, name, notes)
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        if colors.getchannel("A").getextrema() != (255, 255):
            notes.append("is transparent in places; these were made white")
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Grey of 16 bits as grey of 8; Pillow itself would cut it off at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise PictureError(
                f"{name} holds floating point numbers from {values.min():.4g} to {values.max():.4g}, and does not say "
                "which of them is white. Save it with 8 or 16 bits, or scaled to between 0 and 1."
            )
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise PictureError(
            f"{name} holds integers from {values.min()} to {values.max()}, and does not say which of them is white. "
            "Save it with 8 or 16 bits."
        )
    if values.max() < FAINT:
        notes.append(f"has 16 bits, but no value above {values.max()} of 65535, so it is dark")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _format_hint(path: Path) -> str:
    if path.suffix.lower() in (".heic", ".heif"):
        return "Pictures of this kind, which phones make, need to be saved as JPEG first."
    return "Give a PNG, JPEG, WebP, TIFF, GIF or BMP file."
