"""Relevance matrices over a dataset as a torchmetrics metric synchronized across processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, extra
from ..events.event import Atom, at
from ..measure.groups import Over, pair_of
from ..measure.measure import RelevanceMeasure
from ..model.devices import on_device_of
from .relevance_matrix import RelevanceMatrix

torchmetrics = extra("torchmetrics", "statistics")


class MeanConditionals(torchmetrics.Metric):  # type: ignore[name-defined, misc, unused-ignore]
    r"""Metric for the mean conditional relevance of the groups in a layer given the groups in a layer above.

    .. math:: T_{ij} = \frac{\sum_n |\mu_n(j)|\, \mu_n(i \mid j)}{\sum_n |\mu_n(j)|}

    Sums are accumulated in double precision, which the device must support. Up to rounding errors, the result does not
    depend on how samples are divided into batches and among processes.

    Args:
        groups: Number of groups in each layer, as ``(K_upper, K_lower)``.
        upper: Layer nearer to the output, a name or ``at(layer)``.
        lower: Layer nearer to the input, a name or ``at(layer)``.
        over: As in :meth:`~nrm_plugin.RelevanceMeasure.joint`.
        kwargs: Additional arguments for ``torchmetrics.Metric``.

    Raises:
        MissingExtraError: If torchmetrics is not installed.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> metric = MeanConditionals((4, 3), "0", "input")
        >>> metric.update(RelevanceMeasure(net, torch.randn(5, 3), 1))
        >>> matrix = metric.compute()
        >>> matrix.matrix.shape, (matrix.matrix.sum(0) + matrix.off).allclose(torch.ones(4).double(), atol=1e-4)
        (torch.Size([3, 4]), True)

    Source: new in this package.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    joint: Tensor
    mass: Tensor
    samples: Tensor

    def __init__(
        self,
        groups: tuple[int, int],
        upper: str | Atom,
        lower: str | Atom,
        over: Over | tuple[Over, Over] = "channel",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.groups, self.upper, self.lower, self.over = tuple(groups), upper, lower, pair_of(over)
        up, down = self.groups
        self.add_state("joint", torch.zeros(up, down + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("mass", torch.zeros(up, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, mu: RelevanceMeasure) -> None:
        """Adds the samples of a measure to the metric.

        Raises:
            InputError: If the number of groups does not match that of the metric or if relevance is not finite. In
                either case, the batch is ignored.
        """
        lower = at(self.lower) if isinstance(self.lower, str) else self.lower
        joint = mu.joint(self.upper, self.lower, over=self.over).double()
        if tuple(joint.shape[1:]) != self.groups:
            raise InputError(
                f"MeanConditionals was created for groups {self.groups}, but the layers have {tuple(joint.shape[1:])}."
            )
        off = mu.marginal(self.upper, over=self.over[0], joint=~lower).flatten(1).double()
        mass = mu.marginal(self.upper, over=self.over[0]).flatten(1).double()
        parts = torch.cat([on_device_of(joint, off), off.unsqueeze(2)], 2) * mass.sign().unsqueeze(2)
        if not bool(parts.isfinite().all()):
            raise InputError("MeanConditionals got relevance that is not finite; the batch was not counted.")
        self.joint += parts.sum(0).to(self.joint.device)
        self.mass += mass.abs().sum(0).to(self.mass.device)
        self.samples += len(mass)

    def compute(self) -> RelevanceMatrix:
        """Computes the matrix over all samples added so far by all processes."""
        shares = (self.joint / self.mass.unsqueeze(1)).masked_fill((self.mass == 0).unsqueeze(1), torch.nan)
        names = [layer if isinstance(layer, str) else str(layer.layer) for layer in (self.upper, self.lower)]
        count = int(self.samples)
        return RelevanceMatrix(shares[:, :-1].T.contiguous(), shares[:, -1], self.mass / max(count, 1), count, *names)


__all__ = ["MeanConditionals", "RelevanceMatrix"]
