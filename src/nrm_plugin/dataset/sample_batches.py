"""Reproducible batches of a dataset, without the samples that cannot be read."""

from __future__ import annotations

import json
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

from .fingerprints import content_hash, described
from .sweep_layout import SweepError

BATCH = 16
FULL_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that yield every sample, in any order."""
WORKER_OPTIONS = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
LOADER_OPTIONS = ("collate_fn", "pin_memory", *WORKER_OPTIONS)


@dataclass(frozen=True)
class FailedSample:
    """Sample that could not be read or evaluated.

    Attributes:
        sample: Index of the sample in the dataset.
        why: The error message, in a single line.
    """

    sample: int
    why: str


@dataclass(frozen=True)
class LoadedBatch:
    """Batch read from a dataset.

    Attributes:
        samples: Index of each sample in the dataset.
        batch: The collated samples, or None if no sample could be read.
        failed: Samples that could not be read.
        content: Hash of each sample, keyed by sample index.
    """

    samples: list[int]
    batch: Any
    failed: list[FailedSample] = field(default_factory=list)
    content: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSource:
    """Dataset with options for loading its samples.

    Attributes:
        data: Dataset that is read by index, or an iterable dataset.
        batch_size: Number of samples per batch.
        num_workers: Number of worker processes.
        options: Other arguments of ``DataLoader``.
        loader: Data loader of an iterable dataset, or None.
    """

    data: Any
    batch_size: int
    num_workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    loader: Iterable[Any] | None = None

    @property
    def count(self) -> int | None:
        """Number of samples, or None for an iterable dataset."""
        return None if self.loader is not None else len(self.data)

    @property
    def preparation(self) -> Any:
        """The dataset's description of its preprocessing, or None if it has none."""
        preparation = getattr(self.data, "preparation", None)
        try:
            return json.loads(json.dumps(preparation))
        except (TypeError, ValueError):  # it contains an object, such as a transform
            return described(preparation)

    def stamps(self, first: int, last: int) -> list[str]:
        """Returns the stamps that identify samples without reading them, or an empty list if there are none."""
        stamp = getattr(self.data, "stamp", None)
        return [str(stamp(index)) for index in range(first, last + 1)] if callable(stamp) else []

    @property
    def is_hashed(self) -> bool:
        """True if samples are identified by hashes, which applies to datasets with stamps or without a fingerprint."""
        return callable(getattr(self.data, "stamp", None)) or not isinstance(
            getattr(self.data, "fingerprint", None), str
        )

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        """Function that collates samples."""
        return self.options.get("collate_fn") or default_collate


def data_source(data: Any, batch_size: int | None, num_workers: int | None) -> DataSource:
    """Creates a data source from a dataset or data loader.

    Args:
        data: A dataset, or a data loader whose dataset is read in index order.
        batch_size: Number of samples per batch. Defaults to the batch size of the loader, or to 16.
        num_workers: Number of worker processes. Defaults to the number of the loader, or to 0.

    Raises:
        SweepError: If ``data`` is neither a dataset nor a loader, an argument is invalid, or the loader yields only a
            subset of its dataset.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SweepError(f"{name}={value!r} must be an integer of at least {least}.")
    if not isinstance(data, DataLoader):
        return _dataset_source(data, batch_size or BATCH, num_workers or 0, {})
    options = {key: getattr(data, key) for key in LOADER_OPTIONS if getattr(data, key, None)}
    workers = data.num_workers if num_workers is None else num_workers
    if isinstance(data.dataset, IterableDataset):
        if batch_size not in (None, data.batch_size):
            raise SweepError(f"batch_size={batch_size}, but the loader yields batches of {data.batch_size}.")
        return DataSource(data.dataset, data.batch_size or 0, workers, options, loader=data)
    if type(data.batch_sampler) is not BatchSampler or not isinstance(data.sampler, FULL_SAMPLERS):
        raise SweepError(
            f"the loader selects samples by {type(data.batch_sampler or data.sampler).__name__}. A sweep reads all "
            "samples in index order; pass torch.utils.data.Subset(data, indices) for a subset."
        )
    options = {key: value for key, value in options.items() if workers or key not in WORKER_OPTIONS}
    return _dataset_source(data.dataset, batch_size or data.batch_size or BATCH, workers, options)


def _dataset_source(data: Any, batch_size: int, num_workers: int, options: Mapping[str, Any]) -> DataSource:
    if isinstance(data, IterableDataset):
        if num_workers > 1:
            raise SweepError(
                "an iterable dataset with several workers yields every sample several times, unless it splits them "
                "among its workers. Set num_workers=1, or pass a DataLoader that is known not to repeat samples."
            )
        return DataSource(data, batch_size, num_workers, options, DataLoader(data, batch_size, num_workers=num_workers))
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise SweepError(
            f"a sweep takes a dataset with a length, an IterableDataset or a DataLoader, got {type(data).__name__}."
        )
    if len(data) == 0:
        raise SweepError("the dataset has no samples.")
    return DataSource(data, batch_size, num_workers, options)


# -- shards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardPlan:
    """Assignment of samples to batches and to shards, consecutive samples whose results are stored in one file.

    Shards do not depend on the batch size. A sweep can therefore be resumed with a different batch size.

    Attributes:
        count: Number of samples.
        batch_size: Number of samples per batch. The last batch of a shard can be smaller.
        shard_size: Number of samples per shard.
    """

    count: int
    batch_size: int
    shard_size: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.count / self.shard_size)

    def range(self, shard: int) -> tuple[int, int]:
        """Returns the indices of the first and last sample of a shard."""
        return shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size) - 1

    def size(self, shard: int) -> int:
        """Returns the number of samples in a shard."""
        first, last = self.range(shard)
        return last - first + 1

    def batches(self, shard: int) -> list[list[int]]:
        """Returns the sample indices of each batch of a shard."""
        first, last = self.range(shard)
        return [
            list(range(start, min(start + self.batch_size, last + 1)))
            for start in range(first, last + 1, self.batch_size)
        ]


# -- reading --------------------------------------------------------------------------------------------------------


class IndexedDataset(Dataset[tuple[int, Any, str]]):
    """Dataset wrapper whose items are samples with index and hash, or a :class:`FailedSample`.

    Random generators are seeded for each sample. Random transforms are therefore reproducible.

    Args:
        data: Dataset to wrap.
        seed: Seed for the random states.
        is_hashed: Whether to hash samples. Otherwise, the hash is an empty string.
    """

    def __init__(self, data: Any, seed: int, is_hashed: bool = False) -> None:
        self.data, self.seed, self.is_hashed = data, seed, is_hashed

    def __getitem__(self, index: int) -> tuple[int, Any, str]:
        with seeded(self.seed, index):
            try:
                sample = self.data[index]
                return index, sample, content_hash(sample) if self.is_hashed else ""
            except Exception as error:  # any error that the user's dataset raises
                return index, FailedSample(index, one_line(error)), ""


@contextmanager
def seeded(seed: int, index: int) -> Iterator[None]:
    """Context manager that seeds all random generators for one sample and restores their states afterwards."""
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
class FaultTolerantCollate:
    """Collate function that omits failed samples and samples with a different structure than the majority.

    Attributes:
        collate: Collate function for the remaining samples.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: Sequence[tuple[int, Any, str]]) -> LoadedBatch:
        failed = [sample for _, sample, _ in samples if isinstance(sample, FailedSample)]
        read = [(index, sample) for index, sample, _ in samples if not isinstance(sample, FailedSample)]
        content = {index: text for index, _, text in samples}
        if not read:
            return LoadedBatch([], None, failed)
        try:
            batch = self.collate([sample for _, sample in read])
            return LoadedBatch([index for index, _ in read], batch, failed, content)
        except Exception as error:  # samples of different sizes, or an error of the user's function
            why = one_line(error)
        structures = [str(structure(sample)) for _, sample in read]
        usual = Counter(structures).most_common(1)[0][0]
        odd = [FailedSample(index, f"its structure is {own}, but that of most samples is {usual}")
               for (index, _), own in zip(read, structures, strict=True) if own != usual]  # fmt: skip
        if not odd:
            return LoadedBatch([], None, [*failed, *(FailedSample(index, why) for index, _ in read)])
        rest = self([(*pair, content[pair[0]]) for pair, own in zip(read, structures, strict=True) if own == usual])
        return LoadedBatch(rest.samples, rest.batch, [*failed, *odd, *rest.failed], rest.content)


def structure(sample: Any) -> Any:
    """Returns the nested structure of a sample: the shape of each tensor or array and the type of any other value."""
    if isinstance(sample, Mapping):
        return {key: structure(value) for key, value in sample.items()}
    if isinstance(sample, (list, tuple)):
        return [structure(value) for value in sample]
    shape = getattr(sample, "shape", None)
    return type(sample).__name__ if shape is None else tuple(shape)


def one_line(error: BaseException) -> str:
    """Formats the type and message of an error in one line of at most 500 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def load_batches(source: DataSource, batches: Sequence[list[int]], seed: int) -> Iterator[LoadedBatch]:
    """Loads batches of a dataset in the given order. Workers prefetch batches."""
    options = {key: value for key, value in source.options.items() if key != "collate_fn"}
    loader: Iterable[LoadedBatch] = DataLoader(
        IndexedDataset(source.data, seed, source.is_hashed),
        batch_sampler=batches,
        num_workers=source.num_workers,
        collate_fn=FaultTolerantCollate(source.collate),
        generator=torch.Generator().manual_seed(seed),  # otherwise, the global random state would change
        **options,
    )
    return iter(loader)


def reload(source: DataSource, samples: Sequence[int], seed: int) -> LoadedBatch:
    """Reads samples again as a single batch."""
    indexed = IndexedDataset(source.data, seed, source.is_hashed)
    return FaultTolerantCollate(source.collate)([indexed[index] for index in samples])


def batch_length(batch: Any) -> int:
    """Returns the number of samples in a collated batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    return next((batch_length(part) for part in parts if isinstance(part, (Tensor, Mapping, list, tuple))), len(parts))


__all__ = [
    "DataSource",
    "FailedSample",
    "LoadedBatch",
    "ShardPlan",
    "batch_length",
    "data_source",
    "load_batches",
    "one_line",
    "reload",
]
