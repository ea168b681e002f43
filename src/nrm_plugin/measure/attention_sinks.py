r"""The share of relevance through an attention layer that arrives at each key token from other tokens.

.. math:: s_k = \sum_{q \ne k} \mu\big((q, k) \mid \text{attention}\big)

Attention sinks are tokens, often the first, that most heads attend to. Whether they also receive the relevance is a
query. The measure of sinks by relevance is ours; see Xiao et al., arXiv 2309.17453, for attention sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..events.event import Attended, Event, at
from .measure import RelevanceMeasure


def attention_sinks(mu: RelevanceMeasure, layer: str, tokens: int | None = None) -> Tensor:
    """Returns the share of relevance through an attention that arrives at each token from other tokens.

    The diagonal is left out, so that the shares sum to the mass that moves between tokens.

    Args:
        mu: The measure.
        layer: A layer that computes one attention of a sequence to itself.
        tokens: Number of tokens; by default that of the tap ``layer``, whose tokens are in the first dimension after
            the samples.

    Returns:
        ``(N, tokens)``, dimensionless.

    Raises:
        EventError: If the layer computes no attention.
        CancellationError, NullEventError: If the mass of the walks through the attention is zero or cancels.

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
