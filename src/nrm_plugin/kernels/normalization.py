r"""Normalization of a kernel: each column is multiplied by its gain, and the sink absorbs the remaining deficit.

.. math:: \tilde T_{ij} = g(c_j)\, T_{ij}, \qquad \tilde T_{\mathrm{sink}, j} = 1 - g(c_j)\, c_j

Source: docs/measure.md, "One step".
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from ..errors import brief
from ..model.trace_guards import holds
from .cache_blocks import WHOLE, Block, blocks
from .form import Form

Residual = Literal["redistribute", "sink"]
RESIDUALS: tuple[Residual, ...] = ("redistribute", "sink")


def gain(column_sum: Tensor, limit: float) -> Tensor:
    r"""Returns the gain ``g(c)``, the factor that rescales a column to reduce the fraction absorbed by the sink.

    .. math::
        g(c) = \begin{cases} 1/c & c \ge 1/G \\ 1 + (G-1)\,G\,c & 0 < c < 1/G \\ 1 & c \le 0 \end{cases}

    The gain is continuous and positive and lies between 1 and ``G`` where ``c <= 1``.

    Args:
        column_sum: ``c``, of any shape.
        limit: ``G``, at least 1; with ``math.inf``, the gain is ``1/c`` for every positive ``c``.

    Returns:
        ``g``, with the shape of ``column_sum``.

    Source: docs/measure.md, "One step".
    """
    restored = column_sum.clamp(min=torch.finfo(column_sum.dtype).tiny).reciprocal_()
    if not math.isfinite(limit):
        return restored.masked_fill_(column_sum < least_restored(column_sum.dtype, limit), 1)
    # The gain is the minimum of the two expressions, which is cheaper than a comparison and a selection.
    return torch.minimum(restored, _line(column_sum, limit), out=restored)


def _line(column_sum: Tensor, limit: float) -> Tensor:
    """Returns ``1 + (G - 1) G max(c, 0)``, the gain of columns that are not rescaled to a sum of one."""
    return torch.rsub(column_sum.clamp(min=0), 1, alpha=(1 - limit) * limit)


def least_restored(dtype: torch.dtype, limit: float) -> float:
    """Returns the smallest column sum for which the gain rescales the column to a sum of one."""
    return max(1 / limit, torch.finfo(dtype).tiny)


def deficit(column_sum: Tensor, factor: Tensor, limit: float) -> Tensor:
    """Returns the fraction ``1 - g c`` absorbed by the sink. It is exactly 0 for columns rescaled to a sum of one."""
    if not math.isfinite(limit):
        return (1 - factor * column_sum).mul_(column_sum < least_restored(column_sum.dtype, limit))
    # With the linear gain, the share reaches zero exactly at the smallest column sum that is rescaled to one. Clamping
    # is faster than a comparison.
    return torch.addcmul(column_sum.new_ones(()), column_sum, _line(column_sum, limit), value=-1).clamp_(min=0)


def may_read(tensor: Tensor) -> bool:
    """Returns True if reading the values of a tensor is cheap enough to save work.

    On devices other than the CPU, it would require a synchronization.
    """
    return tensor.device.type == "cpu" and tensor.numel() > 0


@dataclass(frozen=True)
class Scaling:
    """Gain of each column of a kernel and the deficit absorbed by the sink.

    Attributes:
        gain: ``g(c)``, or None if all gains are one.
        deficit: ``1 - g(c) c``, or None if all deficits are zero.
    """

    gain: Tensor | None = None
    deficit: Tensor | None = None


@dataclass(frozen=True)
class Normalization:
    """Normalization of a kernel's columns.

    Attributes:
        residual: With ``"redistribute"``, each column is multiplied by its gain, and the sink absorbs only the
            remaining deficit. With ``"sink"``, the rule is unchanged, and the sink absorbs all relevance that it does
            not propagate.
        gain_limit: Largest gain ``G``, at least 1.
    """

    residual: Residual = "redistribute"
    gain_limit: float = 2.0

    def __post_init__(self) -> None:
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={brief(self.residual)} is unknown; choose one of {RESIDUALS}.")
        is_number = isinstance(self.gain_limit, numbers.Real) and not isinstance(self.gain_limit, bool)
        if not is_number or not self.gain_limit >= 1:
            raise ValueError(
                f"gain_limit={brief(self.gain_limit)} must be a number of at least 1 (math.inf is allowed)."
            )

    def scaling(self, column_sum: Tensor) -> Scaling:
        """Returns the gain and the deficit for column sums ``c``, with the shape of ``c``."""
        if self.residual == "sink":
            return Scaling(deficit=1 - column_sum)
        limit = float(self.gain_limit)
        least = least_restored(column_sum.dtype, limit)
        if may_read(column_sum) and holds("large column sums", lambda: column_sum.amin() >= least):
            return Scaling(column_sum.reciprocal())
        factor = gain(column_sum, limit)
        return Scaling(factor, deficit(column_sum, factor, limit))

    def restores(self, image: Tensor, added: Tensor | float) -> bool:
        """Returns True if all columns with sums ``image / (image + added)`` are rescaled to a sum of one.

        Both arguments must be nonnegative.
        """
        limit = float(self.gain_limit)
        if self.residual == "sink" or not 1 < limit < math.inf or not may_read(image):
            return False
        return holds("restored columns", lambda: torch.sub(image, added, alpha=1 / (limit - 1)).amin() >= 0)

    def scaling_by_blocks(self, column_sum: Tensor) -> Scaling:
        """Computes :meth:`scaling` block by block if the tensor is on the CPU."""
        if column_sum.device.type != "cpu":
            return self.scaling(column_sum)
        factor, share = None, None
        for at in blocks(column_sum):
            if at == WHOLE:
                return self.scaling(column_sum)
            part = self.scaling(column_sum[at])
            if part.gain is not None:
                factor = torch.empty_like(column_sum) if factor is None else factor
                factor[at] = part.gain
            if part.deficit is not None:
                share = torch.zeros_like(column_sum) if share is None else share
                share[at] = part.deficit
        return Scaling(factor, share)


class Columns(ABC):
    """Column sums of a kernel or, if the kernel is normalized, the fraction of each column that the sink absorbs."""

    @abstractmethod
    def joined(self, other: Self) -> Self:
        """Merges the columns of two disjoint groups of branches. Each column is nonzero in at most one group."""

    @abstractmethod
    def sums(self, like: Tensor) -> Tensor:
        """Returns the column sums ``c`` of the kernel, with the shape of ``like``."""


@dataclass(frozen=True)
class ColumnSums(Columns):
    """Column sums of a kernel that is not normalized.

    Attributes:
        values: ``c``, of shape ``(N, *out)``.
    """

    values: Tensor

    def joined(self, other: Self) -> Self:
        return type(self)(self.values + other.values)

    def sums(self, like: Tensor) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Deficit(Columns):
    """Deficit of each column of a normalized kernel: the fraction of its relevance that the sink absorbs.

    Attributes:
        share: Fraction of each column absorbed by the sink, of shape ``(N, *out)``, or None if all are zero.
    """

    share: Tensor | None

    def joined(self, other: Self) -> Self:
        if self.share is None or other.share is None:
            return type(self)(None)
        return type(self)(self.share + other.share - 1)  # each group has a deficit of 1 in the columns of the other

    def sums(self, like: Tensor) -> Tensor:
        return torch.ones_like(like) if self.share is None else 1 - self.share


class ColumnWriter:
    """Accumulates the column sums of a kernel block by block and computes the gain of each block.

    Args:
        form: The form of the output.
        normalization: The normalization of the kernel, or None to leave the kernel unnormalized.
    """

    def __init__(self, form: Form, normalization: Normalization | None) -> None:
        self._form, self._normalization = form, normalization
        self._values: Tensor | None = None

    def gain(self, at: Block, column_sum: Tensor | None) -> Tensor | None:
        """Stores the columns of one block and returns their gains ``g(c)``, or None if all gains are one.

        Args:
            at: The block of columns.
            column_sum: ``c`` in the block, or None if all sums are one.
        """
        if self._normalization is None:
            self._write(at, 1.0 if column_sum is None else column_sum)
            return None
        if column_sum is None:
            return None
        scaling = self._normalization.scaling(column_sum)
        if scaling.deficit is not None:
            self._write(at, scaling.deficit)
        return scaling.gain

    def _write(self, at: Block, values: Tensor | float) -> None:
        if isinstance(values, Tensor) and values.shape == self._form.shape:
            self._values = values
            return
        if self._values is None:
            self._values = torch.zeros_like(self._form.tensor)
        self._values[at] = values

    def columns(self) -> ColumnSums | Deficit:
        """Returns the accumulated columns of all blocks."""
        if self._normalization is not None:
            return Deficit(self._values)
        return ColumnSums(torch.zeros_like(self._form.tensor) if self._values is None else self._values)
