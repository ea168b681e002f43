"""Conservation check of a measure at every tap, for the tables of models and layers."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from nrm_plugin import RelevanceMeasure, at

RESULTS = Path(__file__).parent / "results"


def random_biases(model: nn.Module) -> nn.Module:
    """Draws biases and zero-initialized weights at random; returns the model in evaluation mode."""
    for name, parameter in model.named_parameters():
        if (parameter.ndim == 1 and "bias" in name) or not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def conservation_check(mu: RelevanceMeasure) -> dict[str, Any]:
    """Returns the largest error of mass + sink + bypass = 1 over all taps, and the mass absorbed above the lowest."""
    mu._check_fresh = lambda: None  # type: ignore[method-assign]  # the weights do not change here
    lowest = mu.layers[0]
    error, largest = largest_error(mu, mu.layers)
    return {
        "taps": len(mu.layers),
        "error": error,
        "residual": float(mu.sink(lowest, kind="residual").max()),
        "constants": float(mu.sink(lowest, kind="constants").max()),
        "variation at the input": float(mu.variation(lowest).max()),
        "largest variation": largest,
    }


def largest_error(mu: RelevanceMeasure, layers: Sequence[str]) -> tuple[float, float]:
    """Returns the largest error of mass + sink + bypass = 1, relative to the variation, and the largest variation."""
    error, largest = 0.0, 0.0
    for layer, mass in zip(layers, mu([at(layer) for layer in layers]), strict=True):
        variation = mu.variation(layer)
        total = mass + mu.sink(layer) + mu.bypass(layer)
        error = max(error, float(((total - 1).abs() / variation.clamp(min=1)).max()))
        largest = max(largest, float(variation.max()))
    return error, largest


def store(name: str, results: dict[str, Any], *packages: str, folder: Path = RESULTS) -> None:
    """Writes ``NAME.json`` into a folder, with the versions of the packages used."""
    versions = {package: version(package) for package in ("torch", "zennit", *packages)}
    environment = {"python": platform.python_version(), **versions}
    text = json.dumps({"environment": environment, **results}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n")
