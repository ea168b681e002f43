"""Canonizers of this package."""

from __future__ import annotations

from typing import Any

from torch import nn
from zennit.canonizers import Canonizer

from .errors import NRMError
from .functional import Interception


class FuseBatchNorm(Canonizer):
    """Fuses batch normalization into the adjacent layers, without modifying the model.

    The canonizer requires a ``Normalized`` composite (``RelevanceMeasure`` normalizes its composite):
    ``EpsilonPlusFlat(canonizers=[FuseBatchNorm()])``. Adjacent layers are detected while the model runs, so the order
    of attributes and the implementation of the forward pass do not matter.

    Examples:
        >>> from zennit.composites import EpsilonPlus
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()).eval()
        >>> rules = EpsilonPlus(canonizers=[FuseBatchNorm()])
        >>> RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 3, composite=rules).marginal("input").shape
        torch.Size([1, 1, 4, 4])

    Source: arXiv 2002.11018; see :mod:`nrm_plugin.kernels.batch_norm_fusion` for the equations.
    """

    def apply(self, root_module: nn.Module) -> list[Any]:
        """Raises an error, since a plain Zennit composite uses the model's own weights.

        Raises:
            NRMError: Always.
        """
        raise NRMError(
            "FuseBatchNorm changes kernels, not the model, so it works only in a Normalized composite: "
            "Normalized(composite) or RelevanceMeasure(…, composite=composite). In a plain composite use Zennit's "
            "SequentialMergeBatchNorm."
        )

    def register(self) -> None:
        """Does nothing, since there is nothing to register."""

    def remove(self) -> None:
        """Does nothing, since there is nothing to remove."""


__all__ = ["FuseBatchNorm", "Interception"]
