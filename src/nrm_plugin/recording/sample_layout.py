"""Layouts: which dimension of a tensor indexes the samples, and conversion to the shape ``(N, …)`` and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PURE = 1e-3
"""Maximum fraction of a slice's mass that rounding can assign to other samples."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Layout of a tensor: which dimension indexes the samples, alone or together with windows, heads or views.

    A dimension of size ``N · W`` is split in two: the samples become the first dimension, and ``W`` remains in place
    unless it is 1. If samples have different numbers of slices, as in a packed sequence, ``W`` is the largest of these
    numbers, and the form ``(N, …)`` is padded with zeros.

    A first dimension of size 1 is dropped if the samples share another dimension with ``W > 1`` slices: a tensor of
    shape ``(1, N · W, …)`` has the form ``(N, W, …)``. Such tensors concatenate all samples, for example for attention
    over one long sequence, or for a grouped convolution with one group per sample. With ``N = 1``, their rows are the
    samples.

    Attributes:
        dim: The dimension that indexes the samples, or None if the tensor is a single sample, to which a first
            dimension of size 1 is added.
        count: Number of samples ``N``.
        parts: ``W``, the number of slices per sample along the dimension.
        order: Indices that sort the slices by sample, of shape ``(N · W,)``, or None if they are already sorted.
        slices: Size of the dimension if the form is padded; ``order`` equals ``slices`` at the padding.
        drops_first: Whether the first dimension, of size 1, is dropped.
        is_scalar: Whether the tensor is a single number without dimensions.
        is_assumed: Whether the sample of some slices is unknown because no relevance arrives there.
    """

    dim: int | None
    count: int
    parts: int = 1
    order: Tensor | None = None
    slices: int | None = None
    drops_first: bool = False
    is_scalar: bool = False
    is_assumed: bool = False

    @classmethod
    def along(
        cls,
        dim: int,
        shape: torch.Size,
        count: int,
        parts: int,
        order: Tensor | None = None,
        slices: int | None = None,
        is_assumed: bool = False,
    ) -> Layout:
        """Returns the layout of a tensor of the given shape with samples along dimension ``dim``.

        The other arguments are the attributes of the same names.
        """
        drops_first = dim > 0 and parts > 1 and shape[0] == 1
        return cls(dim, count, parts, order, slices, drops_first, is_assumed=is_assumed)

    @property
    def is_plain(self) -> bool:
        """True if the tensor already has the form ``(N, …)``."""
        return self.dim == 0 and self.parts == 1 and self.order is None

    def shape(self, shape: torch.Size) -> torch.Size:
        """Converts the shape of a tensor to the form ``(N, …)``."""
        if self.is_plain:
            return shape
        if self.dim is None:
            return torch.Size((1, *shape))
        inner = [*shape[self.drops_first : self.dim], *([self.parts] if self.parts > 1 else []), *shape[self.dim + 1 :]]
        return torch.Size((self.count, *inner))

    def channel_dim(self, dim: int, ndim: int) -> int:
        """Converts the channel dimension of a tensor with ``ndim`` dimensions to the one of its form ``(N, …)``."""
        if self.is_plain:
            return dim
        dim %= max(ndim, 1)
        if (dim == self.dim and self.parts == 1) or (dim == 0 and self.drops_first):
            return -1  # the dimension indexes samples or is dropped
        return dim + 1 - self.drops_first if self.dim is None or self.parts > 1 or dim < self.dim else dim

    def has_views(self, channel_dim: int) -> bool:
        """Returns True if the parts are views, windows or heads, to all of which a neuron index applies.

        Otherwise, they are an ordinary dimension: channels, if ``channel_dim`` is the dimension of the layout, or
        tokens of concatenated samples.
        """
        return self.dim is not None and self.parts > 1 and not self.drops_first and channel_dim != self.dim

    def inner_of_views(self, inner: torch.Size, channel_dim: int) -> torch.Size:
        """Removes the dimension of the views, if any, from ``inner``, the shape of a sample."""
        if self.dim is None or not self.has_views(channel_dim):
            return inner
        return torch.Size([*inner[: self.dim], *inner[self.dim + 1 :]])

    def in_all_views(self, values: Tensor, channel_dim: int) -> Tensor:
        """Repeats values for every view if the parts are views."""
        if self.dim is None or not self.has_views(channel_dim):
            return values.clone()
        repeated = values.unsqueeze(self.dim)
        return repeated.expand(*values.shape[: self.dim], self.parts, *values.shape[self.dim :]).clone()

    def unfold(self, values: Tensor, lead: int = 0) -> Tensor:
        """Converts values to the form ``(N, …)``, keeping the first ``lead`` dimensions."""
        if self.is_plain:
            return values
        if self.dim is None:
            return values.unsqueeze(lead)
        dim = self.dim + lead
        values = values.unsqueeze(dim) if self.is_scalar else values
        if self.slices is not None:
            zeros = values.new_zeros(*values.shape[:dim], 1, *values.shape[dim + 1 :])
            values = torch.cat([values, zeros], dim)
        if self.order is not None:
            values = values.index_select(dim, self.order.to(values.device))
        if self.parts > 1:
            values = values.reshape(*values.shape[:dim], self.count, self.parts, *values.shape[dim + 1 :])
        values = values.movedim(dim, lead)
        return values.squeeze(lead + 1) if self.drops_first else values

    def fold(self, values: Tensor, lead: int = 0) -> Tensor:
        """Inverts :meth:`unfold`. A sample dimension of size 1 is expanded to all samples."""
        if self.is_plain:
            return values
        if self.dim is None:
            return values.squeeze(lead)
        dim = self.dim + lead
        values = values.unsqueeze(lead + 1) if self.drops_first else values
        if values.shape[lead] != self.count:
            values = values.expand(*values.shape[:lead], self.count, *values.shape[lead + 1 :])
        values = values.movedim(lead, dim)
        if self.parts > 1:
            values = values.flatten(dim, dim + 1)
        if self.order is None:
            return values
        values = values.index_select(dim, self.order.argsort()[: self.slices].to(values.device))
        return values.squeeze(dim) if self.is_scalar else values


def layouts_of(labels: Tensor, count: int, mass: Tensor | None = None, is_last: bool = False) -> list[Layout]:
    """Returns the layouts of a tensor that are consistent with the known samples of its elements.

    Args:
        labels: The sample of each element, or -1 if it is unknown because no relevance arrives there.
        count: Number of samples.
        mass: Weight of each element. By default, all weights are equal. Elements with negligible weight are ignored.
        is_last: Whether no further information is available. Samples without known elements are then assigned the
            unknown slices of a dimension, or no slices if all slices are known.

    Returns:
        The layouts, in decreasing order of the number of known slices. The list is empty if no dimension can be divided
        among the samples and has several elements if too few elements of the tensor are known. Samples can have
        different numbers of slices only if no dimension can be divided equally and the sample of each slice is known.
    """
    layouts = _fitting(labels, count, None)
    if not layouts and mass is not None:
        layouts = _fitting(labels, count, mass)
    if not layouts:
        layouts = _padded(labels, count)
    if not layouts and is_last:
        layouts = _assumed(labels, count) or _padded(labels, count, some_lack=True)
    return layouts


def _assumed(labels: Tensor, count: int) -> list[Layout]:
    """Returns a layout in which the unknown slices of a dimension belong to the samples that lack slices."""
    for dim, size in enumerate(labels.shape):
        known = _samples_of_slices(labels, dim, count, None) if size and size % count == 0 else None
        if known is None or bool((known >= 0).all()):
            continue
        missing = size // count - torch.bincount(known[known >= 0], minlength=count)
        if bool((missing < 0).any()):
            continue
        complete = known.clone()
        complete[known < 0] = torch.arange(count, device=known.device).repeat_interleave(missing).to(known.dtype)
        order = torch.argsort(complete, stable=True)
        return [Layout.along(dim, labels.shape, count, size // count, order, is_assumed=True)]
    return []


def _padded(labels: Tensor, count: int, some_lack: bool = False) -> list[Layout]:
    """Returns a layout with different numbers of slices per sample, if the sample of each slice is known.

    If all known elements belong to one sample, every dimension is consistent with them, and the elements of other
    samples may merely be unknown. Samples without slices are therefore accepted only if ``some_lack`` is True; the
    first consistent dimension is then used.
    """
    if not labels.ndim:
        return [replace(layout, is_scalar=True) for layout in _padded(labels.reshape(1), count, some_lack=True)]
    for dim, size in enumerate(labels.shape):
        known = _samples_of_slices(labels, dim, count, None) if size else None
        if known is None or bool((known < 0).any()):
            continue
        numbers = torch.bincount(known, minlength=count)
        if not some_lack and bool((numbers == 0).any()):
            continue
        parts = int(numbers.max())
        order = torch.full((count, parts), size, device=known.device)
        order[torch.arange(parts, device=known.device) < numbers[:, None]] = torch.argsort(known, stable=True)
        return [Layout.along(dim, labels.shape, count, parts, order.flatten(), size)]
    return []


def _fitting(labels: Tensor, count: int, mass: Tensor | None) -> list[Layout]:
    candidates: list[tuple[float, Layout]] = []
    # If two dimensions can both be divided among the samples, at most 1/N of the elements are known.
    is_sparse = int((labels >= 0).sum()) * count <= labels.numel()
    for dim in range(labels.ndim):
        size = labels.shape[dim]
        known = _samples_of_slices(labels, dim, count, mass) if size % count == 0 else None
        if known is None:
            continue
        share = float((known >= 0).double().mean())
        for complete in _completed(known, count):
            order = torch.argsort(complete, stable=True)
            is_sorted = torch.equal(order, torch.arange(size, device=order.device))
            layout = Layout.along(
                dim, labels.shape, count, size // count, None if is_sorted else order, is_assumed=share < 1
            )
            candidates.append((share, layout))
        if share == 1 and not is_sparse:
            break
    return [layout for _, layout in sorted(candidates, key=lambda pair: -pair[0])]


def doubled(shape: torch.Size, shape_of_two: torch.Size) -> Layout | None:
    """Returns the layout of a tensor of one sample, derived from its shape for two samples.

    Returns None unless exactly one dimension doubles.
    """
    if len(shape) != len(shape_of_two):
        return None
    changed = [dim for dim, (one, two) in enumerate(zip(shape, shape_of_two, strict=True)) if one != two]
    if len(changed) != 1 or shape_of_two[changed[0]] != 2 * shape[changed[0]]:
        return None
    return Layout.along(changed[0], shape, 1, shape[changed[0]])


def unreached(shape: torch.Size, count: int) -> Layout | None:
    """Returns a layout of a tensor without relevance, along a dimension whose size is a multiple of the batch size."""
    for parts in (1, None):
        for dim, size in enumerate(shape):
            if size == count * (parts or size // count) and size:
                return Layout.along(dim, shape, count, size // count, is_assumed=True)
    return None


def _samples_of_slices(labels: Tensor, dim: int, count: int, mass: Tensor | None) -> Tensor | None:
    """Returns the sample of each slice along a dimension, or None if a slice contains several samples.

    Slices of unknown samples have the label -1.
    """
    size = labels.shape[dim]
    flat = labels.movedim(dim, 0).reshape(size, -1)
    if mass is None:
        known = flat.amax(1)
        return None if bool(((flat != known[:, None]) & (flat >= 0)).any()) else known
    weights = mass.movedim(dim, 0).reshape(size, -1) * (flat >= 0)
    sums = weights.new_zeros(size, count).scatter_add_(1, flat.clamp(min=0).long(), weights)
    most, known = sums.max(1)
    total = sums.sum(1)
    known = torch.where(most > 0, known, -1)
    return None if bool((total - most > PURE * total).any()) else known


def _completed(labels: Tensor, count: int) -> list[Tensor]:
    """Completes the labels of slices by regular patterns. Returns all completions that match the known labels."""
    size = len(labels)
    parts = size // count
    if bool((labels >= 0).all()):
        is_even = torch.bincount(labels, minlength=count).tolist() == [parts] * count
        return [labels] if is_even else []
    position = torch.arange(size, device=labels.device)
    patterns = [(position // inner) % count for inner in range(parts, 0, -1) if parts % inner == 0]
    return [pattern for pattern in patterns if bool(((labels == pattern) | (labels < 0)).all())]


__all__ = ["Layout", "doubled", "layouts_of", "unreached"]
