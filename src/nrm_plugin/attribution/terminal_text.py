"""Output of text explanations in a terminal, with or without colors."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import printable

if TYPE_CHECKING:
    from .words import Tokens, Word

LISTED = 12
"""Maximum number of words in a table."""
SHADES = {1: (217, 173, 167, 131, 124), -1: (189, 152, 110, 67, 25)}
"""Codes of 256-color backgrounds for positive (1) and negative (-1) relevance, from weak to strong."""
REST = "the rest"
"""Name of the contrast if a target is compared with all other outputs."""
KINDS = {"class": "class", "mask": "token behind the mask", "next": "next token", "token": "class of the token"}


def lines(explanation: Any, width: int = 80, color: bool = False) -> list[str]:
    """Formats an explanation as lines of at most ``width`` columns (at least 40), excluding color codes."""
    return [line.rstrip() if not color else line for line in _lines(explanation, max(width, 40), color)]


def _lines(explanation: Any, width: int, color: bool) -> Iterator[str]:
    yield from _wrapped([f"{_quoted(name)} {100 * share:.1f}%" for name, share in explanation.predictions],
                        width, f"predicted {KINDS[explanation.kind]}: ")  # fmt: skip
    others = f" rather than {_other(explanation.against)}" if explanation.against else ""
    origin = f" from the reference {_quoted(explanation.reference)}" if explanation.reference else ""
    yield from _wrapped([f"explained: {_quoted(explanation.target)}{others}", f"{number(explanation)}{origin}"], width)
    if explanation.reference and explanation.output < 0:
        yield from _sentence("it is further ahead with the reference; + is evidence for it", width)
    elif explanation.against and explanation.output < 0:
        yield from _sentence("it is behind; + is evidence for it", width)
    yield ""
    words = explanation.text.words
    yield from (f"  {line}" for line in colored(explanation.text, explanation.words, width - 2, color))
    yield ""
    yield from _table(words, explanation.words, width)
    special = float(sum(explanation.words[n] for n, word in enumerate(words) if word.is_special))
    parts = [f"special tokens {_percent(special)}"] if any(word.is_special for word in words) else []
    parts += [f"start of the decoder {_percent(explanation.decoder)}"] if explanation.decoder else []
    yield from _wrapped([*parts, f"absorbed {_percent(explanation.absorbed)}",
                         f"variation {explanation.variation:.3g}"], width, "  ")  # fmt: skip
    for layer, rows in explanation.layers.items():
        yield ""
        yield from _wrapped([f"{layer}: most relevant units", "with the words that they use"], width)
        for row in rows:
            yield f"  {row.title} {_percent(row.mass)}"
            yield from (f"    {line}" for line in _used(explanation.text, row.relevance, width - 4, color))
        if not rows:
            yield from _sentence("no relevance passes through it", width)
    for row in explanation.given:
        yield ""
        yield from _wrapped([f"given {row.title}", f"{_percent(row.mass)} of all relevance"], width)
        if row.relevance is None:
            yield from _sentence(row.problem, width)
        else:
            yield from (f"  {line}" for line in _used(explanation.text, row.relevance, width - 2, color))


def number(explanation: Any) -> str:
    """Formats the explained scalar with its kind, as in ``difference 2.31``."""
    kind = "change" if explanation.reference else "difference" if explanation.against else "output"
    return f"{kind} {explanation.output:.4g}"


def colored(text: Tokens, values: Tensor, width: int, color: bool) -> Iterator[str]:
    """Yields the text in lines of at most ``width`` columns. Words are colored by relevance if ``color`` is True."""
    largest = text.largest(values)
    line, at = "", 0
    for word, value in zip(text.words, values.tolist(), strict=True):
        pieces = _pieces(printable(word.text), width)
        for number, piece in enumerate(pieces):
            space = bool(line) and number == 0 and word.has_space_before
            if line and at + _cells(piece) + space > width:
                yield line
                line, at, space = "", 0, False
            line += " " * space + (_painted(piece, value / largest) if color else piece)
            at += _cells(piece) + space
    if line:
        yield line


def _used(text: Tokens, values: Tensor, width: int, color: bool) -> Iterator[str]:
    """Yields the text colored by relevance or, without colors, a table of the most relevant words."""
    if color:
        yield from colored(text, values, width, True)
        return
    order = values.abs().argsort(descending=True, stable=True)[:LISTED].tolist()
    names = {n: printable(text.words[n].text) for n in order}
    names = {n: name if any(map(str.isalnum, name)) else _quoted(name) for n, name in names.items()}
    best = [(_shortened(name, width // 3), float(values[n])) for n, name in names.items()]
    yield from _wrapped([f"{word} {_percent(value)}" for word, value in best if round(value, 4)], width)


def _table(words: Sequence[Word], values: Tensor, width: int) -> Iterator[str]:
    order = values.abs().argsort(descending=True, stable=True).tolist()
    chosen = [n for n in order if not words[n].is_special and round(float(values[n]), 4)][:LISTED]
    names = {n: _shortened(printable(words[n].text), max(8, width // 3)) for n in chosen}
    column = max((_cells(name) for name in names.values()), default=0)
    largest = max((abs(float(values[n])) for n in chosen), default=1.0)
    room = width - column - 14
    for n in chosen:
        value = float(values[n])
        bar = ("+" if value > 0 else "-") * max(1, round(room * abs(value) / largest))
        yield f"  {names[n]}{' ' * (column - _cells(names[n]))} {_percent(value):>9}  {bar}"


def _painted(text: str, value: float) -> str:
    shades = SHADES[1 if value > 0 else -1]
    step = round(min(abs(value), 1) * len(shades)) - 1
    if step < 0:
        return text
    ink = 231 if step >= len(shades) - 2 else 16
    return f"\x1b[48;5;{shades[step]}m\x1b[38;5;{ink}m{text}\x1b[0m"


def _wrapped(parts: Sequence[str], width: int, head: str = "") -> Iterator[str]:
    """Joins parts with commas and wraps the result into lines with a hanging indent."""
    line = head
    for number, part in enumerate(parts):
        text = _shortened(part, width - 5) + ("," if number < len(parts) - 1 else "")
        if line.strip() and _cells(line) + _cells(text) > width:
            yield line.rstrip()
            line = "    "
        line += f"{text} "
    yield line.rstrip()


def _sentence(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")


def _pieces(text: str, width: int) -> list[str]:
    most = max(1, width // 2 if _cells(text) > len(text) else width)
    return [text[start : start + most] for start in range(0, len(text), most)] or [""]


def _shortened(text: str, width: int) -> str:
    if len(text) <= 4 * width and _cells(text) <= width:
        return text
    kept, cells = "", 1
    for letter in text:
        cells += _cells(letter)
        if cells > width:
            break
        kept += letter
    return f"{kept}…"


def _cells(text: str) -> int:
    """Returns the display width of a text in columns. Wide East Asian characters take two."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _other(text: str) -> str:
    return text if text == REST else _quoted(text)


def _quoted(text: str) -> str:
    return f'"{printable(text)}"'


def _percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}%"


__all__ = ["colored", "lines", "number"]
