r"""Relevance as a sum over enumerated walks: a slow reference implementation of docs/measure.md.

It does not propagate relevance and shares no code with the package or with Zennit's rules. A rule is a dense matrix of
one sample in float64, ``T[i, j]`` from output neuron ``j`` to input neuron ``i``. A walk is a row of arrays: its mass,
its neuron at each tap, and its end. Every query is a sum over rows. The network is a list of `Node`, so the oracle does
not depend on how the package records it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
Key = tuple[str, int]
Modify = Callable[[Tensor], Tensor]
Rule = Callable[[nn.Module, Tensor], Array]
ZeroParams = str | tuple[str, ...] | None


# Rules, from their published definitions, as matrices.


def dense(
    module: nn.Module, a: Tensor, modify: Modify = torch.clone, zero_params: ZeroParams = None
) -> tuple[Array, Array]:
    """``W[i, j]`` and ``b[j]`` of a linear module with modified parameters, by applying it to unit vectors.

    Parameters are modified before ``W`` is computed: with reflect padding an entry of ``W`` is a sum of several
    weights, and the positive part of the sum is not the sum of the positive parts.
    """
    modified = copy.deepcopy(module).double()
    zero = (zero_params,) if isinstance(zero_params, str) else zero_params or ()
    with torch.no_grad():
        for name, param in modified.named_parameters(recurse=False):
            param.copy_(torch.zeros_like(param) if name in zero else modify(param))
        b = modified.forward(torch.zeros_like(a)[None]).flatten()
        if getattr(modified, "bias", None) is not None:
            modified.bias.zero_()
        units = torch.eye(a.numel(), dtype=torch.float64).reshape(-1, *a.shape)
        return modified.forward(units).flatten(1).numpy(), b.numpy()


def contributions(a: Tensor, W: Array) -> Array:
    """``a_i w_ij``."""
    return a.flatten().numpy()[:, None] * W


def shares(part: Array, z: Array, epsilon: float) -> Array:
    """``part_ij / (z_j + epsilon sign(z_j))``, ``sign(0) = 1``; LRP-0 at 0 is nan, as in Zennit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return part / (z + epsilon * np.where(z >= 0, 1.0, -1.0))


def negative(p: Tensor) -> Tensor:
    return p.clamp(max=0)


def two_signs(module: nn.Module, a: Tensor, upper: Modify, lower: Modify, epsilon: float, zero: ZeroParams) -> Array:
    """Positive inputs times ``upper(w)``, negative ones times ``lower(w)``; the bias is ``upper(b)``."""
    W_upper, b = dense(module, a, upper, zero)
    W_lower, _ = dense(module, a, lower, zero)
    part = contributions(torch.relu(a), W_upper) + contributions(negative(a), W_lower)
    return shares(part, part.sum(0) + b, epsilon)


@dataclass(frozen=True)
class Epsilon:
    r""":math:`T_{ij} = a_i w_{ij} / \mathrm{stab}(\sum_i a_i w_{ij} + b_j)`; LRP-0 for ``epsilon=0``."""

    epsilon: float = 1e-6
    zero_params: ZeroParams = None

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        W, b = dense(module, a, zero_params=self.zero_params)
        part = contributions(a, W)
        return shares(part, part.sum(0) + b, self.epsilon)


@dataclass(frozen=True)
class Norm:
    """`Epsilon` for modules without parameters, such as average pooling and Sum."""

    stabilizer: float = 1e-6

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        return Epsilon(self.stabilizer)(module, a)


@dataclass(frozen=True)
class Gamma:
    r"""Generalized gamma: the weights whose contributions have the sign of :math:`z_j` are increased.

    For :math:`z_j > 0` positive inputs are multiplied by :math:`w + \gamma w^+` and negative ones by
    :math:`w + \gamma w^-`, for :math:`z_j < 0` vice versa. :math:`z_j` is the actual output including the bias,
    regardless of ``zero_params``; for :math:`z_j = 0` no relevance is propagated.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6
    zero_params: ZeroParams = None

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        W, b = dense(module, a)
        z = contributions(a, W).sum(0) + b
        excited = two_signs(module, a, self._up, self._down, self.stabilizer, self.zero_params)
        inhibited = two_signs(module, a, self._down, self._up, self.stabilizer, self.zero_params)
        return np.where(z > 0, excited, np.where(z < 0, inhibited, 0.0))

    def _up(self, p: Tensor) -> Tensor:
        return p + self.gamma * torch.relu(p)

    def _down(self, p: Tensor) -> Tensor:
        return p + self.gamma * negative(p)


@dataclass(frozen=True)
class ZPlus:
    r"""Positive contributions only: :math:`a^+ w^+ + a^- w^-`, with :math:`b^+` in the denominator."""

    stabilizer: float = 1e-6
    zero_params: ZeroParams = None

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        return two_signs(module, a, torch.relu, negative, self.stabilizer, self.zero_params)


@dataclass(frozen=True)
class AlphaBeta:
    """``alpha`` times the shares of positive contributions minus ``beta`` times those of negative ones."""

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6
    zero_params: ZeroParams = None

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        excited = two_signs(module, a, torch.relu, negative, self.stabilizer, self.zero_params)
        inhibited = two_signs(module, a, negative, torch.relu, self.stabilizer, self.zero_params)
        return self.alpha * excited - self.beta * inhibited


@dataclass(frozen=True)
class ZBox:
    r"""Contributions :math:`a_i w_{ij} - l w_{ij}^+ - h w_{ij}^-` of inputs in ``[low, high]``."""

    low: float = -3.0
    high: float = 3.0
    stabilizer: float = 1e-6
    zero_params: ZeroParams = None

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        W, b = dense(module, a, zero_params=self.zero_params)
        W_plus, b_plus = dense(module, a, torch.relu, self.zero_params)
        W_minus, b_minus = dense(module, a, negative, self.zero_params)
        low, high = torch.full_like(a, self.low), torch.full_like(a, self.high)
        part = contributions(a, W) - contributions(low, W_plus) - contributions(high, W_minus)
        return shares(part, part.sum(0) + b - b_plus - b_minus, self.stabilizer)


@dataclass(frozen=True)
class WSquare:
    r""":math:`T_{ij} = w_{ij}^2 / \mathrm{stab}(\sum_i w_{ij}^2 + b_j^2)`."""

    stabilizer: float = 1e-6
    zero_params: ZeroParams = None

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        W, b = dense(module, a, torch.square, self.zero_params)
        return shares(W, W.sum(0) + b, self.stabilizer)


@dataclass(frozen=True)
class Flat:
    """Equal shares over the receptive field, without a bias."""

    stabilizer: float = 1e-6

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        W, b = dense(module, a, torch.ones_like, "bias")
        return shares(W, W.sum(0) + b, self.stabilizer)


@dataclass(frozen=True)
class AbsoluteShare:
    r""":math:`T_{ij} = |a_i w_{ij}| / \sum_i |a_i w_{ij}|`, without a bias.

    A column whose sum is zero absorbs everything (``zeros="absorb"``) or propagates
    :math:`|w_{ij}| / \sum_i |w_{ij}|`, which are equal shares in a sum (``zeros="equal"``).
    """

    zeros: str = "absorb"

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        W, _ = dense(module, a, torch.abs)
        T = contributions(a.abs(), W)
        for j, total in enumerate(T.sum(0)):
            if total == 0 and self.zeros == "equal":
                T[:, j] = W[:, j]
            T[:, j] /= T[:, j].sum() or 1.0
        return T


@dataclass(frozen=True)
class Pass:
    """The identity: an output neuron passes all of its relevance to the input neuron of the same index."""

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        return np.eye(a.numel())


@dataclass(frozen=True)
class Route:
    """The Jacobian of the module: 0/1 for max pooling and reshapes, with ties broken as by autograd."""

    def __call__(self, module: nn.Module, a: Tensor) -> Array:
        jacobian = torch.autograd.functional.jacobian(lambda x: module.forward(x.clone()), a[None])
        return jacobian.reshape(-1, a.numel()).T.numpy()


DEFAULT_RULES: dict[str, Rule] = {
    "linear": Epsilon(),
    "relu": Pass(),
    "sum": Norm(),
    "avgpool": Norm(),
    "maxpool": Route(),
    "flatten": Route(),
}


# The network and its normalized steps.


class Node(NamedTuple):
    """One call: its tap, the index of the call, and the taps it reads.

    ``kind`` is ``input``, ``stack`` (no module: the parents joined along a new last dimension) or a
    key of `DEFAULT_RULES`.
    """

    tap: str
    call: int
    kind: str
    module: nn.Module | None
    parents: tuple[Key, ...]

    @property
    def key(self) -> Key:
        return self.tap, self.call


class Step(NamedTuple):
    """The kernels from one tap to each parent (an index into the spec), and the share absorbed by its sink."""

    shape: tuple[int, ...]
    down: tuple[tuple[int, Array], ...]
    sink: Array


def gain(c: float, residual: str, gain_limit: float) -> float:
    """The gain ``g(c)`` of docs/measure.md."""
    if residual not in ("redistribute", "sink"):
        raise ValueError(f"residual is 'redistribute' or 'sink', got {residual!r}")
    if residual == "sink" or c <= 0:
        return 1.0
    if c >= 1 / gain_limit:
        return 1 / c
    return 1 + (gain_limit - 1) * gain_limit * c


def normalized(T: Array, residual: str, gain_limit: float) -> tuple[Array, Array]:
    """``g(c_j) T_ij``, and the absorbed share ``1 - g(c_j) c_j`` of each ``j``."""
    c = T.sum(0)
    g = np.array([gain(c_j, residual, gain_limit) for c_j in c])
    return T * g, 1 - g * c


def activations(spec: Sequence[Node], x: Tensor) -> dict[Key, Tensor]:
    """Values of every tap for one sample, without the batch dimension."""
    value: dict[Key, Tensor] = {}
    for node in spec:
        read = [value[parent].clone() for parent in node.parents]
        if node.module is None:
            value[node.key] = torch.stack(read, -1) if read else x.detach().double()
        else:
            with torch.no_grad():
                value[node.key] = node.module.forward(read[0][None])[0]
    return value


def steps(
    spec: Sequence[Node],
    x: Tensor,
    rules: Mapping[str, Rule] | None = None,
    residual: str = "redistribute",
    gain_limit: float = 2.0,
) -> list[Step]:
    """The normalized kernels of every node for one sample; the input has none."""
    value = activations(spec, x)
    keys = list(value)
    result = []
    for node in spec:
        shape, size = tuple(value[node.key].shape), value[node.key].numel()
        parents = [keys.index(parent) for parent in node.parents]
        if node.module is None:
            # Neuron i of parent k becomes neuron i * K + k of the stack: 0/1 routing.
            T = np.eye(size).reshape(-1, max(len(parents), 1), size)
            result.append(Step(shape, tuple((p, T[:, k]) for k, p in enumerate(parents)), np.zeros(size)))
        else:
            rule = (rules or {}).get(node.tap, DEFAULT_RULES[node.kind])
            T, sink = normalized(rule(node.module, value[node.parents[0]]), residual, gain_limit)
            result.append(Step(shape, ((parents[0], T),), sink))
    return result


# Walks.


class Split(NamedTuple):
    """Masses of the walks that cross a tap, are absorbed above it, and bypass it."""

    crossing: float
    absorbed: float
    bypass: float


class Walk(NamedTuple):
    """One walk: its mass, its flat neuron index at every tap that it crosses, and where it was absorbed."""

    mass: float
    neurons: dict[Key, int]
    absorbed: Key | None


@dataclass(frozen=True, eq=False)
class Walks:
    """All walks of one sample. Events are boolean arrays over walks: combine them with ``& | ~``.

    ``masses[w]``; ``neurons[w, node]``, flat index or -1; ``absorbed[w]``, node or -1.
    """

    spec: tuple[Node, ...]
    shapes: tuple[tuple[int, ...], ...]
    masses: Array
    neurons: Array
    absorbed: Array

    def __len__(self) -> int:
        return len(self.masses)

    def __iter__(self) -> Iterator[Walk]:
        keys = [node.key for node in self.spec]
        for mass, row, end in zip(self.masses, self.neurons, self.absorbed, strict=True):
            crossed = {key: int(i) for key, i in zip(keys, row, strict=True) if i >= 0}
            yield Walk(float(mass), crossed, keys[end] if end >= 0 else None)

    def node(self, tap: str, call: int = 0) -> int:
        """Index of a tap in the spec; ``output`` is the last one."""
        keys = [node.key for node in self.spec]
        return len(keys) - 1 if tap == "output" else keys.index((tap, call))

    def crosses(self, tap: str, call: int = 0, indices: Iterable[int] | None = None) -> Array:
        """The walks through some neurons of a tap (flat indices), by default through any of them."""
        neuron = self.neurons[:, self.node(tap, call)]
        return neuron >= 0 if indices is None else np.isin(neuron, list(indices))

    def absorbed_in(self, tap: str, call: int = 0, indices: Iterable[int] | None = None) -> Array:
        """The walks absorbed in the step whose output is this tap, from these neurons of it."""
        return (self.absorbed == self.node(tap, call)) & self.crosses(tap, call, indices)

    @property
    def survives(self) -> Array:
        """The walks that end at an input neuron; ``~survives`` is ABSORBED."""
        return self.absorbed < 0

    def mass(self, event: Array | Callable[[Walk], bool]) -> float:
        """Total mass of an event: a boolean array, or a predicate on walks (slow)."""
        mask = np.array([event(walk) for walk in self]) if callable(event) else event
        if mask.dtype != bool:
            raise TypeError(f"an event is a boolean array over walks, got {mask.dtype}")
        return float(self.masses[mask].sum())

    def conditional(self, a: Array, b: Array) -> float:
        """``mass(a & b) / mass(b)``."""
        return self.mass(a & b) / self.mass(b)

    def given(self, event: Array) -> Walks:
        """The walks of an event, their masses divided by that of the event."""
        masses = self.masses[event] / self.mass(event)
        return Walks(self.spec, self.shapes, masses, self.neurons[event], self.absorbed[event])

    def joint(self, *taps: Key, event: Array | None = None) -> Array:
        """Mass through one neuron of each tap (and in an event), flat ``(n_1, ..., n_k)``."""
        nodes = [self.node(*tap) for tap in taps]
        rows = self.neurons[:, nodes]
        inside = (rows >= 0).all(1) if event is None else (rows >= 0).all(1) & event
        result = np.zeros([int(np.prod(self.shapes[n])) for n in nodes])
        np.add.at(result, tuple(rows[inside].T), self.masses[inside])
        return result

    def marginal(self, tap: str, call: int = 0, event: Array | None = None) -> Array:
        """Mass through each neuron of a tap (and in an event), in the tap's shape."""
        return self.joint((tap, call), event=event).reshape(self.shapes[self.node(tap, call)])

    def sink(self, tap: str, call: int = 0) -> Array:
        """Mass absorbed in one step, by neuron of its output."""
        return self.marginal(tap, call, self.absorbed_in(tap, call))

    def above(self, tap: str, call: int = 0) -> list[int]:
        """The nodes above a tap, from which walks can reach it; without the tap itself."""
        reaching = [self.node(tap, call)]
        for n, node in enumerate(self.spec):
            if any(self.node(*parent) in reaching for parent in node.parents):
                reaching.append(n)
        return reaching[1:]

    def split(self, tap: str, call: int = 0) -> Split:
        """The masses of the three parts of the sample space at a tap, each summed independently."""
        crossing, absorbed = self.crosses(tap, call), np.isin(self.absorbed, self.above(tap, call))
        return Split(self.mass(crossing), self.mass(absorbed), self.mass(~crossing & ~absorbed))

    def tap_variation(self, tap: str, call: int = 0, sinks: str = "neuron") -> float:
        """``sum |mu(j)| + sum |absorbed above| + |bypass|``, with sinks by neuron or by step."""
        above = [self.sink(*self.spec[n].key) for n in self.above(tap, call)]
        absorbed = sum(abs(s.sum()) if sinks == "step" else np.abs(s).sum() for s in above)
        return float(np.abs(self.marginal(tap, call)).sum() + absorbed + abs(self.split(tap, call).bypass))

    def variation(self, event: Array | None = None) -> float:
        """Walk variation ``sum |mu(w)|`` of all walks or of an event."""
        return float(np.abs(self.masses if event is None else self.masses[event]).sum())


def enumerate_walks(
    spec: Sequence[Node],
    x: Tensor,
    start: Tensor | Sequence[float] | int,
    rules: Mapping[str, Rule] | None = None,
    residual: str = "redistribute",
    gain_limit: float = 2.0,
    top: Key | None = None,
) -> Walks:
    r"""All walks of one sample with non-zero mass, :math:`\mu(w) = \mu(n_L) \prod \tilde T`.

    Args:
        spec: The network, in execution order.
        x: One sample, without the batch dimension.
        start: Flat index of the output neuron, or a start vector: :math:`\mu(n_L = k) = s_k / \sum s`.
        rules: Rules by module name; `DEFAULT_RULES` for the others.
        residual: ``"redistribute"`` or ``"sink"``.
        gain_limit: ``G``.
        top: The tap at which walks begin, by default the output. Beginning at one neuron of an inner tap gives
            :math:`\mu(\cdot \mid j)` of the taps below, also where :math:`\mu(j) = 0`.
    """
    kernels = steps(spec, x, rules, residual, gain_limit)
    first = len(spec) - 1 if top is None else [node.key for node in spec].index(top)
    size = len(kernels[first].sink)
    s = np.eye(size)[start] if isinstance(start, int) else np.asarray(start, float).reshape(size)
    origin = np.full((size, len(spec)), -1)
    origin[:, first] = np.arange(size)
    pending = {first: [(s / s.sum(), origin)]}
    done = []
    for n in range(first, -1, -1):
        if n not in pending:
            continue
        masses, neurons = (np.concatenate(parts) for parts in zip(*pending.pop(n), strict=True))
        at = neurons[:, n]
        if not kernels[n].down:
            done.append((masses, neurons, np.full(len(masses), -1)))
            continue
        ended = masses * kernels[n].sink[at]
        has_mass = ended != 0
        done.append((ended[has_mass], neurons[has_mass], np.full(has_mass.sum(), n)))
        for parent, T in kernels[n].down:
            moved = masses[:, None] * T.T[at]
            walk, i = np.nonzero(moved)
            longer = neurons[walk]
            longer[:, parent] = i
            pending.setdefault(parent, []).append((moved[walk, i], longer))
    ends = (np.concatenate(parts) for parts in zip(*done, strict=True))
    return Walks(tuple(spec), tuple(step.shape for step in kernels), *ends)


def brute_kappa(joint: Array, rows: Sequence[int], columns: Sequence[int]) -> float:
    """κ from its definition, by loops."""
    r, c, total = joint.sum(1), joint.sum(0), joint.sum()
    groups: dict[tuple[int, int], float] = {}
    size = 0.0
    for i, j in itertools.product(range(len(r)), range(len(c))):
        value = joint[i, j] - r[i] * c[j] / total
        groups[rows[i], columns[j]] = groups.get((rows[i], columns[j]), 0.0) + value
        size += abs(value)
    return sum(map(abs, groups.values())) / size
