"""Properties of a measure that require no propagation: layer names and shapes, outputs, and the explained scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from ..composites import Normalized
from ..events.event import Atom, Side
from .layer_taps import Layer, taps_of
from .query_passes import QueryPasses
from .start import every_one


class Recorded(QueryPasses):
    """Base class of the measure that provides the properties of its recording.

    Attributes:
        composite: Composite that assigned the normalized rules.
    """

    composite: Normalized
    _output: Tensor
    _is_difference = False

    @property
    def layers(self) -> list[str]:
        """Names of the taps, in execution order.

        Examples:
            >>> mu.layers
            ['input', '0', '1', '2', 'output']
        """
        return self._recording.taps.layers

    @property
    def ends(self) -> list[str]:
        """Names of the taps at which walks end: the inputs, or the embedding rows that integer inputs select.

        Examples:
            >>> mu.ends
            ['input']
        """
        return self._recording.taps.ends

    @property
    def sites(self) -> list[str]:
        """Names of transformer sites, such as ``blocks.1.attn.v``, which can be used like tap names.

        In addition, ``blocks.1.attn.head.3`` and ``blocks.1.mlp.neuron.17`` stand for the events that a walk crosses a
        head of ``blocks.1.attn`` or a neuron of ``blocks.1.mlp``. Sites are derived from the recording; a model without
        residual connections has none.

        Examples:
            >>> mu.sites
            []
        """
        return list(self._recording.taps.sites)

    @property
    def outputs(self) -> Tensor:
        """The explained outputs as the model returned them, detached, of shape ``(N, …)``.

        Examples:
            >>> torch.equal(mu.outputs[:, 1], mu.output)
            True
        """
        return every_one(self._recording.outputs(), self._recording.references)

    @property
    def output(self) -> Tensor:
        r"""The explained output :math:`\sum_k s_k f_k / \sum s`, of shape ``(N,)``.

        With ``residual="sink"``, a mass times this output is the relevance of plain LRP.

        With ``against``, this is :math:`g = \sum_k s_k f_k`, which is negative if the contrasted outputs exceed the
        target. The measure is nevertheless normalized to 1. Positive relevance is then evidence against the target.

        Examples:
            >>> mu.output.shape
            torch.Size([5])
        """
        return self._output.clone()

    @property
    def explains_difference(self) -> bool:
        """True if the measure explains a difference between outputs (``against``) or from a reference (``reference``).

        Examples:
            >>> mu.explains_difference
            False
        """
        return self._is_difference

    @property
    def sign(self) -> Tensor:
        """Sign of the explained difference, of shape ``(N,)``, or 1 if the measure does not explain a difference.

        Multiplied by the sign, positive relevance is evidence for the target, even if the explained difference is
        negative. Multiply maps by the sign before plotting or summing them, as flows, sweeps and the commands do.

        Examples:
            >>> mu.sign
            tensor([1., 1., 1., 1., 1.])
            >>> difference = RelevanceMeasure(net, torch.randn(5, 3), target=1, against=0)
            >>> torch.equal(difference.sign, difference.output.sign())
            True
        """
        return self._output.sign() if self.explains_difference else torch.ones_like(self._output)

    @property
    def parts(self) -> int:
        """Number of parts into which the recording is divided to fit ``max_memory``; 1 if it fits as a whole.

        Examples:
            >>> mu.parts, RelevanceMeasure(net, torch.randn(5, 3), target=1, max_memory=100).parts
            (1, 3)
        """
        parts = self._recording.parts
        return 1 if parts is None else len(parts.ranges)

    @property
    def batch(self) -> int:
        """Number of samples.

        Examples:
            >>> mu.batch
            5
        """
        return self._recording.samples.count // self._recording.references

    def shape(self, layer: Layer) -> torch.Size:
        """Returns the shape of a tap with samples first, such as ``(N, T, C)`` for a tensor of shape ``(T, N, C)``.

        Examples:
            >>> mu.shape("1")
            torch.Size([5, 4])
        """
        count, *inner = self._tap(layer).shape
        return torch.Size((count // self._recording.references, *inner))

    def _device(self, layer: Layer) -> torch.device:
        """Returns the device of a tap."""
        return self._recording.graph.device(self._tap(layer).place)

    def channel_dim(self, layer: Layer) -> int:
        """Returns the channel dimension of a tap, such as 1 for shape ``(N, C, H, W)`` and 2 for ``(N, tokens, C)``.

        Raises:
            UnknownLayerError: If no tap has this name; the message lists similar names.

        Examples:
            >>> mu.channel_dim("1")
            1
        """
        tap = self._tap(layer)
        return tap.channel_dim % len(tap.shape)

    def taps_of(self, layer: Layer, side: Side = "output") -> list[Atom]:
        """Returns the taps of a layer, one for each tensor that the layer returns.

        Raises:
            UnknownLayerError: If no tap has this name.

        Examples:
            >>> mu.taps_of("1")
            [at('1')]
        """
        return taps_of(self._recording, layer, side)

    def __repr__(self) -> str:
        rules, settings = type(self.composite.composite).__name__, self.composite.normalization
        return (
            f"RelevanceMeasure({self.batch} samples, {len(self._recording.taps)} taps, {rules}, "
            f"residual={settings.residual!r}, gain_limit={settings.gain_limit})"
        )
