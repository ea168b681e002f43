"""Nets that are cut at their lowest site: ``below`` computes its activations, and ``rest`` the outputs from these.

A site is a module of ``rest`` whose output is patched. Patching with zero activations changes nothing below the lowest
site, so that a measure against this reference is a measure of ``rest``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.circuits.nets import CircuitNet, Rolled, trained
from nrm_plugin.demo import load_digits, load_model
from nrm_plugin.measure.layer_averages import blurred


class Whole(nn.Module):
    """``rest`` applied to ``below``, which returns the activations of the lowest site and tensors that bypass it."""

    def __init__(self, below: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.below, self.rest = below, rest

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.below(x)
        logits: Tensor = self.rest(*inputs) if isinstance(inputs, tuple) else self.rest(inputs)
        return logits


@dataclass(frozen=True)
class Case:
    """A net with samples and the explained output: a logit, or the difference of two logits.

    ``other`` is the reference input, one for all samples or one for each; ``layers`` are those of ``whole`` whose
    channels are ranked together. On a large net, only the reference input and the default composite are compared.
    """

    whole: Whole
    sites: tuple[str, ...]
    x: Tensor
    other: Tensor
    target: Tensor
    against: Tensor | None = None
    layers: tuple[str, ...] = ()
    is_large: bool = False

    def explained(self, outputs: Tensor) -> Tensor:
        """``(N,)``."""
        value = outputs.gather(1, self.target[:, None])[:, 0]
        return value if self.against is None else value - outputs.gather(1, self.against[:, None])[:, 0]

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the inputs of ``rest``: activations of the lowest site, and tensors that bypass it."""
        with torch.no_grad():
            read = self.whole.below(x.expand(len(self.x), *x.shape[1:]))
        return read if isinstance(read, tuple) else (read,)

    def run(
        self, inputs: tuple[Tensor, ...], patched: dict[str, Tensor], until: str | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the activations of the sites, and outputs, where some sites have given activations.

        Args:
            inputs: The inputs of ``rest``.
            patched: Activations by site. A chain of layers starts at the patched site.
            until: The last site that is needed. A chain of layers stops there and does not return the net's outputs.
        """
        seen: dict[str, Tensor] = dict(patched)
        rest = self.whole.rest
        with ExitStack() as stack:
            for site in self.sites:

                def hook(module: object, args: object, output: Tensor, site: str = site) -> Tensor:
                    return seen.setdefault(site, output)

                stack.callback(rest.get_submodule(site).register_forward_hook(hook).remove)
            if isinstance(rest, nn.Sequential) and len(patched) == 1:
                ((first, value),) = patched.items()
                rest, inputs = rest[int(first) + 1 : None if until is None else int(until) + 1], (value,)
            outputs = rest(*inputs)
        return seen, outputs


# -- a chain of layers ------------------------------------------------------------------------------------------------


def chain(layers: Sequence[nn.Module], sites: Sequence[int]) -> tuple[Whole, tuple[str, ...]]:
    """Cuts a chain of layers at its first site; also returns the names of the sites in ``rest``."""
    first = sites[0]
    rest = nn.Sequential(nn.Identity(), *layers[first + 1 :])
    return Whole(nn.Sequential(*layers[: first + 1]), rest), tuple(str(site - first) for site in sites)


def modules(whole: nn.Module, kind: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of all modules of a kind, lowest first."""
    return tuple(name for name, module in whole.named_modules() if isinstance(module, kind))


def digits(count: int) -> list[Case]:
    """Returns the embedded net: ReLUs after the second convolution of each block, and of the first linear layer."""
    net, (images, _) = load_model(), load_digits()
    images = images.double()
    net = net.double().requires_grad_(False)
    layers = [*net.features, net.flatten, *net.classifier]
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    whole, sites = chain(layers, [3, 8, 13, 17])
    x = images[:count]
    mean, target = images.mean(0, keepdim=True), net(x).argmax(1)
    return [Case(whole.eval(), sites, x, mean, target, layers=modules(whole, nn.ReLU))]


# -- residual blocks --------------------------------------------------------------------------------------------------


class ResidualBelow(nn.Module):
    """Stem and the first convolution of the first block."""

    def __init__(self, net: Rolled) -> None:
        super().__init__()
        self.stem, self.first = net.stem, net.first[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x)
        return self.first(h), h


class ResidualRest(nn.Module):
    """The net from the hidden channels of the first block and the skip connection around them."""

    def __init__(self, net: Rolled) -> None:
        super().__init__()
        self.site, self.output = nn.Identity(), net.output
        self.first, self.second = nn.ModuleList(net.first[1:]), net.second

    def forward(self, hidden: Tensor, h: Tensor) -> Tensor:
        h = h + self.second[0](functional.silu(self.site(hidden)))
        for first, second in zip(self.first, self.second[1:], strict=True):
            h = h + second(functional.silu(first(h)))
        logits: Tensor = self.output(h).flatten(1)
        return logits


RESIDUAL = (
    "below.stem",
    "below.first",
    *(f"rest.{name}.{n}" for n in range(2) for name in ("second", "first")),
    "rest.second.2",
)
"""All convolutions but the last, of three blocks."""


def rolled(net: CircuitNet) -> Rolled:
    """Returns the residual CNN as it was trained, from its unrolled twin."""
    steps, width = net.steps, net.steps["stem"].out_channels
    twin = Rolled(width, len(steps) // 2 - 1)
    layers = {"stem": twin.stem, "output": twin.output}
    for n, (first, second) in enumerate(zip(twin.first, twin.second, strict=True), 1):
        layers |= {f"first{n}": first, f"second{n}": second}
    for name, layer in layers.items():
        layer.weight.data, layer.bias.data = steps[name].weight.data[:, : layer.in_channels], steps[name].bias.data
    return twin.requires_grad_(False).eval()


def residual(count: int, seeds: int = 3) -> list[Case]:
    """Returns three blocks, SiLU; the channels inside the blocks, and the output of the first."""
    cases = []
    for seed in range(seeds):
        net, (x, *_), _ = trained("residual CNN", seed, count // seeds)
        twin = rolled(net)
        whole = Whole(ResidualBelow(twin), ResidualRest(twin)).eval()
        sites, mean, target = ("site", "second.0", "first.0", "first.1"), x.mean(0, keepdim=True), net(x).argmax(1)
        cases.append(Case(whole, sites, x, mean, target, layers=RESIDUAL))
    return cases


# -- transformer ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Outputs of the heads of one layer, ``(N, heads, T, D)``, from the residual stream ``(N, T, D)``."""

    def __init__(self, qkv: Tensor, out: Tensor, later: Tensor) -> None:
        super().__init__()
        self.qkv, self.out = nn.Parameter(qkv), nn.Parameter(out)
        self.register_buffer("later", later)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (normalized(h).unsqueeze(1) @ self.qkv).chunk(3, 1)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + self.later
        return (scores.softmax(-1) @ v) @ self.out


class TransformerBelow(nn.Module):
    """Embedding and the heads of the first layer."""

    def __init__(self, net: CircuitNet, attention: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions, self.attention = net.tokens, net.positions, attention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.tokens(x) + self.positions
        return self.attention(h), h


class TransformerRest(nn.Module):
    """The net from the outputs of the heads of the first layer and the embedding."""

    def __init__(self, net: CircuitNet, attention: Sequence[nn.Module]) -> None:
        super().__init__()
        self.site, self.heads = nn.Identity(), nn.ModuleList(attention)
        self.up, self.down, self.unembed = net.up, net.down, net.unembed
        self.mlps = nn.ModuleList(nn.Identity() for _ in net.up)

    def forward(self, heads: Tensor, h: Tensor) -> Tensor:
        heads = self.site(heads)
        for n, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            h = h + (self.heads[n - 1](h) if n else heads).sum(1)
            h = h + self.mlps[n](down(functional.gelu(up(normalized(h)))).unsqueeze(1)).squeeze(1)
        logits: Tensor = self.unembed(normalized(h)[:, -1])
        return logits


def normalized(h: Tensor) -> Tensor:
    return functional.layer_norm(h, h.shape[-1:], eps=1e-5)


def rolled_transformer(net: CircuitNet) -> Whole:
    """Returns the transformer of the benchmark of circuits, with a module for each output of heads and MLPs."""
    attention = [Attention(qkv, out, net.later) for qkv, out in zip(net.qkv, net.out, strict=True)]
    whole = Whole(TransformerBelow(net, attention[0]), TransformerRest(net, attention[1:]))
    return copy.deepcopy(whole).eval().requires_grad_(False)


def transformer(count: int, seeds: int = 3) -> list[Case]:
    """Returns three layers that recall the value of a key; the reference is the sequence with two keys swapped."""
    cases = []
    for seed in range(seeds):
        net, (clean, corrupted, t, u), _ = trained("transformer", seed, count // seeds)
        cases.append(Case(rolled_transformer(net), ("site", "mlps.0", "heads.0", "heads.1"), clean, corrupted, t, u))
    return cases


# -- photographs ------------------------------------------------------------------------------------------------------


def photographs(name: str, count: int) -> list[Case]:
    """Returns a net of :mod:`benchmarks.real` with photographs of objects in front of two landscapes.

    The explained class is the largest output. The reference is the blurred image. Every image is a case of its own.
    """
    from benchmarks.real.networks import NETWORKS
    from benchmarks.real.photos import background, placed, stamps

    net = NETWORKS[name]()
    chosen = [stamp for stamp in stamps() if len(net.classes) == 1000 or stamp.label in net.classes]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:count].tolist()
    grounds = [background(ground, *net.size) for ground in ("flower", "china")]
    images = [placed(chosen[k].cut_out(*net.size), grounds[n % 2])[0] for n, k in enumerate(order)]
    x = net.normalized(torch.stack(images))
    target = net.logits(x).argmax(1)
    layers, places = vgg_layers(net.model) if name == "VGG16" else efficientnet_layers(net.model)
    whole, sites = chain(layers, places)
    whole = whole.eval()
    parts = zip(x.split(1), target.split(1), strict=True)
    return [Case(whole, sites, one, blurred(one), t, is_large=True) for one, t in parts]


def vgg_layers(model: nn.Module) -> tuple[list[nn.Module], list[int]]:
    """Returns the layers of VGG16, and the ReLUs of its last two blocks that are sites."""
    layers = [*model.features, model.avgpool, nn.Flatten(), model.classifier]
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return layers, [22, 25, 29]


def efficientnet_layers(model: nn.Module) -> tuple[list[nn.Module], list[int]]:
    """Returns the stem, blocks, head and classifier; the last blocks of the fourth, fifth and sixth stage are sites."""
    stem = nn.Sequential(model._conv_stem, model._bn0, model._swish)
    head = nn.Sequential(model._conv_head, model._bn1, copy.deepcopy(model._swish))
    widths = [block._project_conv.out_channels for block in model._blocks]
    ends = [n for n, (width, above) in enumerate(pairwise(widths), 1) if width != above]
    return [stem, *model._blocks, head, model._avg_pooling, nn.Flatten(), model._fc], ends[3:6]


NETS: dict[str, Callable[[int], list[Case]]] = {
    "digits": digits,
    "residual CNN": residual,
    "transformer": transformer,
    "VGG16": lambda count: photographs("VGG16", count),
    "EfficientNet-Lite0": lambda count: photographs("EfficientNet-Lite0", count),
    "EfficientNet-Lite1": lambda count: photographs("EfficientNet-Lite1", count),
}
