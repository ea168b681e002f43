"""The computations that are timed side by side, and the comparison of their results before that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from captum.attr import LRP
from torch import Tensor, nn
from zennit.composites import EpsilonPlusFlat
from zennit.core import Composite
from zennit.types import Convolution, Linear

from benchmarks.cost import dynamic_lrp_way, lxt_way
from benchmarks.cost.nets import Net, double
from nrm_plugin import NRMDefault, Plan, RelevanceMeasure

COMPOSITES: dict[str, Callable[..., Composite]] = {"EpsilonPlusFlat": EpsilonPlusFlat, "NRMDefault": NRMDefault}
TARGET = 3

PLAIN, ZENNIT, ZENNIT_FIRST, CAPTUM = "plain gradient", "zennit", "zennit, context included", "captum LRP"
LXT, DYNAMIC_LRP = "LXT", "DynamicLRP"
RECORDED, PLANNED, FIRST, AGAIN = "recorded", "plan", "first call", "marginals again"
CONSTANTS, STATE = "constants", "state"
TOLERANCE = 1e-6
ROUNDINGS = 4
"""Largest difference of a plan in float32, in units of the error of the recorded measure, as both are rounded."""
MOVES = 4
"""Number of inputs with perturbed last bits, which show the effect of rounding on a measure."""
OTHER = 2
"""Seed of the inputs for which a plan is made; they differ from the measured inputs, so no result can be reused."""

Work = dict[str, Callable[[], object]]
T = TypeVar("T")


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the input gradient of one logit of each sample."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, TARGET].sum(), leaf)[0]


def explained(model: nn.Module, x: Tensor) -> Tensor:
    """Returns Zennit's relevance at the input, of a model in a composite's context."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    start = torch.zeros_like(output)
    start[:, TARGET] = 1
    return torch.autograd.grad(output, leaf, start)[0]


def with_context(model: nn.Module, x: Tensor, composite: Composite) -> Tensor:
    """Returns Zennit's relevance at the input; enters and exits the context of the composite."""
    with composite.context(model):
        return explained(model, x)


def recorded(net: Net, model: nn.Module, x: Tensor, composite: Composite, **options: Any) -> RelevanceMeasure:
    """Returns a measure that is recorded for these inputs."""
    return RelevanceMeasure(model, x, TARGET, composite=composite, batched=net.is_batched, **options)


def planned(net: Net, model: nn.Module, x: Tensor, composite: Composite) -> Plan:
    """Returns a plan for inputs of this shape."""
    return Plan(model, x, composite=composite, batched=net.is_batched)


def prepared(net: Net, model: nn.Module, other: Tensor, composite: Composite) -> Plan:
    """Returns a plan that has already answered the query, so that later inputs only run its program."""
    plan = planned(net, model, other, composite)
    all_marginals(plan(other, TARGET))
    return plan


def held(plan: Plan) -> dict[str, int]:
    """Returns the bytes of the constants of a plan, and of the tensors between its two stages."""
    programs = [one.latest for one in plan._forms.values() if one.latest is not None]
    return {CONSTANTS: plan.memory, STATE: max((program.size for program in programs), default=0)}


def all_marginals(mu: RelevanceMeasure) -> dict[str, Tensor]:
    """Returns the marginals of all taps."""
    marginals: dict[str, Tensor] = mu.marginal(mu.layers)
    return marginals


@dataclass(frozen=True)
class Ways:
    """The computations for one net and its inputs."""

    net: Net
    model: nn.Module
    x: Tensor
    plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def other(self) -> Tensor:
        """Other inputs of the same shape."""
        return self.net.inputs(len(self.x), OTHER)

    def plan(self, name: str) -> Plan:
        """Returns a plan with one composite, made for other inputs at the first call."""
        if name not in self.plans:
            self.plans[name] = prepared(self.net, self.model, self.other, COMPOSITES[name]())
        return self.plans[name]

    def ours(self, name: str) -> Work:
        """Measures with one composite."""
        net, model, x, make, plan = self.net, self.model, self.x, COMPOSITES[name], self.plan(name)
        existing = _once(lambda: recorded(net, model, x, make()), all_marginals)
        return {
            f"{PLANNED}, {name}": lambda: all_marginals(plan(x.clone(), TARGET)),
            f"{FIRST}, {name}": lambda: all_marginals(planned(net, model, x, make())(x, TARGET)),
            f"{RECORDED}, {name}": lambda: all_marginals(recorded(net, model, x, make())),
            f"{AGAIN}, {name}": existing,
        }

    def others(self) -> Work:
        """The plain gradient and other packages. A model whose context remains open is a copy."""
        net, model, x = self.net, self.model, self.x
        zennit = EpsilonPlusFlat(canonizers=[net.canonizer()])

        def opened() -> nn.Module:
            inside = copy.deepcopy(model)
            zennit.context(inside).__enter__()
            return inside

        return {
            PLAIN: lambda: gradient(model, x),
            ZENNIT: _once(opened, lambda inside: explained(inside, x)),
            ZENNIT_FIRST: lambda: with_context(model, x, EpsilonPlusFlat(canonizers=[net.canonizer()])),
            CAPTUM: _once(lambda: copy.deepcopy(model), lambda own: LRP(own).attribute(x.clone(), target=TARGET)),
            LXT: lxt_way.way(model, x, TARGET),
            DYNAMIC_LRP: dynamic_lrp_way.way(model, x, TARGET),
        }

    def runnable(self, names: list[str], others: tuple[str, ...] | None = None) -> tuple[Work, dict[str, str]]:
        """Returns the computations that run on this net, all or some of other packages, and why the others fail."""
        works, failed = self.others(), dict[str, str]()
        works = {name: work for name, work in works.items() if others is None or name in others}
        for name in list(works):
            try:
                check(works[name]())
            except Exception as error:
                failed[name] = message(error)
                del works[name]
        for name in names:
            works |= self.ours(name)
        return works, failed


def _once(prepare: Callable[[], T], run: Callable[[T], object]) -> Callable[[], object]:
    """Prepares a model or a measure at the first call."""
    made: list[T] = []

    def work() -> object:
        if not made:
            made.append(prepare())
        return run(made[0])

    return work


def without_rule(model: nn.Module) -> list[str]:
    """Returns the types of modules with parameters for which Zennit's composite has no rule, such as an LSTM.

    Zennit's pass through them is a gradient, so that its time is shown, but is not a target. Batch normalization is
    left to the canonizer.
    """
    known = (Linear, Convolution, nn.modules.batchnorm._BatchNorm)
    lacking = {type(module) for module in model.modules() if module._parameters and not isinstance(module, known)}
    return sorted(kind.__name__ for kind in lacking)


def check(relevance: object) -> None:
    """Rejects relevance that is not finite or zero everywhere."""
    values = relevance if isinstance(relevance, Tensor) else relevance[0]  # type: ignore[index]
    if not values.isfinite().all():
        raise ArithmeticError("the relevance is not finite")
    if not values.any():
        raise ArithmeticError("the relevance is zero everywhere")


def message(error: Exception) -> str:
    """Returns the error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# -- comparisons ------------------------------------------------------------------------------------------------------


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Returns the largest differences over all taps, relative to the tap variation: of one neuron, and summed.

    The measures of samples are compared separately.
    """
    if list(one) != list(other):
        raise ValueError(f"different taps: {sorted(set(one) ^ set(other))[:5]}")
    largest = {"neuron": 0.0, "sum": 0.0}
    for tap, values in one.items():
        of = (values.flatten(1), other[tap].flatten(1)) if values.ndim > 1 else (values[None], other[tap][None])
        variation = of[1].abs().sum(1)
        off = (of[0] - of[1]).abs()
        scale = torch.where(variation > 0, variation, 1.0)
        largest["neuron"] = max(largest["neuron"], float((off.amax(1) / scale).max()))
        largest["sum"] = max(largest["sum"], float((off.sum(1) / scale).max()))
    return largest


def differences(ways: Ways, exact: bool = True) -> dict[str, dict[str, float]]:
    """Compares the results of different computations of the same measure before they are timed.

    Args:
        ways: The computations.
        exact: Whether plans are compared in float64 as well.
    """
    found: dict[str, dict[str, float]] = {}
    net, model, x = ways.net, ways.model, ways.x
    twin, x64 = double(model), x.double()
    for name, make in COMPOSITES.items():
        in_double = all_marginals(recorded(net, twin, x64, make()))
        if exact:
            plan = prepared(net, twin, ways.other.double(), make())
            found[f"{PLANNED}, {name}, float64"] = apart(all_marginals(plan(x64, TARGET)), in_double)
            del plan
        measured = all_marginals(recorded(net, model, x, make()))
        found[f"{PLANNED}, {name}, float32"] = apart(all_marginals(ways.plan(name)(x.clone(), TARGET)), measured)
        found[f"rounding, {name}"] = apart({tap: values.double() for tap, values in measured.items()}, in_double)
    if any(name.endswith("float32") for name in faults_by_name(found)):  # rare, and takes long
        for name, make in COMPOSITES.items():
            found[f"rounding of inputs, {name}"] = of_moved_inputs(ways, make)
    if net.all_rules:
        composite = EpsilonPlusFlat(canonizers=[net.canonizer()])
        ours = recorded(net, twin, x64, composite, residual="sink").marginal("input")
        theirs = with_context(twin, x64, EpsilonPlusFlat(canonizers=[net.canonizer()]))
        found["zennit, float64"] = apart({"input": ours}, {"input": theirs})
    return found


def of_moved_inputs(ways: Ways, make: Callable[..., Composite]) -> dict[str, float]:
    """Returns the largest change of a recorded measure in float32 if the last bit of each input is perturbed."""
    measured = all_marginals(recorded(ways.net, ways.model, ways.x, make()))
    largest = {"neuron": 0.0, "sum": 0.0}
    for seed in range(MOVES):
        draw = torch.Generator().manual_seed(seed)
        towards = torch.where(torch.rand(ways.x.shape, generator=draw) < 0.5, torch.inf, -torch.inf)
        moved = recorded(ways.net, ways.model, torch.nextafter(ways.x, towards), make())
        off = apart(all_marginals(moved), measured)
        largest = {kind: max(value, off[kind]) for kind, value in largest.items()}
    return largest


def faults(found: dict[str, dict[str, float]]) -> list[str]:
    """Returns the differences above the tolerance: of the sum in float64, of one neuron in float32.

    In float32 a plan may differ from a recorded measure by a few times what rounding changes: the difference of the
    recorded measure from float64, or from that of inputs which differ by their last bit, the largest one of both
    composites. Rounding decides which of two equal entries of a pooling window is the largest.
    """
    return [f"{name} differs by {value:.1e} V" for name, value in faults_by_name(found).items()]


def faults_by_name(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the differences above the tolerance, keyed by name."""
    figures = {name: off["sum" if name.endswith("float64") else "neuron"] for name, off in found.items()}
    largest = max((value for name, value in figures.items() if name.startswith("rounding")), default=0.0)
    wrong = {}
    for name, value in figures.items():
        rounding = largest if name.endswith("float32") else 0.0
        if not name.startswith("rounding") and not value <= max(TOLERANCE, ROUNDINGS * rounding):
            wrong[name] = value
    return wrong
