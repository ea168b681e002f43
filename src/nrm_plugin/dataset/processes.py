"""Processes of a sweep: their ranks and locks on the sweep folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .sweep_layout import LOCKS, SweepError, path_inside

PATIENCE = 60.0
"""Time in seconds to wait while another process creates or checks the manifest."""


@dataclass(frozen=True)
class ProcessRank:
    """Rank of this process among the processes of a sweep.

    Attributes:
        rank: Rank of this process.
        world_size: Number of processes.
    """

    rank: int
    world_size: int

    @classmethod
    def current(cls) -> ProcessRank:
        """Reads the rank from ``torch.distributed`` or the environment of ``torchrun``. Defaults to rank 0 of 1."""
        if _is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return cls(0, 1)

    def barrier(self) -> None:
        """Synchronizes all processes if ``torch.distributed`` is initialized."""
        if self.world_size > 1 and _is_initialized():
            torch.distributed.barrier()


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@dataclass(frozen=True)
class FolderLocks:
    """Locks on a sweep folder: one per rank, held until the process ends, and one for the manifest.

    The operating system releases the locks of a process when it ends. Lock files are never removed. Otherwise, a
    process could lock a file that another process has just replaced.

    Attributes:
        folder: Folder that contains the sweep and its locks.
        process: Rank of this process.
        held: Stack of the locks held by this process.
    """

    folder: Path
    process: ProcessRank
    held: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> FolderLocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.held.close()

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Context manager that holds the manifest lock and acquires this rank's lock until the process ends.

        Raises:
            SweepError: If another process writes to the folder with the same rank or if the file system of the folder
                does not support locks.
        """
        try:
            path_inside(self.folder, LOCKS).mkdir(parents=True, exist_ok=True)
            with self._lock("begin", PATIENCE):
                self.held.enter_context(self._lock(self._name(self.process.rank)))
                yield
        except Timeout as error:
            raise SweepError(
                f"another process writes to {self.folder}. Wait for it to end, or choose another folder. Use torchrun "
                "to start several processes for one sweep."
            ) from error
        except NotImplementedError as error:
            raise SweepError(
                f"the file system of {self.folder} does not support file locks. Choose a folder on another file system."
            ) from error

    def are_others_running(self) -> bool:
        """Returns True if any other rank holds its lock."""
        for path in (self.folder / LOCKS).glob("rank-*"):
            if path.name != self._name(self.process.rank):
                try:
                    with self._lock(path.name):
                        pass
                except Timeout:
                    return True
        return False

    @staticmethod
    def _name(rank: int) -> str:
        return f"rank-{rank:04}"

    def _lock(self, name: str, patience: float = 0.0) -> FileLock:
        return FileLock(path_inside(self.folder, f"{LOCKS}/{name}"), timeout=patience, thread_local=False)


__all__ = ["FolderLocks", "ProcessRank"]
