"""HTML pages, without scripts, that show explanations of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch
from torch import Tensor

from ..attribution.terminal_text import KINDS, REST, number
from ..attribution.text import Row, TextExplanation
from .ribbons import percent
from .text import Word, words_html

STYLE = (
    ":root{color-scheme:light dark} body{font-family:system-ui,sans-serif;max-width:52em;margin:1.5em auto;"
    "padding:0 1em} h2{margin:1.2em 0 .3em;font-size:1.15em}"
    " .note{color:#767676;color:light-dark(#616161,#a8a8a8);font-size:.9em;margin:.2em 0}"
    " table{border-collapse:collapse;font-size:.9em} td{padding:.1em .8em .1em 0} td+td{text-align:right}"
    " summary{cursor:pointer;margin:.4em 0} .nrm-text{border-radius:.4em}"
)
HELP = "Red words are evidence for the explained output, blue words against it. Point at a word for its share."


def text_page(explanations: TextExplanation | Sequence[TextExplanation], title: str = "Relevance of words") -> str:
    """Renders one or several explanations as a self-contained HTML page.

    Args:
        explanations: One or several results of :func:`~nrm_plugin.explain_text`.
        title: Title of the page.
    """
    several = [explanations] if isinstance(explanations, TextExplanation) else list(explanations)
    body = "\n".join(part for explanation in several for part in _section(explanation))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1><p class=note>{HELP}</p>\n{body}\n</body></html>\n"
    )


def _section(explanation: TextExplanation) -> Iterator[str]:
    compared = explanation.against if explanation.against == REST else _quoted(explanation.against)
    others = f" rather than {compared}" if explanation.against else ""
    behind = ", which is behind" if explanation.against and explanation.output < 0 else ""
    behind = ", further ahead with the reference" if behind and explanation.reference else behind
    origin = f" from the reference {_quoted(explanation.reference)}" if explanation.reference else ""
    predicted = ", ".join(f"{_quoted(name)} {100 * share:.1f}%" for name, share in explanation.predictions)
    yield f"<h2>{_quoted(explanation.target)}{others}{behind}</h2>"
    yield f"<p class=note>predicted {escape(KINDS[explanation.kind])}: {predicted}; {number(explanation)}{origin}</p>"
    yield _colored(explanation, [("", explanation.words)])
    start = f"start of the decoder {percent(explanation.decoder)}, " if explanation.decoder else ""
    parts = f"{start}absorbed {round(100 * explanation.absorbed, 1) + 0.0:.1f}%, variation {explanation.variation:.3g}"
    yield f"<p class=note>{parts}</p>"
    for layer, rows in explanation.layers.items():
        titles = [(f"{row.title}, {percent(row.mass)}", row.relevance) for row in rows]
        yield f"<h3>{escape(layer)}: the most relevant units, with the words that they use</h3>"
        yield _colored(explanation, titles) if titles else "<p>No relevance passes through it.</p>"
    for row in explanation.given:
        yield _given(explanation, row)
    yield f"<details><summary>All numbers</summary>{_table(explanation)}</details>"


def _given(explanation: TextExplanation, row: Row) -> str:
    heading = f"<h3>given {escape(row.title)}, {percent(row.mass)} of all relevance</h3>"
    if row.relevance is None:
        return f"{heading}<p>{escape(row.problem)}</p>"
    return heading + _colored(explanation, [("", row.relevance)], "of the relevance of these walks")


def _colored(
    explanation: TextExplanation, rows: Sequence[tuple[str, Tensor | None]], whole: str = "of all relevance"
) -> str:
    values = [row.tolist() for _, row in rows if row is not None]
    maps = [
        [
            Word(word.text, value, word.has_space_before and number > 0, word.is_special)
            for number, (word, value) in enumerate(zip(explanation.text.words, row, strict=True))
        ]
        for row in values
    ]
    known = [(title, row) for title, row in rows if row is not None]
    bound = explanation.text.largest(torch.stack([row for _, row in known]))
    return words_html(maps, [title for title, _ in known], bound, whole=whole)


def _table(explanation: TextExplanation) -> str:
    words = zip(explanation.text.words, explanation.words.tolist(), strict=True)
    rows = "".join(f"<tr><td>{escape(word.text)}</td><td>{escape(percent(value))}</td></tr>" for word, value in words)
    return f"<table>{rows}</table>"


def _quoted(text: str) -> str:
    return f"“{escape(text)}”"


__all__ = ["text_page"]
