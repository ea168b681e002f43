"""Atomic file replacement: readers see either the old or the new content, never a partial file."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

LONGEST = 100
"""Maximum length in bytes of file names included in temporary names. Longer names are hashed."""


class AtomicFile:
    """Context manager that yields a temporary file and renames it once its content is synced to disk.

    Args:
        path: The final path. It is left unchanged if an error is raised in the context.
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
    """Blocks until a file or folder has been written to disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["AtomicFile", "sync", "write_bytes"]
