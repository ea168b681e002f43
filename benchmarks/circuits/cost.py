"""Cost of the passes on networks of realistic size, where the time of Python code does not dominate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.circuits.scores import STEPS
from nrm_plugin import Plan, RelevanceMeasure

NETS = {"vgg16": 96, "resnet50": 96}
"""Models of torchvision and their image sizes; weights are random, which does not change the time."""
PLANNED = 3
"""Calls of a plan before it is timed: the first ones record the query and trace it."""


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = getattr(torchvision.models, name)(weights=None).eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net


def jobs(net: nn.Module, x: Tensor, x0: Tensor, s: Tensor) -> dict[str, Callable[[], Any]]:
    """Returns the passes of each score; for EAP and EAP-IG, without the hooks that record activations."""

    def gradient(inputs: Tensor) -> Tensor:
        leaf = inputs.clone().requires_grad_()
        return torch.autograd.grad((net(leaf) * s).sum(), leaf)[0]

    def patching(points: list[Tensor]) -> None:
        with torch.no_grad():
            net(x0)
        for point in points:
            gradient(point)

    def measure() -> None:
        mu = RelevanceMeasure(net, x, start=s, reference=x0)
        mu.marginal(mu.layers)

    plan = Plan(net, x, reference=x0)

    def planned() -> None:
        mu = plan(x, start=s, reference=x0)
        mu.marginal(mu.layers)

    for _ in range(PLANNED):
        planned()
    return {
        "plain gradient": lambda: gradient(x),
        "reference measure": measure,
        "reference measure, planned": planned,
        "EAP": lambda: patching([x]),
        f"EAP-IG, {STEPS} steps": lambda: patching([x + n / STEPS * (x0 - x) for n in range(1, STEPS + 1)]),
    }


def cost(repetitions: int = 3) -> dict[str, dict[str, float]]:
    """Returns the processor time relative to a plain gradient, the smallest of alternating repetitions."""
    results = {}
    for name, size in NETS.items():
        x, x0 = torch.rand(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
        s = torch.zeros(1, 1000)
        s[0, 0], s[0, 1] = 1, -1
        spent: dict[str, list[float]] = {}
        for _ in range(repetitions):
            for job, run in jobs(model(name), x, x0, s).items():
                began = time.process_time()
                run()
                spent.setdefault(job, []).append(time.process_time() - began)
        unit = min(spent.pop("plain gradient"))
        results[name] = {job: round(min(times) / unit, 2) for job, times in spent.items()}
    return results
