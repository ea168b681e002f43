"""Four nets as circuits: every edge is an entry of a weight of a step, ``z_r = b_r + Σ_s W_rs ∗ a_s``.

A step is a linear layer, or a convolution whose channels are the nodes. The residual stream is unrolled: a step of the
residual CNN reads the concatenation of all earlier block outputs, with the weights of the block repeated, and a step
of the transformer adds up all earlier node outputs, as a 1 × 1 convolution of ones. ``wire`` replaces the steps, which
is how circuits are run; ``slopes`` replaces the non-linear operations, which is how scores are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.circuits.slopes import MASKED, Tangents

Wire = Callable[[str, Tensor], Tensor]
TANGENTS = Tangents()


class Read(nn.Identity):
    """Names the tensor that a step reads; its nodes are the entries of dimension 1."""

    nrm_channel_dim: ClassVar[int] = 1


class CircuitNet(nn.Module):
    """A net of steps. ``nodes`` contains the names of the nodes that each step reads, one per column of its weight."""

    def __init__(self, steps: dict[str, nn.Module], nodes: dict[str, list[str]]) -> None:
        super().__init__()
        self.steps, self.nodes = nn.ModuleDict(steps), nodes
        self.read = nn.ModuleDict({name: Read() for name in steps})

    def plain(self, name: str, a: Tensor) -> Tensor:
        return self.steps[name](self.read[name](a))

    def embed(self, x: Tensor) -> Tensor:
        """Returns the input node."""
        return x

    def body(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embed(x), self.plain, TANGENTS)


class MLP(CircuitNet):
    """A multilayer perceptron with edges between neurons, including pixels."""

    def __init__(self, *widths: int) -> None:
        steps: dict[str, nn.Module] = {f"layer{n}": nn.Linear(i, o) for n, (i, o) in enumerate(pairwise(widths), 1)}
        super().__init__(steps, {name: columns(name, step.in_features) for name, step in steps.items()})

    def body(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        for name in list(self.steps)[:-1]:
            h = slopes.activation(wire(name, h), torch.relu)
        return wire(list(self.steps)[-1], h)


class CNN(CircuitNet):
    """A CNN with edges between channels, and max pooling before all but the first two convolutions."""

    def __init__(self, *widths: int) -> None:
        steps: dict[str, nn.Module] = {
            f"conv{n}": nn.Conv2d(i, o, 3, padding=1)
            for n, (i, o) in enumerate(zip((1, *widths), widths, strict=False), 1)
        }
        steps["output"] = nn.Conv2d(widths[-1], 10, 8 // 2 ** (len(widths) - 1))
        super().__init__(steps, {name: columns(name, step.in_channels) for name, step in steps.items()})

    def body(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        for number, name in enumerate(list(self.steps)[:-1]):
            h = slopes.activation(wire(name, slopes.pool(h) if number > 1 else h), torch.relu)
        return wire("output", slopes.pool(h)).flatten(1)


class Rolled(nn.Module):
    """The residual CNN as it is trained: ``h + second(silu(first(h)))``."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.first, self.second = (
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks)) for _ in range(2)
        )
        self.output = nn.Conv2d(width, 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for first, second in zip(self.first, self.second, strict=True):
            h = h + second(functional.silu(first(h)))
        return self.output(h).flatten(1)


class ResidualCNN(CircuitNet):
    """The unrolled residual CNN: edges lead from channels of a block to those of later blocks, and within blocks."""

    def __init__(self, rolled: Rolled) -> None:
        steps: dict[str, nn.Module] = {"stem": rolled.stem}
        nodes, stream = {"stem": ["pixels"]}, columns("stem", rolled.stem.out_channels)
        for n, (first, second) in enumerate(zip(rolled.first, rolled.second, strict=True), 1):
            steps |= {f"first{n}": repeated(first, n), f"second{n}": second}
            nodes |= {f"first{n}": list(stream), f"second{n}": columns(f"hidden{n}", second.in_channels)}
            stream += columns(f"block{n}", second.out_channels)
        steps["output"], nodes["output"] = repeated(rolled.output, len(rolled.first) + 1), stream
        super().__init__(steps, nodes)

    def body(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        stream = wire("stem", h)
        for n in range(1, len(self.steps) // 2):
            hidden = slopes.activation(wire(f"first{n}", stream), functional.silu)
            stream = torch.cat([stream, wire(f"second{n}", hidden)], 1)
        return wire("output", stream).flatten(1)


class Transformer(CircuitNet):
    """Edges as in MIB, from embedding, heads and MLPs to the q, k and v of each later head, to later MLPs and logits.

    Layer normalization without gain and bias (gains are part of the weights), causal attention, GELU.
    """

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int) -> None:
        steps: dict[str, nn.Module] = {}
        nodes, stream = {}, ["embedding"]
        for n in range(layers):
            steps[f"attention{n}"], nodes[f"attention{n}"] = summed(len(stream), 3 * heads), list(stream)
            stream += [f"head {n}.{head}" for head in range(heads)]
            steps[f"mlp{n}"], nodes[f"mlp{n}"] = summed(len(stream), 1), list(stream)
            stream += [f"mlp {n}"]
        steps["logits"], nodes["logits"] = summed(len(stream), 1), stream
        super().__init__(steps, nodes)
        self.heads, self.layers = heads, layers
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) / 2)
        size = width // heads
        self.qkv = nn.ParameterList(
            nn.Parameter(torch.randn(3 * heads, width, size) / width**0.5) for _ in range(layers)
        )
        self.out = nn.ParameterList(nn.Parameter(torch.randn(heads, size, width) / width**0.5) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.unembed = nn.Linear(width, vocabulary)
        self.register_buffer("later", torch.full((length, length), MASKED).triu(1))

    def embed(self, x: Tensor) -> Tensor:
        return (self.tokens(x) + self.positions).unsqueeze(1)

    def body(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        return self.unembed(self.last(h, wire, slopes)[:, 0, -1])

    def last(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        """Returns the normalized residual stream at the end, ``(N, 1, T, D)``."""
        for n in range(self.layers):
            q, k, v = (slopes.norm(wire(f"attention{n}", h)) @ self.qkv[n]).chunk(3, 1)
            scores = slopes.matmul(q, k.transpose(2, 3)) / q.shape[-1] ** 0.5 + self.later
            h = torch.cat([h, slopes.matmul(slopes.softmax(scores), v) @ self.out[n]], 1)
            hidden = self.up[n](slopes.norm(wire(f"mlp{n}", h)))
            h = torch.cat([h, self.down[n](slopes.activation(hidden, functional.gelu))], 1)
        return slopes.norm(wire("logits", h))


def columns(name: str, count: int) -> list[str]:
    return [f"{name}:{number}" for number in range(count)]


def repeated(layer: nn.Module, times: int) -> nn.Conv2d:
    """Returns a convolution of concatenated tensors that equals ``layer`` applied to their sum."""
    twin = nn.Conv2d(times * layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    twin.weight.data, twin.bias.data = layer.weight.data.repeat(1, times, 1, 1), layer.bias.data.clone()
    return twin


def summed(nodes: int, readers: int) -> nn.Conv2d:
    """Returns a convolution in which each reader sums over all nodes."""
    step = nn.Conv2d(nodes, readers, 1, bias=False).requires_grad_(False)
    nn.init.ones_(step.weight)
    return step


# -- training and pairs ---------------------------------------------------------------------------------------------

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Clean and corrupted inputs, their answers."""


def trained(name: str, seed: int, pairs: int, steps: int | None = None) -> tuple[CircuitNet, Pairs, float]:
    """Returns a net in float64, pairs of held-out inputs that it answers correctly, and its held-out accuracy."""
    torch.manual_seed(seed)
    net, data = (recall_net if name == "transformer" else digits_net)(name, steps)
    net = net.double().eval().requires_grad_(False)
    clean, corrupted, t, u = data(torch.Generator().manual_seed(seed), 20 * pairs)
    with torch.no_grad():
        first, second = net(clean).argmax(1) == t, net(corrupted).argmax(1) == u
    chosen = (first & second).nonzero()[:pairs, 0]
    if len(chosen) < pairs:
        raise ValueError(f"{name}, seed {seed}: {len(chosen)} pairs are answered correctly, {pairs} are needed.")
    return net, (clean[chosen], corrupted[chosen], t[chosen], u[chosen]), float(first.float().mean())


def fit(net: nn.Module, batches: Callable[[], tuple[Tensor, Tensor]], steps: int, rate: float = 3e-3) -> None:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = batches()
        functional.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def digits_net(name: str, steps: int | None) -> tuple[CircuitNet, Callable[..., Pairs]]:
    """Returns a net for the digits of scikit-learn; a pair consists of held-out digits of two classes."""
    from sklearn.datasets import load_digits  # takes long to import

    digits = load_digits()
    x, y = torch.as_tensor(digits.images, dtype=torch.float32) / 16, torch.as_tensor(digits.target)
    x = x.flatten(1) if name == "MLP" else x.unsqueeze(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    net: nn.Module = {"MLP": lambda: MLP(64, 48, 48, 48, 10), "CNN": lambda: CNN(16, 16, 24)}.get(
        name, lambda: Rolled(12, 3)
    )()

    def batch() -> tuple[Tensor, Tensor]:
        drawn = train[torch.randint(len(train), (100,))]
        return x[drawn], y[drawn]

    def pairs(draw: torch.Generator, count: int) -> Pairs:
        one, other = (test[torch.randint(len(test), (count,), generator=draw)] for _ in range(2))
        differ = y[one] != y[other]
        one, other = one[differ], other[differ]
        return x[one].double(), x[other].double(), y[one], y[other]

    fit(net, batch, steps or NETS[name])
    return (ResidualCNN(net) if isinstance(net, Rolled) else net), pairs  # type: ignore[return-value]


KEYS, VALUES, SHOWN = 8, 8, 4


def recall(draw: torch.Generator | None, count: int) -> tuple[Tensor, Tensor]:
    """Returns sequences ``k1 v1 k2 v2 k3 v3 k4 v4 k``, with the value of the last key as the answer."""
    keys = torch.rand(count, KEYS, generator=draw).argsort(1)[:, :SHOWN]
    values = torch.rand(count, VALUES, generator=draw).argsort(1)[:, :SHOWN] + KEYS
    asked = torch.randint(SHOWN, (count, 1), generator=draw)
    return torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, asked)], 1), values.gather(1, asked)[
        :, 0
    ]


def twins(draw: torch.Generator, count: int) -> Pairs:
    """Returns pairs of sequences; in the corrupted one, the requested key and another key are swapped."""
    clean, t = recall(draw, count)
    rows = torch.arange(count)
    place = (clean[:, :-1:2] == clean[:, -1:]).int().argmax(1)
    other = (place + torch.randint(1, SHOWN, (count,), generator=draw)) % SHOWN
    corrupted = clean.clone()
    corrupted[rows, 2 * place], corrupted[rows, 2 * other] = clean[rows, 2 * other], clean[rows, 2 * place]
    return clean, corrupted, t, clean[rows, 2 * other + 1]


def recall_net(name: str, steps: int | None) -> tuple[CircuitNet, Callable[..., Pairs]]:
    """Returns a transformer that recalls the value of a key."""
    net = Transformer(KEYS + VALUES, 2 * SHOWN + 1, layers=3, heads=4, width=32)
    fit(net, lambda: recall(None, 256), steps or NETS[name])
    return net, twins


NETS = {"MLP": 500, "CNN": 500, "residual CNN": 500, "transformer": 600}
"""Training steps."""
