"""Canonizers for batch-norm fusion and the interception of functions."""

from __future__ import annotations

from typing import Any

from torch import nn
from zennit.canonizers import Canonizer

from .errors import NRMError
from .functional import Interception


class FuseBatchNorm(Canonizer):
    """Canonizer that fuses batch normalization into adjacent layers without modifying the model.

    Use it in a :class:`~nrm_plugin.Normalized` composite, or in a composite that is passed to
    :class:`~nrm_plugin.RelevanceMeasure`, which normalizes the composite. Adjacent layers are detected during the
    forward pass. Neither the registration order of layers nor the implementation of ``forward`` matters.

    Examples:
        >>> from zennit.composites import EpsilonPlus
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()).eval()
        >>> rules = EpsilonPlus(canonizers=[FuseBatchNorm()])
        >>> RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=rules).marginal("input").shape
        torch.Size([1, 1, 4, 4])

    Source: arXiv 2002.11018; see :mod:`nrm_plugin.kernels.batch_norm_fusion` for the equations.
    """

    def apply(self, root_module: nn.Module) -> list[Any]:
        """Raises an error. A plain Zennit composite cannot use fused kernels.

        Raises:
            NRMError: Always.
        """
        raise NRMError(
            "FuseBatchNorm changes kernels, not the model, so it works only in a Normalized composite: "
            "Normalized(composite) or RelevanceMeasure(…, composite=composite). In a plain composite use Zennit's "
            "SequentialMergeBatchNorm."
        )

    def register(self) -> None:
        """Does nothing. Required by Zennit's canonizer interface."""

    def remove(self) -> None:
        """Does nothing. Required by Zennit's canonizer interface."""


__all__ = ["FuseBatchNorm", "Interception"]
