"""Layouts: conversion of tensors to the form ``(N, …)``, with one row per sample, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """The dimension of a tensor that holds the samples, alone or together with windows, heads or views.

    A dimension of size ``N · W`` is split in two: the samples come first, and ``W`` remains in place. ``W = 1`` is
    dropped.

    Attributes:
        dim: The dimension.
        count: Number of samples ``N``.
        parts: ``W``, the number of slices of the dimension that belong to one sample.
        order: Indices that sort the slices by sample, ``(N · W,)``; None if they are already sorted.
    """

    dim: int
    count: int
    parts: int = 1
    order: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the tensor already has the form ``(N, …)``."""
        return self.dim == 0 and self.parts == 1 and self.order is None

    def shape(self, shape: torch.Size) -> torch.Size:
        """The shape in the form ``(N, …)`` of a tensor with this shape."""
        inner = [*shape[: self.dim], *([self.parts] if self.parts > 1 else []), *shape[self.dim + 1 :]]
        return torch.Size((self.count, *inner))

    def channel_dim(self, dim: int, ndim: int) -> int:
        """The channel dimension in the form ``(N, …)``, given that of the tensor with its ``ndim`` dimensions."""
        dim %= ndim
        return dim + 1 if self.parts > 1 or dim < self.dim else dim

    def unfold(self, values: Tensor, lead: int = 0) -> Tensor:
        """Converts values to the form ``(N, …)``; the first ``lead`` dimensions are not changed."""
        if self.is_plain:
            return values
        dim = self.dim + lead
        if self.order is not None:
            values = values.index_select(dim, self.order.to(values.device))
        if self.parts > 1:
            values = values.reshape(*values.shape[:dim], self.count, self.parts, *values.shape[dim + 1 :])
        return values.movedim(dim, lead)

    def fold(self, values: Tensor, lead: int = 0) -> Tensor:
        """The inverse of :meth:`unfold`; a leading dimension of size 1, for all samples, is expanded."""
        if self.is_plain:
            return values
        dim = self.dim + lead
        if values.shape[lead] != self.count:
            values = values.expand(*values.shape[:lead], self.count, *values.shape[lead + 1 :])
        values = values.movedim(lead, dim)
        if self.parts > 1:
            values = values.flatten(dim, dim + 1)
        return values if self.order is None else values.index_select(dim, self.order.argsort().to(values.device))


def layout_of(labels: Tensor, count: int) -> Layout | None:
    """The layout of a tensor, given the sample of each entry.

    Args:
        labels: The sample of each entry; -1 if unknown, because no relevance arrives there.
        count: Number of samples.

    Returns:
        The layout; None if no dimension holds the samples in equal parts.
    """
    for dim in range(labels.ndim):
        size = labels.shape[dim]
        if size % count:
            continue
        slices = labels.movedim(dim, 0).reshape(size, -1)
        known = slices.amax(1)
        # All known entries of a slice belong to one sample.
        if bool(((slices != known[:, None]) & (slices >= 0)).any()):
            continue
        complete = _completed(known, count)
        if complete is not None:
            order = torch.argsort(complete, stable=True)
            is_sorted = torch.equal(order, torch.arange(size, device=order.device))
            return Layout(dim, count, size // count, None if is_sorted else order)
    return None


def _completed(labels: Tensor, count: int) -> Tensor | None:
    """Fills in the unknown labels of slices by the pattern that fits the known labels."""
    size = len(labels)
    parts = size // count
    if bool((labels >= 0).all()):
        is_even = torch.bincount(labels, minlength=count).tolist() == [parts] * count
        return labels if is_even else None
    position = torch.arange(size, device=labels.device)
    for inner in [inner for inner in range(parts, 0, -1) if parts % inner == 0]:
        pattern = (position // inner) % count
        if bool(((labels == pattern) | (labels < 0)).all()):
            return pattern
    return None


__all__ = ["Layout", "layout_of"]
