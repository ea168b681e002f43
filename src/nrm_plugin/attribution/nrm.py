"""Relevance of inputs, the counterpart of Captum's ``LRP``."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, overload

import torch
from captum.attr._utils.attribution import GradientAttribution
from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..events.event import Atom, Event
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..model.checks import check_module
from ..model.devices import on_device_of
from ..model.inputs_and_outputs import Output, check_batched
from ..model.targets import sample_sums
from ..plan.reuse import measures_of
from ..recording.coverage import coverage
from .base import (
    WRAPPERS,
    Request,
    Unit,
    as_given,
    as_tuple,
    check_floating,
    convergence_delta,
    in_unit,
    input_relevance,
    input_taps,
    log_usage,
    reference_of,
    rules_for,
    sink_above,
    unwrapped,
    with_optional,
)

T = TypeVar("T", Tensor, tuple[Tensor, ...])


class NRM(GradientAttribution):
    """Captum attribution method for the normalized relevance of the inputs.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped and runs on one device.
        composite: A Zennit composite, or None for the default of this package.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        batched: As in :class:`~nrm_plugin.RelevanceMeasure`. With ``batched=False``, attributions have the shape of the
            inputs, and deltas and sinks have one element.

    Raises:
        InputError: If ``model`` is a function rather than a module. The layers of a function cannot be recorded.

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
        *,
        output: Output | Atom | None = None,
        batched: bool = True,
    ) -> None:
        check_module(model)
        check_batched(batched)
        super().__init__(model)
        self.model, self.output, self.batched = model, output, batched
        self.composite = normalize(composite, residual, gain_limit, uncovered)
        self._has_rules = composite is not None

    @overload
    def attribute(
        self,
        inputs: T,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: Literal[False] = False,
        verbose: bool = False,
        *,
        against: Any = None,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: Literal[False] = False,
        baselines: Any = None,
    ) -> T: ...
    @overload
    def attribute(
        self,
        inputs: T,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        *,
        against: Any = None,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
        baselines: Any = None,
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
        against: Any = None,
        given: Event | None = None,
        joint: Event | None = None,
        unit: Unit = "output",
        return_sink: bool = False,
        baselines: Any = None,
    ) -> Any:
        """Computes the relevance of each input element.

        Args:
            inputs: Inputs of shape ``(N, …)``, or a tuple of such tensors.
            target: The output to explain, in Captum's format: an int, or a tensor with a single int, for all samples;
                or a list or tensor with one int per sample. Use a tuple or a list of tuples for outputs with more
                dimensions, and None if each sample has a single output.
            additional_forward_args: Additional arguments for the model: a single one, or a tuple. They receive no
                relevance.
            return_convergence_delta: Whether to also return the convergence delta, of shape ``(N,)``: the explained
                output minus the sum of attributions, sink and bypass, which is zero up to rounding errors.
            verbose: Whether to print the rule applied at each step.
            against: Another output to contrast with, or ``"rest"`` for all other classes. If given, the attributions
                explain the difference between the target and this contrast; see :class:`~nrm_plugin.RelevanceMeasure`.
                With ``unit="output"``, relevance sums to this difference, which can be negative.
            given: Event to condition on.
            joint: Event to intersect with, for joint relevance.
            unit: ``"output"`` for relevance whose sum, including sink and bypass, is the explained output of each
                sample; ``"measure"`` for relevance that sums to 1.
            return_sink: Whether to also return the absorbed relevance, of shape ``(N,)``, in the same unit.
            baselines: Baselines in Captum's format, a tensor or number for each input. If given, the attributions
                explain the change of the output relative to the baselines; see ``reference`` of
                :class:`~nrm_plugin.RelevanceMeasure`. In this case, nothing is absorbed unless a composite is given.

        Returns:
            Attributions in the format of the inputs. If the delta or the sink is requested, a tuple that also contains
            them.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> x = torch.randn(5, 3)
            >>> relevance, delta, sink = NRM(net).attribute(
            ...     x, target=1, return_convergence_delta=True, return_sink=True)
            >>> torch.allclose(relevance.sum(1) + sink, net(x)[:, 1], atol=1e-5), bool(delta.abs().max() < 1e-5)
            (True, True)
        """
        formatted, was_tuple = as_tuple(inputs)
        check_floating(formatted)
        self._report(formatted, additional_forward_args, verbose)
        measure = self.measure(formatted, target, additional_forward_args, against, baselines)
        request = Request(given, joint, unit, return_convergence_delta, return_sink)
        return self._in_form(measure, measure.output, formatted, was_tuple, request)

    def measure(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        against: Any = None,
        baselines: Any = None,
    ) -> RelevanceMeasure:
        """Returns the measure behind the attributions, for queries such as sinks and joint relevance.

        Args:
            inputs: As in :meth:`attribute`.
            target: As in :meth:`attribute`.
            additional_forward_args: As in :meth:`attribute`.
            against: As in :meth:`attribute`.
            baselines: As in :meth:`attribute`.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> NRM(net).measure(torch.randn(5, 3), 1).marginal("0").shape
            torch.Size([5, 4])
        """
        with torch.enable_grad():  # Captum's metrics call attribute under no_grad
            return measures_of(self)(
                unwrapped(self.model),
                inputs,
                target,
                against=against,
                composite=rules_for(baselines, self.composite, self._has_rules),
                reference=reference_of(baselines, as_tuple(inputs)[0]),
                additional_forward_args=additional_forward_args,
                output=self.output,
                batched=self.batched,
            )

    def attribute_future(self) -> None:
        """Raises an error. As in Captum's ``LRP``, futures are not supported.

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
        """Always True: relevance is a contribution to the output rather than a sensitivity.

        Examples:
            >>> NRM(nn.Linear(2, 2)).multiplies_by_inputs
            True
        """
        return True

    def has_convergence_delta(self) -> bool:
        """Returns True: sink and bypass account for all relevance that does not reach the inputs.

        Examples:
            >>> NRM(nn.Linear(2, 2)).has_convergence_delta()
            True
        """
        return True

    def compute_convergence_delta(self, attributions: Any, output: Tensor, accounted: Tensor | float = 0.0) -> Tensor:
        """Computes ``output - accounted - Σ attributions``, as a tensor of shape ``(N,)``, as in Captum's LRP.

        Args:
            attributions: A tensor of shape ``(N, …)``, or a tuple of such tensors.
            output: The explained output, of shape ``(N,)``.
            accounted: The relevance of sink and bypass, in the same unit.

        Examples:
            >>> method = NRM(nn.Linear(2, 2))
            >>> method.compute_convergence_delta(torch.tensor([[1.0, 2.0]]), torch.tensor([3.5]), accounted=0.25)
            tensor([0.2500])
        """
        parts = attributions if isinstance(attributions, tuple) else (attributions,)
        sums = [sample_sums(part if self.batched else part.unsqueeze(0)) for part in parts]
        output = output.flatten()
        return output - accounted - torch.stack([on_device_of(one, output) for one in sums]).sum(0)

    # -- internal ---------------------------------------------------------------------------------------------

    def _layer(self, layer: Any) -> Any:
        """Returns the unwrapped model's counterpart of a layer in a ``DataParallel`` model."""
        if not isinstance(self.model, WRAPPERS):
            return layer
        if layer is self.model:
            return self.model.module
        names = {name for name, _ in self.model.module.named_modules()}
        is_wrapped = isinstance(layer, str) and layer.startswith("module.") and layer not in names
        return layer.removeprefix("module.") if is_wrapped else layer

    def _report(self, inputs: tuple[Tensor, ...], additional_forward_args: Any, verbose: bool) -> None:
        if verbose:
            output = None if isinstance(self.output, Atom) else self.output
            model, args = unwrapped(self.model), additional_forward_args
            with torch.enable_grad():
                print(coverage(model, inputs, self.composite, args, output=output, batched=self.batched))

    def _in_form(
        self, measure: RelevanceMeasure, output: Tensor, inputs: tuple[Tensor, ...], was_tuple: bool, request: Request
    ) -> Any:
        """Computes the input relevance in Captum's format, with the delta and the sink if requested."""
        relevance = input_relevance(measure, inputs, request.given, request.joint)
        attributions = as_given(tuple(in_unit(part, output, request.unit) for part in relevance), was_tuple)
        taps = input_taps(measure)
        delta = in_unit(convergence_delta(measure, taps), output, request.unit) if request.delta else None
        sink = in_unit(sink_above(measure, taps), output, request.unit) if request.sink else None
        return with_optional(attributions, delta, sink)
