"""Relevance of inputs to neurons inside the network, the counterpart of Captum's ``NeuronGradient``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from captum.attr._utils.attribution import NeuronAttribution
from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered
from ..events.event import Atom, Event, Side, at
from ..kernels.normalization import Residual
from ..model.targets import Neurons
from ..plan.reuse import measures_of
from .base import (
    Layer,
    Request,
    Unit,
    as_tuple,
    check_device_ids,
    check_floating,
    log_usage,
    reference_of,
    rules_for,
    unwrapped,
)
from .nrm import NRM


class NeuronNRM(NRM, NeuronAttribution):
    """Captum attribution method for the normalized relevance of the inputs to neurons inside the network.

    The measure starts at the selected neurons and needs no target.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        layer: A module, its name or ``at(…)``.
        device_ids: Accepted for compatibility with Captum but ignored. The model runs on one device.
        composite: As in :class:`NRM`.
        residual: As in :class:`NRM`.
        gain_limit: As in :class:`NRM`.
        uncovered: As in :class:`NRM`.
        batched: As in :class:`NRM`.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
        >>> images = torch.randn(2, 3, 6, 6)
        >>> NeuronNRM(net, net[0]).attribute(images, (1, 2, 2)).shape
        torch.Size([2, 3, 6, 6])
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        device_ids: list[int] | None = None,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
        *,
        batched: bool = True,
    ) -> None:
        check_device_ids(device_ids)
        NRM.__init__(self, model, composite, residual, gain_limit, uncovered, batched=batched)
        NeuronAttribution.__init__(self, model, layer, device_ids)

    @log_usage()
    def attribute(
        self,
        inputs: Any,
        neuron_selector: int | tuple[int | slice, ...] | Callable[[Tensor], Tensor],
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        verbose: bool = False,
        *,
        against: Any = None,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_convergence_delta: bool = False,
        return_sink: bool = False,
        baselines: Any = None,
    ) -> Any:
        """Computes the relevance of each input element to the selected neurons.

        Args:
            inputs: Inputs of shape ``(N, …)``, or a tuple of such tensors.
            neuron_selector: As in Captum: an index, a tuple of indices and slices, or a function of the layer's output,
                of shape ``(N, …)``, that returns one number per sample. If several neurons are selected, they are
                weighted by their activations.
            additional_forward_args: Additional arguments for the model.
            attribute_to_neuron_input: Whether to select neurons of the layer's input instead of its output.
            verbose: Whether to print the rule applied at each step.
            against: A second selector. If given, the relevance explains the difference between the two selected
                activations.
            given: Event to condition on.
            joint: Event to intersect with, for joint relevance.
            unit: ``"output"`` for relevance whose sum, including sink and bypass, is the activation of the neurons;
                ``"measure"`` for relevance that sums to 1.
            return_convergence_delta: Whether to also return the convergence delta, of shape ``(N,)``.
            return_sink: Whether to also return the absorbed relevance, of shape ``(N,)``.
            baselines: If given, the relevance explains the change in the activation relative to the baselines.

        Returns:
            Attributions in the format of the inputs. If the delta or the sink is requested, a tuple that also contains
            them.

        Raises:
            TargetError: If the selector does not match the layer or if the selected activations cancel.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> x, method = torch.randn(5, 3), NeuronNRM(net, net[1])
            >>> relevance, sink = method.attribute(x, 2, return_sink=True)
            >>> torch.allclose(relevance.sum(1) + sink, net[:2](x)[:, 2], atol=1e-5)
            True
            >>> both = method.attribute(x, (slice(1, 3),))
            >>> torch.allclose(both, method.attribute(x, lambda h: h[:, 1] + h[:, 2]), atol=1e-6)
            True
        """
        formatted, was_tuple = as_tuple(inputs)
        check_floating(formatted)
        self._report(formatted, additional_forward_args, verbose)
        side: Side = "input" if attribute_to_neuron_input else "output"
        layer = self._layer(self.layer)
        neurons = Neurons(neuron_selector)
        start: dict[str, Any] = {"start": neurons if baselines is None else neurons.slope}
        if against is not None:
            start = {"against": functools.partial(_difference, neurons, Neurons(against))}
        with torch.enable_grad():
            measure = measures_of(self)(
                unwrapped(self.model),
                formatted,
                **start,
                output=layer if isinstance(layer, Atom) else at(layer, side=side),
                composite=rules_for(baselines, self.composite, self._has_rules),
                reference=reference_of(baselines, formatted),
                additional_forward_args=additional_forward_args,
                batched=self.batched,
            )
        request = Request(given, joint, unit, return_convergence_delta, return_sink)
        explained = neurons.activation if against is None and baselines is None else measure.output
        return self._in_form(measure, explained, formatted, was_tuple, request)


def _difference(neurons: Neurons, others: Neurons, values: Tensor) -> Tensor:
    """Returns the weight of each activation in the difference between two neuron selections."""
    return neurons.slope(values) - others.slope(values)
