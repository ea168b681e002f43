"""Text in figures fits into them."""

from __future__ import annotations

from nrm_plugin.commands.output_files import wrapped


def test_long_conditions_fit_above_a_heat_map():
    text = " & ".join(f"features.{number}[{','.join(map(str, range(9)))}]" for number in range(20))
    lines = wrapped(text).split("\n")
    assert len(lines) == 4
    assert max(map(len, lines)) <= 30
