from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import EventError


class Windowed(nn.Module):
    """Attention within windows of three tokens, whose layout is given.

    Args:
        layout: Order of samples ``b``, heads ``h`` and windows ``w`` before tokens and features. ``(bw)h`` and
            ``(bh)w`` merge two of them.
        heads: Number of heads.
        has_norm: Whether a normalization of each head's features precedes the last linear layer.
    """

    def __init__(self, layout: str, heads: int, has_norm: bool) -> None:
        super().__init__()
        self.layout, self.heads, self.has_norm = layout, heads, has_norm
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8 // heads)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        count, windows = len(x), x.shape[1] // 3
        whole = self.qkv(x).view(count, windows, 3, 3, self.heads, -1)  # sample, window, token, q k v, head, feature
        order = {"bhw": (0, 4, 1), "bwh": (0, 1, 4), "(bw)h": (0, 1, 4), "(bh)w": (0, 4, 1)}[self.layout]
        q, k, v = whole.permute(3, *order, 2, 5).unbind(0)
        if "(" in self.layout:
            q, k, v = (one.flatten(0, 1) for one in (q, k, v))
        z = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        if "(" in self.layout:
            z = z.unflatten(0, (count, -1))
        z = z.transpose(1, 2) if self.layout[-1] == "w" else z  # sample, window, head, token, feature
        if self.has_norm:
            z = self.norm(z)
        z = z.transpose(2, 3).reshape(count, -1, 8)
        result: Tensor = self.head((x + self.out(z)).mean(1))
        return result


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("layout", ["bhw", "bwh", "(bw)h", "(bh)w"])
def test_a_head_is_the_columns_that_the_next_layer_reads_from_it(layout, heads, has_norm):
    torch.manual_seed(0)
    net, x = Windowed(layout, heads, has_norm).double().eval(), torch.randn(2, 6, 8).double()
    mu = RelevanceMeasure(net, x, 1)
    read = mu.marginal(at("norm" if has_norm else "out", side="input"))
    columns = read.sum((1, 3, 4)) if has_norm else read.unflatten(-1, (heads, -1)).sum((1, 3))
    events = torch.stack([mu(at("blocks.0.attn").head(head)) for head in range(heads)], 1)
    torch.testing.assert_close(events, columns, atol=1e-10, rtol=1e-8)
    with pytest.raises(EventError, match=f"the attention has {heads} heads"):
        mu(at("blocks.0.attn").head(heads))
