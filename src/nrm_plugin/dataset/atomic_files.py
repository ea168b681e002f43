"""Files that are replaced atomically, so that readers see either the old or the new content, never a part of it."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

LONGEST = 100
"""Longest file name, in bytes, that a temporary name contains; longer names are replaced by their hash."""


class AtomicFile:
    """Context manager that provides a temporary file and renames it when its content is complete and synced to disk.

    Args:
        path: The final path, which is not changed if the context exits with an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        name = (
            path.name if len(os.fsencode(path.name)) <= LONGEST else hashlib.sha256(os.fsencode(path.name)).hexdigest()
        )
        self.temporary = path.with_name(f".{name}.{platform.node()}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.temporary.unlink(missing_ok=True)  # opening the file directly would follow a link
        return self.temporary

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                sync(self.temporary)
                self.temporary.replace(self.path)
                if os.name == "posix":  # on other systems, a folder cannot be opened
                    sync(self.path.parent)
        finally:
            self.temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with AtomicFile(path) as temporary, temporary.open("wb") as file:
        file.write(content)


def sync(path: Path) -> None:
    """Blocks until the content of a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["AtomicFile", "sync", "write_bytes"]
