"""Tiny networks whose walks can be enumerated, and Hypothesis strategies for them.

They have signed weights, biases, dead units, skip connections, forks and a reused module. They are in float64 and
determined by a seed. Every operation is a module except ``torch.stack``, which joins branches before a Sum.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
import zennit.rules
from hypothesis import strategies as st
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.layer import Sum

from tests.oracles import (
    DEFAULT_RULES,
    AbsoluteShare,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Key,
    Node,
    Norm,
    Route,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "linear",
    nn.Conv2d: "linear",
    nn.ReLU: "relu",
    nn.MaxPool2d: "maxpool",
    nn.AvgPool1d: "avgpool",
    nn.AvgPool2d: "avgpool",
    nn.Flatten: "flatten",
    Sum: "sum",
}


def wired(model: nn.Module, *wires: str) -> list[Node]:
    """Builds a spec from wires ``"tap < parent, parent"`` in execution order.

    A repeated tap denotes its next call, and ``"lin#1"`` reads call 1. A tap that is not a module is a stack.
    """
    modules = dict(model.named_modules())
    spec = [Node("input", 0, "input", None, ())]
    calls: Counter[str] = Counter()
    for wire in wires:
        tap, parents = wire.split(" < ")
        keys = tuple(_key(parent) for parent in parents.split(", "))
        module = modules.get(tap)
        kind = "stack" if module is None else KINDS[type(module)]
        spec.append(Node(tap, calls[tap], kind, module, keys))
        calls[tap] += 1
    return spec


def _key(text: str) -> Key:
    tap, _, call = text.partition("#")
    return tap, int(call or 0)


class Chain(nn.Sequential):
    """Modules in series, by name."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(OrderedDict(modules))

    def spec(self) -> list[Node]:
        names = ["input", *(name for name, _ in self.named_children())]
        return wired(self, *(f"{name} < {below}" for below, name in pairwise(names)))


class Block(nn.Module):
    """``add(stack([x, conv2(relu(conv1(x)))]))``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv1d(2, 2, 3, padding=1), nn.ReLU(inplace=True)
        self.conv2, self.add = nn.Conv1d(2, 2, 3, padding=1), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(torch.stack([x, self.conv2(self.relu(self.conv1(x)))], -1))


class Skip(nn.Module):
    """A residual block between two ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu1, self.block = nn.Conv1d(1, 2, 2), nn.ReLU(), Block()
        self.relu2, self.flatten, self.head = nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu1(self.stem(x)))
        return self.head(self.flatten(self.relu2(x)))

    def spec(self) -> list[Node]:
        return wired(
            self,
            "stem < input",
            "relu1 < stem",
            "block.conv1 < relu1",
            "block.relu < block.conv1",
            "block.conv2 < block.relu",
            "block.stack < relu1, block.conv2",
            "block.add < block.stack",
            "relu2 < block.add",
            "flatten < relu2",
            "head < flatten",
        )


class Fork(nn.Module):
    """One tensor feeds a deep and a shallow branch; another branch bypasses two layers.

    ``head(late(late_relu(mid(s))) + s)`` with ``s = deep2(deep_relu(deep1(h))) + shallow(h)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_relu = nn.Linear(3, 3), nn.ReLU()
        self.deep1, self.deep_relu, self.deep2 = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)
        self.shallow, self.join = nn.Linear(3, 3), Sum()
        self.mid, self.late_relu, self.late = nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)
        self.rejoin, self.head = Sum(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem_relu(self.stem(x))
        deep = self.deep2(self.deep_relu(self.deep1(h)))
        s = self.join(torch.stack([deep, self.shallow(h)], -1))
        late = self.late(self.late_relu(self.mid(s)))
        return self.head(self.rejoin(torch.stack([late, s], -1)))

    def spec(self) -> list[Node]:
        return wired(
            self,
            "stem < input",
            "stem_relu < stem",
            "deep1 < stem_relu",
            "deep_relu < deep1",
            "deep2 < deep_relu",
            "shallow < stem_relu",
            "stack1 < deep2, shallow",
            "join < stack1",
            "mid < join",
            "late_relu < mid",
            "late < late_relu",
            "stack2 < late, join",
            "rejoin < stack2",
            "head < rejoin",
        )


class Reused(nn.Module):
    """One Linear and one ReLU, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.relu, self.head = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.lin(self.relu(self.lin(x)))))

    def spec(self) -> list[Node]:
        wires = "lin < input", "relu < lin", "lin < relu", "relu < lin#1", "head < relu#1"
        return wired(self, *wires)


def chain_mlp() -> Chain:
    return Chain(fc1=nn.Linear(3, 4), relu1=nn.ReLU(), fc2=nn.Linear(4, 4), relu2=nn.ReLU(), fc3=nn.Linear(4, 3))


def no_bias_relu() -> Chain:
    return Chain(
        fc1=nn.Linear(4, 5, bias=False),
        relu1=nn.ReLU(),
        fc2=nn.Linear(5, 4, bias=False),
        relu2=nn.ReLU(),
        fc3=nn.Linear(4, 2, bias=False),
    )


def conv_chain() -> Chain:
    return Chain(
        conv1=nn.Conv2d(1, 2, 3, padding=1),
        relu1=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(2, 2, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.AvgPool2d((1, 2)),
        flatten=nn.Flatten(),
        head=nn.Linear(4, 3),
    )


def conv1d_chain() -> Chain:
    return Chain(
        conv1=nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect", groups=2),
        relu1=nn.ReLU(),
        pool=nn.AvgPool1d(2),
        conv2=nn.Conv1d(4, 2, 2, dilation=2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        head=nn.Linear(2, 2),
    )


BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain_mlp": (chain_mlp, (3,)),
    "conv_chain": (conv_chain, (1, 4, 4)),
    "conv1d_chain": (conv1d_chain, (2, 6)),
    "skip": (Skip, (1, 4)),
    "fork": (Fork, (3,)),
    "reused": (Reused, (3,)),
    "no_bias_relu": (no_bias_relu, (4,)),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A net, its structure, a batch ``x`` and start vectors ``start`` of shape ``(N, outputs)``."""

    name: str
    seed: int
    batch: int
    signed: bool
    net: nn.Module = field(repr=False)
    spec: list[Node] = field(repr=False)
    x: Tensor = field(repr=False)
    start: Tensor = field(repr=False)


def tiny_net(name: str, seed: int = 0, batch: int = 2, signed: bool = False) -> Case:
    """A case that is determined by its arguments. Start vectors are one-hot, or ``signed``."""
    build, shape = BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build().double().eval()
        for param_name, param in net.named_parameters():
            _redraw(param_name, param)
        x = torch.randn(batch, *shape, dtype=torch.float64)
        x[torch.rand_like(x) < 0.1] = 0
        outputs = net(x).shape[1]
        start = torch.eye(outputs, dtype=torch.float64)[torch.randint(outputs, (batch,))]
        if signed:
            start = 2 * start - 0.5 * torch.rand(batch, outputs, dtype=torch.float64)
    return Case(name, seed, batch, signed, net, net.spec(), x, start)


def _redraw(name: str, param: Tensor) -> None:
    """Signed weights and small biases; a quarter of the hidden biases are so negative that their ReLU is dead."""
    with torch.no_grad():
        if name.endswith("weight"):
            param.normal_().mul_(1.5 * param[0].numel() ** -0.5)
        else:
            dead = torch.rand_like(param) < 0.25 * (not name.startswith(("head", "fc3")))
            param.normal_().mul_(0.5).sub_(6.0 * dead)


def tiny_nets(
    names: Sequence[str] = tuple(BUILDERS), max_batch: int = 3, signed: bool | None = None
) -> st.SearchStrategy[Case]:
    """Cases of some builders, by default of all; ``signed`` fixes the kind of start vector."""
    starts = st.booleans() if signed is None else st.just(signed)
    return st.builds(tiny_net, st.sampled_from(names), st.integers(0, 10_000), st.integers(1, max_batch), starts)


LINEAR_RULES: tuple[Rule, ...] = (
    Epsilon(),
    Epsilon(0.1),
    Epsilon(0.1, zero_params="bias"),
    Gamma(),
    Gamma(1.0, 0.1, zero_params="bias"),
    ZPlus(),
    ZPlus(zero_params="bias"),
    AlphaBeta(),
    AlphaBeta(zero_params="bias"),
    ZBox(),
    ZBox(-1.0, 2.0, 0.1),
    WSquare(),
    Flat(),
)
SUM_RULES: tuple[Rule, ...] = (Norm(), Norm(0.1))
OURS: tuple[Rule, ...] = (AbsoluteShare(),)


@st.composite
def rule_maps(draw: st.DrawFn, case: Case, ours: bool = False) -> dict[str, Rule]:
    """A rule for every linear module, pooling layer and sum of a case: Zennit's, and with ``ours`` also Absolute."""
    own = OURS if ours else ()
    choices = {"linear": LINEAR_RULES + own, "sum": SUM_RULES + own, "avgpool": SUM_RULES + own}
    kinds = {node.tap: node.kind for node in case.spec if node.kind in choices}
    return {tap: draw(st.sampled_from(choices[kind])) for tap, kind in kinds.items()}


def zennit_rule(rule: Rule) -> zennit.core.Hook:
    """Zennit's rule of the same name and arguments."""
    return getattr(zennit.rules, type(rule).__name__)(**asdict(rule))


def zennit_composite(spec: Sequence[Node], rules: Mapping[str, Rule] | None = None) -> NameMapComposite:
    """The composite that assigns each module its rule; routes are left to autograd."""
    by_tap = {node.tap: DEFAULT_RULES[node.kind] for node in spec if node.module is not None}
    by_tap.update(rules or {})
    hooks = [([tap], zennit_rule(rule)) for tap, rule in by_tap.items() if not isinstance(rule, Route)]
    return NameMapComposite(hooks)
