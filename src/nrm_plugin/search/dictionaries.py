r"""Dictionaries of learned features: sparse autoencoders, transcoders and crosscoders.

.. math:: z = W_E^\top x + b_E, \qquad f_k = z_k \, [z_k > \theta_k] \, [z_k \text{ among the largest}], \qquad
          \hat y = W_D^\top f + b_D + W_S x, \qquad y = \hat y + e

A sparse autoencoder reads the tensor that it reconstructs, ``x = y``. A transcoder reads the input of a layer and
reconstructs its output. In a crosscoder, the features of a layer also contribute to the reconstruction of later layers.

Source: Bricken et al., Towards Monosemanticity (2023); Dunefsky et al., arXiv 2406.11944 (transcoders); Rajamanoharan
et al., arXiv 2404.16014 and 2407.14435 (gated and JumpReLU); Gao et al., arXiv 2406.04093 (top k); Lindsey et al.,
Sparse Crosscoders (2024); docs/features.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import InputError, brief

Reads = Literal["output", "input"]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Dictionary of learned features for one layer.

    Attributes:
        encoder: Weights of shape ``(d_in, F)``.
        decoder: Weights of shape ``(F, d_out)``; each row is the direction of a feature.
        encoder_bias: Bias of the encoder, of shape ``(F,)``, or None for zeros. If a bias is subtracted from the input,
            it must be folded into this bias.
        decoder_bias: Bias of the decoder, of shape ``(d_out,)``, or None for zeros.
        threshold: Pre-activations up to this threshold are set to zero. A number or a tensor of shape ``(F,)``. 0 gives
            ReLU, positive values give JumpReLU, and ``-math.inf`` disables the threshold.
        k: Maximum number of active features at each position, or None for no limit.
        skip: Weights of shape ``(d_out, d_in)`` of a linear skip path from the input to the reconstruction, or None.
        reads: ``"output"`` for an autoencoder, which reconstructs the output of a layer from itself; or ``"input"`` for
            a transcoder, which reconstructs it from the input of the layer.

    Raises:
        InputError: If the shapes do not match or a weight is not finite.

    Examples:
        >>> dictionary = Dictionary(torch.eye(4)[:, :3], torch.eye(4)[:3])
        >>> dictionary.encode(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
        tensor([[1., 0., 3.]])
        >>> dictionary.error(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
        tensor([[ 0., -2.,  0.,  4.]])
    """

    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor | None = None
    decoder_bias: Tensor | None = None
    threshold: Tensor | float = 0.0
    k: int | None = None
    skip: Tensor | None = None
    reads: Reads = "output"

    def __post_init__(self) -> None:
        if self.encoder.ndim != 2 or self.decoder.ndim != 2 or self.encoder.shape[1] != self.decoder.shape[0]:
            raise InputError(
                f"a dictionary of F features has an encoder (d_in, F) and a decoder (F, d_out); got "
                f"{tuple(self.encoder.shape)} and {tuple(self.decoder.shape)}."
            )
        d_in, count = self.encoder.shape
        shapes = {"encoder_bias": (count,), "decoder_bias": (self.width,), "skip": (self.width, d_in)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise InputError(f"{name} of this dictionary must have shape {shape}, got {tuple(value.shape)}.")
        if tuple(torch.as_tensor(self.threshold).shape) not in ((), (1,), (count,)):
            raise InputError(f"threshold={brief(self.threshold)}: give one number, or one for each feature.")
        if bool(torch.as_tensor(self.threshold).isnan().any()):
            raise InputError(f"threshold={brief(self.threshold)} of this dictionary is nan.")
        if self.k is not None and (not isinstance(self.k, int) or not 1 <= self.k <= count):
            raise InputError(f"k={brief(self.k)}: give 1 to {count}, the number of features.")
        if self.reads not in ("output", "input"):
            raise InputError(f"reads={brief(self.reads)} is unknown; choose 'output' or 'input'.")
        if self.reads == "output" and (d_in != self.width or self.skip is not None):
            raise InputError(
                f"a dictionary from {d_in} to {self.width} neurons, or with a skip path, is a transcoder: "
                "pass reads='input'."
            )
        for name, value in vars(self).items():
            if name != "threshold" and isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise InputError(f"{name} of this dictionary is not finite.")

    def __len__(self) -> int:
        """Returns the number of features ``F``."""
        return int(self.encoder.shape[1])

    @property
    def width(self) -> int:
        """Number of reconstructed neurons, ``d_out``.

        Examples:
            >>> Dictionary(torch.eye(4)[:, :3], torch.eye(4)[:3]).width
            4
        """
        return int(self.decoder.shape[1])

    def activate(self, pre: Tensor) -> Tensor:
        """Computes feature activations from the pre-activations of the encoder, both of shape ``(…, F)``.

        Examples:
            >>> Dictionary(torch.eye(3), torch.eye(3), threshold=1.5, k=1).activate(torch.tensor([1.0, 2.0, 3.0]))
            tensor([0., 0., 3.])
        """
        threshold = self.threshold.to(pre) if isinstance(self.threshold, Tensor) else self.threshold
        active = torch.where(pre > threshold, pre, 0.0)
        if self.k is None:
            return active
        largest = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, pre.topk(self.k, -1).indices, True)
        return torch.where(largest, active, 0.0)

    def encode(self, x: Tensor) -> Tensor:
        """Computes feature activations of shape ``(…, F)`` from ``x`` of shape ``(…, d_in)``.

        Examples:
            >>> Dictionary(torch.eye(2), torch.eye(2)).encode(torch.tensor([3.0, -1.0]))
            tensor([3., 0.])
        """
        bias = None if self.encoder_bias is None else self.encoder_bias.to(x)
        return self.activate(linear(x, self.encoder.T.to(x), bias))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Computes the reconstruction of shape ``(…, d_out)`` from ``x`` of shape ``(…, d_in)``.

        The reconstruction includes biases and the skip path.

        Examples:
            >>> Dictionary(torch.eye(2), torch.eye(2)).reconstruct(torch.tensor([3.0, -1.0]))
            tensor([3., 0.])
        """
        bias = None if self.decoder_bias is None else self.decoder_bias.to(x)
        reconstruction = linear(self.encode(x), self.decoder.T.to(x), bias)
        return reconstruction if self.skip is None else reconstruction + linear(x, self.skip.to(x))

    def error(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Computes the reconstruction error of ``y`` (by default, of ``x``, as is usual for an autoencoder).

        Examples:
            >>> Dictionary(torch.eye(2), torch.eye(2)).error(torch.tensor([3.0, -1.0]))
            tensor([ 0., -1.])
        """
        return (x if y is None else y) - self.reconstruct(x)


@dataclass(frozen=True, eq=False)
class Crosscoder:
    """Dictionaries for several layers. Features also contribute to the reconstruction of later layers.

    Attributes:
        dictionaries: Dictionaries keyed by layer name, each with the encoder and the decoder of its layer.
        decoders: Weights of shape ``(F_lower, d_upper)`` from the features of a layer to the output of a later layer,
            keyed by pairs of layer names ``(lower, upper)``.

    Raises:
        InputError: If a decoder does not match its layers.

    Examples:
        >>> one = Dictionary(torch.eye(4), torch.eye(4), reads="input")
        >>> Crosscoder({"0": one, "2": one}, {("0", "2"): torch.zeros(4, 4)}).lower("2")
        ['0']
    """

    dictionaries: Mapping[str, Dictionary]
    decoders: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (lower, upper), weights in self.decoders.items():
            if lower == upper or lower not in self.dictionaries or upper not in self.dictionaries:
                raise InputError(
                    f"the decoder from {brief(lower)} to {brief(upper)} needs two different layers with dictionaries."
                )
            shape = (len(self.dictionaries[lower]), self.dictionaries[upper].width)
            if tuple(weights.shape) != shape:
                raise InputError(
                    f"the decoder from {brief(lower)} to {brief(upper)} must have shape {shape}, got "
                    f"{tuple(weights.shape)}."
                )

    def lower(self, site: str) -> list[str]:
        """Returns the earlier layers whose features contribute to the reconstruction of ``site``.

        Examples:
            >>> Crosscoder({"0": Dictionary(torch.eye(2), torch.eye(2))}).lower("0")
            []
        """
        return [lower for lower, upper in self.decoders if upper == site]


__all__ = ["Crosscoder", "Dictionary", "Reads"]
