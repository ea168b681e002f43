"""Straightforward implementations of published formulas without this package, for :mod:`benchmarks.special_cases`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from zennit.core import BasicHook, Composite
from zennit.rules import NoMod


def zennit_relevance(net: nn.Module, x: Tensor, target: int, rules: Composite, layers: Sequence[str]) -> list[Tensor]:
    """Computes relevance by Zennit alone, recorded by hooks after those of the composite, as in Zennit's how-to."""
    seen: dict[str, Tensor] = {}
    leaf = x.clone().requires_grad_()
    with rules.context(net) as modified, ExitStack() as hooks:
        for name in layers:

            def record(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                seen[name] = output

            if name != "input":
                hooks.callback(modified.get_submodule(name).register_forward_hook(record).remove)
        output = modified(leaf)
        seen["input"] = leaf
        start = torch.zeros_like(output)
        start[:, target] = output[:, target].detach()
        return list(torch.autograd.grad(output, [seen[name] for name in layers], start))


def masked_relevance(
    net: nn.Module,
    x: Tensor,
    target: int,
    rules: Composite,
    masks: Mapping[str, Tensor],
    prune: bool = False,
    at: str = "input",
) -> Tensor:
    r"""Computes relevance at the input, or below a masked layer, restricted to masked neurons in some layers.

    Concept relevance propagation (arXiv 2206.03208) zeroes the relevance of all other neurons in the backward pass.
    Pruned LRP (arXiv 2404.14271) rescales the rest to the previous total, :math:`λ = \sum_j R_j / \sum_j m_j R_j`.
    """
    leaf = x.clone().requires_grad_()
    seen = {"input": leaf}

    def restrict(relevance: Tensor, mask: Tensor) -> Tensor:
        left = relevance * mask
        return left * (relevance.sum() / left.sum()) if prune else left

    with rules.context(net) as modified, ExitStack() as hooks:
        for name, mask in masks.items():

            def hook(module: nn.Module, inputs: Any, output: Tensor, name: str = name, mask: Tensor = mask) -> Tensor:
                seen[name] = output
                output = output.clone()
                output.register_hook(lambda relevance: restrict(relevance, mask))
                return output

            hooks.callback(modified.get_submodule(name).register_forward_hook(hook).remove)
        output = modified(leaf)
        start = torch.zeros_like(output)
        start[:, target] = output[:, target].detach()
        return torch.autograd.grad(output, seen[at], start)[0]


def merged_by_hand(net: nn.Module) -> nn.Module:
    """Returns a copy in which every batch norm after a convolution is merged into its weights (arXiv 2002.11018)."""
    twin = copy.deepcopy(net)
    layers = list(twin.features)
    for number, (conv, norm) in enumerate(itertools.pairwise(layers)):
        if isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            conv.weight.data = conv.weight * scale.reshape(-1, 1, 1, 1)
            conv.bias.data = (conv.bias - norm.running_mean) * scale + norm.bias
            twin.features[number + 1] = nn.Identity()
    return twin


def densely(affine: Callable[[Tensor], Tensor], shape: Sequence[int]) -> nn.Linear:
    """Converts an affine map to one dense layer, whose columns are the images of unit vectors minus the bias."""
    size = math.prod(shape)
    bias = affine(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    columns = affine(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1) - bias
    layer = nn.Linear(size, len(bias)).double()
    layer.weight.data, layer.bias.data = columns.T.clone(), bias.clone()
    return layer


class Clipped(nn.Module):
    """Clips each channel at the value below (or above) which a batch norm followed by a ReLU yields zero."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.limit = norm.running_mean - norm.bias / self.scale

    def forward(self, x: Tensor) -> Tensor:
        scale, limit = (part.reshape(1, -1, 1, 1) for part in (self.scale, self.limit))
        return torch.where(scale > 0, x.maximum(limit), x.minimum(limit))


class RatioSplit(BasicHook):
    """A sum redistributes relevance over its branches in proportion to their absolute values (arXiv 2407.09115)."""

    def __init__(self) -> None:
        super().__init__(
            input_modifiers=[torch.abs],
            param_modifiers=[NoMod(param_keys=[])],
            output_modifiers=[lambda output: output],
            gradient_mapper=lambda gradient, outputs: gradient / (outputs[0] + 1e-30),
            reducer=lambda inputs, gradients: inputs[0] * gradients[0],
        )


def forward_times_backward(weights: Sequence[Tensor], x: Tensor, target: int) -> list[Tensor]:
    r"""Returns contributions :math:`a_i w_{ij}` without denominators, for every layer of a bias-free ReLU net.

    Each layer is divided by its sum: for a leaky chain of kernels this is forward × backward / Z.
    """
    states = [x]
    for W in weights[:-1]:
        states.append(torch.relu(states[-1] @ W.T))
    relevance = torch.eye(len(weights[-1]), dtype=x.dtype)[target].expand(len(x), -1)
    below = torch.ones(len(x), x.shape[1], dtype=x.dtype)
    survival = [below]
    for W, a in zip(weights[:-1], states, strict=False):  # share of each neuron's relevance that reaches the input
        survival.append(torch.einsum("ni,ni,ji->nj", a, survival[-1], W))
    contributions = []
    for W, a, survived in zip(reversed(weights), reversed(states), reversed(survival), strict=True):
        relevance = a * (relevance @ W)
        contributions.append(relevance * survived / (relevance * survived).sum(1, keepdim=True))
    return contributions[::-1]


# -- graphs -----------------------------------------------------------------------------------------------------------


class GraphNet(nn.Module):
    """``H' = relu(Λ H W)`` without biases, a sum over nodes and a linear head: the network of GNN-LRP."""

    def __init__(self, adjacency: Tensor, widths: Sequence[int], outputs: int = 2) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.edges = adjacency.nonzero().T.flip(0)  # from, to
        self.scale = adjacency[self.edges[1], self.edges[0]]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))
        self.blocks = nn.ModuleList(nn.ReLU() for _ in self.layers)
        self.head = nn.Linear(widths[-1], outputs, bias=False)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer, block in zip(self.layers, self.blocks, strict=True):
            messages = x.index_select(0, self.edges[0]) * self.scale.unsqueeze(1)
            x = block(layer(torch.zeros_like(x).index_add(0, self.edges[1], messages)))
        return self.head(x.sum(0, keepdim=True))


def graph_walks(net: GraphNet, adjacency: Tensor, x: Tensor, target: int, gamma: float) -> dict[tuple[int, ...], float]:
    r"""Returns GNN-LRP (arXiv 2006.03589) of every walk over nodes, input first, for non-negative features.

    .. math:: R_{jJ} = \sum_k \frac{λ_{JK} h_j^J w^γ_{jk}}{\sum_{J'} \sum_{j'} λ_{J'K} h_{j'}^{J'} w^γ_{j'k}} R_{kK}
    """
    states = [x]
    with torch.no_grad():
        for layer in net.layers:
            states.append(torch.relu(adjacency @ states[-1] @ layer.weight.T))
        raised = [layer.weight + gamma * layer.weight.clamp(min=0) for layer in (*net.layers, net.head)]
        score = (states[-1].sum(0) @ net.head.weight[target]).item()
        if score <= 0:
            raise ValueError(f"the formula requires a positive output; that of class {target} is {score}.")
        part = states[-1] * raised[-1][target]
        arrived = {(node,): score * part[node] / part.sum() for node in range(len(x))}
        for W, h in zip(reversed(raised[:-1]), reversed(states[:-1]), strict=True):
            z = adjacency @ h @ W.T
            longer = {}
            for walk, relevance in arrived.items():
                K = walk[0]
                shared = torch.where(z[K] == 0, 0.0, relevance / z[K])
                for J in range(len(x)):
                    if adjacency[K, J]:
                        longer[(J, *walk)] = adjacency[K, J] * h[J] * (shared @ W)
            arrived = longer
    return {walk: float(relevance.sum()) for walk, relevance in arrived.items()}


def symbolic_query(walks: Mapping[tuple[int, ...], float], query: Callable[[set[int]], bool]) -> float:
    """Computes the relevance of walks whose nodes satisfy a logical formula: Symbolic XAI (arXiv 2408.17198)."""
    return sum(mass for walk, mass in walks.items() if query(set(walk)))


# -- attention --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block and a head, without biases. Subclasses define the propagation rule of each part."""

    def __init__(self, width: int = 8, heads: int = 2, hidden: int = 12, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, classes, bias=False)
        self.double().eval()

    def norm(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    act = staticmethod(functional.gelu)
    add = staticmethod(torch.add)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.norm1, x)
        q, k, v = (self.linear(m, y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = self.add(x, self.linear(self.out, self.attention(q, k, v).transpose(1, 2).flatten(2)))
        y = self.linear(self.down, self.act(self.linear(self.up, self.norm(self.norm2, x))))
        return self.linear(self.head, self.add(x, y)[:, 0])


class GradientBlock(Block):
    """The same values; gradient × input is LRP because the factors of the identity rule are constants."""

    def norm(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x * (layer(x) / x).detach()

    def act(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * (functional.gelu(x) / x).detach()


class AttnLRPBlock(GradientBlock):
    """AttnLRP (arXiv 2402.05602): each factor of a product receives half its relevance, softmax is Taylor-expanded."""

    @staticmethod
    def half(x: Tensor) -> Tensor:
        return x / 2 + (x / 2).detach()

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.half(q) @ self.half(k).transpose(-2, -1) / q.shape[-1] ** 0.5
        return self.half(scores.softmax(-1)) @ self.half(v)


class CPLRPBlock(GradientBlock):
    """CP-LRP (arXiv 2202.07304): attention weights are constants."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).detach() @ v


class LXTBlock(Block):
    """The operations of LXT; their backward pass is AttnLRP."""

    TINY = 1e-12

    def norm(self, layer: nn.Module, x: Tensor) -> Tensor:
        from lxt.explicit.rules import identity

        return identity(layer, x)  # type: ignore[no-any-return]

    def act(self, x: Tensor) -> Tensor:  # type: ignore[override]
        from lxt.explicit.rules import identity

        return identity(functional.gelu, x)  # type: ignore[no-any-return]

    def add(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        from lxt.explicit.functional import add2

        return add2(a, b, epsilon=self.TINY)  # type: ignore[no-any-return]

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        from lxt.explicit.functional import linear_epsilon

        return linear_epsilon(x, layer.weight, None, epsilon=self.TINY)  # type: ignore[no-any-return]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from lxt.explicit.functional import matmul, mul2, softmax

        scale = torch.tensor(q.shape[-1] ** -0.5, dtype=q.dtype)
        scores = matmul(mul2(q, scale), k.transpose(-2, -1), epsilon=self.TINY)
        return matmul(softmax(scores, -1), v, epsilon=self.TINY)  # type: ignore[no-any-return]


def input_gradient(net: nn.Module, x: Tensor, target: int) -> Tensor:
    """Returns the gradient of one output; for a net of LXT's operations, the relevance of that output."""
    leaf = x.clone().requires_grad_()
    output = net(leaf)
    start = torch.zeros_like(output)
    start[:, target] = output[:, target].detach() if isinstance(net, LXTBlock) else 1.0
    return torch.autograd.grad(output, leaf, start)[0]


def rollout(net: nn.TransformerEncoder, x: Tensor) -> Tensor:
    """Computes attention rollout (arXiv 2005.00928): the product of ``(A + 1) / 2``, with the mean over heads as A."""
    product = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    for layer in net.layers:
        weights = layer.self_attn(x, x, x, need_weights=True)[1]  # type: ignore[union-attr]
        product = (weights + torch.eye(x.shape[1], dtype=x.dtype)) / 2 @ product
        x = layer(x)
    return product.detach()


def subspaces(activation: Tensor, relevance: Tensor, basis: Tensor) -> Tensor:
    r"""Computes PRCA and DRSA (arXiv 2212.14855), relevance :math:`(u^\top a)(u^\top c)` of ``u``, ``c = R / a``."""
    return (activation @ basis) * ((relevance / activation) @ basis)
