from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nrm_plugin import RelevanceMeasure, at
from tests.text_nets import Block

ATTENTION = "resid_pre attn.q attn.k attn.v attn attn_out".split()
STANDARD = [*ATTENTION, *"resid_mid mlp.neuron mlp_out resid_post".split()]
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-8}


class Projected(nn.Module):
    """Attention written out, with a linear layer for each of queries, keys and values.

    Args:
        sizes: Sizes of the tensors that queries, keys and values read.
        size: Size of the output.
        heads: Number of heads.
    """

    def __init__(self, sizes: tuple[int, int, int], size: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(read, size) for read in sizes)
        self.out, self.heads = nn.Linear(size, size), heads

    def forward(self, *read: Tensor) -> Tensor:
        layers = (self.q, self.k, self.v)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, x in zip(layers, read, strict=True))
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


def feed_forward(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, 12), nn.ReLU(), nn.Linear(12, size))


class Bottleneck(nn.Module):
    """A narrow stream of attention and MLPs between two outer adds, as in MobileBERT.

    Args:
        read: What attention reads. ``"shared"``: queries and keys a projection of their own, values the input of the
            block; ``"input"``: all of them the input of the block; ``"inner"``: all of them the narrow stream.
        count: Number of MLPs.
        heads: Number of heads.
        is_pre: Whether normalization precedes the branches.
    """

    def __init__(self, read: str, count: int, heads: int, is_pre: bool) -> None:
        super().__init__()
        self.read, self.is_pre = read, is_pre
        self.into, self.shared, self.back = nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(4, 8)
        sizes = {"shared": (6, 6, 8), "input": (8, 8, 8), "inner": (4, 4, 4)}[read]
        self.attn = Projected(sizes, 4, heads)
        self.mlps = nn.ModuleList(feed_forward(4) for _ in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(count + 1))

    def forward(self, x: Tensor) -> Tensor:
        narrow, shared = self.into(x), self.shared(x)
        before, *others = self.norms if self.is_pre else [nn.Identity() for _ in self.norms]
        after = [nn.Identity() for _ in self.norms] if self.is_pre else self.norms
        inner = before(narrow)
        read = {"shared": (shared, shared, x), "input": (x, x, x), "inner": (inner, inner, inner)}[self.read]
        narrow = after[0](narrow + self.attn(*read))
        for mlp, one, two in zip(self.mlps, others, list(after)[1:], strict=True):
            narrow = two(narrow + mlp(one(narrow)))
        result: Tensor = x + self.back(narrow)
        return result


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x.mean(1))
        return result


def drawn(*blocks: nn.Module) -> tuple[nn.Module, Tensor]:
    net, x = Stack(*blocks), torch.randn(1, 6, 8)
    net(x)
    return net.double().eval().requires_grad_(False), x.double()


def mlps(count: int) -> Iterator[str]:
    """Yields the names of consecutive MLPs and of the sums after them."""
    for number in range(count):
        own = f"mlp{number}" if count > 1 else "mlp"
        yield from (f"{own}.neuron", f"{own}_out", f"resid_mid{number + 1}")


def names(*blocks: list[str]) -> list[str]:
    return [f"blocks.{number}.{name}" for number, block in enumerate(blocks) for name in block]


def check_layers(mu: RelevanceMeasure, same: dict[str, Any]) -> None:
    """Checks that sites are the same tensors as layers, and that mass, sink and bypass sum to 1 at every site."""
    for site, layer in same.items():
        known = mu.marginal(layer)
        torch.testing.assert_close(mu.marginal(site).reshape(known.shape), known, **EXACT)
    for site in mu.sites:
        total = mu(at(site)) + mu.sink(site) + mu.bypass(site)
        torch.testing.assert_close(total, torch.ones(1).double(), atol=1e-9, rtol=0)


def by_hand(net: nn.Module, layer: nn.Module, x: Tensor, x0: Tensor, columns: slice) -> Tensor:
    """Gradient × difference of the input of a layer, in the given columns alone, as a fraction of the difference."""
    read: list[Tensor] = []

    def store(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(inputs[0].detach().requires_grad_())
        return (read[-1],)

    handle = layer.register_forward_pre_hook(store)
    y, y0 = net(x)[0, 1], net(x0)[0, 1]
    handle.remove()
    (gradient,) = torch.autograd.grad(y, read[0])
    mask = torch.zeros_like(gradient)
    mask[..., columns] = 1
    return (mask * gradient * (read[0] - read[1])).sum().detach() / (y - y0).detach()


def check_heads(net: nn.Module, x: Tensor, layers: dict[int, Projected]) -> None:
    """Checks that each head is the columns that the output layer of its attention reads from this head."""
    x0 = x.flip(-1)
    tangent = RelevanceMeasure(net, x, 1, reference=x0, slopes="tangent")
    mu = RelevanceMeasure(net, x, 1)
    for block, layer in layers.items():
        read = mu.marginal(at(_name(net, layer.out), side="input"))
        size = read.shape[-1] // layer.heads
        for head in range(layer.heads):
            columns, event = slice(head * size, (head + 1) * size), at(f"blocks.{block}.attn.head.{head}")
            torch.testing.assert_close(mu(event)[0], read[..., columns].sum(), **EXACT)
            torch.testing.assert_close(tangent(event)[0], by_hand(net, layer.out, x, x0, columns), **EXACT)


def _name(net: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in net.named_modules() if module is layer)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    read=st.sampled_from(["shared", "input", "inner"]),
    count=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    is_pre=st.booleans(),
    depth=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_bottlenecks_are_blocks_whose_sites_are_the_tensors_of_their_layers(read, count, heads, is_pre, depth, seed):
    torch.manual_seed(seed)
    net, x = drawn(*(Bottleneck(read, count, heads, is_pre) for _ in range(depth)))
    inner = [*ATTENTION, "resid_mid0", *mlps(count), "resid_post"]
    mu = RelevanceMeasure(net, x, 1)
    assert mu.sites == names(*[inner] * depth)
    for block, number in product(range(depth), range(count)):
        own = f"blocks.{block}.mlp{number if count > 1 else ''}"
        check_layers(mu, {
            f"{own}_out": f"layers.{block}.mlps.{number}",
            f"{own}.neuron": f"layers.{block}.mlps.{number}.1",
            f"blocks.{block}.attn_out": f"layers.{block}.attn.out",
            f"blocks.{block}.resid_pre": f"layers.{block - 1}" if block else "input",
            f"blocks.{block}.resid_post": f"layers.{block}",
        })  # fmt: skip
        values = mu.marginal(f"blocks.{block}.attn.v").transpose(1, 2).flatten(2)
        torch.testing.assert_close(values, mu.marginal(f"layers.{block}.attn.v"), **EXACT)
    check_heads(net, x, {block: layer.attn for block, layer in enumerate(net.layers)})


class Scaled(Block):
    """The stream is scaled before each add."""

    def forward(self, x: Tensor) -> Tensor:
        x = 0.8 * x + self.attended(self.one(x)) / 2
        return self.down(torch.relu(self.up(self.two(x)))) - x * 0.7 * torch.full((8,), 0.9).to(x)


class Narrowing(nn.Module):
    """The first add is to a projection of half of the tokens, with the largest values, as in Hiera."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.skip = nn.LayerNorm(8), nn.Linear(8, 4)
        self.attn, self.mlp = Projected((8, 8, 8), 4, 2), feed_forward(4)

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        pooled = self.skip(read).unflatten(1, (-1, 2)).amax(2)
        x = pooled + self.attn(read[:, ::2], read, read)
        result: Tensor = x + self.mlp(x)
        return result


class Long(nn.Module):
    """A long skip around two blocks and a convolution, as in Swin2SR."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(True) for _ in range(2))
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        result: Tensor = x + self.mix(y.transpose(1, 2)).transpose(1, 2)
        return result


class Convolving(Block):
    """Both branches end with a convolution and an add of their own."""

    def __init__(self) -> None:
        super().__init__(True)
        self.mixes = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))

    def mixed(self, x: Tensor, number: int) -> Tensor:
        result: Tensor = x + self.mixes[number](x.transpose(1, 2)).transpose(1, 2)
        return result

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(self.attended(self.one(x)), 0)
        return x + self.mixed(self.down(torch.relu(self.up(self.two(x)))), 1)


class Pooling(Block):
    """The queries are added to the output of attention before the last linear layer, as in MViT."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.one(x)).chunk(3, -1))
        z = (q @ k.transpose(-2, -1)).softmax(-1) @ v + q
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.two(x))))


class Learned(Block):
    """Learned keys precede those of the tokens, as global tokens do in the first block of PEGASUS-X."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        learned = torch.ones(3, 4, dtype=x.dtype).tril()
        weights = torch.cat([q @ learned.T, q @ k.transpose(-2, -1)], -1).softmax(-1)
        z = weights[..., 3:] @ v + weights[..., :3] @ learned
        result: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return result


class Around(Block):
    """The add of the MLP reads the input of the block, not the output of attention, as in EdgeNeXt."""

    def __init__(self) -> None:
        super().__init__(True)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        y = y + self.attended(self.one(y))
        return x + self.down(torch.relu(self.up(self.two(y))))


class Beside(Around):
    """A linear layer beside attention, as a second branch of one add."""

    def forward(self, x: Tensor) -> Tensor:
        read = self.one(x)
        x = x + (self.attended(read) + self.mix(read))
        return x + self.down(torch.relu(self.up(self.two(x))))


OUT, DOWN = {"attn_out": "out"}, {"mlp_out": "down", "resid_post": ""}
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "scaled": (lambda: Scaled(True), {"mlp.neuron": "relu", "resid_post": ""}),
    "long": (Long, {}),
    "convolving": (Convolving, {"resid_post": ""}),
    "pooling": (lambda: Pooling(True), OUT | DOWN),
    "learned": (lambda: Learned(True), OUT | DOWN),
    "around": (Around, OUT | DOWN),
}


@pytest.mark.medium
@pytest.mark.parametrize("is_difference", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_with_other_adds_have_the_sites_of_their_attention_and_mlp(kind, is_difference):
    torch.manual_seed(0)
    block, same = KINDS[kind]
    net, x = drawn(*(block() for _ in range(1 if kind == "long" else 2)))
    mu = RelevanceMeasure(net, x, 1, reference=x.flip(-1) if is_difference else None)
    assert mu.sites == names(STANDARD, STANDARD)
    check_layers(mu, {f"blocks.1.{site}": f"layers.1.{layer}".rstrip(".") for site, layer in same.items()})
    before = "layers.0.blocks.0" if kind == "long" else "layers.0"
    check_layers(mu, {"blocks.0.resid_pre": "input", "blocks.1.resid_pre": before})


def test_an_mlp_after_a_linear_layer_beside_attention_is_numbered():
    torch.manual_seed(0)
    net, x = drawn(Beside())
    mu = RelevanceMeasure(net, x, 1)
    assert mu.sites == names([*ATTENTION, *"mlp0_out resid_mid mlp1.neuron mlp1_out resid_post".split()])
    check_layers(mu, {
        "blocks.0.attn_out": "layers.0.out",
        "blocks.0.mlp0_out": "layers.0.mix",
        "blocks.0.mlp1_out": "layers.0.down",
    })  # fmt: skip


@pytest.mark.medium
def test_attention_that_is_added_to_a_pooled_projection_has_sites():
    torch.manual_seed(0)
    net, x = drawn(Narrowing())
    mu = RelevanceMeasure(net, x, 1)
    assert mu.sites == names(STANDARD)
    check_layers(mu, {
        "blocks.0.resid_pre": "layers.0.norm",
        "blocks.0.attn_out": "layers.0.attn.out",
        "blocks.0.mlp.neuron": "layers.0.mlp.1",
        "blocks.0.resid_post": "layers.0",
    })  # fmt: skip
    check_heads(net, x, {0: net.layers[0].attn})


class Twice(nn.Module):
    """Two attention calls in one branch, whose difference is used, and an MLP of two last layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attns, self.up = nn.ModuleList(Projected((8, 8, 8), 8, 2) for _ in range(2)), nn.Linear(8, 12)
        self.gated, self.downs = nn.Linear(8, 12), nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.attns[0](x, x, x) - 0.5 * self.attns[1](x, x, x))
        return x + (self.downs[0](torch.relu(self.up(x))) + self.downs[1](torch.tanh(self.gated(x))))


def test_heads_and_neurons_of_numbered_sites_are_events():
    torch.manual_seed(0)
    net, x = drawn(Twice())
    mu = RelevanceMeasure(net, x, 1)
    for number, head in product(range(2), range(2)):
        read = mu.marginal(at(f"layers.0.attns.{number}.out", side="input"))
        known = read[..., 4 * head : 4 * head + 4].sum()
        torch.testing.assert_close(mu(at(f"blocks.0.attn{number}.head.{head}"))[0], known, **EXACT)
        torch.testing.assert_close(mu.marginal(f"blocks.0.attn{number}.hook_z"), mu.marginal(f"blocks.0.attn{number}"))
        neurons = mu.marginal(at(f"layers.0.downs.{number}", side="input"))
        torch.testing.assert_close(mu(at(f"blocks.0.mlp.neuron{number}.7"))[0], neurons[..., 7].sum(), **EXACT)
        torch.testing.assert_close(mu.marginal(f"blocks.0.mlp.post{number}"), neurons, **EXACT)
