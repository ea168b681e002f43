"""Which samples are read together, and how: the same batches in every run, whoever reads them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import BatchSampler, RandomSampler, SequentialSampler

from .sweep_layout import SweepError

BATCH = 16
WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that hand out all samples, in some order."""
KEPT = ("collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read or evaluated.

    Attributes:
        sample: Its place in the data set.
        why: What went wrong, in one line.
    """

    sample: int
    why: str


@dataclass(frozen=True)
class Read:
    """What was read of one batch.

    Attributes:
        sample: Places of its samples.
        batch: Put together as a loader does; None where no sample could be read.
        failed: Samples that could not be read.
    """

    sample: list[int]
    batch: Any
    failed: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A data set with everything that says how it is read.

    Attributes:
        data: The data set.
        batch_size: Samples of a batch.
        num_workers: Processes that read.
        options: Further arguments of ``DataLoader``.
        loader: Of an iterable data set, what hands out batches.
    """

    data: Any
    batch_size: int
    num_workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    loader: Iterable[Any] | None = None

    @property
    def count(self) -> int | None:
        """How many samples there are; None where that is known at the end only."""
        return None if self.loader is not None else len(self.data)

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """What puts samples together."""
        return self.options.get("collate_fn") or default_collate


def source_of(data: Any, batch_size: int | None, num_workers: int | None) -> Source:
    """What is to be read.

    Args:
        data: A data set, or a loader, whose data set is read in its own order.
        batch_size: Samples of a batch; that of the loader by default.
        num_workers: Processes that read; those of the loader by default.

    Raises:
        SweepError: It is neither, or the loader hands out a selection.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SweepError(f"{name}={value!r}: give a number of at least {least}.")
    if not isinstance(data, DataLoader):
        return _plain(data, batch_size or BATCH, num_workers or 0, {})
    options = {key: getattr(data, key) for key in KEPT if getattr(data, key, None)}
    workers = data.num_workers if num_workers is None else num_workers
    if isinstance(data.dataset, IterableDataset):
        if batch_size not in (None, data.batch_size):
            raise SweepError(f"batch_size={batch_size}, but the loader hands out batches of {data.batch_size}.")
        return Source(data.dataset, data.batch_size or 0, workers, options, loader=data)
    if type(data.batch_sampler) is not BatchSampler or not isinstance(data.sampler, WHOLE):
        raise SweepError(
            f"the loader selects samples by {type(data.batch_sampler or data.sampler).__name__}. A sweep reads a whole "
            "data set in its own order: give torch.utils.data.Subset(data, indices) for a part of it."
        )
    workers_only = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    options = {key: value for key, value in options.items() if workers or key not in workers_only}
    return _plain(data.dataset, batch_size or data.batch_size or BATCH, workers, options)


def _plain(data: Any, batch_size: int, num_workers: int, options: Mapping[str, Any]) -> Source:
    if isinstance(data, IterableDataset):
        if num_workers > 1:
            raise SweepError(
                "an iterable data set with several workers hands out every sample several times, unless it shares them "
                "out itself. Give num_workers=1, or a DataLoader of which you know that it does not."
            )
        return Source(data, batch_size, num_workers, options, DataLoader(data, batch_size, num_workers=num_workers))
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise SweepError(
            f"a sweep takes a data set with a length, an IterableDataset or a DataLoader, got {type(data).__name__}."
        )
    if len(data) == 0:
        raise SweepError("the data set has no samples.")
    return Source(data, batch_size, num_workers, options)


# -- shards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which samples lie in which batch, and which batches in which shard.

    Attributes:
        count: Samples.
        batch_size: Samples of a batch; the last one may have fewer.
        shard_batches: Batches of a shard.
    """

    count: int
    batch_size: int
    shard_batches: int

    @property
    def shards(self) -> int:
        """How many there are."""
        return math.ceil(self.count / (self.batch_size * self.shard_batches))

    def range(self, shard: int) -> tuple[int, int]:
        """First and last sample of a shard."""
        size = self.batch_size * self.shard_batches
        return shard * size, min(self.count, (shard + 1) * size) - 1

    def batches(self, shard: int) -> list[list[int]]:
        """The samples of each batch."""
        first, last = self.range(shard)
        return [
            list(range(start, min(start + self.batch_size, last + 1)))
            for start in range(first, last + 1, self.batch_size)
        ]


# -- reading --------------------------------------------------------------------------------------------------------


class Guarded(Dataset[tuple[int, Any]]):
    """A data set whose samples bring their places, and failures where they cannot be read.

    Each sample is read with random numbers of its own, so that a random transform gives the same in every run.

    Args:
        data: The data set.
        seed: Of the random numbers.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, index: int) -> tuple[int, Any]:
        with seeded(self.seed, index):
            try:
                return index, self.data[index]
            except Exception as error:  # whatever the user's data raise
                return index, Failure(index, told(error))


@contextmanager
def seeded(seed: int, index: int) -> Iterator[None]:
    """Random numbers of one sample; those of the process go on as if nothing was drawn."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    number = (seed * 1_000_003 + index) % (1 << 32)
    try:
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


@dataclass(frozen=True)
class Together:
    """Puts samples together, without those that failed or are of another form than most.

    Attributes:
        collate: What the loader does.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: Sequence[tuple[int, Any]]) -> Read:
        failed = [sample for _, sample in samples if isinstance(sample, Failure)]
        left = [(index, sample) for index, sample in samples if not isinstance(sample, Failure)]
        if not left:
            return Read([], None, failed)
        try:
            return Read([index for index, _ in left], self.collate([sample for _, sample in left]), failed)
        except Exception as error:  # of samples of different sizes, or of the user's function
            why = told(error)
        forms = [str(form(sample)) for _, sample in left]
        usual = Counter(forms).most_common(1)[0][0]
        odd = [Failure(index, f"its form is {is_}, that of others {usual}")
               for (index, _), is_ in zip(left, forms, strict=True) if is_ != usual]  # fmt: skip
        if not odd:
            return Read([], None, [*failed, *(Failure(index, why) for index, _ in left)])
        rest = self([pair for pair, is_ in zip(left, forms, strict=True) if is_ == usual])
        return Read(rest.sample, rest.batch, [*failed, *odd, *rest.failed])


def form(sample: Any) -> Any:
    """Types and shapes of a sample."""
    if isinstance(sample, Mapping):
        return {key: form(value) for key, value in sample.items()}
    if isinstance(sample, (list, tuple)):
        return [form(value) for value in sample]
    shape = getattr(sample, "shape", None)
    return type(sample).__name__ if shape is None else tuple(shape)


def told(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def reader(source: Source, batches: Sequence[list[int]], seed: int) -> Iterator[Read]:
    """The batches of a data set, one after the other, read ahead by workers where there are any."""
    options = {key: value for key, value in source.options.items() if key != "collate_fn"}
    loader: Iterable[Read] = DataLoader(
        Guarded(source.data, seed),
        batch_sampler=batches,
        num_workers=source.num_workers,
        collate_fn=Together(source.collate),
        generator=torch.Generator().manual_seed(seed),  # else one is drawn from the random numbers of the process
        **options,
    )
    return iter(loader)


def read_again(source: Source, sample: Sequence[int], seed: int) -> Read:
    """The same samples once more, or some of them."""
    guarded = Guarded(source.data, seed)
    return Together(source.collate)([guarded[index] for index in sample])


def length(batch: Any) -> int:
    """Number of samples in a batch that was put together."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    return next((length(part) for part in parts if isinstance(part, (Tensor, Mapping, list, tuple))), len(parts))


__all__ = ["Failure", "Plan", "Read", "Source", "length", "read_again", "reader", "source_of", "told"]
