"""The relevance measure of a model on given inputs, with one method per query."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Unpack, overload

from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered
from ..events.event import Atom, Event
from ..kernels.normalization import Residual
from ..model.checks import unwrapped
from ..model.inputs_and_outputs import Call, Inputs, Output
from ..model.trace_guards import uncollected
from ..recording.propagation import Cost
from ..recording.recording import Recording
from . import conservation
from .conditions import Condition, event_list
from .conservation import Kind
from .flow import flow_graph, ordered_taps, with_groups
from .flow_graph import TOP, FlowGraph
from .group_search import K
from .groups import Over, over_each
from .layer_groups import Groups
from .layer_loops import KeptAnswers, Loops
from .layer_taps import Layer, layer_list, several_layers
from .memory_budget import check_memory
from .partitions import Names
from .query_description import explanation
from .query_passes import query
from .recording_properties import Recorded
from .references import Slopes, composite_of, reference_of
from .start import start_of
from .totals import pass_totals


class RelevanceMeasure(Recorded):
    r"""Relevance as a normalized signed measure on the walks of a network, with one measure per sample.

    .. math:: \mu(w) = \mu(n_L) \prod_l \tilde T_{n_l n_{l+1}}, \qquad
              \mu(A) = \sum_{w \in A} \mu(w), \qquad \mu(\Omega) = 1

    The model is run once, or several times if memory is limited, and is not modified. All queries are computed from
    this recording, and their results do not require gradients.

    Args:
        model: The network, in evaluation mode.
        inputs: A tensor of shape ``(N, …)``, a tuple of such tensors, or a mapping whose items are passed as keyword
            arguments. In a mapping, only floating-point tensors receive relevance. If the inputs are integers, such as
            token ids, the embedding rows that they select receive the relevance.
        target: The output to explain, in Captum's format (int, tuple, list or tensor), or a function that computes it
            from the outputs of shape ``(N, …)``, such as ``lambda outputs: outputs.argmax(1)``. None if each sample has
            a single output.
        composite: A Zennit composite, or None for :class:`~nrm_plugin.composites.NRMDefault`. A ``Normalized``
            composite keeps its own settings.
        residual: Treatment of the relevance that a rule does not propagate: ``"redistribute"`` (the default) or
            ``"sink"``.
        gain_limit: Largest gain ``G`` of a column, 2 by default; ``math.inf`` removes the effect of ε and bias.
        start: Signed weights of the outputs, or a function that computes them from the outputs; used in place of a
            target.
        against: Outputs to contrast the target with: ``"rest"`` for all other classes, weighted by their softmax;
            another target; or a function of the outputs that returns a target or the weights of all outputs. The
            measure then explains the difference between the target and these outputs. The explained scalar is the
            weighted sum :math:`\sum_k s_k f_k`, which can be negative. The sum is fused with the last layer and becomes
            the tap ``"output"``, of shape ``(N, 1)``.
        reference: A reference (baseline input) :math:`x^0`, in the form of the inputs, or a single sample that serves
            as the reference of all inputs. The measure then explains the difference :math:`\sum_k s_k (f_k(x) -
            f_k(x^0))`. Without a composite, every operation propagates relevance along its slope between reference and
            input, and nothing is absorbed; with a composite, its rules are applied to differences. The start vector may
            sum to 0. A list of references defines the mixture :math:`\sum_b \Delta f_b \mu_b / \sum_b \Delta f_b`.
        slopes: ``"secant"`` for slopes between reference and input, or ``"tangent"`` for derivatives at the input,
            whose linearization error is absorbed.
        additional_forward_args: Additional positional arguments for the model, as a tuple or a single argument.
        additional_forward_kwargs: Additional keyword arguments for the model.
        output: The tensor to explain if the model returns several: a key, an index, or a function of the returned
            value. By default, the only tensor, ``"logits"`` or ``"out"``. If this is a tap ``at(layer)``, the measure
            explains the tap as if it were the output of the model.
        batched: Whether the first dimension of the inputs indexes samples. Pass False if it indexes, for example, the
            nodes of a graph or the time steps of a sequence, which together form one sample. Events and targets then
            index tensors as the model does, ``at("conv1")[node, feature]``, and results have an additional first
            dimension of size one.
        uncovered: Treatment of layers without a rule: ``"error"`` (the default) or ``"gradient"``.
        max_memory: Memory budget in bytes for the tensors stored in the recording and for the relevance vectors of one
            pass. If the recording exceeds the budget, each pass reruns the model and processes the recording part by
            part, with the same results. By default, the recording is not limited; vectors are limited to 128 MiB on a
            CPU, where more memory would be slower, and to 1 GiB on other devices.

    Raises:
        TypeError: If settings are passed in addition to a ``Normalized`` composite.
        InputError, TargetError, ModelStateError, GradModeError: If an argument is invalid for the model.
        UncoveredLayerError, UnsupportedOperationError, UnsupportedRuleError: If the rules do not support the model.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), target=1)
        >>> mu(at("0")[2]).shape, mu.marginal("input", given=at("input")).shape
        (torch.Size([5]), torch.Size([5, 3]))

    The examples of the methods continue this one.

    Source: arXiv 2606.00557 for the measure; docs/measure.md for the parts that are new in this package.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        target: Any = None,
        *,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        start: Any = None,
        against: Any = None,
        reference: Any = None,
        slopes: Slopes = "secant",
        additional_forward_args: Any = None,
        additional_forward_kwargs: Mapping[str, Any] | None = None,
        output: Output | Atom | None = None,
        batched: bool = True,
        uncovered: Uncovered | None = None,
        max_memory: float | None = None,
    ) -> None:
        self._max_memory = check_memory(max_memory)
        self.composite = composite_of(composite, residual, gain_limit, uncovered, reference)
        call = Call(inputs, additional_forward_args, additional_forward_kwargs, batched)
        call, recorded = reference_of(call, reference, slopes)
        with uncollected():
            self._recording = Recording(unwrapped(model), call, self.composite, output, recorded, self._max_memory)
        if self._recording.parts is not None:
            self._one_query = threading.RLock()
        self._start, self._output = start_of(self._recording, target, start, against)
        self._is_difference = against is not None or reference is not None
        self.cost = Cost()
        self._loops, self._kept = Loops(), KeptAnswers()

    @overload
    def marginal(self, layer: Layer, over: Over | None = ..., **of: Unpack[Condition]) -> Tensor: ...
    @overload
    def marginal(self, layer: list[Any], over: Over | None = ..., **of: Unpack[Condition]) -> dict[Any, Tensor]: ...
    @query
    def marginal(
        self,
        layer: Any,
        over: Over | None = None,
        *,
        given: Event | Sequence[Event] | None = None,
        joint: Event | Sequence[Event] | None = None,
        min_ratio: float | None = None,
    ) -> Tensor | dict[Any, Tensor]:
        r"""Returns the mass of the walks through each neuron of a tap.

        .. math:: \mu(n_l = i) = \mu(\{w : w \text{ crosses } i\})

        Args:
            layer: Tap name, module or ``at(…)``, or a list of these, which are evaluated in one pass.
            over: ``"channel"`` to sum over all dimensions except samples and channels; ``"position"`` to sum over
                channels; or an integer tensor with a label for every neuron, to sum over neurons with the same label,
                of shape ``(N, groups)``.
            given: The event to condition on, for ``μ(n_l = i | event)``, or a list of events, for one map per event.
            joint: An event to intersect with, for ``μ(n_l = i and event)``, without division by the mass of the event.
            min_ratio: Smallest ``|μ(event)|``, relative to its variation, that is accepted as a divisor for ``given``.

        Returns:
            A dimensionless tensor of shape ``(N, *shape)``, or ``(E, N, *shape)`` for a list of ``E`` events; a
            dictionary of tensors for a list of layers. For each sample, the marginal, the sink above the tap and the
            bypass sum to 1.

        Raises:
            UnknownLayerError: If no tap has one of the given names; the message lists similar names.
            NullEventError, CancellationError: If the mass of ``given`` is zero or nearly cancels.

        Examples:
            >>> maps = mu.marginal(["1", "input"])
            >>> maps["input"].shape
            torch.Size([5, 3])
            >>> each = mu.marginal("input", joint=[at("1")[k] for k in range(4)])
            >>> torch.allclose(each.sum(0), maps["input"], atol=1e-5)
            True

        Source: docs/measure.md.
        """
        layers, is_one = layer_list(layer)
        maps = self._maps([self._tap(item) for item in layers], over, given, joint, min_ratio)
        return maps[0] if is_one else dict(zip(layers, maps, strict=True))

    @query
    def sink(self, layer: Layer, kind: Kind | None = None) -> Tensor:
        """Returns the relevance absorbed between the output and a layer (tap), as a tensor of shape ``(N,)``.

        Args:
            layer: Tap name, module or ``at(…)``.
            kind: ``"residual"`` for the mass that rules do not propagate, or ``"constants"`` for the mass that ends at
                parameters, buffers and other constants; by default, both.

        Examples:
            >>> total = mu.marginal("1").sum(1) + mu.sink("1") + mu.bypass("1")
            >>> torch.allclose(total, torch.ones(5), atol=1e-5)
            True
        """
        return self._mixed(conservation.absorbed(self._totals, [self._tap(layer)], kind))

    @query
    def sink_above(self, taps: Sequence[Atom]) -> Tensor:
        """Returns the relevance absorbed above any of the given taps, as a tensor of shape ``(N,)``.

        For example, the taps may be the tensors in a tuple returned by one module.

        Examples:
            >>> torch.equal(mu.sink_above(mu.taps_of("0")), mu.sink("0"))
            True
        """
        return self._mixed(conservation.absorbed(self._totals, [self._tap(tap) for tap in taps]))

    @query
    def bypass(self, layer: Layer) -> Tensor:
        """Returns the mass of the walks that neither cross a tap nor are absorbed above it.

        The result has one value per sample.

        Examples:
            >>> mu.bypass("1")
            tensor([0., 0., 0., 0., 0.])
        """
        return self._mixed(conservation.bypassing(self._totals, self._tap(layer)))

    @query
    def sinks(self, kind: Kind | None = None) -> dict[str, Tensor]:
        """Returns the mass absorbed in each step, as tensors of shape ``(N,)``, keyed by step name.

        Steps that absorb nothing are omitted.

        Examples:
            >>> from zennit.composites import EpsilonPlus
            >>> leaky = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=EpsilonPlus(), residual="sink")
            >>> sorted(leaky.sinks())
            ['0', '2']
        """
        return {name: self._mixed(mass) for name, mass in conservation.step_sinks(self._totals, kind).items()}

    @query
    def variation(self, layer: Layer) -> Tensor:
        r"""Returns the tap variation ``Σ_j |μ(j)| + Σ|absorbed above| + |bypass|`` of each sample.

        The variation is at least 1. A value above 1 means that some of this relevance is negative, either at a neuron,
        in the sink or in the bypass.

        Examples:
            >>> bool((mu.variation("1") >= 0.999).all())
            True
        """
        return self._mixed(conservation.tap_variation(self._totals, self._tap(layer)))

    @query
    def walk_variation(self, surviving: bool = False) -> Tensor:
        r"""Returns the walk variation ``|μ|(Ω) = Σ_w |μ(w)|`` of each sample.

        It is 1 if and only if no walk is negative. The walk variation is an upper bound on every ``|μ(A)|`` and,
        multiplied by the order of the machine precision, on the rounding errors of all sums. For signed rules, it grows
        with depth.

        Args:
            surviving: Whether to condition the measure on survival. The sum then runs over the walks that reach an
                input and is divided by the absolute value of their mass.

        Raises:
            NullEventError: If ``surviving`` is set and no relevance of a sample survives.

        Examples:
            >>> bool((mu.walk_variation() >= mu.variation("1") - 1e-4).all())
            True
        """
        totals = pass_totals(self._recording, self._start.abs(), absolute=True)
        self.cost = totals.cost
        return self._mixed(conservation.walk_variation(totals, self._totals if surviving else None))

    @query
    def __call__(
        self, event: Event | Sequence[Event], given: Event | None = None, *, min_ratio: float | None = None
    ) -> Tensor:
        r"""Returns the mass of an event, ``μ(A)``, or its conditional mass, ``μ(A | B) = μ(A & B) / μ(B)``.

        Args:
            event: An event, or a list of events, which are evaluated in one pass.
            given: The event to condition on.
            min_ratio: Smallest ``|μ(B)|``, relative to its variation, that is accepted as a divisor; by default 1e-3 in
                float32 and 1e-8 in float64. With 0, every nonzero divisor is accepted.

        Returns:
            The mass for each sample, of shape ``(N,)``, or ``(E, N)`` for a list of ``E`` events.

        Raises:
            NullEventError: If no walk with nonzero mass satisfies the condition.
            CancellationError: If the positive and negative walks of the condition nearly cancel.
        """
        events, is_single = event_list(event)
        mass = self._masses(events, given, min_ratio)
        return mass[0] if is_single else mass

    @overload
    def conditional(self, event: Event, layer: Layer) -> Tensor: ...
    @overload
    def conditional(self, event: Event, layer: None = ...) -> dict[str, Tensor]: ...
    @query
    def conditional(self, event: Event, layer: Layer | None = None) -> Tensor | dict[str, Tensor]:
        """Returns ``μ(event given j)`` for every neuron ``j`` of a tap above the event, in shape ``(N, *shape)``.

        The query takes one transposed pass. It is defined even for neurons with ``μ(j) = 0``.

        Args:
            event: An event over taps below ``layer``.
            layer: The tap, or None for a dictionary of all taps above the event.

        Raises:
            EventError: If the event refers to a tap that is not below ``layer``.

        Examples:
            >>> below = mu.conditional(at("input")[0], "2")
            >>> torch.allclose(below[:, 1], mu(at("input")[0]), atol=1e-5)
            True
        """
        maps = self._conditionals(event, layer)
        return maps if layer is None else maps[""]

    @query
    def joint(self, upper: Layer, lower: Layer, over: Over | tuple[Over, Over] = "channel") -> Tensor:
        """Returns the joint relevance of all channel pairs of a tap and a lower tap, in shape ``(N, upper, lower)``.

        Args:
            upper: The upper tap, which walks cross first.
            lower: A tap below ``upper``.
            over: ``"channel"``, ``"position"``, ``"neuron"``, or an integer tensor with the group of every neuron; or a
                pair of these, for the upper and the lower tap.

        Raises:
            EventError: If ``lower`` is not below ``upper``.

        Examples:
            >>> joint = mu.joint("2", "0")
            >>> joint.shape, torch.allclose(joint.sum(1), mu.marginal("0"), atol=1e-5)
            (torch.Size([5, 2, 4]), True)
        """
        return self._joints([upper, lower], [over], "joint relevance takes an upper tap and then a lower one")[0]

    @query
    def joints(self, layers: Sequence[Layer], over: Over | Sequence[Over] = "channel") -> list[Tensor]:
        """Returns the joint relevance of each pair of consecutive layers in ``layers``, by default between channels.

        Each pair yields one tensor of shape ``(N, upper, lower)``.
        The marginals of all layers are computed in one pass. If two layers are separated only by a single linear layer
        and by operations that act on each channel separately (ReLU, max pooling), the joint relevance of all their
        channels costs one weight gradient.

        Args:
            layers: Two or more layers, each below the previous layer.
            over: ``"channel"``, ``"position"``, ``"neuron"`` or labels for all layers, or a list with one item per
                layer.

        Raises:
            EventError: If a layer is not below the previous layer.

        Examples:
            >>> [tuple(joint.shape) for joint in mu.joints(["2", "0", "input"])]
            [(5, 2, 4), (5, 4, 3)]
        """
        overs = list(pairwise(over_each(over, len(layers := several_layers(layers)))))
        return self._joints(layers, overs, "list layers from the output to the input")

    def flow(
        self,
        layers: Sequence[Layer],
        over: Any = "channel",
        *,
        top: int | None = TOP,
        min_mass: float | None = None,
        coverage: float | None = None,
        names: Mapping[str, Names] | None = None,
        sample: int | None = None,
        k: int = K,
        groups: Groups | None = None,
    ) -> FlowGraph:
        """Computes the flow of relevance between groups of neurons in several layers, as a graph of joint relevance.

        All masses are multiplied by :attr:`sign`, which is -1 if the measure explains a negative difference.

        Args:
            layers: The layers, in any order; for any two of them, one must be below the other.
            over: Grouping of the neurons: ``"channel"``, ``"position"``, ``"neuron"``, integer labels, or boolean masks
                keyed by name; or a dictionary of these keyed by layer name, with channels as the default. ``"groups"``
                divides the channels of each layer into ``k`` groups that preserve most of the dependence between
                layers, without a rest; see :func:`~nrm_plugin.find_groups`.
            top: Maximum number of groups to show per layer, by absolute mass, or None for no limit. All other neurons
                form one node, the rest.
            min_mass: Smallest absolute mass of a shown group.
            coverage: Fraction of the absolute mass to show in each layer, such as 0.9, with as few groups as possible.
            names: Names of the groups in each layer, as lists or dictionaries, such as ``{"output": classes}``.
            sample: Index of the sample; required if the measure has several.
            k: Number of groups in a layer for ``over="groups"``.
            groups: Groups returned by :func:`~nrm_plugin.find_groups`, which apply to all of their layers.

        Raises:
            FlowError, InputError: If a threshold is out of range or the sample does not exist.
            EventError: If neither of two layers is below the other, or if the groups do not match their layer.

        Examples:
            >>> graph = mu.flow(["output", "1", "input"], top=2, names={"output": ["cat", "dog"]}, sample=0)
            >>> graph.nodes[0].label, len(graph.joints)
            ('dog', 2)

        Source: docs/flow.md.
        """
        taps = ordered_taps(self, layers)
        over, names, top = with_groups(self, taps, over, names, k, groups, top)
        with self._sharing([layer for layer, _ in taps]):
            graph = flow_graph(self, taps, over, top, min_mass, coverage, names, sample)
        return graph if groups is None else replace(graph, origin=groups.origin)

    def explain(self, event: Event, given: Event | None = None) -> str:
        """Describes a query by its formula, its meaning in words and its cost.

        Examples:
            >>> print(mu.explain(at("0")[1] & at("input")[2]))
            μ(at('0')[1] & at('input')[2])
            The share of relevance carried by the walks that cross '0' at [1] and cross 'input' at [2].
            Cost: ...
        """
        return explanation(self._recording, event, given)
