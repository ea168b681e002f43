"""Text whose tokens are colored by relevance, as a figure or as an HTML fragment without scripts.

Positive relevance is red and negative relevance is blue, in colorblind-friendly shades. Zero has the background
color. Relevance is shown as a percentage of the sample's total.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from ..errors import InputError, brief
from .arrays import as_array
from .ribbons import DARK, LIGHT, Palette, percent

Values = Tensor | np.ndarray | Sequence[float]

CONTINUED = ("##",)
"""Prefixes of tokens that continue the previous word."""
OPENING = ("Ġ", "▁")
"""Prefixes of tokens that begin a word."""
BREAKS = {"Ċ": "↵", "\n": "↵", "\t": "→"}
LINE, LETTER, FONT = 1.9, 0.602, 10.5
"""Line height and character width, relative to the font size, and the font size in points."""


@dataclass(frozen=True)
class Word:
    """Displayed token.

    Attributes:
        text: The text of the token.
        value: Relevance of the token.
        has_space_before: Whether a space precedes the token.
        is_special: Whether the token is not part of the text, such as padding.
    """

    text: str
    value: float
    has_space_before: bool
    is_special: bool


def text_figure(
    tokens: Sequence[str],
    values: Values,
    titles: Sequence[str] = ("",),
    *,
    special: Collection[str] = (),
    limit: float | None = None,
    width: float = 7.2,
    heading: str = "",
    dark: bool = False,
) -> Figure:
    """Draws text whose tokens are colored by relevance. Several maps are stacked and share a color scale.

    Args:
        tokens: Tokens as produced by a tokenizer. ``Ġ`` and ``▁`` mark the beginning of a word, and ``##`` its
            continuation. If no token has one of these prefixes, each token is a word.
        values: Relevance of shape ``(tokens,)``, or ``(maps, tokens)`` for several maps, such as one per head.
        titles: One title per map.
        special: Tokens that are not text, such as ``tokenizer.all_special_tokens``. They are drawn in italics with a
            frame.
        limit: Absolute relevance at which the colors saturate; by default, the largest absolute value.
        width: Width in inches. Longer lines are wrapped.
        heading: Title of the figure.
        dark: Whether to use a dark background; save the figure with ``facecolor=figure.get_facecolor()``.

    Raises:
        InputError: If tokens, values and titles do not match.

    Examples:
        >>> figure = text_figure(["[CLS]", "un", "##kind"], [0.2, -0.1, 0.6], special=["[CLS]"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['[CLS]', 'un', 'kind']
    """
    maps, bound, is_cut = _checked(tokens, values, titles, special, limit)
    palette = DARK if dark else LIGHT
    columns = max(12, int((0.94 * width - 1.2) * 72 / (FONT * LETTER)))  # next to the color bar
    laid = [_lines(words, columns) for words in maps]
    heights = [
        len(lines) * LINE * FONT / 72 + (0.28 if title else 0.06) for lines, title in zip(laid, titles, strict=True)
    ]
    figure = Figure(figsize=(width, max(1.1, sum(heights) + 0.2 + 0.35 * bool(heading))), layout="constrained")
    figure.set_facecolor(palette.paper)
    if heading:
        figure.suptitle(heading, fontsize=12.5, color=palette.ink)
    panels = figure.subplots(len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, lines, title in zip(panels, laid, titles, strict=True):
        _draw(axes, lines, columns, bound, palette)
        if title:
            axes.set_title(title, fontsize=10, color=palette.ink, loc="left")
    _color_bar(figure, list(panels), bound, is_cut, palette)
    return figure


def text_html(
    tokens: Sequence[str],
    values: Values,
    titles: Sequence[str] = ("",),
    *,
    special: Collection[str] = (),
    limit: float | None = None,
    heading: str = "",
) -> str:
    """Renders text whose tokens are colored by relevance as an HTML fragment, for light and dark mode.

    Args:
        tokens: As in :func:`text_figure`.
        values: As in :func:`text_figure`.
        titles: As in :func:`text_figure`.
        special: As in :func:`text_figure`.
        limit: As in :func:`text_figure`.
        heading: As in :func:`text_figure`.

    Raises:
        InputError: If tokens, values and titles do not match.

    Examples:
        >>> page = text_html(["<b>", "good"], [0.1, 0.9])
        >>> "&lt;b&gt;" in page, "<script" in page
        (True, False)
    """
    maps, bound, is_cut = _checked(tokens, values, titles, special, limit)
    return words_html(maps, titles, bound, is_cut, heading)


def words_html(
    maps: Sequence[Sequence[Word]],
    titles: Sequence[str],
    bound: float,
    is_cut: bool = False,
    heading: str = "",
    whole: str = "of all relevance",
) -> str:
    """Renders colored words as an HTML fragment; see :func:`text_html`.

    Args:
        maps: The words of each map, with their values.
        titles: One title per map.
        bound: Absolute relevance at which the colors saturate.
        is_cut: Whether any value is clipped because its absolute value exceeds ``bound``.
        heading: Heading of the fragment.
        whole: Description of the total to which percentages refer.
    """
    parts = [f"<style>{_style()}</style>", '<div class="nrm-text">']
    parts += [f"<h4>{escape(heading)}</h4>"] if heading else []
    for words, title in zip(maps, titles, strict=True):
        parts += [f"<h5>{escape(title)}</h5>"] if title else []
        parts.append(f"<p>{''.join(_span(word, bound) for word in words)}</p>")
    least, most = ("≤ ", "≥ ") if is_cut else ("", "")
    ends = f"<b>{least}{percent(-bound)}</b><i></i><b>{most}{percent(bound)}</b>"
    parts.append(f'<div class="nrm-bar">{ends}<span>{escape(whole)}</span></div></div>')
    return "\n".join(parts)


# -- tokens ---------------------------------------------------------------------------------------------------------


def _checked(
    tokens: Sequence[str], values: Values, titles: Sequence[str], special: Collection[str], limit: float | None
) -> tuple[list[list[Word]], float, bool]:
    """Validates the arguments of a plot.

    Returns:
        The words of each map, the absolute relevance at which the colors saturate, and True if any value exceeds it.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise InputError("tokens must be a list of strings, as returned by tokenizer.convert_ids_to_tokens(ids).")
    array = as_array(values)
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != len(tokens) or not len(tokens) or not len(rows):
        raise InputError(
            f"values have shape {tuple(array.shape)}, but there are {len(tokens)} tokens; give (tokens,) or (maps, "
            "tokens) of one sample. mu.marginal(layer, over='position')[0] sums the relevance of embeddings."
        )
    if not np.isfinite(rows).all():
        raise InputError("values have nan or inf entries, which have no color; give finite values.")
    if isinstance(titles, str) or len(titles) != len(rows):
        raise InputError(f"titles={brief(titles)}: give a list of one title for each of the {len(rows)} maps.")
    if limit is not None and not limit > 0:
        raise InputError(f"limit={brief(limit)}: give a positive number, the relevance of the strongest colors.")
    strongest = float(np.abs(rows).max())
    bound = float(limit) if limit is not None else strongest or 1.0
    return [_words(tokens, row, special) for row in rows], bound, strongest > bound


def _words(tokens: Sequence[str], values: np.ndarray, special: Collection[str]) -> list[Word]:
    is_opened = any(token.startswith(OPENING) for token in tokens)
    is_continued = any(token.startswith(CONTINUED) for token in tokens)
    words = []
    for number, (token, value) in enumerate(zip(tokens, values, strict=True)):
        is_special = token in special
        text, has_space_before = token, number > 0
        if not is_special:
            is_joined = token.startswith(CONTINUED) or (
                is_opened and not is_continued and not token.startswith(OPENING)
            )
            has_space_before = has_space_before and not is_joined
            text = token[2:] if token.startswith(CONTINUED) else token[1:] if token.startswith(OPENING) else token
        text = "".join(BREAKS.get(letter, letter) for letter in text)
        words.append(Word(text or "␣", float(value), has_space_before, is_special))
    return words


def _cells(text: str) -> int:
    """Returns the width of a text in characters. Wide East Asian characters count twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _lines(words: Sequence[Word], columns: int) -> list[list[tuple[float, Word]]]:
    """Breaks words into lines. Returns each word with its first column. Words longer than a line are split."""
    lines: list[list[tuple[float, Word]]] = [[]]
    at = 0.0
    for word in words:
        space = 1.0 if word.has_space_before and lines[-1] else 0.15
        if lines[-1] and at + space + _cells(word.text) > columns:
            lines.append([])
            at, space = 0.0, 0.0
        for piece in _broken(word, columns):
            if lines[-1] and at + space + _cells(piece.text) > columns:
                lines.append([])
                at, space = 0.0, 0.0
            lines[-1].append((at + space, piece))
            at, space = at + space + _cells(piece.text), 0.15
    return lines


def _broken(word: Word, columns: int) -> list[Word]:
    most = max(1, columns // 2 if _cells(word.text) > len(word.text) else columns)
    pieces = [word.text[start : start + most] for start in range(0, len(word.text), most)]
    return [Word(piece, word.value, word.has_space_before, word.is_special) for piece in pieces]


# -- colors --------------------------------------------------------------------------------------------------------


def shade(value: float, palette: Palette) -> tuple[float, float, float]:
    """Returns the background color of a token for a value between -1 and 1. 0 yields the color of the page."""
    strength = min(abs(value), 1.0)
    pairs = zip(to_rgb(palette.paper), to_rgb(palette.of(value)), strict=True)
    red, green, blue = (paper + strength * (color - paper) for paper, color in pairs)
    return red, green, blue


def ink_on(color: tuple[float, float, float]) -> str:
    """Returns black or white, whichever contrasts more with the given color."""
    bright = luminance(color)
    return "#000000" if (bright + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def luminance(color: tuple[float, float, float]) -> float:
    """Computes the relative luminance of a color, as defined by the Web Content Accessibility Guidelines."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# -- the figure -----------------------------------------------------------------------------------------------------


def _draw(axes: Axes, lines: list[list[tuple[float, Word]]], columns: int, bound: float, palette: Palette) -> None:
    axes.set_xlim(0, columns)
    axes.set_ylim(len(lines), 0)
    axes.set_axis_off()
    for row, line in enumerate(lines):
        for column, word in line:
            color = shade(word.value / bound, palette)
            cells = _cells(word.text)
            box = FancyBboxPatch((column, row + 0.12), cells, 0.76, boxstyle="round,pad=0,rounding_size=0.12")
            box.set(
                facecolor=color,
                edgecolor=palette.pale if word.is_special else color,
                linewidth=0.7,
                mutation_aspect=0.3,
            )
            axes.add_patch(box)
            # Mathtext is disabled, since a dollar sign is an ordinary token.
            axes.text(
                column + cells / 2, row + 0.53, word.text, ha="center", va="center", fontsize=FONT, color=ink_on(color),
                family="monospace", style="italic" if word.is_special else "normal", parse_math=False,
            )  # fmt: skip


def _color_bar(figure: Figure, panels: list[Axes], bound: float, is_cut: bool, palette: Palette) -> None:
    colors = [shade(value, palette) for value in np.linspace(-1, 1, 65)]
    drawn = ScalarMappable(Normalize(-bound, bound), LinearSegmentedColormap.from_list("relevance", colors))
    extend = "both" if is_cut else "neither"
    bar = figure.colorbar(
        drawn, ax=panels, fraction=0.035, pad=0.02, extend=extend, extendfrac=0.06, ticks=[-bound, 0, bound]
    )
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore]
    bar.ax.tick_params(length=0, labelsize=8.5, colors=palette.ink)
    bar.formatter = FuncFormatter(lambda value, _: percent(float(value)))
    bar.update_ticks()


# -- HTML -----------------------------------------------------------------------------------------------------------


def _span(word: Word, bound: float) -> str:
    value = max(-1.0, min(1.0, word.value / bound))
    marks = ["x"] if word.is_special else []
    marks += ["p" if value >= 0 else "n"] if value else []
    marks += ["w"] if ink_on(shade(value, LIGHT)) == "#ffffff" else []
    marks += ["k"] if ink_on(shade(value, DARK)) == "#000000" else []
    space = " " if word.has_space_before else ""
    style = f' style="--a:{abs(value):.3f}"' if value else ""
    kind = f' class="{" ".join(marks)}"' if marks else ""
    return f'{space}<span{kind}{style} title="{escape(percent(word.value))}">{escape(word.text)}</span>'


def _style() -> str:
    def colors(palette: Palette) -> str:
        parts = {"p": to_rgb(palette.positive), "n": to_rgb(palette.negative)}
        numbers = {name: " ".join(str(round(255 * part)) for part in color) for name, color in parts.items()}
        return " ".join(f".nrm-text .{name}{{background:rgb({rgb}/var(--a))}}" for name, rgb in numbers.items())

    def bar(palette: Palette) -> str:
        ends = f"{palette.negative},{palette.paper},{palette.positive}"
        return f".nrm-bar i{{background:linear-gradient(to right,{ends})}}"

    dark = (
        f".nrm-text{{color:#fff;background:{DARK.paper}}} {colors(DARK)} {bar(DARK)} "
        ".nrm-text span.w{color:inherit} .nrm-text span.k{color:#000}"
    )
    return (
        f".nrm-text{{color-scheme:light dark;color:#000;background:{to_hex(LIGHT.paper)};padding:.6em .8em;"
        "font-family:system-ui,sans-serif} "
        ".nrm-text h4,.nrm-text h5{margin:.2em 0;font-weight:600} "
        ".nrm-text p{margin:.2em 0 .8em;line-height:1.9;white-space:pre-wrap;overflow-wrap:anywhere} "
        ".nrm-text p span{padding:.12em .14em;border-radius:.2em;box-decoration-break:clone;"
        "-webkit-box-decoration-break:clone} "
        ".nrm-text span.x{font-style:italic;outline:1px solid #8c8c8c} "
        f".nrm-text span.w{{color:#fff}} {colors(LIGHT)} {bar(LIGHT)} "
        ".nrm-bar{font-size:.85em} .nrm-bar b{font-weight:400} .nrm-bar i{display:inline-block;width:9em;height:.8em;"
        "margin:0 .5em;vertical-align:-.1em} .nrm-bar span{padding-left:.8em} "
        f"@media (prefers-color-scheme:dark){{{dark}}}"
    )


__all__ = ["text_figure", "text_html"]
