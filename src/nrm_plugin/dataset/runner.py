"""A sweep over a data set: started, continued, shared out among processes, and finished."""

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
from ..model.inputs import Output
from .evaluation import Evaluation, Target, Unpack, check_target, device_of
from .progress import Progress
from .queries import Query, check_queries
from .row_index import remove_index, write_index
from .sample_batches import Plan, source_of
from .settings import differences, digest, settings_of
from .shard_writer import remove_unfinished
from .stored_sweep import Sweep
from .sweep_job import Job
from .sweep_layout import BY_QUERY, MANIFEST, MAPS, ROWS, Manifest, OnError, SettingsError, SweepError, arrow, inside

Engine = Literal["local", "ray"]
SHARD = 256
"""Samples of a shard: what a kill may cost."""
SHOWN = 8
"""Differences that a message lists."""


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
    """Asks the measure of every sample of a data set, and stores the answers.

    What is written stays: after a kill, an error or Ctrl-C the same call goes on where it stopped, and ends with the
    rows that it would have ended with. Under ``torchrun`` the processes share the shards.

    Args:
        model: The network, in evaluation mode, on the device where it is to run.
        data: A data set with a length, whose samples are numbered by their places; where it has a ``fingerprint``, a
            text, another one is another data set. Of a ``DataLoader`` the data set is
            read in its own order, whatever its sampler. An ``IterableDataset`` numbers its samples as they come; to
            resume, it is read again from its beginning, and must hand out the same samples in the same order.
        queries: What is asked, such as ``[Marginal("features.28"), Sink("features.28")]``.
        out: Folder for the results; made where it is missing.
        target: What is explained: ``"prediction"``, ``"label"``, the number of a class, a function that finds the
            targets in a batch, or None for a model with a single output.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As there.
        gain_limit: As there.
        output: As there.
        unpack: Finds inputs and labels in a batch; by default a batch is inputs, ``(inputs, labels)``, or a mapping
            with ``"label"`` or ``"labels"``.
        batch_size: Samples of a batch; that of the loader, or 16, by default.
        num_workers: Processes that read samples; those of the loader, or none, by default.
        shard: Samples of a file, rounded up to whole batches: what a kill may cost.
        seed: Each sample is read with random numbers of its own, made of this.
        resume: False refuses a folder that holds a sweep.
        retry_failed: Evaluate shards with failed samples again.
        on_error: ``"raise"`` at the first sample that cannot be read or evaluated and at a damaged file; ``"skip"``
            leaves such samples out and lists them, and evaluates damaged files again.
        index: Write the rows once more by group and value when all are there, for :meth:`Sweep.top`.
        engine: ``"local"``, or ``"ray"`` for the machines of a Ray cluster.
        engine_options: Of Ray: ``concurrency``, ``num_gpus``, ``num_cpus`` of each worker.
        progress: Show a progress bar with rate, remaining time and memory.

    Returns:
        What is stored; complete, unless other processes are still at it.

    Raises:
        SweepError: The folder holds a sweep with other settings; the message says which. Or a sample or shard fails.
        NRMError: The model has no measure with these rules, or a query does not fit it.
        MissingExtraError: pyarrow or Ray is not installed.
    """
    arrow()
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is unknown; choose 'local' or 'ray'.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is unknown; choose 'raise' or 'skip'.")
    if isinstance(shard, bool) or not isinstance(shard, int) or shard < 1:
        raise SweepError(f"shard={shard!r}: give a number of samples.")
    check_target(target)
    asked = check_queries(queries)
    source = source_of(data, batch_size, num_workers)
    rules = normalize(composite, residual, gain_limit, None)
    evaluation = Evaluation(model, asked, rules, target, unpack, output)
    shard_batches = max(1, -(-shard // max(1, source.batch_size)))
    plan = None if source.count is None else Plan(source.count, source.batch_size, shard_batches)
    functions = {"unpack": unpack, "output": output, "collate": source.options.get("collate_fn")}
    said = getattr(source.data, "fingerprint", None)
    sizes = {
        "samples": source.count,
        "data": said if isinstance(said, str) else None,
        "batch_size": source.batch_size,
        "shard_batches": shard_batches,
        "seed": seed,
    }
    device = "cuda" if (engine_options or {}).get("num_gpus") else None
    settings = settings_of(model, asked, rules, target, functions, sizes, device)
    folder = Path(out)
    job = Job(evaluation, source, plan, shard_batches, folder, digest(settings), on_error, seed, {})
    started = Manifest(
        settings,
        job.fingerprint,
        tuple(query.info() for query in asked),
        samples=source.count,
        value=job.value,
        environment={"threads": torch.get_num_threads(), "device": _device_name(device_of(model))},
    )
    place = Place.here() if engine == "local" else Place(0, 1)
    if plan is None and (place.world > 1 or engine == "ray"):
        raise SweepError("an iterable data set cannot be shared out: every process would read all of it. Run one.")
    _begin(folder, started, resume, place)
    with _told_at_the_end(folder):
        count = _run(job, place, engine, engine_options or {}, retry_failed, progress)
        place.wait()
        if count is not None:
            finish(folder, count, index)
        place.wait()
    return Sweep.open(folder, on_error)


@dataclass(frozen=True)
class Place:
    """Which of several processes this is.

    Attributes:
        rank: Its number.
        world: How many there are.
    """

    rank: int
    world: int

    @classmethod
    def here(cls) -> Place:
        """As ``torch.distributed`` or ``torchrun`` tell it; else the only one."""
        if _is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return cls(0, 1)

    def wait(self) -> None:
        """For the others, where they can be waited for."""
        if self.world > 1 and _is_initialized():
            torch.distributed.barrier()


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -- beginning and end ----------------------------------------------------------------------------------------------


def _begin(folder: Path, started: Manifest, resume: bool, place: Place) -> None:
    """Makes the folder, or sees that what is in it is of the same sweep.

    Raises:
        SweepError: It is not.
    """
    try:
        for name in (ROWS, MAPS):
            inside(folder, name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"cannot write to {folder}: {error.strerror or error}. Name another folder.") from error
    has_shards = any((folder / ROWS).glob("part-*"))
    if (folder / MANIFEST).exists() and has_shards:
        there = Manifest.read(folder)
        if not resume and place.rank == 0:
            raise SettingsError(f"{folder} holds a sweep already. resume=True goes on with it; or name another folder.")
        changed = differences(there.settings, _as_read(started.settings))
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise SettingsError(
                f"{folder} holds a sweep with other settings, and results are not mixed. It differs in "
                f"{'; '.join(changed[:SHOWN])}{more}. Name another folder, or set these as they were."
            )
    elif has_shards:
        raise SweepError(f"{folder} holds shards, but no {MANIFEST} that says what they are. Name another folder.")
    else:
        _write(folder, started)
    remove_unfinished(folder)


def _as_read(settings: Any) -> Any:
    """Settings as they come back from a file, where there are no tuples."""
    return json.loads(json.dumps(settings))


def _write(folder: Path, manifest: Manifest) -> None:
    try:
        manifest.write(folder)
    except OSError as error:
        raise SweepError(f"cannot write to {folder}: {error.strerror or error}.") from error


@contextmanager
def _told_at_the_end(folder: Path) -> Iterator[None]:
    """The manifest says that a sweep was interrupted, and what failed so far."""
    try:
        yield
    except BaseException:
        # Whatever is wrong here, what was wrong before is what the user is to see; the shards tell all the same.
        with suppress(Exception):
            _write(folder, replace(summed_up(folder), state="interrupted"))
        raise


def summed_up(folder: Path) -> Manifest:
    """The manifest with what the shards say: groups, ranks, samples and files that failed."""
    stored = Sweep.open(folder, on_error="skip")
    shards = stored.shards
    return replace(
        stored.manifest,
        queries=tuple(stored.queries.values()),
        ranks=tuple(sorted({shard.rank for shard in shards})) or (0,),
        failed=tuple(failure for shard in shards for failure in shard.failed),
        bad_shards=tuple(entry for shard in shards for entry in shard.replaces),
    )


def finish(folder: Path, count: int, index: bool) -> None:
    """Says that a sweep is complete, and sorts its rows.

    Args:
        folder: Of the sweep.
        count: Number of its samples.
        index: Whether to sort.
    """
    manifest = summed_up(folder)
    if manifest.state == "complete" and ((folder / BY_QUERY).exists() or not index):
        return
    wanted = {shard.path for shard in Sweep(folder, manifest).shards}
    for path in (folder / ROWS).glob("part-*.parquet"):
        if path not in wanted:  # a shard that two processes wrote
            path.unlink()
    if index and not (folder / BY_QUERY).exists():
        try:
            write_index(Sweep(folder, manifest))
        except OSError as error:
            raise SweepError(
                f"all rows are stored in {folder}, but cannot be sorted there: {error.strerror or error}. Make room "
                "and run the same sweep again, or leave this out by index=False."
            ) from error
    _write(folder, replace(manifest, state="complete", samples=count))


# -- in between -----------------------------------------------------------------------------------------------------


def _run(
    job: Job, place: Place, engine: Engine, options: dict[str, Any], retry_failed: bool, progress: bool
) -> int | None:
    """Evaluates what is missing; returns the number of samples where nothing is missing any more."""
    done = job.done(retry_failed)
    if job.plan is None:
        manifest = Manifest.read(job.folder)
        if manifest.state == "complete" and not job.bad and not retry_failed:
            return manifest.samples
        _go_on(job.folder)
        with Progress(None, 0, progress) as shown:
            return job.run_stream(done, shown.tell)
    mine = range(place.rank, job.plan.shards, place.world)
    missing = [number for number in mine if number not in done]
    if missing:
        _go_on(job.folder)
        sizes = {number: 1 + job.plan.range(number)[1] - job.plan.range(number)[0] for number in mine}
        total = sum(sizes.values())
        with Progress(total, total - sum(sizes[number] for number in missing), progress) as shown:
            _runner(engine, options)(job, missing, place, shown.tell)
        done = job.done() if engine == "local" else replace(job, on_error="raise").done()
    return job.plan.count if len(done) == job.plan.shards else None


def _go_on(folder: Path) -> None:
    remove_index(folder)
    manifest = Manifest.read(folder)
    if manifest.state != "running":
        _write(folder, replace(manifest, state="running"))


def _runner(engine: Engine, options: dict[str, Any]) -> Callable[[Job, list[int], Place, Callable[[int], None]], None]:
    if engine == "ray":
        from .ray_engine import run

        return lambda job, missing, place, tell: run(job, missing, tell, **options)
    return lambda job, missing, place, tell: job.run(missing, place.rank, tell)


__all__ = ["Engine", "Place", "finish", "sweep"]
