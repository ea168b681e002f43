"""Matrices of functions of one graph, without a batch dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure, at
from nrm_plugin.errors import UnknownLayerError

SUM_FLOOR = 1e-5  # what the rule of a sum passes to entries of zero


def rows(net: nn.Module, inputs: tuple[Tensor, ...], *more: Any) -> tuple[list[Tensor], Tensor]:
    """``T[j, i]`` for each input, and the share of each output ``j`` that constants absorb; together they are one."""
    shape = net(*inputs, *more).shape
    parts: list[list[Tensor]] = [[] for _ in inputs]
    constants = []
    for j in range(shape.numel()):
        start = torch.zeros(shape).double()
        start.view(-1)[j] = 1.0
        rules = Normalized(NRMAbsolute(), residual="sink")
        mu = RelevanceMeasure(net, inputs, start=start, composite=rules, additional_forward_args=more, batched=False)
        for number, value in enumerate(inputs):
            try:
                marginal = mu.marginal(at("input", item=number)).reshape(-1)
            except UnknownLayerError:  # the output does not depend on it
                marginal = torch.zeros(value.numel()).double()
            parts[number].append(marginal)
        constants.append(sum(mu.sinks("constants").values(), start=torch.zeros(1).double())[0])
        whole = sum(part[-1].sum() for part in parts) + sum(float(v) for v in mu.sinks().values())
        assert abs(float(whole) - 1) <= 1e-10
    return [torch.stack(part) for part in parts], torch.stack(constants)
