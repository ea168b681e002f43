"""Comparison of dataset samples with the samples of a stored sweep, without running the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .progress import Progress
from .sample_batches import DataSource, load_batches
from .shard_file import Shard
from .sweep_job import SampleError, changed_samples
from .sweep_layout import OnError


def contents_to_compare(source: DataSource, shards: Iterable[Shard]) -> dict[int, str]:
    """Returns the stored hashes of samples whose modification stamp has changed or is unknown.

    Failed samples and samples stored by earlier versions of the library have no hash and are not compared.
    """
    contents: dict[int, str] = {}
    for shard in shards:
        stamps = source.stamps(shard.first, shard.last)
        stored = shard.stamps if len(shard.stamps) == len(stamps) else ()
        for position, content in enumerate(shard.content):
            if content and not (stored and stored[position] == stamps[position]):
                contents[shard.first + position] = content
    return contents


def check_samples(
    folder: Path,
    source: DataSource,
    contents: Mapping[int, str],
    seed: int,
    on_error: OnError = "raise",
    progress: bool = False,
) -> None:
    """Reads samples and compares their hashes with those stored in a sweep.

    Args:
        folder: The folder of the sweep.
        source: A dataset with a length.
        contents: The stored hashes, keyed by sample.
        seed: Seed for the random state set before each sample is read.
        on_error: Whether samples that can no longer be read are ignored (``"skip"``) or raise an error (``"raise"``).
        progress: Whether to show a progress bar.

    Raises:
        SettingsError: If samples have changed.
        SampleError: If a sample can no longer be read and ``on_error`` is ``"raise"``.
    """
    if not contents:
        return
    samples, size, changed = sorted(contents), source.batch_size, []
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    uncollated = replace(source, options={**source.options, "collate_fn": _nothing})
    with Progress(len(samples), 0, progress, "comparing stored samples") as bar:
        for batch in load_batches(uncollated, batches, seed):
            if batch.failed and on_error == "raise":
                failure = batch.failed[0]
                raise SampleError(
                    f"sample {failure.sample}, of which {folder} contains results, can no longer be read: "
                    f"{failure.why.rstrip('.')}. The results remain readable; restore the data, or set "
                    "on_error='skip'."
                )
            changed += [sample for sample in batch.samples if batch.content[sample] != contents[sample]]
            bar.update(len(batch.samples) + len(batch.failed))
    if changed:
        raise changed_samples(folder, changed)


def _nothing(samples: Sequence[Any]) -> None:
    """Discards samples. Only their hashes are compared."""


__all__ = ["check_samples", "contents_to_compare"]
