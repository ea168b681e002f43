"""Words of a text, merged from the tokens of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CONTINUED = "##"
OPENING = ("Ġ", "▁")


@dataclass(frozen=True)
class Word:
    """A word in a text, or a special token.

    Attributes:
        text: The word as it appears in the text, or the special token.
        tokens: Token positions of the word.
        has_space_before: Whether a space precedes the word.
        is_special: Whether this is a special token of the tokenizer, such as a mask.
    """

    text: str
    tokens: tuple[int, ...]
    has_space_before: bool = True
    is_special: bool = False


@dataclass(frozen=True)
class Tokens:
    """Text with its tokens and words.

    Attributes:
        text: Text as given by the user.
        ids: Token ids of shape ``(1, T)``.
        tokens: Token strings, ``T`` of them.
        words: Words in order. Each token is part of exactly one word.
    """

    text: str
    ids: Tensor
    tokens: tuple[str, ...]
    words: tuple[Word, ...]

    def largest(self, values: Tensor) -> float:
        """Returns the limit of the color scale: the largest absolute value of any word, or 1 if all values are zero.

        A class token often receives most of the relevance. Special tokens are therefore ignored unless the values of
        all words are zero.
        """
        texts = [number for number, word in enumerate(self.words) if not word.is_special]
        own = float(values[..., texts].abs().max()) if texts else 0.0
        return own or float(values.abs().max()) or 1.0

    def of_words(self, values: Tensor) -> Tensor:
        """Sums token values of shape ``(…, T)`` over each word. Returns shape ``(…, words)``."""
        result = values.new_zeros(*values.shape[:-1], len(self.words))
        for number, word in enumerate(self.words):
            result[..., number] = values[..., list(word.tokens)].sum(-1)
        return result


def merged(text: str, ids: Sequence[int], tokens: Sequence[str], special: set[int], encoding: Any) -> tuple[Word, ...]:
    """Merges the tokens of a text into words.

    Args:
        text: Text as given by the user.
        ids: Token ids, one per token.
        tokens: Token strings, as returned by the tokenizer.
        special: Ids of the special tokens.
        encoding: Encoding of a fast tokenizer, with ``word_ids`` and ``offsets``. None for other tokenizers, which mark
            word boundaries with ``##``, ``Ġ`` or ``▁``.
    """
    are_special = [number in special for number in ids]
    if encoding is None:
        return _by_prefixes(tokens, are_special)
    words: list[Word] = []
    known: int | None = None
    end = opened = 0
    for position, (word, (start, stop)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if are_special[position] or word is None:
            words.append(Word(tokens[position], (position,), bool(words), True))
            known, end = None, max(end, stop)
            continue
        if word == known and words:
            before = words[-1]
            letters = text[opened:stop].strip()
            words[-1] = Word(letters or "␣", (*before.tokens, position), before.has_space_before)
        else:
            opened, letters = start, text[start:stop].strip()
            leading = text[end:start] + text[start:stop].removesuffix(text[start:stop].lstrip())
            has_space_before = not words or words[-1].is_special or any(map(str.isspace, leading))
            words.append(Word(letters or "␣", (position,), has_space_before))
        known, end = word, max(end, stop)
    return tuple(words)


def _by_prefixes(tokens: Sequence[str], are_special: Sequence[bool]) -> tuple[Word, ...]:
    is_opened = any(token.startswith(OPENING) for token in tokens)
    is_continued = any(token.startswith(CONTINUED) for token in tokens)
    words: list[Word] = []
    for position, (token, is_special) in enumerate(zip(tokens, are_special, strict=True)):
        joins = token.startswith(CONTINUED) or (is_opened and not is_continued and not token.startswith(OPENING))
        letters = token.removeprefix(CONTINUED).lstrip("".join(OPENING))
        if joins and words and not is_special and not words[-1].is_special:
            before = words[-1]
            words[-1] = Word(before.text + letters, (*before.tokens, position), before.has_space_before)
        else:
            words.append(Word(token if is_special else letters or "␣", (position,), True, is_special))
    return tuple(words)


__all__ = ["Tokens", "Word", "merged"]
