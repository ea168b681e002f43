"""Widths of text in figures."""

from __future__ import annotations

from matplotlib.figure import Figure

from nrm_plugin.plots.flow_text import cut, text_width, wrapped_lines


def test_a_drawn_text_is_not_wider_than_computed():
    figure = Figure(figsize=(10, 1), dpi=150)
    for size, bold in ((5, False), (7.2, True), (10.5, True)):
        words = "features.28: flow of “zebra” $5"
        text = figure.text(0, 0.5, words, fontsize=size, weight="bold" if bold else "normal", parse_math=False)
        figure.canvas.draw()
        drawn = text.get_window_extent().width * 72 / figure.dpi
        assert 0.85 * text_width(words, size, bold) < drawn <= text_width(words, size, bold)


def test_long_texts_are_cut_in_the_middle_and_lines_are_broken():
    assert cut("short", 100, 8) == "short"
    shortened = cut("a very long name of a layer", 60, 8)
    assert "…" in shortened
    assert text_width(shortened, 8) <= 60
    lines = wrapped_lines("one two three four five\nsix", 60, 8)
    assert " ".join(lines) == "one two three four five six"
    assert lines[-1] == "six"
    assert all(text_width(line, 8) <= 60 for line in lines)
    assert text_width(wrapped_lines("x" * 80, 60, 8)[0], 8) <= 60
    assert wrapped_lines("", 60, 8) == []
