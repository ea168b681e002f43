"""Layouts bring any tensor into the form (N, …) and back, whatever its dimensions are."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nrm_plugin.recording.sample_layout import Layout, layouts_of


@st.composite
def folded(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A tensor ``(N, …)``, the same in another layout, and N: samples moved, joined with a part, permuted."""
    count = draw(st.integers(2, 4))
    inner = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    plain = torch.arange(count * torch.Size(inner).numel()).reshape(count, *inner) + 1
    at = draw(st.integers(0, len(inner)))
    other = plain.movedim(0, at)
    if at < len(inner) and draw(st.booleans()):
        swap = draw(st.booleans())
        other = other.transpose(at, at + 1).flatten(at, at + 1) if swap else other.flatten(at, at + 1)
    return plain, other, count


@given(folded(), st.integers(0, 2**32 - 1))
def test_labels_determine_the_layout(case: tuple[Tensor, Tensor, int], seed: int) -> None:
    plain, other, count = case
    size = plain[0].numel()
    labels = (other - 1) // size
    (layout,) = layouts_of(labels, count)
    unfolded = layout.unfold(other)
    assert unfolded.shape == layout.shape(other.shape)
    assert len(unfolded) == count
    # Each row holds the entries of one sample, in order.
    assert torch.equal((unfolded.reshape(count, -1) - 1) // size, torch.arange(count)[:, None].expand(count, size))
    assert torch.equal(layout.fold(unfolded), other)
    assert torch.equal(layout.fold(layout.unfold(other[None], 1), 1)[0], other)
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.rand(labels.shape, generator=draw) < 0.3
    for known in layouts_of(labels.masked_fill(hidden, -1), count):  # known entries are in the right row in each
        placed = known.unfold(labels.masked_fill(hidden, -1))
        rows = torch.arange(count).reshape(-1, *(1,) * (placed.ndim - 1))
        assert bool(((placed == rows) | (placed < 0)).all())


def test_rows_in_another_order_are_sorted_by_sample() -> None:
    rows = torch.tensor([2, 0, 1, 1, 0, 2])
    (layout,) = layouts_of(rows[:, None].expand(6, 5), 3)
    assert layout.unfold(rows[:, None]).flatten(1).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert torch.equal(layout.fold(layout.unfold(rows)), rows)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 2), st.integers(2, 3))
def test_samples_with_different_numbers_of_slices_are_padded(slices: list[int], dim: int, width: int) -> None:
    assume(len(set(slices)) > 1 and len({slices.count(sample) for sample in range(3)}) > 1)  # uneven
    samples = torch.tensor(slices)
    values = torch.arange(1, len(slices) * width * width + 1).reshape(-1, width, width).movedim(0, dim)
    labels = samples.reshape(-1, 1, 1).expand(-1, width, width).movedim(0, dim)
    assert bool(layouts_of(labels, 3)) == (set(slices) == {0, 1, 2})  # samples that lack slices may just be unknown
    (layout,) = layouts_of(labels, 3, is_last=True)
    assert not layout.is_assumed
    unfolded = layout.unfold(values)
    assert unfolded.shape == layout.shape(values.shape)
    for sample in range(3):
        own = values.index_select(dim, (samples == sample).nonzero().flatten())
        placed = unfolded[sample].unsqueeze(dim) if layout.parts == 1 else unfolded[sample]
        assert torch.equal(placed.narrow(dim, 0, own.shape[dim]), own)
        assert not placed.narrow(dim, own.shape[dim], layout.parts - own.shape[dim]).any()
    assert torch.equal(layout.fold(unfolded), values)
    assert torch.equal(layout.fold(layout.unfold(values[None], 1), 1)[0], values)
    assert layouts_of(labels.masked_fill(samples.reshape(-1, 1, 1).movedim(0, dim) == slices[0], -1), 3) != [layout]


def test_entries_of_one_sample_are_divided_along_the_first_dimension() -> None:
    (layout,) = layouts_of(torch.full((1, 4), 2), 4, is_last=True)
    assert layout.unfold(torch.ones(1, 4)).sum(1).tolist() == [0, 0, 4, 0]


@given(st.permutations(range(3)), st.integers(1, 2), st.integers(0, 2), st.data())
def test_unknown_slices_are_assigned_to_the_samples_that_lack_some(
    order: list[int], parts: int, dim: int, data: st.DataObject
) -> None:
    samples = torch.tensor(order).repeat(parts)
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3 * parts, max_size=3 * parts)))
    assume(0 < int(known.sum()) < len(known))
    labels = torch.where(known, samples, -1).reshape(-1, 1, 1).expand(-1, 3, 3).movedim(0, dim)
    values = (labels >= 0) * torch.rand(labels.shape)
    layout = layouts_of(labels, 3, is_last=True)[0]
    assert layout.is_assumed
    rows = torch.arange(3).reshape(-1, *(1,) * (len(layout.shape(labels.shape)) - 1))
    placed = layout.unfold(labels)
    assert bool(((placed == rows) | (placed < 0)).all())  # entries of known samples are in their rows
    assert torch.equal(layout.fold(layout.unfold(values)), values)


def test_mixed_samples_have_no_layout() -> None:
    assert layouts_of(torch.tensor([[0, 1], [1, 0]]), 2) == []


def test_few_known_entries_fit_several_dimensions() -> None:
    labels = torch.full((6, 4), -1)  # (N · T, C) of two samples with three steps each
    labels[0, 0] = labels[1, 2] = 0
    labels[4, 1] = 1
    assert {layout.dim for layout in layouts_of(labels, 2)} == {0, 1}
    labels[5, 2] = 1
    assert [layout.dim for layout in layouts_of(labels, 2)] == [0]


def test_the_channels_are_followed() -> None:
    values = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (N, T, H, C)
    cases = [
        (values.transpose(0, 1), Layout(1, 2), 3),  # (T, N, H, C)
        (values.transpose(0, 1).flatten(1, 2), Layout(1, 2, 4), 2),  # (T, N · H, C)
        (values.movedim(3, 0), Layout(1, 2), 0),  # (C, N, T, H)
    ]
    for other, layout, channels in cases:
        unfolded = layout.unfold(other)
        dim = layout.channel_dim(channels, other.ndim)
        assert unfolded.shape[dim] == 5
        assert layout.channel_dim(channels - other.ndim, other.ndim) == dim


def test_a_first_dimension_of_size_1_is_dropped_if_all_samples_are_concatenated() -> None:
    values = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (N, T, H, C)
    cases = [
        (values.reshape(1, 6, 4, 5), 3, 3, values),  # (1, N · T, H, C)
        (values.reshape(1, 6, 4, 5).transpose(1, 2), 3, 3, values.transpose(1, 2)),  # (1, H, N · T, C)
        (values.reshape(1, 24, 5), 1, 1, values.reshape(2, 12, 5)),  # as many groups as samples, of T · H channels
        (values.reshape(1, 120), 1, 1, values.reshape(2, 60)),
    ]
    for other, channels, expected_channels, expected in cases:
        (layout,) = layouts_of(other // 60, 2)
        assert torch.equal(layout.unfold(other), expected)
        assert layout.shape(other.shape) == expected.shape
        assert torch.equal(layout.fold(expected), other)
        assert torch.equal(layout.fold(layout.unfold(other[None], 1), 1)[0], other)
        assert layout.channel_dim(channels, other.ndim) == expected_channels
        inner = expected.shape[1:]
        assert not layout.has_views(channels)
        assert layout.inner_of_views(inner, channels) == inner
    (windows,) = layouts_of(values.reshape(6, 4, 5) // 60, 2)
    assert windows.has_views(2)
    assert windows.inner_of_views(torch.Size((3, 4, 5)), 2) == (4, 5)
    assert not windows.has_views(0)  # (N · C, …): the parts are channels


def test_a_tensor_without_dimensions_belongs_to_one_sample() -> None:
    (layout,) = layouts_of(torch.tensor(1), 3)
    assert layout.shape(torch.Size(())) == (3,)
    assert layout.unfold(torch.tensor(5.0)).tolist() == [0, 5, 0]
    assert layout.unfold(torch.tensor([5.0, 7.0]), 1).tolist() == [[0, 5, 0], [0, 7, 0]]
    assert float(layout.fold(torch.tensor([1.0, 2.0, 3.0]))) == 2
    assert layout.fold(torch.tensor([[1.0, 2.0, 3.0]] * 2), 1).tolist() == [2, 2]
    assert layouts_of(torch.tensor(-1), 3) == []
