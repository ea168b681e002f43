"""Layers without a single activation raise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.errors import InputError


class Odd(nn.Module):
    """Layers that are called twice or never, or return two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair, self.head = nn.ReLU(), nn.ReLU(), nn.LSTM(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(x) + 1) + self.pair(x[None])[0][0])


BATCH = [(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [("twice", "is called more than once"), ("never", "was not called"), ("pair", "returns no tensor")],
)
def test_a_layer_without_a_single_activation_raises(layer, message):
    with pytest.raises(InputError, match=f"'{layer}' {message}"):
        find_references(Odd().eval(), BATCH, [layer], by=["activation"])
