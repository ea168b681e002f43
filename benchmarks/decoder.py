"""A Llama-like decoder in plain PyTorch, so that the timing does not depend on the code of another package."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

WIDTH, HIDDEN, HEADS, KEY_HEADS, LAYERS, VOCABULARY = 768, 2048, 12, 4, 12, 8000


def rotated(x: Tensor) -> Tensor:
    """Applies the rotary position embedding to ``(N, heads, T, width)``."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] / 10000 ** (torch.arange(half, device=x.device) / half)
    cosine, sine = (part.repeat(1, 2).to(x.dtype) for part in (angles.cos(), angles.sin()))
    swapped = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine + swapped * sine


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        width = WIDTH // HEADS
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key, self.value = (nn.Linear(WIDTH, KEY_HEADS * width, bias=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(samples, tokens, -1, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, 1) for part in (rotated(k), v))
        mixed = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(samples, tokens, WIDTH))


class Block(nn.Module):
    """Attention and a gated unit, each after a norm and with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gated_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        y = self.gated_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Maps embedded tokens ``(N, T, width)`` to logits of the next token, ``(N, vocabulary)``."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits[:, -1]
