"""The work of a sweep: shards are evaluated and written one by one, in any order, by any process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .evaluation import Evaluated, Evaluation, is_of_samples
from .queries import Maps
from .sample_batches import Failure, Plan, Read, Source, length, read_again, reader, told
from .shard_file import Shard, shards_in
from .shard_writer import failures, write_shard
from .sweep_layout import OnError, ShardError, SweepError


class SampleError(SweepError):
    """Samples that cannot be read or evaluated."""


@dataclass(frozen=True)
class Job:
    """All that is needed to evaluate any shard.

    Attributes:
        evaluation: What is done to every batch.
        source: The data.
        plan: Which samples lie in which shard; None where the data do not tell how many there are.
        shard_batches: Batches of a shard.
        folder: Of the sweep.
        fingerprint: Of its settings.
        on_error: What happens to samples that fail.
        seed: Of random numbers while samples are read.
        bad: What was wrong with files that are to be replaced, by number.
    """

    evaluation: Evaluation
    source: Source
    plan: Plan | None
    shard_batches: int
    folder: Path
    fingerprint: str
    on_error: OnError
    seed: int
    bad: dict[int, dict[str, str]]

    @property
    def value(self) -> str:
        """Type of the values."""
        return "double" if self.evaluation.is_double else "float"

    # -- what is there ------------------------------------------------------------------------------------------------

    def done(self, retry_failed: bool = False) -> dict[int, Shard]:
        """The shards that need not be evaluated; damaged files are put aside.

        Args:
            retry_failed: Shards with failed samples count as not written, and are removed.

        Raises:
            ShardError: A file is damaged, and ``on_error`` is ``"raise"``.
        """
        found = {}
        for number, path in shards_in(self.folder).items():
            try:
                shard = self._checked(path)
            except ShardError as error:
                if self.on_error == "raise":
                    raise ShardError(
                        f"{error} With on_error='skip' it is put aside and its samples are evaluated again."
                    ) from error
                self.bad[number] = {"file": str(path.relative_to(self.folder)), "why": str(error)}
                path.replace(path.with_name(f"bad-{path.name}"))
                continue
            if retry_failed and shard.failed:
                path.unlink()
                continue
            found[number] = shard
        return found

    def _checked(self, path: Path) -> Shard:
        shard = Shard.read(path)
        if shard.settings != self.fingerprint:
            raise ShardError(f"{path} is of another sweep, with other settings.")
        if self.plan is not None:
            expected = self.plan.range(shard.number)
            if shard.number >= self.plan.shards or (shard.first, shard.last) != expected:
                raise ShardError(f"{path} holds samples {shard.first} to {shard.last}, expected {expected}.")
        if shard.groups and any(isinstance(query, Maps) for query in self.evaluation.queries):
            shard.check_maps()
        return shard

    # -- what is to do ------------------------------------------------------------------------------------------------

    def run(self, numbers: Sequence[int], rank: int, tell: Callable[[int], None]) -> None:
        """Evaluates and writes some shards.

        Args:
            numbers: Which.
            rank: Who writes.
            tell: Called with the number of samples after each batch.

        Raises:
            SampleError: Samples fail, and ``on_error`` is ``"raise"``.
            SweepError: A file cannot be written.
        """
        assert self.plan is not None
        batches = {number: self.plan.batches(number) for number in numbers}
        reads = reader(self.source, [batch for number in numbers for batch in batches[number]], self.seed)
        for number in numbers:
            self.shard(number, rank, islice(reads, len(batches[number])), self.plan.range(number)[0], tell)

    def run_stream(self, done: dict[int, Shard], tell: Callable[[int], None]) -> int:
        """Reads data that do not tell how many samples they have, and skips over finished shards.

        Returns:
            How many samples there were.

        Raises:
            SweepError: They hand out other numbers of samples than before.
        """
        assert self.source.loader is not None
        batches, sample, number = iter(self.source.loader), 0, 0
        while batch := list(islice(batches, self.shard_batches)):
            reads, first = [], sample
            for part in batch:
                reads.append(Read(list(range(sample, sample + length(part))), part))
                sample = reads[-1].sample[-1] + 1
            if number not in done:
                self.shard(number, 0, iter(reads), first, tell)
            elif (done[number].first, done[number].last) != (first, sample - 1):
                raise SweepError(
                    f"{self.folder} has samples {done[number].first} to {done[number].last} in shard {number}, but the "
                    f"data now hand out {first} to {sample - 1} there. They must come again as they were."
                )
            else:
                tell(sample - first)
            number += 1
        return sample

    def shard(self, number: int, rank: int, reads: Iterable[Read], first: int, tell: Callable[[int], None]) -> Path:
        """Evaluates and writes one shard."""
        parts: list[Evaluated] = []
        failed: list[Failure] = []
        last = first - 1
        for read in reads:
            part, bad = self._evaluated(read)
            parts += [] if part is None else [part]
            failed += bad
            size = len(read.sample) + len(read.failed)
            last += size
            tell(size)
        said = {
            "settings": self.fingerprint,
            "first": first,
            "last": last,
            "failed": failures(failed),
            "replaces": [self.bad[number]] if number in self.bad else [],
        }
        try:
            return write_shard(self.folder, rank, number, self.evaluation.queries, parts, said, self.value)
        except OSError as error:
            raise SweepError(
                f"shard {number} cannot be written to {self.folder}: {error.strerror or error}. All shards before it "
                "are whole and can be read; make room and run the same sweep again to go on."
            ) from error

    def _evaluated(self, read: Read) -> tuple[Evaluated | None, list[Failure]]:
        if read.failed and self.on_error == "raise":
            raise _cannot(f"sample {read.failed[0].sample} cannot be read", read.failed[0].why)
        if not read.sample:
            return None, read.failed
        try:
            return self.evaluation(read.sample, read.batch), read.failed
        except Exception as error:
            if not is_of_samples(error):
                raise
            if self.on_error == "raise" or self.plan is None:
                which = f"samples {read.sample[0]} to {read.sample[-1]} cannot be evaluated"
                raise _cannot(which, told(error)) from error
            return self._without_bad(read, error)

    def _without_bad(self, read: Read, error: Exception) -> tuple[Evaluated | None, list[Failure]]:
        """Each sample on its own, to find those that fail; the others are then evaluated together."""
        bad = [failure for sample in read.sample for failure in self._alone(sample)]
        names = {failure.sample for failure in bad}
        good = [sample for sample in read.sample if sample not in names]
        if not bad:
            raise error
        if not good:
            return None, [*read.failed, *bad]
        again = read_again(self.source, good, self.seed)
        return self.evaluation(again.sample, again.batch), [*read.failed, *bad]

    def _alone(self, sample: int) -> Iterator[Failure]:
        again = read_again(self.source, [sample], self.seed)
        if again.failed:
            yield again.failed[0]
            return
        try:
            self.evaluation(again.sample, again.batch)
        except Exception as error:
            if not is_of_samples(error):
                raise
            yield Failure(sample, told(error))


def _cannot(what: str, why: str) -> SampleError:
    return SampleError(
        f"{what}: {why.rstrip('.')}. Everything before is stored. Mend it and run the same sweep again, or leave such "
        "samples out by on_error='skip', which lists them at the end."
    )


__all__ = ["Job", "SampleError"]
