"""Mean and variance of relevance over a data set, as metrics of torchmetrics: by class, and across processes.

They are part of any loop, ``MetricCollection`` or Lightning module: ``update`` takes a measure or its numbers, the
states of several processes are merged when ``compute`` is called.
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
    """Moments of numbers of a fixed shape, by class where there are any."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    moments: Tensor

    def __init__(self, groups: tuple[int, ...], classes: int | None, correction: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for number in (*groups, 1 if classes is None else classes):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{number!r} is no number of groups or classes: give a whole number of at least 1.")
        self.groups, self.classes, self.correction = groups, classes, correction
        # One state, not three: each is reduced by itself, and means cannot be merged without their counts.
        self.add_state("moments", default=empty(classes or 1, groups), dist_reduce_fx=merged)

    def _add(self, values: Tensor, target: Any) -> None:
        state = of_batch(*self._checked(values, target), self.classes or 1)
        self.moments = merged(torch.stack((self.moments, state)))

    def _checked(self, values: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if not isinstance(values, Tensor) or tuple(values.shape[1:]) != self.groups:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            sizes = ", ".join(map(str, self.groups))
            raise InputError(f"{name} was made for relevance of shape (N, {sizes}), got {got}. Say other sizes anew.")
        if not bool(values.isfinite().all()):
            raise InputError(f"{name} got relevance that is not finite; nothing of this batch was counted.")
        values = values.to(self.moments.device)
        if self.classes is None:
            if target is not None:
                raise InputError(f"{name} was made without classes, but got some. Make it with classes=.")
            return values, torch.zeros(len(values), dtype=torch.long, device=values.device)
        if target is None:
            raise InputError(f"{name} was made for {self.classes} classes: give the class of each sample, (N,).")
        found = torch.as_tensor(target, device=values.device)
        if found.ndim == 0:
            found = found.expand(len(values))
        if found.shape != values.shape[:1] or found.is_floating_point() or found.dtype == torch.bool:
            raise InputError(f"{name} takes one whole number for each of {len(values)} samples, got {target!r}.")
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < self.classes:
            raise InputError(
                f"{name} was made for classes 0 to {self.classes - 1}, got {int(found.min())} to {int(found.max())}."
            )
        return values, found.long()

    def compute(self) -> Moments:
        """Number of samples, mean and variance so far, over all processes."""
        found = moments(self.moments, self.correction)
        return found if self.classes is not None else Moments(*(part[0] for part in found))


class ClasswiseRelevance(_Relevance):
    r"""Count, mean and variance, for each class, of relevance that is told for each of some groups.

    .. math:: m_{ck} = \frac{1}{n_c} \sum_{n:\, t_n = c} \mu_n(k), \qquad
              v_{ck} = \frac{1}{n_c - 1} \sum_{n:\, t_n = c} (\mu_n(k) - m_{ck})^2

    Sums are in double precision, merged without cancellation, and the same however samples are batched or shared out
    among processes, up to rounding. A device without double precision cannot hold the state.

    Args:
        groups: Number of groups ``K``, such as the channels of a layer.
        classes: Number of classes; None for all samples together.
        layer: Name of the layer whose marginals are taken, or ``at(layer)``; needed for measures only.
        over: Its groups, as in :meth:`~nrm_plugin.RelevanceMeasure.marginal`.
        correction: The variance divides by the count less this: 1 for the unbiased one, 0 for that of these samples.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        InputError: No such number of groups or classes.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> metric = ClasswiseRelevance(groups=4, classes=2, layer="0")
        >>> metric.update(RelevanceMeasure(net, torch.randn(5, 3), 1), [0, 1, 1, 0, 1])
        >>> metric.compute().samples, metric.compute().mean.shape
        (tensor([2, 3]), torch.Size([2, 4]))

    Source: ours; the sums after Chan, Golub and LeVeque (1979).
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
        """Counts a batch.

        Args:
            relevance: A measure, or relevance of the groups ``(N, K)``.
            target: Class of each sample, ``(N,)``.

        Raises:
            InputError: It does not fit; then nothing was counted.
        """
        if isinstance(relevance, RelevanceMeasure):
            if self.layer is None:
                raise InputError("ClasswiseRelevance got a measure, but was made without layer=.")
            relevance = relevance.marginal(self.layer, over=self.over).flatten(1)
        self._add(relevance, target)


class JointRelevance(_Relevance):
    r"""Count, mean and variance of the joint relevance of the groups of two layers.

    .. math:: m_{ab} = \frac{1}{n} \sum_n \mu_n(a \cap b)

    The mean of joint matrices is one of a measure: its sums over ``b`` are the mean marginals of the upper groups.

    Args:
        groups: Numbers of groups ``(K_upper, K_lower)``.
        classes: Number of classes, each of which has a matrix of its own; None for all samples together.
        upper: Name of the layer nearer to the output, or ``at(layer)``; needed for measures only.
        lower: The layer nearer to the input.
        over: The groups, as in :meth:`~nrm_plugin.RelevanceMeasure.joint`.
        correction: As in :class:`ClasswiseRelevance`.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        InputError: No such number of groups or classes.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> metric = JointRelevance((2, 4), upper="2", lower="0")
        >>> metric.update(RelevanceMeasure(net, torch.randn(5, 3), 1))
        >>> metric.compute().mean.shape
        torch.Size([2, 4])

    Source: ours; the sums after Chan, Golub and LeVeque (1979).
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
        """Counts a batch.

        Args:
            relevance: A measure, or joint relevance ``(N, K_upper, K_lower)``.
            target: Class of each sample, ``(N,)``.

        Raises:
            InputError: It does not fit; then nothing was counted.
        """
        if isinstance(relevance, RelevanceMeasure):
            if self.upper is None or self.lower is None:
                raise InputError("JointRelevance got a measure, but was made without upper= and lower=.")
            relevance = relevance.joint(self.upper, self.lower, over=self.over)
        self._add(relevance, target)


__all__ = ["ClasswiseRelevance", "JointRelevance", "Moments"]
