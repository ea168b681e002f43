"""Relevance of layers, the counterpart of Captum's ``LayerLRP``."""

from __future__ import annotations

from typing import Any

from captum.attr._utils.attribution import LayerAttribution
from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered
from ..events.event import Atom, Event, Side
from ..kernels.normalization import Residual
from ..measure.layer_taps import layer_list
from ..model.inputs_and_outputs import Output
from .base import (
    Layer,
    Unit,
    as_tensor,
    as_tuple,
    check_device_ids,
    convergence_delta,
    in_unit,
    log_usage,
    sink_above,
    with_optional,
)
from .nrm import NRM


class LayerNRM(NRM, LayerAttribution):
    """Captum attribution method for the normalized relevance of the neurons of one or several layers.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        layer: A module, its name or ``at(…)``; a list of layers, computed in a single pass; or None for all layers of
            the measure.
        device_ids: Accepted for compatibility with Captum but ignored. The model runs on one device.
        composite: As in :class:`NRM`.
        residual: As in :class:`NRM`.
        gain_limit: As in :class:`NRM`.
        uncovered: As in :class:`NRM`.
        output: As in :class:`NRM`.
        batched: As in :class:`NRM`.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
        >>> images = torch.randn(2, 3, 6, 6)
        >>> LayerNRM(net, net[0]).attribute(images, target=5).shape
        torch.Size([2, 4, 4, 4])
        >>> [tuple(relevance.shape) for relevance in LayerNRM(net, ["2", net[0]]).attribute(images, target=5)]
        [(2, 64), (2, 4, 4, 4)]
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | list[Layer] | list[nn.Module] | list[str] | None = None,
        device_ids: list[int] | None = None,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
        *,
        output: Output | Atom | None = None,
        batched: bool = True,
    ) -> None:
        check_device_ids(device_ids)
        NRM.__init__(self, model, composite, residual, gain_limit, uncovered, output=output, batched=batched)
        LayerAttribution.__init__(self, model, layer, device_ids)

    @log_usage()
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
        *,
        against: Any = None,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
        baselines: Any = None,
    ) -> Any:
        """Computes the relevance of each neuron of the layers.

        The first dimension of the result is always the batch, even if the layer has a different layout, such as time
        first or windows; see :meth:`~nrm_plugin.RelevanceMeasure.shape`.

        Args:
            inputs: Inputs of shape ``(N, …)``, or a tuple of such tensors. Integer inputs receive no relevance, but the
                embeddings that they index do.
            target: The output to explain, in Captum's format; see :meth:`NRM.attribute`.
            additional_forward_args: Additional arguments for the model.
            return_convergence_delta: Whether to also return the convergence delta of each layer, of shape ``(N,)``.
            attribute_to_layer_input: Whether to return the relevance of layer inputs instead of layer outputs.
            verbose: Whether to print the rule applied at each step.
            against: Output or outputs to contrast with; see :meth:`NRM.attribute`.
            given: Event to condition on.
            joint: Event to intersect with, for joint relevance.
            unit: ``"output"`` or ``"measure"``; see :meth:`NRM.attribute`.
            return_sink: Whether to also return the relevance absorbed above each layer, of shape ``(N,)``.
            baselines: If given, the relevance explains the change in the output relative to the baselines; see
                :meth:`NRM.attribute`.

        Returns:
            A tensor for a single layer (a tuple if the layer returns several tensors), or a list for several layers. If
            deltas or sinks are requested, a tuple that also contains them.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> x = torch.randn(5, 3)
            >>> relevance, sink = LayerNRM(net, "1").attribute(x, target=0, return_sink=True)
            >>> torch.allclose(relevance.sum(1) + sink, net(x)[:, 0], atol=1e-5)
            True
            >>> LayerNRM(net, net[2]).attribute(x, target=0, attribute_to_layer_input=True).shape
            torch.Size([5, 4])
        """
        formatted, _ = as_tuple(inputs)
        self._report(formatted, additional_forward_args, verbose)
        measure = self.measure(formatted, target, additional_forward_args, against, baselines)
        layers = measure.layers if self.layer is None else self.layer
        side: Side = "input" if attribute_to_layer_input else "output"
        several, is_one = layer_list(layers)
        taps = [measure.taps_of(self._layer(layer), side) for layer in several]
        marginals = measure.marginal([tap for group in taps for tap in group], given=given, joint=joint)

        def scaled(value: Tensor) -> Tensor:
            return in_unit(value, measure.output, unit)

        def of_tensor(tap: Atom) -> Tensor:
            return as_tensor(measure, scaled(marginals[tap]))

        def in_form(values: list[Any]) -> Any:
            return values[0] if is_one else values

        relevance = [tuple(of_tensor(tap) for tap in group) for group in taps]
        attributions = in_form([parts[0] if len(parts) == 1 else parts for parts in relevance])
        delta = sink = None
        if return_convergence_delta:
            delta = in_form([scaled(convergence_delta(measure, group)) for group in taps])
        if return_sink:
            sink = in_form([scaled(sink_above(measure, group)) for group in taps])
        return with_optional(attributions, delta, sink)
