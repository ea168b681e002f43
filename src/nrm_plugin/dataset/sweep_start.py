"""Start of a sweep, in a new folder or by resuming a stored sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .evaluation import device_of
from .fingerprints import digest
from .processes import FolderLocks
from .shard_file import Shard, shards_in
from .shard_writer import remove_unfinished
from .sweep_job import SweepJob
from .sweep_layout import (
    MANIFEST,
    MAPS,
    REBUILT,
    ROWS,
    Manifest,
    ManifestError,
    SettingsError,
    ShardError,
    SweepError,
    path_inside,
)
from .sweep_settings import check_same


def begin(job: SweepJob, settings: dict[str, Any], resume: bool, locks: FolderLocks) -> SweepJob:
    """Creates the sweep folder with its manifest or checks that the folder contains the same sweep.

    Args:
        job: Settings and data of the sweep.
        settings: The settings of the sweep.
        resume: Whether the folder may already contain a sweep.
        locks: Locks of the folder. The lock of this rank remains acquired.

    Returns:
        The job with the shard size and fingerprint of the stored shards.

    Raises:
        SweepError: If the folder contains a different sweep, is in use or cannot be written to.
    """
    folder = job.folder
    try:
        for name in (ROWS, MAPS):
            path_inside(folder, name).mkdir(parents=True, exist_ok=True)
        with locks.beginning():
            remove_unfinished(folder)
            return _resumed_or_new(job, settings, resume, locks)
    except OSError as error:
        raise SweepError(f"cannot write to {folder}: {error.strerror or error}. Choose another folder.") from error


def _resumed_or_new(job: SweepJob, settings: dict[str, Any], resume: bool, locks: FolderLocks) -> SweepJob:
    folder = job.folder
    has_shards = any((folder / ROWS).glob("part-*"))
    is_in_use = (folder / MANIFEST).exists() and locks.are_others_running()
    if not (has_shards or is_in_use):
        _first_manifest(job, settings).write(folder)
        return job
    if not resume and locks.process.rank == 0:
        raise SettingsError(
            f"{folder} already contains a sweep. Set resume=True to resume it, or choose another folder."
        )
    try:
        stored = _read(folder)
    except ManifestError:
        if job.on_error == "raise" or is_in_use:
            raise
        _check_shards(job, settings)
        stored = _first_manifest(job, settings)
        stored.write(folder)
    check_same(folder, stored.settings, settings)
    return _with_stored_shards(job, stored)


def _read(folder: Path) -> Manifest:
    """Reads the manifest and checks its settings against their fingerprint.

    Raises:
        ManifestError: If the manifest is missing, damaged, or was edited.
    """
    if not (folder / MANIFEST).exists():
        raise ManifestError(
            f"{folder} contains shards, but no {MANIFEST} that describes them. Choose another folder. {REBUILT}"
        )
    stored = Manifest.read(folder)
    if digest(stored.settings) != stored.fingerprint:
        raise ManifestError(f"{folder / MANIFEST} was edited: its settings are not those of its shards. {REBUILT}")
    return stored


def _first_manifest(job: SweepJob, settings: dict[str, Any]) -> Manifest:
    device = device_of(job.evaluation.model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Manifest(
        settings,
        job.fingerprint,
        tuple(query.info() for query in job.evaluation.queries),
        samples=job.source.count,
        value=job.value,
        environment={"threads": torch.get_num_threads(), "device": name},
    )


def _check_shards(job: SweepJob, settings: dict[str, Any]) -> None:
    """Raises :class:`SettingsError` unless all readable shards are from this sweep. Used if the manifest is damaged."""
    for path in shards_in(job.folder).values():
        try:
            is_of_another = Shard.read(path).settings != job.fingerprint
        except ShardError:
            continue
        if is_of_another:
            raise SettingsError(
                f"the manifest of {job.folder} is lost, and its shards belong to a sweep with other settings, such as "
                f"another batch size than {settings['batch_size']}. Choose another folder, or restore the settings."
            )


def _with_stored_shards(job: SweepJob, stored: Manifest) -> SweepJob:
    """Returns the job with the shard size and fingerprint of the stored shards."""
    size = stored.settings["batch_size"] * stored.settings["shard_batches"]
    plan = None if job.plan is None else replace(job.plan, shard_size=size)
    batches = stored.settings["shard_batches"] if plan is None else job.shard_batches
    return replace(job, plan=plan, shard_batches=batches, fingerprint=stored.fingerprint)


__all__ = ["begin"]
