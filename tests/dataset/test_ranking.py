"""Rankings equal Python's sort of all samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrm_plugin.dataset.ranking import NO_SAMPLE, Ranking


def sorted_by_hand(rows, k):
    """``[(value, sample, target, position)]`` of one group: by decreasing value, then by sample."""
    return sorted(rows, key=lambda row: (-row[0], row[1]))[:k]


def listed(places, group):
    parts = zip(*(part[group].tolist() for part in places.parts), strict=True)
    return [row for row in parts if row[1] != NO_SAMPLE]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    k=st.integers(1, 6),
    classes=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_a_ranking_does_not_depend_on_batches_or_their_order(sizes, k, classes, seed):
    draw = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    values = torch.randint(-3, 4, (count, 3), generator=draw).double()  # many ties
    samples = torch.randperm(count, generator=draw) * 7
    targets = torch.randint(0, classes, (count,), generator=draw) * 5
    positions = torch.randint(0, 9, (count, 3), generator=draw)
    ranking = Ranking(k, by_target=True)
    for rows in torch.arange(count).split(sizes):
        ranking.add(values[rows], samples[rows], targets[rows], positions[rows])
    every = [
        [(float(values[n, g]), int(samples[n]), int(targets[n]), int(positions[n, g])) for n in range(count)]
        for g in range(3)
    ]
    if not count:
        with pytest.raises(KeyError):
            ranking.of(None)
        return
    assert ranking.targets == sorted(set(targets.tolist()))
    for group, rows in enumerate(every):
        assert listed(ranking.of(None), group) == sorted_by_hand(rows, k)
        for target in ranking.targets:
            mine = [row for row in rows if row[2] == target]
            assert listed(ranking.of(target), group) == sorted_by_hand(mine, k)
    with pytest.raises(KeyError):
        ranking.of(99)


def test_memory_does_not_grow_with_the_samples():
    ranking = Ranking(3, by_target=True)
    for start in range(0, 1000, 10):
        ranking.add(torch.randn(10, 4), torch.arange(start, start + 10), torch.arange(10) % 2)
    assert ranking.of(None).values.shape == (4, 3)
    assert [part.shape for part in ranking._by_target.parts] == [(4, 2, 3)] * 4
