"""Composites by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from zennit.composites import COMPOSITES, EpsilonPlusFlat

from nrm_plugin.commands.cli import main
from tests.commands.shell import OWN, fails


@pytest.mark.parametrize("name", sorted(COMPOSITES))
def test_every_composite_of_the_registry_runs_or_is_rejected_in_one_line(name: str, fast: Path, capsys):
    argv = ["explain", "china.png", *OWN, "--composite", name]
    if name in ("beta_smooth", "deconvnet", "guided_backprop"):
        assert f"--composite {name} has no rule for" in fails(capsys, *argv)
    else:
        assert main(argv) == 0


def test_a_composite_with_other_arguments_is_rejected(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    class Needy(EpsilonPlusFlat):
        def __init__(self, low, wishes):
            super().__init__()

    monkeypatch.setitem(COMPOSITES, "needy", Needy)
    assert "requires wishes, for which there is no option" in fails(
        capsys, "explain", "china.png", *OWN, "--composite", "needy"
    )
