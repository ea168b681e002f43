"""Copies of module outputs: one for each call, also in a recorded forward pass, and no hooks afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import UnknownLayerError
from nrm_plugin.recording.module_outputs import module_outputs


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu, self.rnn = nn.Linear(3, 3), nn.ReLU(inplace=True), nn.RNN(3, 2, batch_first=True)

    def forward(self, x):
        x = self.relu(self.linear(self.relu(self.linear(x))))
        return self.rnn(x[:, None])[0][:, 0]


def test_every_call_is_copied_before_it_is_overwritten():
    torch.manual_seed(0)
    net, x = Reused().eval(), torch.randn(4, 3)
    with module_outputs(net, ["linear", "rnn"]) as outputs:
        output = net(x)
    first = net.linear(x)
    second = net.linear(first.relu())
    torch.testing.assert_close(outputs["linear"], [first.detach(), second.detach()])
    torch.testing.assert_close(outputs["rnn"][0][0][:, 0], output.detach())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.recorded
def test_a_measure_is_the_same_while_outputs_are_copied():
    torch.manual_seed(0)
    net, x = Reused().eval(), torch.randn(4, 3)
    plain = RelevanceMeasure(net, x, 1)
    with module_outputs(net, ["linear", "relu"]) as outputs:
        mu = RelevanceMeasure(net, x, 1)
    assert [len(calls) for calls in outputs.values()] == [2, 2]
    assert mu.layers == plain.layers
    torch.testing.assert_close(mu.marginal("input"), plain.marginal("input"), rtol=0, atol=0)


def test_unknown_modules_raise():
    with pytest.raises(UnknownLayerError, match="'conv'"), module_outputs(Reused(), ["conv"]):
        pass
