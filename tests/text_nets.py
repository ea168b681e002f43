"""A tokenizer and small text models with the interface of transformers, for tests without that package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dull fine film never bor ##ing long and yet . ,".split()


class Encoded(dict[str, Tensor]):
    """The result of a tokenizer call."""

    encodings: Any = None


class StubTokenizer:
    """Splits at spaces; a word with a suffix ``ing`` is two tokens."""

    all_special_ids = (0, 1, 2, 3, 4)
    mask_token, unk_token = "[MASK]", "[UNK]"
    mask_token_id, unk_token_id = 4, 1
    model_max_length = 16

    def __init__(self, is_fast: bool = True, has_class_token: bool = True) -> None:
        self.is_fast, self.has_class_token = is_fast, has_class_token

    def __len__(self) -> int:
        return len(WORDS)

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(WORDS)}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [number for number, _, _, _ in self._pieces(text, add_special_tokens)]

    def _pieces(self, text: str, is_special: bool) -> list[tuple[int, int | None, int, int]]:
        pieces: list[tuple[int, int | None, int, int]] = []
        place = 0
        for count, word in enumerate(text.split()):
            start = text.index(word, place)
            place = start + len(word)
            if word.endswith("ing") and len(word) > 3:
                pieces.append((self._id(word[:-3]), count, start, place - 3))
                pieces.append((self._id("##ing"), count, place - 3, place))
            else:
                pieces.append((self._id(word), count, start, place))
        if is_special and self.has_class_token:
            pieces = [(2, None, 0, 0), *pieces, (3, None, 0, 0)]
        return pieces

    @staticmethod
    def _id(word: str) -> int:
        return WORDS.index(word) if word in WORDS else 1

    def __call__(self, text: str, return_tensors: str) -> Encoded:
        assert return_tensors == "pt"
        pieces = self._pieces(text, True)
        ids = torch.tensor([[number for number, _, _, _ in pieces]], dtype=torch.long).reshape(1, len(pieces))
        encoded = Encoded(input_ids=ids, attention_mask=torch.ones_like(ids))
        if self.is_fast:
            words, spans = [word for _, word, _, _ in pieces], [(start, stop) for _, _, start, stop in pieces]
            encoded.encodings = [SimpleNamespace(word_ids=words, offsets=spans)]
        return encoded

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return WORDS[ids] if isinstance(ids, int) else [WORDS[number] for number in ids]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[number] for number in ids)


class Block(nn.Module):
    """One layer of attention with an MLP, post-norm or causal pre-norm."""

    def __init__(self, is_causal: bool, size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 12), nn.Linear(12, size)
        self.one, self.two = nn.LayerNorm(size), nn.LayerNorm(size)
        self.is_causal, self.heads = is_causal, heads

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        result: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.is_causal:
            x = x + self.attended(self.one(x))
            return x + self.down(torch.relu(self.up(self.two(x))))
        x = self.one(x + self.attended(x))
        return self.two(x + self.down(torch.relu(self.up(x))))


class TextNet(nn.Module):
    """A text model that returns a dictionary with logits, as the models of transformers do.

    Args:
        kind: ``"class"``, ``"mask"``, ``"next"`` or ``"token"``.
        classes: Number of classes of the first and the last kind.
    """

    def __init__(self, kind: str, classes: int = 2) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.places = nn.Embedding(len(WORDS), 8), nn.Parameter(torch.randn(16, 8))
        self.blocks = nn.ModuleList(Block(kind == "next") for _ in range(2))
        count = len(WORDS) if kind in ("mask", "next") else classes
        self.head = nn.Linear(8, count)
        names = {0: "negative", 1: "positive"} if count == 2 else {}
        self.config = SimpleNamespace(id2label=names, vocab_size=len(WORDS), is_encoder_decoder=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids) + self.places[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x.mean(1) if self.kind == "class" else x)}


def text_net(kind: str, classes: int = 2) -> nn.Module:
    """A model with fixed random weights, in double precision."""
    torch.manual_seed(1)
    return TextNet(kind, classes).double().eval().requires_grad_(False)
