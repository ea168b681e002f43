"""Headings and titles fit into their figures."""

from __future__ import annotations

import warnings

import pytest

from nrm_plugin.commands.output_files import wrapped
from nrm_plugin.commands.resolved_options import one_line_warnings


def test_long_conditions_fit_above_a_heat_map():
    text = " & ".join(f"features.{number}[{','.join(map(str, range(9)))}]" for number in range(20))
    lines = wrapped(text).split("\n")
    assert len(lines) == 4
    assert max(map(len, lines)) <= 30


@pytest.mark.filterwarnings("default")
def test_letters_without_a_font_are_left_to_the_note_and_other_warnings_are_printed(capsys):
    with one_line_warnings():
        warnings.warn("Glyph 29483 (x) missing from font(s) DejaVu Sans.", UserWarning, stacklevel=1)
        warnings.warn("another one", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "nrm-plugin: warning: another one\n"
