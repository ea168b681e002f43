"""Fonts for letters that the standard font lacks."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure

from nrm_plugin.plots import fonts


def _figure(text: str) -> Figure:
    figure = Figure()
    figure.text(0.5, 0.5, text)
    return figure


def test_letters_of_the_standard_font_change_nothing():
    figure = _figure("Größe, é, α")
    before = figure.texts[0].get_fontfamily()
    assert fonts.use_installed_fonts(figure) == ""
    assert figure.texts[0].get_fontfamily() == before


def test_another_installed_font_is_used():
    """DejaVu Sans lacks U+E000 to U+E07F, which are private; STIXNonUnicode has some of these."""
    letter = next(chr(code) for code in range(0xE000, 0xE0FF) if fonts.font_with(chr(code)))
    name = fonts.font_with(letter)
    figure = _figure("a")
    figure.texts[0].set_text(letter)
    assert name != "DejaVu Sans"
    assert "Last Resort" not in name


def test_letters_that_no_font_has_are_returned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fonts, "font_with", lambda letter: {"犬": "STIXGeneral"}.get(letter, ""))
    figure = _figure("猫 犬 猫 x")
    assert fonts.use_installed_fonts(figure) == "猫"
    assert figure.texts[0].get_fontfamily()[-1] == "STIXGeneral"
    with pytest.warns(UserWarning, match="Glyph"):
        figure.savefig(io.BytesIO())
