"""Width and line breaking of text in the standard font of figures."""

from __future__ import annotations

import functools

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

HINTED = 1.06
"""Factor for the widening of small text by hinting, relative to the outlines."""


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float, is_bold: bool = False) -> float:
    """Returns the width of a line of text in points."""
    if not text:
        return 0.0
    font = FontProperties(size=size, weight="bold" if is_bold else "normal")
    return HINTED * float(TextToPath().get_text_width_height_descent(text, font, ismath=False)[0])


def cut(text: str, room: float, size: float, is_bold: bool = False) -> str:
    """Shortens a text in the middle to fit the given width."""
    if text_width(text, size, is_bold) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = (kept + 1) // 2
        short = f"{text[:head].rstrip()}…{text[len(text) - (kept - head) :].lstrip()}"
        if text_width(short, size, is_bold) <= room:
            return short
    return f"{text[:1]}…"


def wrapped_lines(text: str, room: float, size: float, is_bold: bool = False) -> list[str]:
    """Breaks a text at spaces into lines of the given width. Shortens overlong words."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".strip()
            if line and text_width(longer, size, is_bold) > room:
                lines.append(line)
                longer = word
            line = cut(longer, room, size, is_bold)
        lines += [line] if line else []
    return lines


__all__ = ["cut", "text_width", "wrapped_lines"]
