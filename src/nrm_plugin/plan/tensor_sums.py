"""Detection of changed tensor values, including writes through ``.data``, which leave version counters unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SMALL = 1 << 10
"""Maximum number of elements of a tensor that is compared with a stored copy."""
_MIDDLE = 1 << 13
"""Maximum number of elements of a tensor that is concatenated with others, for sums over several tensors."""
_ROW = 1 << 12
"""Number of elements in each weighted sum."""
_AT_ONCE = 1 << 22
"""Number of half-precision elements that are converted to float32 at once."""

_DTYPES = (torch.float32, torch.float64)
"""Dtypes that are summed without conversion."""

_Groups = dict[Any, tuple[list[Tensor], list[Tensor]]]
"""Tensors of medium and of large size, keyed by device and dtype."""


class TensorSums:
    """Weighted sums of all elements of tensors, compared later to detect changes in one pass over the memory.

    The weights are random and of both signs. Exchanging elements thus also changes a sum. Small tensors, integer
    tensors, and tensors whose sums are not finite are compared element by element.

    Args:
        tensors: Parameters and buffers.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._weights: dict[Any, Tensor] = {}
        self._divided: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        stored: dict[Any, list[Tensor]] = {}
        large: list[Tensor] = []
        for flat in [flat for flat in map(_flat, tensors) if flat is not None and flat.numel()]:
            if flat.numel() <= _SMALL or not flat.is_floating_point():
                stored.setdefault((flat.device, flat.dtype), []).append(flat)
            else:
                large.append(flat)
        self._summed = _grouped(large)
        self._sums = self._of_rows(self._summed)
        # An infinite element makes its sum infinite or nan, so that finding infinite elements takes no further pass.
        if not all(bool(sums.isfinite().all()) for sums in self._sums.values()):
            is_finite = [self._is_finite(flat) for flat in large]
            for flat in (flat for flat, finite in zip(large, is_finite, strict=True) if not finite):
                stored.setdefault((flat.device, flat.dtype), []).append(flat)
            self._summed = _grouped([flat for flat, finite in zip(large, is_finite, strict=True) if finite])
            self._sums = self._of_rows(self._summed)
        self._stored = {key: (views, _bits(torch.cat(views))) for key, views in stored.items()}
        # Dividing a tensor into rows takes longer than summing a small one.
        kept = [flat for _, large in self._summed.values() for flat in large if flat.dtype in _DTYPES]
        self._divided = {id(flat): self._divided_into_rows(flat) for flat in kept}

    def have_changed(self) -> bool:
        """Returns True if the values of any tensor have changed."""
        if any(not torch.equal(_bits(torch.cat(views)), values) for views, values in self._stored.values()):
            return True
        return any(not torch.equal(sums, self._sums[key]) for key, sums in self._of_rows(self._summed).items())

    def _of_rows(self, summed: _Groups) -> dict[Any, Tensor]:
        """Returns the weighted sums of tensors, keyed by device and dtype."""
        sums = {}
        with torch.inference_mode(False), torch.no_grad():
            for key, (middle, large) in summed.items():
                together = [torch.cat(middle)] if middle else []
                with torch.autocast(key[0].type, enabled=False):
                    sums[key] = torch.cat([self._of_tensor(flat) for flat in (*together, *large)])
        return sums

    def _is_finite(self, flat: Tensor) -> bool:
        """Returns True if all weighted sums of a tensor are finite."""
        (sums,) = self._of_rows(_grouped([flat])).values()
        return bool(sums.isfinite().all())

    def _of_tensor(self, flat: Tensor) -> Tensor:
        if flat.dtype not in _DTYPES:
            parts = [part.to(torch.float32) for part in torch.split(flat, _AT_ONCE)]
            return torch.cat([self._of_tensor(part) for part in parts])
        rows, rest, weights = self._divided.get(id(flat)) or self._divided_into_rows(flat)
        return torch.cat([rows.mv(self._weights_for(flat)), rest.dot(weights).view(1)])

    def _divided_into_rows(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rows of a tensor, the remaining elements, and the weights of these elements."""
        whole = flat.numel() // _ROW * _ROW
        return flat[:whole].view(-1, _ROW), flat[whole:], self._weights_for(flat)[: flat.numel() - whole]

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
    """Returns the elements of a dense tensor as a vector in memory order, or None for any other tensor."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    tensor = tensor.detach()
    if type(tensor) is not Tensor or torch._debug_has_internal_overlap(tensor) != 0:  # expanded
        return None
    if tensor.is_contiguous():
        return tensor if tensor.ndim == 1 else tensor.view(-1)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


def _bits(values: Tensor) -> Tensor:
    """Returns the bytes of a tensor, for comparisons in which NaN equals itself."""
    return values.view(torch.uint8)


__all__ = ["TensorSums"]
