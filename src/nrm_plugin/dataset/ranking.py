"""Top-k rankings of the samples for each group, updated batch by batch in constant memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_SAMPLE = torch.iinfo(torch.int64).max
"""Sample index of empty slots. It sorts them after all samples."""


@dataclass
class TopSamples:
    """The ``k`` samples with the largest values in each row, in decreasing order. Ties are broken by sample index.

    Attributes:
        values: Ranked values of shape ``(…, k)``, or minus infinity in empty slots.
        samples: Sample indices of shape ``(…, k)``.
        targets: Explained classes, of shape ``(…, k)``, or -1 if unknown.
        positions: Position of the largest value within the group, of shape ``(…, k)``, or -1 if unknown.
    """

    values: Tensor
    samples: Tensor
    targets: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype) -> TopSamples:
        """Creates a ranking with only empty slots."""
        return cls(
            torch.full(shape, -torch.inf, dtype=dtype),
            torch.full(shape, NO_SAMPLE),
            torch.full(shape, -1, dtype=torch.int32),
            torch.full(shape, -1, dtype=torch.int32),
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors ``values``, ``samples``, ``targets`` and ``positions``."""
        return self.values, self.samples, self.targets, self.positions

    def __getitem__(self, index: int | slice | Tensor | tuple[int | slice | Tensor, ...]) -> TopSamples:
        return TopSamples(*(part[index] for part in self.parts))

    def where(self, is_ranked: Tensor) -> TopSamples:
        """Returns a copy in which slots that do not satisfy ``is_ranked`` are empty."""
        empty = TopSamples.empty((), self.values.dtype)
        pairs = zip(self.parts, empty.parts, strict=True)
        return TopSamples(*(torch.where(is_ranked, part, other) for part, other in pairs))

    def joined(self, others: TopSamples, dim: int) -> TopSamples:
        """Concatenates two rankings along ``dim``."""
        return TopSamples(*(torch.cat(pair, dim) for pair in zip(self.parts, others.parts, strict=True)))

    def merged(self, others: TopSamples) -> TopSamples:
        """Merges two rankings and keeps the top ``k``. All dimensions but the last must match."""
        both = self.joined(others, -1)
        # Entries are sorted by sample, and then stably by value.
        order = both.samples.argsort(dim=-1, stable=True)
        by_value = both.values.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, by_value[..., : self.values.shape[-1]])
        return TopSamples(*(part.gather(-1, order) for part in both.parts))


class Ranking:
    """Top-k samples of each group, over all samples and optionally per target.

    The memory is proportional to ``k`` for each group and target.

    Args:
        k: Number of samples per group.
        by_target: Whether to rank the samples of each target as well.

    Examples:
        >>> ranking = Ranking(2)
        >>> for start in (0, 3):
        ...     ranking.add(torch.tensor([[1.0], [5.0], [5.0]]), torch.arange(start, start + 3))
        >>> ranking.of(None).samples
        tensor([[1, 2]])
    """

    def __init__(self, k: int, by_target: bool = False) -> None:
        self.k, self.by_target = k, by_target
        self._all: TopSamples | None = None
        self._by_target: TopSamples | None = None
        self._rows: dict[int, int] = {}

    @property
    def targets(self) -> list[int]:
        """The targets seen so far."""
        return sorted(self._rows)

    def add(
        self, values: Tensor, samples: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        """Adds a batch to the ranking.

        Args:
            values: Finite values of shape ``(N, K)``.
            samples: Unique index of each sample, of shape ``(N,)``.
            targets: Explained class of each sample, of shape ``(N,)``; required to rank by target.
            positions: Position of the largest value within each group, of shape ``(N, K)``.
        """
        if not len(values):
            return
        empty = TopSamples.empty((values.shape[1], len(values)), values.dtype)
        batch = TopSamples(
            values.T,
            samples.expand(values.T.shape),
            empty.targets if targets is None else targets.int().expand(values.T.shape),
            empty.positions if positions is None else positions.T.int(),
        )
        held = self._all or TopSamples.empty((values.shape[1], self.k), values.dtype)
        self._all = held.merged(batch)
        if self.by_target and targets is not None:
            self._add_by_target(batch, targets)

    def _add_by_target(self, batch: TopSamples, targets: Tensor) -> None:
        groups, present = len(batch.values), torch.unique(targets)
        stored = self._with_rows_for(present, groups, batch.values.dtype)
        # Samples are arranged in one row per target, so the most frequent target determines the number of columns.
        row = torch.searchsorted(present, targets)
        order = row.argsort(stable=True)
        counts = row.bincount(minlength=len(present))
        column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row[order]]
        spread = TopSamples.empty((groups, len(present), int(counts.max())), batch.values.dtype)
        for part, source in zip(spread.parts, batch.parts, strict=True):
            part[:, row[order], column] = source[:, order]
        rows = torch.tensor([self._rows[int(target)] for target in present])
        for part, new in zip(stored.parts, stored[:, rows].merged(spread).parts, strict=True):
            part[:, rows] = new

    def _with_rows_for(self, present: Tensor, groups: int, dtype: torch.dtype) -> TopSamples:
        """Returns the rankings by target after adding empty rows for new targets."""
        new = [int(target) for target in present if int(target) not in self._rows]
        for target in new:
            self._rows[target] = len(self._rows)
        if self._by_target is None or new:
            empty = TopSamples.empty((groups, len(new), self.k), dtype)
            self._by_target = empty if self._by_target is None else self._by_target.joined(empty, 1)
        return self._by_target

    def of(self, target: int | None) -> TopSamples:
        """Returns the ranking for a target, or over all samples if ``target`` is None.

        It has shape ``(K, k)``, where ``K`` is the number of groups and ``k`` is the number of samples per group.

        Raises:
            KeyError: If no samples with this target have been added.
        """
        if target is not None and self._by_target is not None:
            return self._by_target[:, self._rows[target]]
        if self._all is None or target is not None:
            raise KeyError(target)
        return self._all


__all__ = ["NO_SAMPLE", "Ranking", "TopSamples"]
