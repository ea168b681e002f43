"""Captum classes: they translate arguments, the measure does the work."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from captum.attr._utils.attribution import GradientAttribution, LayerAttribution, NeuronAttribution
from torch import Tensor, nn
from zennit.core import Composite

from .captum_adapter import as_given, as_tuple, log_usage
from .checks import check_module
from .composites import Uncovered
from .errors import TargetError, UnknownLayerError
from .events import Atom, Event, Side, at
from .kernels import Residual
from .measure import RelevanceMeasure, normalize
from .starts import sample_sums

Unit = Literal["output", "measure"]


class NRM(GradientAttribution):
    """Normalized relevance of the inputs, as a Captum attribution method.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        composite: A Zennit composite; None for the default of this package.
        residual, gain_limit, uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Raises:
        InputError: ``model`` is a function instead of a module, whose layers could not be seen.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
    ) -> None:
        check_module(model)
        super().__init__(model)
        self.model = model
        self.composite = normalize(composite, residual, gain_limit, uncovered)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
    ) -> Any:
        """Relevance of each input entry.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors.
            target: Output to explain, in Captum's forms.
            additional_forward_args: Further arguments of the model.
            return_convergence_delta: Also return what the books leave open, ``(N,)``.
            given: Conditional relevance: given that walks are in this event.
            joint: Joint relevance with this event.
            unit: ``"output"``: the relevance, the sink and the bypass of a sample sum to the explained output;
                ``"measure"``: to 1.

        Returns:
            Attributions in the form of the inputs, and the delta if asked for.
        """
        formatted, was_tuple = as_tuple(inputs)
        measure = self.measure(formatted, target, additional_forward_args)
        maps = _input_maps(measure, formatted, given, joint)
        attributions = as_given(tuple(_in_unit(measure.output, values, unit) for values in maps), was_tuple)
        if not return_convergence_delta:
            return attributions
        return attributions, _delta(measure, measure.taps_of("input"), unit)

    def measure(
        self, inputs: Tensor | tuple[Tensor, ...], target: Any = None, additional_forward_args: Any = None
    ) -> RelevanceMeasure:
        """The measure behind the attributions, to be asked further: sinks, joints, conditionals."""
        model = self.model.module if isinstance(self.model, nn.DataParallel) else self.model
        with torch.enable_grad():  # Captum's methods work under no_grad; its metrics call them so
            return RelevanceMeasure(
                model, inputs, target, composite=self.composite, additional_forward_args=additional_forward_args
            )

    def attribute_future(self) -> None:
        """Not there, as in Captum's LRP.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("attribute_future is not available for normalized relevance.")

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: relevance is a contribution, not a sensitivity."""
        return True

    def has_convergence_delta(self) -> bool:
        """True: sink and bypass are accounted for."""
        return True

    def compute_convergence_delta(self, attributions: Any, output: Tensor, accounted: Tensor | float = 0.0) -> Tensor:
        """``output - accounted - Σ attributions``, ``(N,)``, as in Captum's LRP.

        Args:
            attributions: A tensor or tuple of tensors, ``(N, …)``.
            output: The explained output, ``(N,)``.
            accounted: What sink and bypass carry, in the same unit.
        """
        parts = attributions if isinstance(attributions, tuple) else (attributions,)
        total = torch.stack([sample_sums(part) for part in parts]).sum(0)
        return output.flatten() - accounted - total


class LayerNRM(NRM, LayerAttribution):
    """Normalized relevance of the neurons of one or several layers, as a Captum attribution method.

    Args:
        model: The network.
        layer: A module or its name, a list of them (answered by one pass), or None for every layer of the measure.
        composite, residual, gain_limit, uncovered: As in :class:`NRM`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str | list[nn.Module | str] | None = None,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
    ) -> None:
        NRM.__init__(self, model, composite, residual, gain_limit, uncovered)
        LayerAttribution.__init__(self, model, layer)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
    ) -> Any:
        """Relevance of each neuron of the layers.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors.
            target: Output to explain, in Captum's forms.
            additional_forward_args: Further arguments of the model.
            return_convergence_delta: Also return what the books leave open, ``(N,)`` for each layer.
            attribute_to_layer_input: Relevance at the input of the layers instead of their output.
            given: Conditional relevance: given that walks are in this event.
            joint: Joint relevance with this event.
            unit: ``"output"`` or ``"measure"``.

        Returns:
            A tensor for a layer (a tuple where it has several), a list for a list or for all layers, and the deltas
            in the same form if asked for.
        """
        formatted, _ = as_tuple(inputs)
        measure = self.measure(formatted, target, additional_forward_args)
        layers = measure.layers if self.layer is None else self.layer
        listed = layers if isinstance(layers, list) else [layers]
        side: Side = "input" if attribute_to_layer_input else "output"
        groups = [measure.taps_of(layer, side) for layer in listed]
        flat = [tap for group in groups for tap in group]
        values = _scaled(measure, measure.marginal(flat, given=given, joint=joint), unit)
        attributions = [
            values[group[0]] if len(group) == 1 else tuple(values[tap] for tap in group) for group in groups
        ]
        single = not isinstance(layers, list)
        if not return_convergence_delta:
            return attributions[0] if single else attributions
        deltas = [_delta(measure, group, unit) for group in groups]
        return (attributions[0], deltas[0]) if single else (attributions, deltas)


class NeuronNRM(NRM, NeuronAttribution):
    """Normalized relevance of the inputs for neurons inside the network, as a Captum attribution method.

    The measure starts at the selected neurons, so there is no target.

    Args:
        model: The network.
        layer: A module or its name.
        composite, residual, gain_limit, uncovered: As in :class:`NRM`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
    ) -> None:
        NRM.__init__(self, model, composite, residual, gain_limit, uncovered)
        NeuronAttribution.__init__(self, model, layer)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: int | tuple[Any, ...] | Callable[[Tensor], Tensor],
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
    ) -> Any:
        """Relevance of each input entry for the selected neurons.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors.
            neuron_selector: As in Captum: an index, a tuple of indices and slices, or a function of the layer's output
                that returns a number for each sample. Of several neurons each starts with its activation.
            additional_forward_args: Further arguments of the model.
            attribute_to_neuron_input: Select among the inputs of the layer instead of its outputs.
            given: Conditional relevance: given that walks are in this event.
            joint: Joint relevance with this event.
            unit: ``"output"``: relevance, sink and bypass sum to the activation of the neurons; ``"measure"``: to 1.

        Returns:
            Attributions in the form of the inputs.

        Raises:
            TargetError: The selector fits no neuron of the layer, or what it selects cancels.
        """
        formatted, was_tuple = as_tuple(inputs)
        side: Side = "input" if attribute_to_neuron_input else "output"
        model = self.model.module if isinstance(self.model, nn.DataParallel) else self.model
        tap = at(self.layer, side=side)
        neurons = _Neurons(neuron_selector)
        with torch.enable_grad():
            measure = RelevanceMeasure(
                model,
                formatted,
                start=neurons,
                output=tap,
                composite=self.composite,
                additional_forward_args=additional_forward_args,
            )
        maps = _input_maps(measure, formatted, given, joint)
        return as_given(tuple(_in_unit(neurons.activation, values, unit) for values in maps), was_tuple)


class JointNRM:
    """Joint relevance of the channels, or neurons, of two layers.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        upper: The layer that is nearer to the output, a module or its name.
        lower: The other one.
        composite, residual, gain_limit, uncovered: As in :class:`NRM`.
    """

    def __init__(
        self,
        model: nn.Module,
        upper: nn.Module | str,
        lower: nn.Module | str,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
    ) -> None:
        self.upper, self.lower = upper, lower
        self._inputs = NRM(model, composite, residual, gain_limit, uncovered)

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        over: str = "channel",
        unit: Unit = "output",
    ) -> Tensor:
        """The joint relevance of each pair.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors.
            target: Output to explain, in Captum's forms.
            additional_forward_args: Further arguments of the model.
            over: ``"channel"`` or ``"neuron"``.
            unit: ``"output"``, multiplied by the explained output, or ``"measure"``.

        Returns:
            ``(N, upper, lower)``.
        """
        measure = self._inputs.measure(as_tuple(inputs)[0], target, additional_forward_args)
        return _in_unit(measure.output, measure.joint(self.upper, self.lower, over), unit)


class _Neurons:
    """The start vector for one of Captum's neuron selectors.

    Args:
        selector: The selector.

    Attributes:
        activation: What was selected, summed, ``(N,)``; known once the start vector was made.
    """

    def __init__(self, selector: Any) -> None:
        self.selector = selector
        self.activation = torch.empty(0)

    def __call__(self, values: Tensor) -> Tensor:
        """The start vector over the outputs ``(N, …)`` of a layer."""
        slope = self._slope(values)
        self.activation = (slope * values).flatten(1).sum(1)
        if bool((slope != 0).flatten(1).sum(1).le(1).all()):
            return slope  # a single neuron starts with all mass, also where it is not active
        start = slope * values
        silent = (start == 0).flatten(1).all(1).reshape(-1, *(1,) * (values.ndim - 1))
        return torch.where(silent, slope, start)

    def _slope(self, values: Tensor) -> Tensor:
        """How much each neuron counts."""
        if callable(self.selector):
            with torch.enable_grad():
                leaf = values.detach().requires_grad_()
                chosen = self.selector(leaf)
                if not isinstance(chosen, Tensor) or chosen.grad_fn is None:
                    raise TargetError("the neuron selector returned nothing that depends on the output of the layer.")
                return torch.autograd.grad(chosen.sum(), leaf)[0]
        index = self.selector if isinstance(self.selector, tuple) else (self.selector,)
        shape = tuple(values.shape)
        if len(index) != values.ndim - 1 or not all(_is_index(entry) for entry in index):
            raise TargetError(
                f"neuron_selector={self.selector!r} does not select neurons of a layer of shape {shape}: give "
                f"{values.ndim - 1} ints or slices, or a function of the layer's output."
            )
        slope = torch.zeros_like(values)
        try:
            slope[(slice(None), *index)] = 1
        except IndexError as error:
            raise TargetError(
                f"neuron_selector={self.selector!r} is out of range for a layer of shape {shape}."
            ) from error
        return slope


def _is_index(entry: Any) -> bool:
    return isinstance(entry, slice) or (isinstance(entry, int) and not isinstance(entry, bool))


def _input_maps(
    measure: RelevanceMeasure, inputs: tuple[Tensor, ...], given: Event | None, joint: Event | None
) -> list[Tensor]:
    """Marginals at all inputs; zeros at those that the explained output does not depend on."""
    taps = [at("input")] if len(inputs) == 1 else [at("input", item=item) for item in range(len(inputs))]
    try:
        reached = set(measure.taps_of("input"))
    except UnknownLayerError:
        reached = set()
    known = [tap for tap in taps if tap in reached]
    maps = measure.marginal(known, given=given, joint=joint) if known else {}
    return [maps[tap] if tap in maps else torch.zeros_like(value) for tap, value in zip(taps, inputs, strict=True)]


def _scaled(measure: RelevanceMeasure, values: dict[Atom, Tensor], unit: Unit) -> dict[Atom, Tensor]:
    return {tap: _in_unit(measure.output, value, unit) for tap, value in values.items()}


def _in_unit(output: Tensor, value: Tensor, unit: Unit) -> Tensor:
    if unit not in ("output", "measure"):
        raise ValueError(f"unit={unit!r} is unknown; choose 'output' or 'measure'.")
    return value if unit == "measure" else value * output.reshape(-1, *(1,) * (value.ndim - 1))


def _delta(measure: RelevanceMeasure, taps: list[Atom], unit: Unit) -> Tensor:
    """What mass, sink and bypass leave open."""
    if len(taps) == 1:
        (tap,) = taps
        open_ = 1 - sample_sums(measure.marginal(tap)) - measure.sink(tap) - measure.bypass(tap)
    else:
        # No walk crosses two tensors of one tuple, so what none of them holds is the complement of their union.
        union = functools.reduce(operator.or_, taps)
        open_ = 1 - sum(measure(tap) for tap in taps) - measure(~union)
    return open_ if unit == "measure" else open_ * measure.output
