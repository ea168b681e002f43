"""Evaluation of shards (consecutive samples) of a sweep, in any order and by any process."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .evaluation import BatchResults, Evaluation, is_due_to_samples
from .fingerprints import content_hash
from .queries import Maps
from .sample_batches import (
    DataSource,
    FailedSample,
    LoadedBatch,
    ShardPlan,
    batch_length,
    load_batches,
    one_line,
    reload,
)
from .shard_file import Shard, shards_in
from .shard_writer import ShardInfo, write_shard
from .sweep_layout import OnError, SettingsError, ShardError, SweepError

OnProgress = Callable[[int], object]
"""Callback that receives the number of newly evaluated samples."""


class SampleError(SweepError):
    """Raised if samples cannot be read or evaluated."""


@dataclass(frozen=True)
class SweepJob:
    """Settings and data required to evaluate any shard of a sweep.

    Attributes:
        evaluation: Evaluation of a batch.
        source: Dataset with its loading options.
        plan: Assignment of samples to shards, or None for an iterable dataset.
        shard_batches: Number of batches per shard.
        folder: Folder to which shards are written.
        fingerprint: Hash of the settings.
        on_error: ``"raise"`` or ``"skip"`` for failing samples and damaged files.
        seed: Seed for the random state set before each sample is read.
        damaged: Damaged files to replace, keyed by shard index.
    """

    evaluation: Evaluation
    source: DataSource
    plan: ShardPlan | None
    shard_batches: int
    folder: Path
    fingerprint: str
    on_error: OnError
    seed: int
    damaged: dict[int, dict[str, str]]

    @property
    def value(self) -> str:
        """Arrow type of stored values: ``"double"`` or ``"float"``."""
        return "double" if self.evaluation.is_double else "float"

    # -- existing shards ----------------------------------------------------------------------------------------------

    def done(self, retry_failed: bool = False, of: Container[int] = ()) -> dict[int, Shard]:
        """Returns the finished shards keyed by index. Moves damaged files aside.

        Args:
            retry_failed: Whether to remove shards with failed samples in order to evaluate them again.
            of: Indices of the shards to verify completely, by checksum rather than only by footer.

        Raises:
            ShardError: If a file is damaged and ``on_error`` is ``"raise"``.
        """
        shards = {}
        for number, path in shards_in(self.folder).items():
            try:
                shard = self._checked(path)
                if number in of:
                    shard.check_content()
            except ShardError as error:
                if self.on_error == "raise":
                    raise ShardError(
                        f"{error} With on_error='skip', it is moved aside and its samples are evaluated again."
                    ) from error
                self.damaged[number] = {"file": str(path.relative_to(self.folder)), "why": str(error)}
                path.replace(path.with_name(f"bad-{path.name}"))
                continue
            if retry_failed and shard.failed:
                path.unlink()
                continue
            shards[number] = shard
        return shards

    def _checked(self, path: Path) -> Shard:
        shard = Shard.read(path)
        shard.check_settings(self.fingerprint)
        if self.plan is not None:
            expected = self.plan.range(shard.number)
            if shard.number >= self.plan.shards or (shard.first, shard.last) != expected:
                raise ShardError(f"{path} contains samples {shard.first} to {shard.last}, expected {expected}.")
        if shard.groups and any(isinstance(query, Maps) for query in self.evaluation.queries):
            shard.check_maps()
        return shard

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def run(self, numbers: Sequence[int], rank: int, on_progress: OnProgress) -> None:
        """Evaluates shards and writes their results.

        Args:
            numbers: Indices of the shards.
            rank: Rank of this process.
            on_progress: Callback that receives the number of new samples after each batch.

        Raises:
            SampleError: If samples fail and ``on_error`` is ``"raise"``.
            SweepError: If a file cannot be written.
        """
        assert self.plan is not None
        batches = {number: self.plan.batches(number) for number in numbers}
        loaded = load_batches(self.source, [batch for number in numbers for batch in batches[number]], self.seed)
        for number in numbers:
            of_shard = islice(loaded, len(batches[number]))
            self._evaluate_shard(number, rank, of_shard, self.plan.range(number)[0], on_progress)

    def run_stream(self, done: dict[int, Shard], on_progress: OnProgress) -> int:
        """Evaluates an iterable dataset, skipping finished shards.

        Returns:
            The number of samples.

        Raises:
            SweepError: If the samples of finished shards differ from the dataset.
        """
        assert self.source.loader is not None
        batches, sample, number = iter(self.source.loader), 0, 0
        while batch := list(islice(batches, self.shard_batches)):
            loaded, first = [], sample
            for part in batch:
                samples = list(range(sample, sample + batch_length(part)))
                content = content_hash(part) if self.source.is_hashed else ""
                loaded.append(LoadedBatch(samples, part, content={samples[0]: content}))
                sample = samples[-1] + 1
            if number not in done:
                self._evaluate_shard(number, 0, iter(loaded), first, on_progress)
            elif (done[number].first, done[number].last) != (first, sample - 1):
                raise SweepError(
                    f"shard {number} in {self.folder} contains samples {done[number].first} to {done[number].last}, "
                    f"but the dataset now yields {first} to {sample - 1}. To resume, it must yield the same samples "
                    "in the same order."
                )
            else:
                self._check_batches(done[number], loaded)
                on_progress(sample - first)
            number += 1
        if missing := [shard for shard in done if shard >= number]:
            raise SettingsError(
                f"the dataset now ends after {sample} samples, but {self.folder} contains shard {missing[0]}. To "
                "resume, it must yield the same samples in the same order."
            )
        return sample

    def _check_batches(self, shard: Shard, loaded: Sequence[LoadedBatch]) -> None:
        now = [text for part in loaded for text in part.content.values()]
        for part, before, text in zip(loaded, shard.content, now, strict=False):
            if before != text:
                raise changed_samples(self.folder, part.samples)

    def _evaluate_shard(
        self, number: int, rank: int, batches: Iterable[LoadedBatch], first: int, on_progress: OnProgress
    ) -> None:
        results: list[BatchResults] = []
        failed: list[FailedSample] = []
        content: dict[int, str] = {}
        stamps = self.source.stamps(first, self.plan.range(number)[1]) if self.plan is not None else []
        last = first - 1
        for loaded in batches:
            result, failures = self._evaluated(loaded)
            results += [] if result is None else [result]
            failed += failures
            size = len(loaded.samples) + len(loaded.failed)
            content |= loaded.content
            last += size
            on_progress(size)
        replaced = [self.damaged[number]] if number in self.damaged else []
        lost = {failure.sample for failure in failed}
        numbers = range(first, last + 1) if self.plan is not None else content
        hashes = ["" if index in lost else content.get(index, "") for index in numbers] if content else []
        info = ShardInfo(self.fingerprint, first, last, failed, replaced, self.value, hashes, stamps)
        try:
            write_shard(self.folder, rank, number, self.evaluation.queries, results, info)
        except OSError as error:
            raise SweepError(
                f"shard {number} cannot be written to {self.folder}: {error.strerror or error}. All shards before it "
                "are complete and readable; free space on the disk and run the same sweep again to resume."
            ) from error

    def _evaluated(self, loaded: LoadedBatch) -> tuple[BatchResults | None, list[FailedSample]]:
        if loaded.failed and self.on_error == "raise":
            raise _sample_error(f"sample {loaded.failed[0].sample} cannot be read", loaded.failed[0].why)
        if not loaded.samples:
            return None, loaded.failed
        try:
            return self.evaluation(loaded.samples, loaded.batch), loaded.failed
        except Exception as error:
            if not is_due_to_samples(error):
                raise
            if self.on_error == "raise" or self.plan is None:
                samples = f"samples {loaded.samples[0]} to {loaded.samples[-1]} cannot be evaluated"
                raise _sample_error(samples, one_line(error)) from error
            return self._without_failing(loaded, error)

    def _without_failing(self, loaded: LoadedBatch, error: Exception) -> tuple[BatchResults | None, list[FailedSample]]:
        """Evaluates samples separately to find the failing ones and then all others together."""
        failed = [failure for sample in loaded.samples for failure in self._failure_of(sample)]
        indices = {failure.sample for failure in failed}
        remaining = [sample for sample in loaded.samples if sample not in indices]
        if not failed:
            raise error
        if not remaining:
            return None, [*loaded.failed, *failed]
        again = reload(self.source, remaining, self.seed)
        return self.evaluation(again.samples, again.batch), [*loaded.failed, *failed]

    def _failure_of(self, sample: int) -> Iterator[FailedSample]:
        again = reload(self.source, [sample], self.seed)
        if again.failed:
            yield again.failed[0]
            return
        try:
            self.evaluation(again.samples, again.batch)
        except Exception as error:
            if not is_due_to_samples(error):
                raise
            yield FailedSample(sample, one_line(error))


def changed_samples(folder: Path, samples: Sequence[int]) -> SettingsError:
    """Creates the error for samples that differ from the samples of a stored sweep."""
    more = "" if len(samples) == 1 else f" and {len(samples) - 1} more"
    return SettingsError(
        f"the data changed: sample {samples[0]}{more} differs from the one whose results are in {folder}. Choose "
        "another folder, delete this one, or restore the data. A dataset whose values change with every read needs "
        "a string attribute fingerprint, which is compared instead."
    )


def _sample_error(what: str, why: str) -> SampleError:
    return SampleError(
        f"{what}: {why.rstrip('.')}. All earlier shards are stored. Fix this and run the same sweep again, or skip "
        "such samples with on_error='skip', which lists them at the end."
    )


__all__ = ["OnProgress", "SampleError", "SweepJob", "changed_samples"]
