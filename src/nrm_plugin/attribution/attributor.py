"""Zennit attributor that returns a relevance measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from zennit.attribution import Attributor
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..events.event import Atom
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..model.inputs_and_outputs import Output
from ..plan.reuse import measures_of
from .base import rules_for


class NRMAttributor(Attributor):
    """Zennit attributor that returns the model output and the measure instead of a heat map.

    Args:
        model: The network, in evaluation mode.
        composite: A Zennit composite, or None for the default of this package.
        attr_output: Start vector of the measure, as in Zennit: a tensor in the shape of the output, or a function of
            the output. Defaults to the output itself.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        batched: As in :class:`~nrm_plugin.RelevanceMeasure`.
        baseline_fn: Function that maps the input to a baseline, as in Zennit's ``IntegratedGradients``. If given, the
            measure explains the difference between the outputs at input and baseline; see ``reference`` of
            :class:`~nrm_plugin.RelevanceMeasure`. Unless a composite is given, relevance then propagates along secant
            slopes between baseline and input, and nothing is absorbed.

    Examples:
        >>> import torch
        >>> from zennit.composites import EpsilonPlusFlat
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
        >>> images, classes = torch.randn(2, 3, 6, 6), torch.eye(10)[[3, 5]]
        >>> with NRMAttributor(net, EpsilonPlusFlat()) as attributor:
        ...     output, mu = attributor(images, classes)
        >>> output.shape, mu.marginal("1").shape
        (torch.Size([2, 10]), torch.Size([2, 4, 4, 4]))
        >>> relevance = mu.marginal("input") * output[classes.bool()].reshape(2, 1, 1, 1)  # as zennit's Gradient
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        attr_output: Tensor | Callable[[Tensor], Tensor] | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
        *,
        output: Output | Atom | None = None,
        batched: bool = True,
        baseline_fn: Callable[[Any], Any] | None = None,
    ) -> None:
        self.output, self.batched, self.baseline_fn = output, batched, baseline_fn
        self._has_rules = composite is not None
        super().__init__(model, normalize(composite, residual, gain_limit, uncovered), attr_output)

    def __enter__(self) -> NRMAttributor:
        """Returns the attributor. The measure registers its own hooks while it runs the model."""
        return self

    def __exit__(self, *error: object) -> None:
        """Does nothing. No hooks are registered."""

    def forward(self, input: Any, attr_output_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, RelevanceMeasure]:
        """Returns the model output of shape ``(N, …)`` and a measure whose start vector is a function of that output.

        Args:
            input: Inputs of shape ``(N, …)``, or any other inputs accepted by :class:`~nrm_plugin.RelevanceMeasure`.
            attr_output_fn: Function that computes the start vector from the output.

        Raises:
            TargetError: If the start vector sums to zero or does not match the output.

        Examples:
            >>> import torch
            >>> net = nn.Linear(3, 2)
            >>> output, mu = NRMAttributor(net).forward(torch.ones(1, 3), lambda output: torch.ones_like(output))
            >>> torch.allclose(mu.output, output.mean(1))
            True
        """
        reference = None if self.baseline_fn is None else self.baseline_fn(input)
        measure = measures_of(self)(
            self.model,
            input,
            start=attr_output_fn,
            reference=reference,
            composite=rules_for(reference, self.composite, self._has_rules),
            output=self.output,
            batched=self.batched,
        )
        return measure.outputs, measure
