r"""Attention sinks (tokens such as ``[BOS]``): how much relevance each key token receives from the other tokens.

.. math:: s_k = \sum_{q \ne k} \mu\big((q, k) \mid \text{attention}\big)

Attention sinks are tokens, often the first one, to which most heads attend (Xiao et al., arXiv 2309.17453). They are
unrelated to the sinks that absorb relevance. This module measures whether attention sinks also receive most of the
relevance. The measurement is new in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..events.event import Attended, Event, at
from .measure import RelevanceMeasure


def attention_sinks(mu: RelevanceMeasure, layer: str, tokens: int | None = None) -> Tensor:
    """Computes the fraction of relevance in an attention layer that each token receives from other tokens.

    The diagonal of the attention matrix is excluded. The fractions sum to the mass that moves between tokens.

    Args:
        mu: A measure of a model with attention.
        layer: A layer that computes self-attention exactly once.
        tokens: Number of tokens; by default, the size of the first non-sample dimension of ``layer``.

    Returns:
        The fractions, of shape ``(N, tokens)``, dimensionless.

    Raises:
        EventError: If the layer does not compute attention.
        CancellationError, NullEventError: If the mass of the walks through the attention is zero or nearly cancels.

    Examples:
        >>> attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> mu = RelevanceMeasure(nn.Sequential(attention, nn.Flatten(), nn.Linear(40, 2)), torch.randn(3, 5, 8), 1)
        >>> attention_sinks(mu, "0.self_attn", 5).shape
        torch.Size([3, 5])
    """
    count = mu.shape(layer)[1] if tokens is None else tokens
    attention = Attended(at(layer))
    events: list[Event] = []
    for key in range(count):
        others = torch.arange(count) != key
        events.append(attention.pair(others, key))
    return mu(events, given=attention.token(slice(None))).T


__all__ = ["attention_sinks"]
