"""Class-wise mean and variance of relevance over a dataset as torchmetrics metrics.

The metrics can be used in any loop, ``MetricCollection`` or Lightning module: ``update`` takes a measure or relevance,
and ``compute`` merges the states of all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, extra
from ..events.event import Atom
from ..measure.groups import Over
from ..measure.measure import RelevanceMeasure
from .moments import Moments, empty, merged, moments, of_batch

torchmetrics = extra("torchmetrics", "statistics")


class _Relevance(torchmetrics.Metric):  # type: ignore[name-defined, misc, unused-ignore]
    """Base class of metrics that accumulate moments of values of a fixed shape, optionally per class."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    moments: Tensor

    def __init__(self, groups: tuple[int, ...], classes: int | None, correction: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for number in (*groups, 1 if classes is None else classes):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{number!r} is not a number of groups or classes: pass an integer of at least 1.")
        self.groups, self.classes, self.correction = groups, classes, correction
        # One state instead of three because states are reduced separately but means need their counts.
        self.add_state("moments", default=empty(classes or 1, groups), dist_reduce_fx=merged)

    def _add(self, values: Tensor, target: Any) -> None:
        state = of_batch(*self._checked(values, target), self.classes or 1)
        self.moments = merged(torch.stack((self.moments, state)))

    def _checked(self, values: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if not isinstance(values, Tensor) or tuple(values.shape[1:]) != self.groups:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            sizes = ", ".join(map(str, self.groups))
            raise InputError(
                f"{name} expects relevance of shape (N, {sizes}), got {got}. Create a metric with these groups."
            )
        if not bool(values.isfinite().all()):
            raise InputError(f"{name} got relevance that is not finite; the batch was not counted.")
        values = values.to(self.moments.device)
        if self.classes is None:
            if target is not None:
                raise InputError(f"{name} was created without classes, but got targets. Create it with classes=.")
            return values, torch.zeros(len(values), dtype=torch.long, device=values.device)
        if target is None:
            raise InputError(f"{name} was created with {self.classes} classes: pass the class of each sample, (N,).")
        labels = torch.as_tensor(target, device=values.device)
        if labels.ndim == 0:
            labels = labels.expand(len(values))
        if labels.shape != values.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(f"{name} takes one integer for each of {len(values)} samples, got {target!r}.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            lowest, highest = int(labels.min()), int(labels.max())
            raise InputError(f"{name} was created with classes 0 to {self.classes - 1}, got {lowest} to {highest}.")
        return values, labels.long()

    def compute(self) -> Moments:
        """Computes the number of samples, mean and variance over all samples added so far by all processes."""
        result = moments(self.moments, self.correction)
        return result if self.classes is not None else Moments(*(part[0] for part in result))


class ClasswiseRelevance(_Relevance):
    r"""Class-wise count, mean and variance of the relevance of groups.

    .. math:: m_{ck} = \frac{1}{n_c} \sum_{n:\, t_n = c} \mu_n(k), \qquad
              v_{ck} = \frac{1}{n_c - 1} \sum_{n:\, t_n = c} (\mu_n(k) - m_{ck})^2

    Sums are accumulated in double precision, which the device must support, and merged without cancellation. Up to
    rounding errors, the result does not depend on how samples are divided into batches and among processes.

    Args:
        groups: Number of groups ``K``, such as the channels of a layer.
        classes: Number of classes, or None to pool all samples.
        layer: Name of the layer, or ``at(layer)``; required only for updates with measures.
        over: Groups of the layer, as in :meth:`~nrm_plugin.RelevanceMeasure.marginal`.
        correction: Number subtracted from the count in the denominator of the variance: 1 for the unbiased estimate, 0
            for the variance of the samples.
        kwargs: Additional arguments for ``torchmetrics.Metric``.

    Raises:
        MissingExtraError: If torchmetrics is not installed.
        InputError: If the number of groups or classes is invalid.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> metric = ClasswiseRelevance(groups=4, classes=2, layer="0")
        >>> metric.update(RelevanceMeasure(net, torch.randn(5, 3), 1), [0, 1, 1, 0, 1])
        >>> metric.compute().samples, metric.compute().mean.shape
        (tensor([2, 3]), torch.Size([2, 4]))

    Source: new in this package; sums are merged as in Chan, Golub and LeVeque (1979).
    """

    def __init__(
        self,
        groups: int,
        classes: int | None = None,
        layer: str | Atom | None = None,
        over: Over = "channel",
        correction: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__((groups,), classes, correction, **kwargs)
        self.layer, self.over = layer, over

    def update(self, relevance: RelevanceMeasure | Tensor, target: Any = None) -> None:
        """Adds a batch to the metric.

        Args:
            relevance: A measure, or relevance of the groups of shape ``(N, K)``.
            target: Class of each sample, of shape ``(N,)``.

        Raises:
            InputError: If the batch does not match the metric; in this case, it is not counted.
        """
        if isinstance(relevance, RelevanceMeasure):
            if self.layer is None:
                raise InputError("ClasswiseRelevance got a measure, but was created without layer=.")
            relevance = relevance.marginal(self.layer, over=self.over).flatten(1)
        self._add(relevance, target)


class JointRelevance(_Relevance):
    r"""Class-wise count, mean and variance of the joint relevance between the groups of two layers.

    .. math:: m_{ab} = \frac{1}{n} \sum_n \mu_n(a \cap b)

    The mean of joint matrices is the joint matrix of the mean measure. Without bypass and absorption between the
    layers, its sums over ``b`` are the mean marginals of the upper groups.

    Args:
        groups: Number of groups in each layer, as ``(K_upper, K_lower)``.
        classes: Number of classes, each with its own matrix, or None to pool all samples.
        upper: Name of the layer nearer to the output, or ``at(layer)``; required only for updates with measures.
        lower: The layer nearer to the input, given in the same way.
        over: As in :meth:`~nrm_plugin.RelevanceMeasure.joint`.
        correction: As in :class:`ClasswiseRelevance`.
        kwargs: Additional arguments for ``torchmetrics.Metric``.

    Raises:
        MissingExtraError: If torchmetrics is not installed.
        InputError: If the number of groups or classes is invalid.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> metric = JointRelevance((2, 4), upper="2", lower="0")
        >>> metric.update(RelevanceMeasure(net, torch.randn(5, 3), 1))
        >>> metric.compute().mean.shape
        torch.Size([2, 4])

    Source: new in this package; sums are merged as in Chan, Golub and LeVeque (1979).
    """

    def __init__(
        self,
        groups: tuple[int, int],
        classes: int | None = None,
        upper: str | Atom | None = None,
        lower: str | Atom | None = None,
        over: Over | tuple[Over, Over] = "channel",
        correction: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tuple(groups), classes, correction, **kwargs)
        self.upper, self.lower, self.over = upper, lower, over

    def update(self, relevance: RelevanceMeasure | Tensor, target: Any = None) -> None:
        """Adds a batch to the metric.

        Args:
            relevance: A measure, or joint relevance of shape ``(N, K_upper, K_lower)``.
            target: Class of each sample, of shape ``(N,)``.

        Raises:
            InputError: If the batch does not match the metric; in this case, it is not counted.
        """
        if isinstance(relevance, RelevanceMeasure):
            if self.upper is None or self.lower is None:
                raise InputError("JointRelevance got a measure, but was created without upper= and lower=.")
            relevance = relevance.joint(self.upper, self.lower, over=self.over)
        self._add(relevance, target)


__all__ = ["ClasswiseRelevance", "JointRelevance", "Moments"]
