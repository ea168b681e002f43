"""Tensors that autograd saves for routes, such as indices and masks, in models that recompute them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def saved_in_place() -> AbstractContextManager[Any]:
    """Context in which autograd keeps the tensors that it saves, in spite of hooks of the model.

    ``torch.utils.checkpoint`` does not keep them, and computes them again by a run of its function. This run is outside
    of the forward pass that a composite or a recording follows, and does not save the same tensors.
    """
    return nullcontext() if _top_hooks(True) is None else torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked)


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpacked(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # as autograd raises without hooks
        raise RuntimeError("a tensor saved by autograd has been modified by an inplace operation")
    return tensor


__all__ = ["saved_in_place"]
