"""Saved-tensor hooks of autograd: indices and masks of routing operations are kept even under checkpointing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def saved_in_place() -> AbstractContextManager[Any]:
    """Context manager in which autograd saves tensors directly, ignoring outer saved-tensor hooks.

    The hooks of ``torch.utils.checkpoint`` discard these tensors and recompute them by running the function again.
    Composites and recordings do not observe this second run, which saves different tensors.
    """
    return nullcontext() if _top_hooks(True) is None else torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked)


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpacked(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # autograd raises this error if there are no hooks
        raise RuntimeError("a tensor saved by autograd has been modified by an inplace operation")
    return tensor


__all__ = ["saved_in_place"]
