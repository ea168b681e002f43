"""Reference values that refactoring must not change: ``python -m tests.pins.golden`` records them.

A dozen networks of different kinds in float64, each under four composites and with the same queries.
Record again only when a change of numbers is intended, and state it in the changelog.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat

from nrm_plugin import ABSORBED, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.demo import load_digits, load_model

STORED = Path(__file__).with_name("golden.json")


class Residual(nn.Module):
    """A skip connection around two convolutions with batch normalization, joined by ``+``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.norm(self.b(functional.relu(self.a(x)))))
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Depthwise convolution, squeeze and excitation, hardswish, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wise = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite, self.head = nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.stem(x))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3))))))
        y = self.wise(x) * gate[:, :, None, None]
        return self.head(
            torch.cat([functional.adaptive_avg_pool2d(x, 1), functional.adaptive_max_pool2d(y, 1)], 1).flatten(1)
        )


class Attending(nn.Module):
    """A class token, position embeddings and two encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(12, 8), nn.Parameter(torch.zeros(1, 1, 8))
        self.place = nn.Parameter(torch.zeros(1, 37, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), -1, 12))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.encoder(x))[:, 0])


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(36, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.transpose(1, 2).flatten(2))[0][:, -1])


class Reused(nn.Module):
    """One layer called three times, a sum of three terms and a scaled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same, self.head = nn.Linear(432, 10), nn.Linear(10, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x.flatten(1)))
        y = functional.relu(self.same(x))
        z = functional.relu(self.same(y))
        return self.head(sum([x, 0.5 * y, self.same(z)]))


class Graph(nn.Module):
    """Messages between the rows of an image over a fixed adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("adjacency", (torch.arange(144).reshape(12, 12) % 5 == 0).double() / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(2)
        x = functional.relu(self.adjacency @ self.first(x))
        return self.head(functional.relu(torch.einsum("ij,njc->nic", self.adjacency, self.second(x))).amax(1))


def _chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: _chain(nn.Flatten(), nn.Linear(432, 9), nn.ReLU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 4)),
    "conv": lambda: _chain(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3),
        nn.ReLU(True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ),
    "strided": lambda: _chain(
        nn.Conv2d(3, 6, 3, stride=2, dilation=2), nn.LeakyReLU(), nn.Conv2d(6, 6, 3, groups=3, padding=1),
        nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    ),
    "transposed": lambda: _chain(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, stride=2), nn.ReLU(),
        nn.Upsample(scale_factor=0.5), nn.Flatten(), nn.Linear(75, 4),
    ),
    "padded": lambda: _chain(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 5, 3), nn.InstanceNorm2d(5, affine=True), nn.ReLU(),
        nn.Conv2d(5, 5, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(20, 4),
    ),
    "normed": lambda: _chain(
        nn.Conv2d(3, 6, 4, stride=4), nn.GroupNorm(2, 6), nn.GELU(), nn.Flatten(), nn.LayerNorm(54), nn.Linear(54, 4)
    ),
    "residual": Residual,
    "gated": Gated,
    "attention": Attending,
    "recurrent": Recurrent,
    "reused": Reused,
    "graph": Graph,
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network with weights drawn from a seed, and two inputs ``(2, 3, 12, 12)``."""
    generator = torch.Generator().manual_seed(sorted(NETS).index(name))
    net, x = NETS[name]().double().eval(), torch.rand(2, 3, 12, 12, generator=generator, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            shift = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.copy_(noise * 2 * scale + shift)
        for key, buffer in net.named_buffers():
            if "running" in key:
                noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(noise + 0.5 if "var" in key else noise - 0.5)
    return net, x


COMPOSITES: dict[str, Callable[[], RelevanceMeasure]] = {
    "default": lambda net, x: RelevanceMeasure(net, x, [1, 3], composite=NRMDefault()),
    "flat, sink": lambda net, x: RelevanceMeasure(net, x, [1, 3], composite=EpsilonPlusFlat(), residual="sink"),
    "box": lambda net, x: RelevanceMeasure(net, x, [1, 3], composite=EpsilonGammaBox(low=-1.0, high=1.0)),
    "absolute": lambda net, x: RelevanceMeasure(net, x, [1, 3], composite=NRMAbsolute()),
}  # type: ignore[dict-item]


def answers(mu: RelevanceMeasure) -> dict[str, list[float]]:
    """The answers of one measure to every kind of query, at three layers, as short lists."""
    upper, lower = _layers(mu)
    A, B = at(upper).channel([0, 2]), at(lower).channel([1, 2])
    matrix = mu.joint(upper, lower)
    queries: dict[str, Tensor] = {
        "output": mu.output,
        "input": mu.marginal("input").flatten(1)[:, ::37],
        "upper": mu.marginal(upper, over="channel"),
        "lower": mu.marginal(lower, over="channel"),
        "sink": mu.sink("input"),
        "constants": mu.sink("input", kind="constants"),
        "bypass": mu.bypass(lower),
        "A": mu(A),
        "A & B": mu(A & B),
        "A | B": mu(A | B),
        "~A - B": mu(~A - B),
        "absorbed": mu(ABSORBED),
        "B given upper": mu(B, given=at(upper), min_ratio=0),
        "input with A": mu.marginal("input", joint=A & B).flatten(1)[:, ::37],
        "joint": matrix.flatten(1)[:, :: max(1, matrix[0].numel() // 8)],
        "variation": mu.variation(lower),
    }
    return {name: value.flatten().tolist() for name, value in queries.items()}


def _layers(mu: RelevanceMeasure) -> tuple[str, str]:
    """The lowest layer, and one at two thirds of the depth, among those with three channels and some relevance."""
    wide = [name for name in mu.layers[1:-1] if mu.shape(name)[mu.channel_dim(name)] >= 3]
    wide = [name for name in wide if bool(mu.marginal(name).abs().sum() > 0)]
    return wide[(2 * len(wide)) // 3], wide[0]


def measured(name: str) -> dict[str, dict[str, list[float]]]:
    """All answers for one network; ``digits`` is the trained model of the demo."""
    if name == "digits":
        net, (images, labels) = load_model().double(), load_digits()
        return {"default": answers(RelevanceMeasure(net, images[:2].double(), labels[:2]))}
    return {composite: answers(make(*made(name))) for composite, make in COMPOSITES.items()}  # type: ignore[call-arg]


def main() -> None:
    """Command line."""
    values = {name: measured(name) for name in [*NETS, "digits"]}
    STORED.write_text(json.dumps(values, indent=0, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
