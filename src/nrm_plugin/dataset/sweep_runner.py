"""Execution of a sweep: start or resumption, distribution of shards among processes, and completion."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from zennit.core import Composite

from ..composites import normalize
from ..events.event import Atom
from ..kernels.normalization import Residual
from ..model.inputs_and_outputs import Output
from .content_check import check_samples, contents_to_compare
from .evaluation import Evaluation, Target, Unpack, check_target
from .fingerprints import digest
from .processes import FolderLocks, ProcessRank
from .progress import Progress
from .queries import Query, check_queries
from .row_index import is_intact, remove_index, write_index
from .sample_batches import ShardPlan, data_source
from .stored_sweep import Sweep
from .sweep_job import OnProgress, SweepJob
from .sweep_layout import (
    ROWS,
    Manifest,
    OnError,
    SweepError,
    arrow,
)
from .sweep_settings import settings_of
from .sweep_start import begin

Engine = Literal["local", "ray"]
SHARD = 256
"""Default number of samples per shard."""


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
    against: Any = None,
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
    """Evaluates queries on every sample of a dataset and stores the results.

    If a sweep fails, is killed or is interrupted by Ctrl-C, completed shards are kept. The same call resumes the sweep
    and yields the same rows as an uninterrupted one. Under ``torchrun``, the shards are divided among the processes.

    Args:
        model: The network, in evaluation mode and on the device to use.
        data: A dataset with a length, whose samples are numbered by index. When a sweep is resumed, samples are read
            again and compared by hash, unless the dataset has a method ``stamp(index)`` that returns the same value as
            before or, without such a method, the same string attribute ``fingerprint``. The dataset of a
            ``DataLoader`` is read in index order, regardless of the sampler. An ``IterableDataset`` is numbered in
            iteration order; to resume a sweep, it is read again from the beginning and must yield the same samples in
            the same order.
        queries: The queries to evaluate, such as ``[Marginal("features.28"), Sink("features.28")]``.
        out: Folder for the results, which is created if it does not exist.
        target: ``"prediction"``, ``"label"``, a class index, a function that returns the targets of a given batch, or
            None for a model with a single output.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        against: As in :class:`~nrm_plugin.RelevanceMeasure`. All masses are multiplied by the sign of the difference.
            Positive values are then evidence for the target in every sample.
        unpack: Function that splits a batch into inputs and labels. By default, a batch is a tensor of inputs, a pair
            ``(inputs, labels)``, or a mapping with ``"label"`` or ``"labels"``.
        batch_size: Number of samples per batch. Defaults to the batch size of the loader, or to 16. A sweep can be
            resumed with a different batch size, which changes results only by rounding errors.
        num_workers: Number of worker processes that read samples. Defaults to the number of the loader, or to 0.
        shard: Number of samples per shard, rounded up to whole batches. If a process is killed, at most one shard is
            lost. A resumed sweep keeps its shard size.
        seed: Seed for the random state set before each sample is read.
        resume: Whether to resume a sweep in this folder rather than raise an error.
        retry_failed: Whether to evaluate shards with failed samples again.
        on_error: ``"raise"`` to stop at the first sample that cannot be read or evaluated, or at a damaged file;
            ``"skip"`` to skip and list such samples and to evaluate damaged files again.
        index: Whether to store the rows a second time when the sweep is complete, sorted by group and value for
            :meth:`Sweep.top`.
        engine: ``"local"``, or ``"ray"`` for a Ray cluster.
        engine_options: Options of Ray: ``concurrency``, and ``num_gpus`` and ``num_cpus`` per worker.
        progress: Whether to show a progress bar.

    Returns:
        The stored sweep, which is complete unless other processes are still running.

    Raises:
        SweepError: If the folder contains a sweep with different settings or samples (listed in the message), if
            another process writes to the folder, or if a sample or shard fails.
        NRMError: If no measure of the model can be constructed with this composite or if a query does not match the
            model.
        MissingExtraError: If pyarrow or Ray is not installed.
    """
    arrow()
    _check_options(engine, on_error, shard, target)
    rules = normalize(composite, residual, gain_limit, None)
    evaluation = Evaluation(model, check_queries(queries), rules, target, unpack, output, against)
    source = data_source(data, batch_size, num_workers)
    options = engine_options or {}
    shard_batches = max(1, -(-shard // max(1, source.batch_size)))
    plan = None
    if source.count is not None:
        plan = ShardPlan(source.count, source.batch_size, source.batch_size * shard_batches)
    process = ProcessRank.current() if engine == "local" else ProcessRank(0, 1)
    if plan is None and (process.world_size > 1 or engine == "ray"):
        raise SweepError(
            "an iterable dataset cannot be split among processes, since each of them would read all of it. Run a "
            "single process."
        )
    device = "cuda" if options.get("num_gpus") else None
    settings = settings_of(evaluation, source, shard_batches, seed, unpack, device)
    job = SweepJob(evaluation, source, plan, shard_batches, Path(out), digest(settings), on_error, seed, {})
    with FolderLocks(job.folder, process) as locks:
        job = begin(job, settings, resume, locks)
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
    """Evaluates the missing shards of this process.

    Returns:
        The number of samples, or None if shards of other processes are missing.
    """
    if job.plan is None:
        manifest, done = Manifest.read(job.folder), job.done(retry_failed, of=range(sys.maxsize))
        if manifest.state == "complete" and not job.damaged and not retry_failed and not job.source.is_hashed:
            return manifest.samples
        _mark_running(job.folder)
        with Progress(None, 0, progress) as bar:
            return job.run_stream(done, bar.update)
    own = range(process.rank, job.plan.shards, process.world_size)
    done = job.done(retry_failed, own)
    stored = contents_to_compare(job.source, [shard for number, shard in done.items() if number in own])
    check_samples(job.folder, job.source, stored, job.seed, job.on_error, progress)
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
    """Context manager that records interruptions and failed samples in the manifest."""
    try:
        yield
    except BaseException:
        # An error here must not replace the original one; the shards store the failures as well.
        with suppress(Exception):
            _write(folder, replace(summarized(folder), state="interrupted"))
        raise


def summarized(folder: Path) -> Manifest:
    """Returns the manifest updated with the groups, ranks, failed samples and damaged files recorded in the shards."""
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
    """Marks a sweep as complete and writes its index.

    Args:
        folder: Folder of the sweep.
        count: Number of samples.
        index: Whether to write the index of sorted rows.
    """
    manifest = summarized(folder)
    is_indexed = is_intact(Sweep(folder, manifest))
    if manifest.state == "complete" and (is_indexed or not index):
        return
    used = {shard.path for shard in Sweep(folder, manifest).shards}
    for path in (folder / ROWS).glob("part-*.parquet"):
        if path not in used:  # a shard written by two processes
            path.unlink()
    if index and not is_indexed:
        try:
            remove_index(folder)
            write_index(Sweep(folder, manifest))
        except OSError as error:
            raise SweepError(
                f"all rows are stored in {folder}, but sorting them failed: {error.strerror or error}. Free space on "
                "the disk and run the same sweep again, or set index=False."
            ) from error
    _write(folder, replace(manifest, state="complete", samples=count))


__all__ = ["Engine", "complete", "sweep"]
