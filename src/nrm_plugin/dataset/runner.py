"""Running a sweep: start or resume it, split the shards among processes, and complete it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from zennit.core import Composite

from ..composites import normalize
from ..events.event import Atom
from ..kernels.normalization import Residual
from ..model.inputs_and_outputs import Output
from .evaluation import Evaluation, Target, Unpack, check_target, device_of
from .progress import Progress
from .queries import Query, check_queries
from .row_index import remove_index, write_index
from .sample_batches import ShardPlan, data_source
from .settings import differences, digest, settings_of
from .shard_writer import remove_unfinished
from .stored_sweep import Sweep
from .sweep_job import OnProgress, SweepJob
from .sweep_layout import (
    BY_QUERY,
    MANIFEST,
    MAPS,
    ROWS,
    Manifest,
    OnError,
    SettingsError,
    SweepError,
    arrow,
    path_inside,
)

Engine = Literal["local", "ray"]
SHARD = 256
"""Samples per shard."""
MAX_LISTED = 8
"""Number of differences that a message lists."""


def sweep(
    model: nn.Module,
    data: Any,
    queries: Query | Sequence[Query],
    out: str | os.PathLike[str],
    *,
    target: Target = "prediction",
    composite: Composite | None = None,
    residual: Residual | None = None,
    gain_limit: float | None = None,
    output: Output | Atom | None = None,
    unpack: Unpack | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    shard: int = SHARD,
    seed: int = 0,
    resume: bool = True,
    retry_failed: bool = False,
    on_error: OnError = "raise",
    index: bool = True,
    engine: Engine = "local",
    engine_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Sweep:
    """Evaluates queries for every sample of a data set, and stores the results.

    Completed shards remain valid: after a kill, an error or Ctrl-C the same call resumes, and ends with the rows of
    an uninterrupted sweep. Under ``torchrun`` the shards are divided among the processes.

    Args:
        model: The network, in evaluation mode and on its device.
        data: A data set with a length, whose samples are numbered by their index; a string attribute ``fingerprint``
            identifies its content. Of a ``DataLoader``, the data set is read in the order of its indices, whatever the
            sampler. An ``IterableDataset`` is numbered in iteration order; to resume, it is read again from the
            beginning and must yield the same samples in the same order.
        queries: The queries, such as ``[Marginal("features.28"), Sink("features.28")]``.
        out: Folder for the results, created if missing.
        target: The explained target: ``"prediction"``, ``"label"``, the index of a class, a function that returns the
            targets of a batch, or None for a model with a single output.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        unpack: Returns inputs and labels of a batch; by default a batch is inputs, ``(inputs, labels)``, or a mapping
            with ``"label"`` or ``"labels"``.
        batch_size: Samples per batch; by default that of the loader, or 16.
        num_workers: Processes that read samples; by default those of the loader, or none.
        shard: Samples per shard, rounded up to whole batches: at most these are lost if a process is killed.
        seed: Seed from which the random state of each sample is derived.
        resume: False raises if the folder contains a sweep.
        retry_failed: Evaluate shards with failed samples again.
        on_error: ``"raise"`` at the first sample that cannot be read or evaluated and at a damaged file; ``"skip"``
            skips and lists such samples, and evaluates damaged files again.
        index: Also store the rows sorted by group and value when the sweep is complete, for :meth:`Sweep.top`.
        engine: ``"local"``, or ``"ray"`` for the machines of a Ray cluster.
        engine_options: For Ray: ``concurrency``, and ``num_gpus`` and ``num_cpus`` of each worker.
        progress: Show a progress bar with rate, remaining time and memory.

    Returns:
        The stored sweep; complete unless other processes are still running.

    Raises:
        SweepError: The folder contains a sweep with different settings, which the message lists; or a sample or shard
            fails.
        NRMError: The measure fails for this model and composite, or a query does not fit the model.
        MissingExtraError: pyarrow or Ray is not installed.
    """
    arrow()
    _check_options(engine, on_error, shard, target)
    rules = normalize(composite, residual, gain_limit, None)
    evaluation = Evaluation(model, check_queries(queries), rules, target, unpack, output)
    source = data_source(data, batch_size, num_workers)
    options = engine_options or {}
    shard_batches = max(1, -(-shard // max(1, source.batch_size)))
    plan = None if source.count is None else ShardPlan(source.count, source.batch_size, shard_batches)
    process = ProcessRank.current() if engine == "local" else ProcessRank(0, 1)
    if plan is None and (process.world_size > 1 or engine == "ray"):
        raise SweepError(
            "an iterable data set cannot be split among processes, as each would read all of it. Run one process."
        )
    device = "cuda" if options.get("num_gpus") else None
    settings = settings_of(evaluation, source, shard_batches, seed, unpack, device)
    job = SweepJob(evaluation, source, plan, shard_batches, Path(out), digest(settings), on_error, seed, {})
    _begin(job, settings, resume, process)
    with _recording_interruption(job.folder):
        count = _run(job, process, engine, options, retry_failed, progress)
        process.barrier()
        if count is not None:
            complete(job.folder, count, index)
        process.barrier()
    return Sweep.open(job.folder, on_error)


def _check_options(engine: str, on_error: str, shard: Any, target: Any) -> None:
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is unknown; choose 'local' or 'ray'.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is unknown; choose 'raise' or 'skip'.")
    if isinstance(shard, bool) or not isinstance(shard, int) or shard < 1:
        raise SweepError(f"shard={shard!r} must be a positive number of samples.")
    check_target(target)


@dataclass(frozen=True)
class ProcessRank:
    """This process among those that share a sweep.

    Attributes:
        rank: Its rank.
        world_size: Number of processes.
    """

    rank: int
    world_size: int

    @classmethod
    def current(cls) -> ProcessRank:
        """From ``torch.distributed`` or the environment of ``torchrun``; by default the only process."""
        if _is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return cls(0, 1)

    def barrier(self) -> None:
        """Waits for the other processes, if ``torch.distributed`` is initialized."""
        if self.world_size > 1 and _is_initialized():
            torch.distributed.barrier()


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -- start ----------------------------------------------------------------------------------------------------------


def _begin(job: SweepJob, settings: dict[str, Any], resume: bool, process: ProcessRank) -> None:
    """Creates the folder, or checks that it contains the same sweep.

    Raises:
        SweepError: The folder contains a different sweep or cannot be written to.
    """
    folder = job.folder
    try:
        for name in (ROWS, MAPS):
            path_inside(folder, name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"cannot write to {folder}: {error.strerror or error}. Choose another folder.") from error
    has_shards = any((folder / ROWS).glob("part-*"))
    if (folder / MANIFEST).exists() and has_shards:
        stored = Manifest.read(folder)
        if not resume and process.rank == 0:
            raise SettingsError(
                f"{folder} already contains a sweep. Set resume=True to resume it, or choose another folder."
            )
        _check_same(folder, stored.settings, settings)
    elif has_shards:
        raise SweepError(f"{folder} contains shards, but no {MANIFEST} that describes them. Choose another folder.")
    else:
        _write(folder, _first_manifest(job, settings))
    remove_unfinished(folder)


def _first_manifest(job: SweepJob, settings: dict[str, Any]) -> Manifest:
    return Manifest(
        settings,
        job.fingerprint,
        tuple(query.info() for query in job.evaluation.queries),
        samples=job.source.count,
        value=job.value,
        environment={"threads": torch.get_num_threads(), "device": _device_name(device_of(job.evaluation.model))},
    )


def _check_same(folder: Path, stored: Any, settings: dict[str, Any]) -> None:
    # Tuples become lists in a file.
    changed = differences(stored, json.loads(json.dumps(settings)))
    if changed:
        more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        raise SettingsError(
            f"{folder} contains a sweep with different settings: {'; '.join(changed[:MAX_LISTED])}{more}. Choose "
            "another folder, or restore these settings."
        )


def _write(folder: Path, manifest: Manifest) -> None:
    try:
        manifest.write(folder)
    except OSError as error:
        raise SweepError(f"cannot write to {folder}: {error.strerror or error}.") from error


# -- evaluation -----------------------------------------------------------------------------------------------------


def _run(
    job: SweepJob,
    process: ProcessRank,
    engine: Engine,
    options: dict[str, Any],
    retry_failed: bool,
    progress: bool,
) -> int | None:
    """Evaluates the missing shards of this process; returns the number of samples once no shard is missing."""
    done = job.done(retry_failed)
    if job.plan is None:
        manifest = Manifest.read(job.folder)
        if manifest.state == "complete" and not job.damaged and not retry_failed:
            return manifest.samples
        _mark_running(job.folder)
        with Progress(None, 0, progress) as bar:
            return job.run_stream(done, bar.update)
    own = range(process.rank, job.plan.shards, process.world_size)
    missing = [number for number in own if number not in done]
    if missing:
        _mark_running(job.folder)
        total, left = (sum(job.plan.size(number) for number in numbers) for numbers in (own, missing))
        with Progress(total, total - left, progress) as bar:
            _engine(engine, options)(job, missing, process, bar.update)
        done = job.done() if engine == "local" else replace(job, on_error="raise").done()
    return job.plan.count if len(done) == job.plan.shards else None


def _mark_running(folder: Path) -> None:
    remove_index(folder)
    manifest = Manifest.read(folder)
    if manifest.state != "running":
        _write(folder, replace(manifest, state="running"))


def _engine(engine: Engine, options: dict[str, Any]) -> Callable[[SweepJob, list[int], ProcessRank, OnProgress], None]:
    if engine == "ray":
        from .ray_engine import run

        return lambda job, missing, process, on_progress: run(job, missing, on_progress, **options)
    return lambda job, missing, process, on_progress: job.run(missing, process.rank, on_progress)


# -- end ------------------------------------------------------------------------------------------------------------


@contextmanager
def _recording_interruption(folder: Path) -> Iterator[None]:
    """Sets the state of the manifest to interrupted if an error occurs, with the failures so far."""
    try:
        yield
    except BaseException:
        # An error here must not replace the first one; the shards store the failures as well.
        with suppress(Exception):
            _write(folder, replace(summarized(folder), state="interrupted"))
        raise


def summarized(folder: Path) -> Manifest:
    """The manifest with the groups, ranks, failed samples and damaged files that the shards store."""
    stored = Sweep.open(folder, on_error="skip")
    shards = stored.shards
    return replace(
        stored.manifest,
        queries=tuple(stored.queries.values()),
        ranks=tuple(sorted({shard.rank for shard in shards})) or (0,),
        failed=tuple(failure for shard in shards for failure in shard.failed),
        bad_shards=tuple(entry for shard in shards for entry in shard.replaces),
    )


def complete(folder: Path, count: int, index: bool) -> None:
    """Marks a sweep as complete, and sorts its rows.

    Args:
        folder: The folder of the sweep.
        count: Number of samples.
        index: Whether to sort.
    """
    manifest = summarized(folder)
    if manifest.state == "complete" and ((folder / BY_QUERY).exists() or not index):
        return
    used = {shard.path for shard in Sweep(folder, manifest).shards}
    for path in (folder / ROWS).glob("part-*.parquet"):
        if path not in used:  # a shard that two processes wrote
            path.unlink()
    if index and not (folder / BY_QUERY).exists():
        try:
            write_index(Sweep(folder, manifest))
        except OSError as error:
            raise SweepError(
                f"all rows are stored in {folder}, but sorting them failed: {error.strerror or error}. Free space on "
                "the disk and run the same sweep again, or set index=False."
            ) from error
    _write(folder, replace(manifest, state="complete", samples=count))


__all__ = ["Engine", "ProcessRank", "complete", "sweep"]
