"""Comparison of one known method with this package, and the nets used for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

import nrm_plugin
from nrm_plugin.functional import registry

DOUBLE = torch.float64
TINY = 1e-12

Made = tuple[dict[str, Any], Tensor | Sequence[Tensor]]
"""The names that an expression uses, and the result of the known method."""


@dataclass(frozen=True)
class Row:
    """One known method.

    Args:
        method: Its name.
        expression: The method in this package, as one Python expression.
        reference: What it is compared with.
        make: Names and expected values.
        tolerance: Largest difference that passes the test, relative to the largest entry.
        needs: The package of ``reference``, if it is not a dependency.
        arxiv: Its paper.
    """

    method: str
    expression: str
    reference: str
    make: Callable[[], Made]
    tolerance: float = 1e-10
    needs: str = ""
    arxiv: str = ""

    @property
    def is_available(self) -> bool:
        """True if the package is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def difference(self) -> float:
        """Returns the largest absolute difference from the known method, relative to the largest entry."""
        with kernels_restored(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            names, expected = self.make()
            public = {name: getattr(nrm_plugin, name) for name in nrm_plugin.__all__}
            actual = eval(self.expression, {**public, "torch": torch, "nn": nn, **names})
        differences = []
        for one, other in zip(_flat(actual), _flat(expected), strict=True):
            if one.shape != other.shape or not bool(other.any()):
                raise ValueError(f"{self.method}: compared {tuple(one.shape)} with {tuple(other.shape)}, or with zeros")
            differences.append(float((one - other).abs().max() / other.abs().max()))
        return max(differences)


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    return [part for item in (result.values() if isinstance(result, dict) else result) for part in _flat(item)]


@contextmanager
def kernels_restored() -> Iterator[None]:
    """Removes the kernels that a row registers."""
    tables = [registry.KERNELS, registry.KERNELS_BY_FUNCTION]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


# -- nets -------------------------------------------------------------------------------------------------------------


def draw(*shape: int) -> Tensor:
    """Returns noise."""
    return torch.randn(shape, dtype=DOUBLE)


class VGG(nn.Module):
    """The features of torchvision's VGG11 and a head, random weights and biases, for images of 32 × 32."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            features = (torchvision.models.vgg11_bn if norm else torchvision.models.vgg11)(weights=None).features
        self.features, self.head = features.to_empty(device="cpu"), nn.Linear(512, 10)
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # Captum reads values that an in-place ReLU overwrites
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                draw_statistics(module)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def draw_statistics(module: nn.BatchNorm2d) -> None:
    nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(module.running_mean, std=0.1)
    nn.init.uniform_(module.running_var, 0.5, 1.5)


def small() -> nn.Sequential:
    """Returns three convolutions and a head, with biases."""
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 6)).double().eval().requires_grad_(False)


def plain_relu() -> nn.Sequential:
    """Returns a ReLU net without biases."""
    widths = [nn.Linear(a, b, bias=False) for a, b in ((6, 8), (8, 7), (7, 4))]
    return nn.Sequential(widths[0], nn.ReLU(), widths[1], nn.ReLU(), widths[2]).double().eval()


def epsilon_everywhere(epsilon: float = TINY) -> LayerMapComposite:
    """Returns LRP-ε on layers and pooling, with the identity on activations."""
    return LayerMapComposite([(Activation, Pass()), (AvgPool, Norm(epsilon)), (Linear, Epsilon(epsilon))])
