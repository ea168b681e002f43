"""Fonts for letters that the standard font lacks."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont

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


def _installed(monkeypatch: pytest.MonkeyPatch, fonts_with: dict[str, str]) -> None:
    """Fonts by name with their letters, in the order in which matplotlib lists them."""
    charsets = {f"/{name}.ttf": frozenset(map(ord, letters)) for name, letters in fonts_with.items()}
    listed = [SimpleNamespace(name=name, fname=f"/{name}.ttf") for name in fonts_with]
    monkeypatch.setattr(fonts, "fontManager", SimpleNamespace(ttflist=listed))
    monkeypatch.setattr(fonts, "letters_of", lambda path: charsets.get(path, frozenset(map(ord, "x $"))))
    monkeypatch.setattr(fonts, "font_with", fonts.font_with.__wrapped__)


def test_the_first_installed_font_with_a_letter_is_used(monkeypatch: pytest.MonkeyPatch):
    """Boxes of the font of last resort are no letters; a font that has none of the letters is not used."""
    _installed(monkeypatch, {"Last Resort High-Efficiency": "猫犬д", "Cyrillic": "дж", "Han": "猫犬", "Other": "猫"})
    figure = _figure("x 猫 д 犬")
    own = figure.texts[0].get_fontfamily()
    assert fonts.use_installed_fonts(figure) == ""
    assert figure.texts[0].get_fontfamily() == [*own, "Cyrillic", "Han"]


def test_each_text_has_its_own_fonts(monkeypatch: pytest.MonkeyPatch):
    _installed(monkeypatch, {"Cyrillic": "дж", "Han": "猫犬"})
    figure = _figure("x")
    second = figure.text(0, 0, "ж犬ü\n")
    own = figure.texts[0].get_fontfamily()
    assert fonts.use_installed_fonts(figure) == "ü"
    assert figure.texts[0].get_fontfamily() == own
    assert second.get_fontfamily() == [*own, "Cyrillic", "Han"]


def test_the_letters_of_a_font_are_those_of_its_table():
    path = findfont("DejaVu Sans")
    assert {ord("a"), ord("ß"), ord("д")} <= fonts.letters_of(path)
    assert ord("猫") not in fonts.letters_of(path)
    assert fonts.letters_of(__file__) == frozenset()


def test_letters_that_no_font_has_are_returned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fonts, "font_with", lambda letter: {"犬": "STIXGeneral"}.get(letter, ""))
    figure = _figure("猫 犬 猫 x")
    assert fonts.use_installed_fonts(figure) == "猫"
    assert figure.texts[0].get_fontfamily()[-1] == "STIXGeneral"
    with pytest.warns(UserWarning, match="Glyph"):
        figure.savefig(io.BytesIO())
