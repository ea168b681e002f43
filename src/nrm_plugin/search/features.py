r"""Features of dictionaries as taps, with the reconstruction error as further neurons of the same tap.

.. math:: y = W_D^\top f + b_D + e = (W_D^\top \;|\; I) \begin{pmatrix} f \\ e \end{pmatrix} + b_D

The layer is replaced with this sum, which is itself a linear layer, so any rule can be applied to it. Features and
error are neurons of one tap, so their masses sum to the mass of the layer, except for the relevance that the rule
assigns to the bias. Relevance of the features propagates through the encoder, and relevance of the error through the
original layer. The construction is new in this package.

Source: Marks et al., arXiv 2403.19647, for errors of autoencoders as nodes of a circuit; docs/features.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import InputError, brief
from ..events.event import ABSORBED, Event, at
from ..functional import FunctionCall, register_kernel
from ..functional.function_kernels import with_zeros
from ..kernels.base import Kernel
from ..measure.measure import RelevanceMeasure
from ..model.devices import on_one_device
from ..model.replaced_layers import Replacement, first_tensor, with_first_tensor, with_replaced
from .dictionaries import Crosscoder, Dictionary

Errors = Literal["pass", "absorb"]


def with_features(
    model: nn.Module, dictionaries: Mapping[str, Dictionary] | Crosscoder, errors: Errors = "pass"
) -> nn.Module:
    """Returns a copy of a model that exposes the features of some layers as taps.

    The copy shares the weights of the model and computes the same outputs; the given model is not modified. A layer
    ``"mlp"`` is replaced with ``"mlp.layer"`` (the layer itself), ``"mlp.encoder"``, ``"mlp.features"`` and
    ``"mlp.decoder"``. The tap ``"mlp.features"``, of shape ``(N, …, F + d)``, contains the ``F`` features, followed by
    the ``d`` neurons of the error and, if there is a skip path, its ``d`` neurons. The tap ``"mlp"`` remains the output
    of the layer. Composites that map names to rules must use ``"mlp.layer"``.

    Args:
        model: The network to extend.
        dictionaries: Dictionaries keyed by layer name, or a crosscoder. If a layer returns a tuple, its first tensor is
            reconstructed. Channels are in the last dimension.
        errors: ``"pass"`` to propagate the relevance of the error through the layer, or ``"absorb"`` to absorb it, as
            in attribution graphs.

    Raises:
        UnknownLayerError: If one of the layers is not in the model.
        InputError: If one of the layers contains another or, during the forward pass, if widths do not match.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> traced = with_features(net, {"1": Dictionary(torch.rand(4, 8), torch.rand(8, 4))})
        >>> mu = RelevanceMeasure(traced, torch.randn(5, 3), 1)
        >>> mu.marginal("1.features").shape
        torch.Size([5, 12])
        >>> masses = mu.marginal("1.features", over=feature_groups(traced, "1"))
        >>> masses.shape, torch.allclose(masses.sum(1) + mu.sink("1.features"), torch.ones(5), atol=1e-5)
        (torch.Size([5, 9]), True)
        >>> mu(at("1.features")[3] & at("input")[0]).shape
        torch.Size([5])
    """
    if errors not in ("pass", "absorb"):
        raise InputError(f"errors={brief(errors)} is unknown; choose 'pass' or 'absorb'.")
    crosscoder = dictionaries if isinstance(dictionaries, Crosscoder) else Crosscoder(dictionaries)
    like = _first_weight(model, torch.empty(0))
    board = _Board(len(crosscoder.dictionaries))

    def traced(site: str) -> Replacement:
        return lambda layer: WithFeatures(layer, site, crosscoder, board, errors, _first_weight(layer, like))

    return with_replaced(model, {site: traced(site) for site in crosscoder.dictionaries}, "features")


class _Board:
    """Features computed so far in a forward pass, which the decoders of later layers read."""

    def __init__(self, sites: int) -> None:
        self.sites, self.features = sites, dict[str, Tensor]()

    def put(self, site: str, features: Tensor) -> None:
        """Stores the features of a layer until all layers have been computed."""
        self.features[site] = features
        if len(self.features) == self.sites:
            self.features = {}

    def get(self, site: str, reader: str) -> Tensor:
        """Returns the features of an earlier layer for the layer ``reader``."""
        if site not in self.features:
            raise InputError(
                f"the features of {brief(site)} also reconstruct {brief(reader)}, which the model calls earlier. "
                "Features can reconstruct only later layers: remove this decoder."
            )
        return self.features[site]


class WithFeatures(nn.Module):
    """Module that wraps a layer and decomposes its output into learned features and the reconstruction error."""

    def __init__(
        self, layer: nn.Module, site: str, crosscoder: Crosscoder, board: _Board, errors: Errors, like: Tensor
    ) -> None:
        super().__init__()
        self.dictionary, self.site, self.board, self.errors = crosscoder.dictionaries[site], site, board, errors
        self.lower = crosscoder.lower(site)
        dictionary, width = self.dictionary, self.dictionary.width
        across = [crosscoder.decoders[lower, site] for lower in self.lower]
        identity = torch.eye(width, dtype=dictionary.decoder.dtype, device=dictionary.decoder.device)
        through = [identity] * (1 if dictionary.skip is None else 2)
        self.layer, self.features = layer, _Features()
        self.encoder = _linear(dictionary.encoder.T, dictionary.encoder_bias, like)
        decoder = torch.cat(on_one_device([*across, dictionary.decoder, *through]))
        self.decoder = _linear(decoder.T, dictionary.decoder_bias, like)
        self.skip = None if dictionary.skip is None else _linear(dictionary.skip, None, like)
        self.train(layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        values = self._checked(output, self.dictionary.width, "returns")
        source = values
        if self.dictionary.reads == "input":
            source = self._checked([*args, *kwargs.values()], len(self.dictionary.encoder), "reads")
        home = self.encoder.weight.device  # not that of a layer without weights, if the model is on several devices
        source, own = source.to(home), values.to(home)
        active = feature_activation(self.encoder(source), self.dictionary)
        skip = [] if self.skip is None else [self.skip(source)]
        lower = [self.board.get(site, self.site).to(home) for site in self.lower]
        error = reconstruction_error(own, [*lower, active], skip, self.decoder, self.errors)
        features = self.features(active, error, *skip)
        self.board.put(self.site, features[..., : len(self.dictionary)])
        total = self.decoder(torch.cat([*lower, features], -1))
        return with_first_tensor(output, without_rounding(total.to(values.device), values))

    def _checked(self, values: Any, width: int, verb: str) -> Tensor:
        tensor = first_tensor(values)
        if tensor is None or not tensor.ndim or tensor.shape[-1] != width:
            got = brief(values) if tensor is None else tuple(tensor.shape)
            raise InputError(
                f"layer {self.site!r} {verb} {got}, but its dictionary is for {width} neurons in the last dimension. "
                "Attach it to the layer on which it was trained."
            )
        return tensor

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the original layer, which the surrounding model might access."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _Features(nn.Module):
    """Module that concatenates features and errors. Its output is the tensor (tap) at which they are queried."""

    nrm_channel_dim: ClassVar[int] = -1

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, -1)


def _first_weight(module: nn.Module, otherwise: Tensor) -> Tensor:
    """Returns the first floating-point parameter, whose device and dtype a dictionary takes."""
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), otherwise)


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(like).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(like), requires_grad=False)
    return linear


# -- functions that the measure records as steps ----------------------------------------------------------------------


def feature_activation(pre: Tensor, dictionary: Dictionary) -> Tensor:
    """Applies :meth:`Dictionary.activate`. Relevance propagates from each feature to its pre-activation."""
    if has_torch_function((pre,)):
        active: Tensor = handle_torch_function(feature_activation, (pre,), pre, dictionary)
        return active
    return dictionary.activate(pre)


def reconstruction_error(
    values: Tensor, features: Sequence[Tensor], skip: Sequence[Tensor], decoder: nn.Linear, errors: Errors
) -> Tensor:
    """Computes ``values`` minus their reconstruction. Relevance propagates to ``values`` or is absorbed."""
    relevant = (values, *features, *skip)
    if has_torch_function(relevant):
        error: Tensor = handle_torch_function(
            reconstruction_error, relevant, values, list(features), list(skip), decoder, errors
        )
        return error
    missed: Tensor = values - decoder(torch.cat([*features, torch.zeros_like(values), *skip], -1))
    return missed


def without_rounding(total: Tensor, values: Tensor) -> Tensor:
    """Returns ``values`` but propagates relevance to ``total``, which equals ``values`` up to rounding.

    Where ``total`` should be zero, rounding may leave a tiny value instead, by which a rule would then divide.
    """
    if has_torch_function((total, values)):
        exact: Tensor = handle_torch_function(without_rounding, (total, values), total, values)
        return exact
    return values.clone()


@register_kernel(feature_activation, without_rounding)
def _first_input_kernel(call: FunctionCall) -> Kernel:
    return call.identity()


@register_kernel(reconstruction_error)
def _error_kernel(call: FunctionCall) -> Kernel:
    return call.identity() if call.args[4] == "pass" else _AbsorbingKernel(call.shapes)


class _AbsorbingKernel(Kernel):
    """Kernel that absorbs all relevance."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = list(shapes)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return with_zeros({}, relevance, self.shapes)

    pull_absolute = pull


# -- groups and events ------------------------------------------------------------------------------------------------


def feature_groups(model: nn.Module, site: str) -> Tensor:
    """Returns the group of each neuron of the tap ``f"{site}.features"``, for use as ``over=``.

    The groups are a tensor of shape ``(F + d,)``. Each feature is a group. The error is group ``F``, and the skip path,
    if there is one, is group ``F + 1``.

    Args:
        model: The model returned by :func:`with_features`.
        site: Name of the layer.

    Raises:
        InputError: If ``site`` names a layer without features.

    Examples:
        >>> dictionary = Dictionary(torch.rand(2, 4), torch.rand(4, 2))
        >>> traced = with_features(nn.Sequential(nn.Linear(3, 2)), {"0": dictionary})
        >>> feature_groups(traced, "0")
        tensor([0, 1, 2, 3, 4, 4])
    """
    dictionary = _sites(model, site)[site].dictionary
    rest = torch.arange(1 if dictionary.skip is None else 2).repeat_interleave(dictionary.width)
    return torch.cat([torch.arange(len(dictionary)), len(dictionary) + rest])


def reconstruction_errors(model: nn.Module, site: str | None = None) -> Event:
    """Returns the event that a walk passes through the reconstruction error of one layer, or of any layer.

    Args:
        model: The model returned by :func:`with_features`.
        site: Name of the layer, or None for all layers with features.

    Raises:
        InputError: If ``site`` names a layer without features.

    Examples:
        >>> dictionary = Dictionary(torch.rand(2, 4), torch.rand(4, 2))
        >>> traced = with_features(nn.Sequential(nn.Linear(3, 2)), {"0": dictionary})
        >>> reconstruction_errors(traced)
        at('0.features')[..., 4:6]
    """
    events = [_error_event(name, module.dictionary) for name, module in _sites(model, site).items()]
    return reduce(lambda first, second: first | second, events)


def _error_event(site: str, dictionary: Dictionary) -> Event:
    return at(f"{site}.features")[..., len(dictionary) : len(dictionary) + dictionary.width]


def _sites(model: nn.Module, site: str | None = None) -> dict[str, WithFeatures]:
    sites = {module.site: module for module in model.modules() if isinstance(module, WithFeatures)}
    if not sites or (site is not None and site not in sites):
        raise InputError(
            f"this model has no features{'' if site is None else f' at {brief(site)}'}; it has them at "
            f"{brief(list(sites))}. Pass the model that with_features() returned."
        )
    return sites if site is None else {site: sites[site]}


def replacement(mu: RelevanceMeasure, model: nn.Module) -> Tensor:
    r"""Computes the replacement score: the fraction of relevance that reaches the input without crossing an error.

    .. math:: \mu(\neg E \mid E \cup \text{survived}), \qquad E = \text{the walk crosses an error}

    Args:
        mu: A measure of ``model``.
        model: The model returned by :func:`with_features`.

    Returns:
        The fraction, of shape ``(N,)``. If no mass is negative and all features are nodes, this equals the replacement
        score of an attribution graph.

    Raises:
        CancellationError: If the mass of the walks in the condition nearly cancels.

    Examples:
        >>> dictionary = Dictionary(torch.rand(2, 4), torch.rand(4, 2))
        >>> traced = with_features(nn.Sequential(nn.Linear(3, 2)), {"0": dictionary})
        >>> replacement(RelevanceMeasure(traced, torch.randn(5, 3), 1), traced).shape
        torch.Size([5])

    Source: Ameisen et al., Circuit Tracing (2025), for the score; its formulation by events is new in this package.
    """
    errors = reconstruction_errors(model)
    return mu(~errors, given=errors | ~ABSORBED)


def completeness(mu: RelevanceMeasure, model: nn.Module) -> Tensor:
    r"""Computes the completeness score: the fraction of steps between nodes that do not end in an error.

    The nodes are the output, the features, the errors and the input. A walk ends at the first error that it crosses:

    .. math:: 1 - \frac{\mu(E)}{1 + \sum_l \mu(F_l \cap \neg E_{>l}) + \mu(E) + \mu(\text{survived} \cap \neg E)}

    where :math:`F_l` is the event that a walk crosses a feature of layer ``l``, and :math:`E_{>l}` the event that it
    crosses an error above that layer.

    Args:
        mu: A measure of ``model``.
        model: The model returned by :func:`with_features`.

    Returns:
        The fraction, of shape ``(N,)``. If no mass is negative, all features are nodes and nothing is absorbed, this
        equals the completeness score of an attribution graph.

    Examples:
        >>> dictionary = Dictionary(torch.rand(2, 4), torch.rand(4, 2))
        >>> traced = with_features(nn.Sequential(nn.Linear(3, 2)), {"0": dictionary})
        >>> completeness(RelevanceMeasure(traced, torch.randn(5, 3), 1), traced).shape
        torch.Size([5])

    Source: Ameisen et al., Circuit Tracing (2025), for the score; its formulation by events is new in this package.
    """
    sites = ordered_sites(mu, model)
    errors = reconstruction_errors(model)
    events, above = [errors, ~ABSORBED & ~errors], list[Event]()
    for site, module in sites.items():
        features: Event = at(f"{site}.features")[..., : len(module.dictionary)]
        events.append(reduce(lambda first, second: first & ~second, above, features))
        above.append(_error_event(site, module.dictionary))
    masses = mu(events)
    return 1 - masses[0] / (1 + masses.sum(0))


def ordered_sites(mu: RelevanceMeasure, model: nn.Module) -> dict[str, WithFeatures]:
    """Returns the layers with features, from the output to the input."""
    order = {name: number for number, name in enumerate(mu.layers)}
    sites = _sites(model)
    missing = [site for site in sites if f"{site}.features" not in order]
    if missing:
        raise InputError(f"the measure has no features at {brief(missing)}. Construct it with the same model.")
    return {site: sites[site] for site in sorted(sites, key=lambda site: -order[f"{site}.features"])}


__all__ = [
    "WithFeatures",
    "completeness",
    "feature_groups",
    "ordered_sites",
    "reconstruction_errors",
    "replacement",
    "with_features",
]
