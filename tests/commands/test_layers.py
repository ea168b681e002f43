"""The command `layers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands.cli import main
from tests.commands.shell import SIZE, own_net


def test_layers_are_those_of_the_measure(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["layers", "--model", "own_nets:make", "--size", "32"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    mu = RelevanceMeasure(own_net(), torch.randn(1, 3, SIZE, SIZE), 0)
    assert [line[0] for line in lines[1:]] == mu.layers
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["0"] == ["6×32×32", "Conv2d", "Flat"]
    assert by_name["3"] == ["8×14×14", "Conv2d", "ConservingEpsilon"]
    assert by_name["7"][0] == "4"


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_gamma_box", "beta_smooth", "guided_backprop"])
def test_layers_of_torchvision_models_need_no_weights(composite: str, fast: Path, capsys):
    assert main(["layers", "--model", "resnet18", "--size", "33", "--composite", composite]) == 0
    printed = capsys.readouterr()
    assert "layer1.0.conv1" in printed.out
    assert "layer2.0.relu:0" in printed.out
    assert printed.err == ""
