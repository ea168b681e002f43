"""Detection of changed tensor values, even if a write through ``.data`` leaves no other trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SMALL = 1 << 10
"""Maximum number of entries in a tensor that is compared entry by entry with a stored copy."""
_MIDDLE = 1 << 16
"""Maximum number of entries in a tensor that is concatenated with others, for sums over several tensors."""
_ROW = 1 << 12
"""Number of entries in a weighted sum."""
_AT_ONCE = 1 << 22
"""Number of short-format entries converted at once."""

_Groups = dict[Any, tuple[list[Tensor], list[Tensor]]]
"""Tensors of middle size and larger ones, by device and dtype."""


class TensorSums:
    """Weighted sums of all entries of tensors, which detect changes in one pass over the memory.

    The weights are random and of both signs, so that exchanging entries also changes a sum. Small tensors, integer
    tensors, and tensors with infinite sums are compared entry by entry.

    Args:
        tensors: Parameters and buffers.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._weights: dict[Any, Tensor] = {}
        stored: dict[Any, list[Tensor]] = {}
        large: list[Tensor] = []
        for flat in [flat for flat in map(_flat, tensors) if flat is not None and flat.numel()]:
            if flat.numel() <= _SMALL or not flat.is_floating_point():
                stored.setdefault((flat.device, flat.dtype), []).append(flat)
            else:
                large.append(flat)
        self._summed = _grouped(large)
        self._sums = self._of_rows(self._summed)
        # An infinite entry makes its sum infinite or nan, so that the entries need no pass of their own.
        if not all(bool(sums.isfinite().all()) for sums in self._sums.values()):
            is_finite = [self._is_finite(flat) for flat in large]
            for flat in (flat for flat, finite in zip(large, is_finite, strict=True) if not finite):
                stored.setdefault((flat.device, flat.dtype), []).append(flat)
            self._summed = _grouped([flat for flat, finite in zip(large, is_finite, strict=True) if finite])
            self._sums = self._of_rows(self._summed)
        self._stored = {key: (views, _bits(torch.cat(views))) for key, views in stored.items()}

    def have_changed(self) -> bool:
        """Returns whether the values of a tensor have changed."""
        if any(not torch.equal(_bits(torch.cat(views)), values) for views, values in self._stored.values()):
            return True
        return any(not torch.equal(sums, self._sums[key]) for key, sums in self._of_rows(self._summed).items())

    def _of_rows(self, summed: _Groups) -> dict[Any, Tensor]:
        """Returns the sums of tensors, by device and dtype."""
        sums = {}
        with torch.inference_mode(False), torch.no_grad():
            for key, (middle, large) in summed.items():
                together = [torch.cat(middle)] if middle else []
                with torch.autocast(key[0].type, enabled=False):
                    sums[key] = torch.cat([self._of_tensor(flat) for flat in (*together, *large)])
        return sums

    def _is_finite(self, flat: Tensor) -> bool:
        """Returns whether all sums of one tensor are finite."""
        (sums,) = self._of_rows(_grouped([flat])).values()
        return bool(sums.isfinite().all())

    def _of_tensor(self, flat: Tensor) -> Tensor:
        if flat.dtype not in (torch.float32, torch.float64):
            parts = [part.to(torch.float32) for part in torch.split(flat, _AT_ONCE)]
            return torch.cat([self._of_tensor(part) for part in parts])
        weights = self._weights_for(flat)
        whole = flat.numel() // _ROW * _ROW
        rest = flat[whole:] @ weights[: flat.numel() - whole]
        return torch.cat([flat[:whole].view(-1, _ROW) @ weights, rest.view(1)])

    def _weights_for(self, flat: Tensor) -> Tensor:
        key = (flat.device, flat.dtype)
        if key not in self._weights:
            draw = torch.Generator().manual_seed(0)
            values = torch.rand(_ROW, generator=draw, dtype=torch.float64) + 0.5
            signs = torch.randint(2, (_ROW,), generator=draw) * 2 - 1
            self._weights[key] = (values * signs).to(flat)
        return self._weights[key]


def _grouped(tensors: list[Tensor]) -> _Groups:
    groups: _Groups = {}
    for flat in tensors:
        groups.setdefault((flat.device, flat.dtype), ([], []))[flat.numel() > _MIDDLE].append(flat)
    return groups


def _flat(tensor: Tensor) -> Tensor | None:
    """Returns the memory of a dense tensor as a vector, or None for any other tensor."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or type(tensor.data) is not Tensor:
        return None
    tensor = tensor.detach()
    if torch._debug_has_internal_overlap(tensor) != 0:  # expanded
        return None
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


def _bits(values: Tensor) -> Tensor:
    """Returns the bytes of values, so that nan equals itself."""
    return values.view(torch.uint8)


__all__ = ["TensorSums"]
