"""Captum classes: they translate arguments, the measure does the work."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
from captum.attr._utils.attribution import GradientAttribution, LayerAttribution, NeuronAttribution
from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered
from ..errors import InputError, UnknownLayerError
from ..events.event import Atom, Event, Side, at
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure, normalize
from ..model.checks import check_module
from ..model.inputs import is_index
from ..model.targets import Neurons, sample_sums
from ..recording.coverage import coverage
from .captum_adapter import as_given, as_tuple, log_usage

Unit = Literal["output", "measure"]
Layer = nn.Module | str | Atom
T = TypeVar("T", Tensor, tuple[Tensor, ...])
Maps = Tensor | tuple[Tensor, ...]
"""Relevance of one layer: a tensor, or a tuple of them where the layer hands out several."""


class NRM(GradientAttribution):
    """Normalized relevance of the inputs, as a Captum attribution method.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped, so that one device does the work.
        composite: A Zennit composite; None for the default of this package.
        residual, gain_limit, uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Raises:
        InputError: ``model`` is a function instead of a module, whose layers could not be seen.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
        >>> images = torch.randn(2, 3, 6, 6)
        >>> NRM(net).attribute(images, target=5).shape
        torch.Size([2, 3, 6, 6])
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

    @overload
    def attribute(
        self,
        inputs: T,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: Literal[False] = False,
        verbose: bool = False,
        *,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: Literal[False] = False,
    ) -> T: ...
    @overload
    def attribute(
        self,
        inputs: T,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: Literal[True],
        verbose: bool = False,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: Literal[False] = False,
    ) -> tuple[T, Tensor]: ...
    @overload
    def attribute(
        self,
        inputs: T,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        *,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
    ) -> Any: ...
    @log_usage()
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        *,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
    ) -> Any:
        """Relevance of each input entry.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors.
            target: Output to explain, in Captum's forms: an int or a tensor of one for all samples, a list or tensor of
                one int for each; for outputs with more dimensions a tuple, or a list of tuples; None where a sample
                has one output.
            additional_forward_args: Further arguments of the model, one or a tuple of them; no relevance flows there.
            return_convergence_delta: Also return what the books leave open, ``(N,)``: the explained output less
                attributions, sink and bypass. 0 but for rounding.
            verbose: Print which rule every step gets.
            given: Conditional relevance: given that walks are in this event.
            joint: Joint relevance with this event.
            unit: ``"output"``: the relevance, the sink and the bypass of a sample sum to the explained output;
                ``"measure"``: to 1.
            return_sink: Also return what was absorbed on the way, ``(N,)``, in the same unit.

        Returns:
            Attributions in the form of the inputs; then, in a tuple with them, the delta and the sink if asked for.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> x = torch.randn(5, 3)
            >>> relevance, delta, sink = NRM(net).attribute(
            ...     x, target=1, return_convergence_delta=True, return_sink=True)
            >>> torch.allclose(relevance.sum(1) + sink, net(x)[:, 1], atol=1e-5), bool(delta.abs().max() < 1e-5)
            (True, True)
        """
        formatted, was_tuple = as_tuple(inputs)
        _check_floating(formatted)
        self._report(formatted, additional_forward_args, verbose)
        measure = self.measure(formatted, target, additional_forward_args)
        maps = _input_maps(measure, formatted, given, joint)
        attributions = as_given(tuple(_in_unit(measure.output, values, unit) for values in maps), was_tuple)
        return self._with_books(
            attributions, measure, measure.output, [_inputs_of(measure)], unit, return_convergence_delta, return_sink
        )

    def measure(
        self, inputs: Tensor | tuple[Tensor, ...], target: Any = None, additional_forward_args: Any = None
    ) -> RelevanceMeasure:
        """The measure behind the attributions, to be asked further: sinks, joints, conditionals.

        Args:
            inputs: As in :meth:`attribute`.
            target: As there.
            additional_forward_args: As there.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> NRM(net).measure(torch.randn(5, 3), 1).marginal("0").shape
            torch.Size([5, 4])
        """
        with torch.enable_grad():  # Captum's methods work under no_grad; its metrics call them so
            return RelevanceMeasure(
                self._unwrapped(),
                inputs,
                target,
                composite=self.composite,
                additional_forward_args=additional_forward_args,
            )

    def attribute_future(self) -> None:
        """Not there, as in Captum's LRP.

        Raises:
            NotImplementedError: Always.

        Examples:
            >>> NRM(nn.Linear(2, 2)).attribute_future()
            Traceback (most recent call last):
            NotImplementedError: attribute_future is not available for normalized relevance.
        """
        raise NotImplementedError("attribute_future is not available for normalized relevance.")

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: relevance is a contribution, not a sensitivity.

        Examples:
            >>> NRM(nn.Linear(2, 2)).multiplies_by_inputs
            True
        """
        return True

    def has_convergence_delta(self) -> bool:
        """True: sink and bypass are accounted for.

        Examples:
            >>> NRM(nn.Linear(2, 2)).has_convergence_delta()
            True
        """
        return True

    def compute_convergence_delta(self, attributions: Any, output: Tensor, accounted: Tensor | float = 0.0) -> Tensor:
        """``output - accounted - Σ attributions``, ``(N,)``, as in Captum's LRP.

        Args:
            attributions: A tensor or tuple of tensors, ``(N, …)``.
            output: The explained output, ``(N,)``.
            accounted: What sink and bypass carry, in the same unit.

        Examples:
            >>> method = NRM(nn.Linear(2, 2))
            >>> method.compute_convergence_delta(torch.tensor([[1.0, 2.0]]), torch.tensor([3.5]), accounted=0.25)
            tensor([0.2500])
        """
        parts = attributions if isinstance(attributions, tuple) else (attributions,)
        total = torch.stack([sample_sums(part) for part in parts]).sum(0)
        return output.flatten() - accounted - total

    # -- inside -----------------------------------------------------------------------------------------------

    def _unwrapped(self) -> nn.Module:
        return self.model.module if isinstance(self.model, nn.DataParallel) else self.model

    def _layer(self, layer: Any) -> Any:
        """A layer of the model that was given, as one of the model without its wrapper."""
        if not isinstance(self.model, nn.DataParallel):
            return layer
        if layer is self.model:
            return self.model.module
        names = {name for name, _ in self.model.module.named_modules()}
        is_wrapped = isinstance(layer, str) and layer.startswith("module.") and layer not in names
        return layer.removeprefix("module.") if is_wrapped else layer

    def _report(self, inputs: tuple[Tensor, ...], additional_forward_args: Any, verbose: bool) -> None:
        if verbose:
            with torch.enable_grad():
                print(coverage(self._unwrapped(), inputs, self.composite, additional_forward_args))

    def _with_books(
        self,
        attributions: Any,
        measure: RelevanceMeasure,
        output: Tensor,
        groups: list[list[Atom]],
        unit: Unit,
        with_delta: bool,
        with_sink: bool,
        is_listed: bool = False,
    ) -> Any:
        """Attributions, and the delta and sink of each group of taps if asked for."""
        scale = output if unit == "output" else torch.ones_like(output)
        found = [attributions]
        if with_delta:
            deltas = [_open(measure, group) * scale for group in groups]
            found.append(deltas if is_listed else deltas[0])
        if with_sink:
            sinks = [measure.sink_above(group) * scale for group in groups]
            found.append(sinks if is_listed else sinks[0])
        return found[0] if len(found) == 1 else tuple(found)


class LayerNRM(NRM, LayerAttribution):
    """Normalized relevance of the neurons of one or several layers, as a Captum attribution method.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        layer: A module, its name or ``at(…)``, a list of them (answered by one pass), or None for every layer of the
            measure.
        device_ids: Taken as in Captum's layer methods, and not needed: one device does the work.
        composite, residual, gain_limit, uncovered: As in :class:`NRM`.

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
    ) -> None:
        _check_device_ids(device_ids)
        NRM.__init__(self, model, composite, residual, gain_limit, uncovered)
        LayerAttribution.__init__(self, model, layer, device_ids)

    @overload  # type: ignore[override]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: Literal[False] = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
        *,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: Literal[False] = False,
    ) -> Maps | list[Maps]: ...
    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        return_convergence_delta: Literal[True],
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: Literal[False] = False,
    ) -> tuple[Maps | list[Maps], Tensor | list[Tensor]]: ...
    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
        *,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
    ) -> Any: ...
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
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
    ) -> Any:
        """Relevance of each neuron of the layers.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors. Of integers, relevance flows to the embeddings that look
                them up.
            target: Output to explain, in Captum's forms; see :meth:`NRM.attribute`.
            additional_forward_args: Further arguments of the model.
            return_convergence_delta: Also return what the books leave open, ``(N,)`` for each layer.
            attribute_to_layer_input: Relevance at the input of the layers instead of their output.
            verbose: Print which rule every step gets.
            given: Conditional relevance: given that walks are in this event.
            joint: Joint relevance with this event.
            unit: ``"output"`` or ``"measure"``; see :meth:`NRM.attribute`.
            return_sink: Also return what was absorbed above the layers, ``(N,)`` for each layer.

        Returns:
            A tensor for a layer (a tuple where it has several), a list for a list or for all layers; then, in a tuple
            with them, the deltas and the sinks in the same form if asked for.

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
        measure = self.measure(formatted, target, additional_forward_args)
        layers = measure.layers if self.layer is None else self.layer
        listed = layers if isinstance(layers, list) else [layers]
        side: Side = "input" if attribute_to_layer_input else "output"
        groups = [measure.taps_of(self._layer(layer), side) for layer in listed]
        flat = [tap for group in groups for tap in group]
        maps = measure.marginal(flat, given=given, joint=joint)
        values = {tap: _in_unit(measure.output, value, unit) for tap, value in maps.items()}
        attributions = [
            values[group[0]] if len(group) == 1 else tuple(values[tap] for tap in group) for group in groups
        ]
        is_listed = isinstance(layers, list)
        found = attributions if is_listed else attributions[0]
        return self._with_books(
            found, measure, measure.output, groups, unit, return_convergence_delta, return_sink, is_listed
        )


class NeuronNRM(NRM, NeuronAttribution):
    """Normalized relevance of the inputs for neurons inside the network, as a Captum attribution method.

    The measure starts at the selected neurons, so there is no target.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        layer: A module, its name or ``at(…)``.
        device_ids: Taken as in Captum's neuron methods, and not needed: one device does the work.
        composite, residual, gain_limit, uncovered: As in :class:`NRM`.

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
    ) -> None:
        _check_device_ids(device_ids)
        NRM.__init__(self, model, composite, residual, gain_limit, uncovered)
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
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_convergence_delta: bool = False,
        return_sink: bool = False,
    ) -> Any:
        """Relevance of each input entry for the selected neurons.

        Args:
            inputs: ``(N, …)``, or a tuple of such tensors.
            neuron_selector: As in Captum: an index, a tuple of indices and slices, or a function of the layer's output
                that returns a number for each sample. Of several neurons each starts with its activation.
            additional_forward_args: Further arguments of the model.
            attribute_to_neuron_input: Select among the inputs of the layer instead of its outputs.
            verbose: Print which rule every step gets.
            given: Conditional relevance: given that walks are in this event.
            joint: Joint relevance with this event.
            unit: ``"output"``: relevance, sink and bypass sum to the activation of the neurons; ``"measure"``: to 1.
            return_convergence_delta: Also return what the books leave open, ``(N,)``.
            return_sink: Also return what was absorbed on the way, ``(N,)``.

        Returns:
            Attributions in the form of the inputs; then, in a tuple with them, the delta and the sink if asked for.

        Raises:
            TargetError: The selector fits no neuron of the layer, or what it selects cancels.

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
        _check_floating(formatted)
        self._report(formatted, additional_forward_args, verbose)
        side: Side = "input" if attribute_to_neuron_input else "output"
        layer = self._layer(self.layer)
        neurons = Neurons(neuron_selector)
        with torch.enable_grad():
            measure = RelevanceMeasure(
                self._unwrapped(),
                formatted,
                start=neurons,
                output=layer if isinstance(layer, Atom) else at(layer, side=side),
                composite=self.composite,
                additional_forward_args=additional_forward_args,
            )
        maps = _input_maps(measure, formatted, given, joint)
        found = as_given(tuple(_in_unit(neurons.activation, values, unit) for values in maps), was_tuple)
        return self._with_books(
            found,
            measure,
            neurons.activation,
            [_inputs_of(measure)],
            unit,
            return_convergence_delta,
            return_sink,
        )


class JointNRM:
    """Joint relevance of the channels, or neurons, of two layers.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        upper: The layer that is nearer to the output, a module, its name or ``at(…)``.
        lower: The other one.
        composite, residual, gain_limit, uncovered: As in :class:`NRM`.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 10))
        >>> JointNRM(net, net[2], net[0]).attribute(torch.randn(2, 3, 6, 6), target=5).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        upper: Layer,
        lower: Layer,
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
            target: Output to explain, in Captum's forms; see :meth:`NRM.attribute`.
            additional_forward_args: Further arguments of the model.
            over: ``"channel"`` or ``"neuron"``.
            unit: ``"output"``, multiplied by the explained output, or ``"measure"``.

        Returns:
            ``(N, upper, lower)``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> x = torch.randn(5, 3)
            >>> joint = JointNRM(net, "2", "0").attribute(x, target=1)
            >>> torch.allclose(joint.sum(1), LayerNRM(net, "0").attribute(x, target=1), atol=1e-6)
            True
        """
        measure = self._inputs.measure(as_tuple(inputs)[0], target, additional_forward_args)
        upper, lower = self._inputs._layer(self.upper), self._inputs._layer(self.lower)
        return _in_unit(measure.output, measure.joint(upper, lower, over), unit)


def _check_device_ids(device_ids: Any) -> None:
    if isinstance(device_ids, Composite):
        raise TypeError(
            "the third argument is device_ids, as in Captum's layer and neuron methods; name the composite: "
            f"composite={type(device_ids).__name__}(…)."
        )


def _check_floating(inputs: tuple[Tensor, ...]) -> None:
    """Raises :class:`InputError` for tokens: they have no relevance, what looks them up has."""
    if any(is_index(value) for value in inputs):
        raise InputError(
            "an input is of integers, to whose entries no relevance can flow. Ask for that of its embedding: "
            "LayerNRM(model, model.embedding).attribute(tokens, …); or hand it over by additional_forward_args."
        )


def _inputs_of(measure: RelevanceMeasure) -> list[Atom]:
    """The taps of the inputs that the explained output depends on."""
    try:
        return measure.taps_of("input")
    except UnknownLayerError:
        return []


def _input_maps(
    measure: RelevanceMeasure, inputs: tuple[Tensor, ...], given: Event | None, joint: Event | None
) -> list[Tensor]:
    """Marginals at all inputs; zeros at those that the explained output does not depend on."""
    taps = [at("input")] if len(inputs) == 1 else [at("input", item=item) for item in range(len(inputs))]
    reached = set(_inputs_of(measure))
    known = [tap for tap in taps if tap in reached]
    maps = measure.marginal(known, given=given, joint=joint) if known else {}
    return [maps[tap] if tap in maps else torch.zeros_like(value) for tap, value in zip(taps, inputs, strict=True)]


def _in_unit(output: Tensor, value: Tensor, unit: Unit) -> Tensor:
    if unit not in ("output", "measure"):
        raise ValueError(f"unit={unit!r} is unknown; choose 'output' or 'measure'.")
    return value if unit == "measure" else value * output.reshape(-1, *(1,) * (value.ndim - 1))


def _open(measure: RelevanceMeasure, taps: list[Atom]) -> Tensor:
    """What mass, sink and bypass leave open, ``(N,)``."""
    if len(taps) == 1:
        (tap,) = taps
        return 1 - sample_sums(measure.marginal(tap)) - measure.sink(tap) - measure.bypass(tap)
    # No walk crosses two tensors of one tuple, so what none of them holds is the complement of their union.
    union = functools.reduce(operator.or_, taps)
    return 1 - sum(measure(tap) for tap in taps) - measure(~union)
