"""docs/troubleshooting.md lists every error and quotes its actual message."""

from __future__ import annotations

import copy
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from zennit.composites import GuidedBackprop, LayerMapComposite, NameMapComposite
from zennit.rules import Epsilon, Pass
from zennit.types import Linear

from nrm_plugin import FuseBatchNorm, Normalized, NRMDefault, NRMEpsilonPlus, RelevanceMeasure, at, errors
from nrm_plugin.measure import event_masses

PAGE = (Path(__file__).parents[1] / "docs/troubleshooting.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))
KINDS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__ and issubclass(kind, (errors.NRMError, Warning))
}
X = torch.randn((2, 4), generator=torch.Generator().manual_seed(0))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def mixing() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x)
            return self.b(hidden + hidden.roll(1, 0))

    RelevanceMeasure(Mixing().eval(), torch.randn(3, 4), [0, 1, 2])(at("input"))


def without_gradients() -> None:
    with torch.no_grad():
        RelevanceMeasure(chain(), X, 1)


def differentiated() -> None:
    x = X.clone().requires_grad_()
    with Normalized(NRMDefault()).context(chain()) as hooked:
        (relevance,) = torch.autograd.grad(hooked(x)[:, 1].sum(), x, create_graph=True)
    relevance.sum().backward()


def deriving() -> None:
    class Force(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0]

    RelevanceMeasure(nn.Sequential(chain(), Force()), X, 1)


def in_training() -> None:
    RelevanceMeasure(nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)), X, 1)


def in_a_context() -> None:
    net = chain()
    with LayerMapComposite([(Linear, Epsilon())]).context(net):
        RelevanceMeasure(net, X, 1)


def stale() -> None:
    net = chain()
    mu = RelevanceMeasure(net, X, 1)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    mu.marginal("input")


def container() -> None:
    net = nn.Sequential()
    net.add_module("block", nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)))
    net.add_module("head", nn.Linear(5, 3))
    rules = NameMapComposite([(["block", "head"], Epsilon())])
    RelevanceMeasure(net.eval(), X, 1, composite=rules).marginal("block.0")


def null_event() -> None:
    mu = RelevanceMeasure(chain(), X, 1)
    mu(at("0")[0], given=at("1")[torch.zeros(5, dtype=torch.bool)])


def unknown_operation() -> None:
    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(self.a(x)).angle()

    RelevanceMeasure(Phase().eval(), X, 1).marginal("input")


class Overriding(Epsilon):
    def pre_forward(self, module, inputs):
        return super().pre_forward(module, inputs)


def overridden() -> None:
    rules = LayerMapComposite([(nn.Linear, Overriding()), (nn.ReLU, Pass())])
    RelevanceMeasure(chain(), X, 1, composite=rules).marginal("input")


def clipped() -> None:
    rules = GuidedBackprop(layer_map=[(nn.Linear, Epsilon())])
    RelevanceMeasure(chain(), X, 1, composite=rules).marginal("input")


def uncovered() -> None:
    RelevanceMeasure(chain(), X, 1, composite=LayerMapComposite([(nn.ReLU, Pass())])).marginal("input")


def missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "networkx", None)
    RelevanceMeasure(chain(), X[:1], 1).flow(["1", "input"]).to_networkx()


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pull = event_masses.pull

    def small(graph, start, visitor, absolute=False):
        if len(visitor.diagram.roots) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return pull(graph, start, visitor, absolute)

    monkeypatch.setattr(event_masses, "pull", small)
    RelevanceMeasure(chain(), X, 1).marginal("input", joint=[at("1")[k] for k in range(5)])


def biased_norm() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    nn.init.constant_(net[1].bias, 50.0)
    RelevanceMeasure(net, X, 1, composite=NRMEpsilonPlus(canonizers=[FuseBatchNorm()])).marginal("input")


class Random(nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x)


def drawing() -> None:
    RelevanceMeasure(nn.Sequential(chain(), Random()).eval(), X, 1)


class Infinite(nn.Module):
    def forward(self, x):
        return (x.log() - x.log()).nan_to_num(0.0) + x


def infinite() -> None:
    RelevanceMeasure(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Infinite(), nn.Linear(5, 3)), X, 1).marginal("input")


CAUSES: dict[str, Callable[..., object]] = {
    "InputError": lambda: RelevanceMeasure(chain(), X * float("nan"), 1),
    "DifferenceError": lambda: RelevanceMeasure(chain(), X, 1, reference=X),
    "TargetError": lambda: RelevanceMeasure(chain(), X, 7),
    "FoldingError": mixing,
    "GradModeError": without_gradients,
    "ModelStateError": in_training,
    "StaleMeasureError": stale,
    "StorageError": lambda: copy.deepcopy(RelevanceMeasure(chain(), X, 1)),
    "UnknownLayerError": lambda: RelevanceMeasure(chain(), X, 1).marginal("2 "),
    "HookedContainerError": container,
    "EventError": lambda: RelevanceMeasure(chain(), X, 1)(at("0")[9]),
    "NullEventError": null_event,
    "CancellationError": lambda: RelevanceMeasure(chain(), X, 1)(at("input")[0], given=at("1"), min_ratio=2.0),
    "NonFiniteError": infinite,
    "UncoveredLayerError": uncovered,
    "UnsupportedOperationError": unknown_operation,
    "UnsupportedRuleError": overridden,
    "NonlinearRuleError": clipped,
    "MissingExtraError": missing_extra,
    "MemoryBudgetWarning": out_of_memory,
    "BatchNormWarning": biased_norm,
    "PrecisionWarning": lambda: RelevanceMeasure(chain(), X, 1, reference=X + 1e-5),
    "RandomnessWarning": drawing,
}


def changed_between_runs() -> object:
    net = chain()
    hook = net[0].register_forward_hook(lambda module, args, output: 2 * output)
    measure = RelevanceMeasure(net, X, 1, max_memory=1)
    hook.remove()
    return measure.marginal("input")


OTHERS: dict[str, list[Callable[..., object]]] = {
    "TargetError": [lambda: RelevanceMeasure(chain(), X)],
    "ModelStateError": [in_a_context],
    "UnsupportedOperationError": [deriving, differentiated],
    "StaleMeasureError": [changed_between_runs],
}


def quotes(name: str) -> list[str]:
    """The messages of an error that the page quotes, where an ellipsis stands for omitted text."""
    return re.findall(r"^> (.+)$", SECTIONS[name], re.M)


def message(name: str, cause: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of the error when it is raised, on one line."""
    takes_monkeypatch = "monkeypatch" in inspect.signature(cause).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KINDS[name]) as caught:
            cause(**({"monkeypatch": monkeypatch} if takes_monkeypatch else {}))
    assert type(caught.value) is KINDS[name]
    return " ".join(str(caught.value).split())


def causes() -> Iterator[tuple[str, int, Callable[..., object]]]:
    for name, cause in CAUSES.items():
        for number, variant in enumerate([cause, *OTHERS.get(name, [])]):
            yield name, number, variant


@pytest.mark.parametrize(
    ("name", "number", "cause"), list(causes()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_page_quotes_the_message_of_an_error(name, number, cause, monkeypatch):
    parts = (re.escape(part.strip()) for part in quotes(name)[number].split("…"))
    assert re.search(".*".join(parts), message(name, cause, monkeypatch))


def test_the_page_lists_exactly_the_errors_of_the_package():
    assert set(SECTIONS) == set(KINDS)
    assert {name: len(quotes(name)) for name in CAUSES} == {n: 1 + len(OTHERS.get(n, [])) for n in CAUSES}
    assert set(CAUSES) == set(KINDS) - {"NRMError"}
