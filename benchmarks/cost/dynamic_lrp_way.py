"""Relevance by DynamicLRP (arXiv 2512.07010), which traverses autograd's graph; a repository, not a package.

``make .venv/hosts/dynamic_lrp.stamp`` installs it. Convolutions and linear layers have the z⁺ rule.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def way(model: nn.Module, x: Tensor, target: int) -> Callable[[], object]:
    """Returns DynamicLRP's pass; the first call sorts the graph, later ones reuse its order."""
    state: list[Any] = []

    def work() -> object:
        leaf = x.clone().requires_grad_()
        parameters = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in parameters:  # autograd stores the inputs of a layer for the gradients of its weights
            parameter.requires_grad_(True)
        try:
            return relevance(state, leaf, model(leaf), target)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    return work


def relevance(state: list[Any], leaf: Tensor, output: Tensor, target: int) -> Tensor:
    """Returns the relevance of the input.

    Raises:
        ImportError: If DynamicLRP is not installed.
        Exception: If it does not reach the input.
    """
    if not state:
        start = torch.zeros_like(output)
        start[:, target] = 1
        engine = importlib.import_module("lrp_engine.lrp").LRPEngine
        state.append(engine(params_to_interpret=[leaf], use_z_plus=True, starting_relevance=start))
    found = state[0].run(output)
    if isinstance(found[-1], Exception):  # returned with the state of the graph
        raise found[-1]
    at_input: Tensor = found[1][0]
    return at_input
