"""A small decoder, and dictionaries for its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nrm_plugin import Dictionary


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A causal language model: token and position embeddings, blocks, a head."""

    def __init__(self, tokens: int = 11, width: int = 8, heads: int = 2, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.place = nn.Embedding(tokens, width), nn.Parameter(torch.randn(64, width) / 4)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def random_dictionary(width: int, count: int, seed: int, reads: str = "output", threshold: float = 0.0) -> Dictionary:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((width, count), (count, width), (count,), (width,))
    encoder, decoder, bias, decoder_bias = (torch.randn(s, generator=draw, dtype=torch.float64) / 2 for s in shapes)
    return Dictionary(encoder, decoder, bias, decoder_bias, threshold, reads=reads)


def transcoders(net: Decoder, count: int = 16) -> dict[str, Dictionary]:
    width = net.head.in_features
    return {f"blocks.{k}.mlp": random_dictionary(width, count, 10 + k, "input") for k in range(len(net.blocks))}
