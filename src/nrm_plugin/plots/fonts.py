"""Lookup of installed fonts for characters that the standard font of a figure lacks."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

PLACEHOLDERS = "Last Resort"
"""matplotlib font with placeholder boxes for all characters."""


def use_installed_fonts(figure: Figure) -> str:
    """Adds installed fonts to the texts of a figure as fallbacks for characters that the standard font lacks.

    Returns:
        The characters that no installed font contains, which are shown as boxes.
    """
    missing = ""
    for text in figure.findobj(Text):
        own = letters_of(findfont(text.get_fontproperties()))
        foreign = {letter for letter in text.get_text() if ord(letter) not in own and letter.isprintable()}
        fonts = {letter: font_with(letter) for letter in sorted(foreign)}
        families = [name for name in dict.fromkeys(fonts.values()) if name]
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])
        missing += "".join(letter for letter, name in fonts.items() if not name)
    return "".join(dict.fromkeys(missing))


@functools.cache
def font_with(letter: str) -> str:
    """Returns the family of an installed font that contains a character, or an empty string if there is none."""
    families: Iterable[tuple[str, str]] = ((font.name, font.fname) for font in fontManager.ttflist)
    return next((name for name, path in families if PLACEHOLDERS not in name and ord(letter) in letters_of(path)), "")


@functools.cache
def letters_of(path: str) -> frozenset[int]:
    """Returns the code points of a font, or none if matplotlib cannot render it, as for colored bitmap fonts."""
    try:
        font = FT2Font(path)
        font.set_size(10, 72)
    except (RuntimeError, OSError):
        return frozenset()
    return frozenset(font.get_charmap())
