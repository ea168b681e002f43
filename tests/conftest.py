"""Helpers of several test files: torchvision models, composites by name, and checks that a model is unchanged."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from zennit.composites import COMPOSITES, LayerMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, BatchNorm, Linear

import nrm_plugin  # registers its composites
from nrm_plugin.functional import registry
from tests import planned

NONLINEAR = ("deconvnet", "guided_backprop")
ARGUMENTS: dict[str, dict[str, float]] = {"epsilon_gamma_box": {"low": -3.0, "high": 3.0}}
UNCOVERED = ("beta_smooth", *NONLINEAR)
"""Assign no rule to some layers, so that Zennit uses their plain gradient."""
NORMALIZED = tuple(name for name, kind in sorted(COMPOSITES.items()) if issubclass(kind, nrm_plugin.Normalized))
LINEAR = ("lrp_0", *(name for name in sorted(COMPOSITES) if name not in (*NONLINEAR, *NORMALIZED)))
SIZES = {"vgg16": 64, "vgg16_bn": 64, "alexnet": 96}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seeds every test, so that its results do not depend on earlier tests."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack for each kind of absent device


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keeps the garbage collector from visiting all imported modules and collected tests again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--planned", action="store_true", help="answer every test by plans made on other values")
    parser.addoption("--examples", type=int, help="at most so many examples of each property")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Draws fewer examples, or runs a test with plans, if requested by an option."""
    planned_too = pyfuncitem.config.getoption("--planned") and not pyfuncitem.get_closest_marker("recorded")
    most = 3 if planned_too else pyfuncitem.config.getoption("--examples")  # a plan makes programs of all its queries
    kept = getattr(pyfuncitem.obj, "_hypothesis_internal_use_settings", None)
    if kept is not None and most is not None:
        phases = [hypothesis.Phase.generate] if planned_too else kept.phases
        fewer = hypothesis.settings(kept, max_examples=min(most, kept.max_examples), phases=phases)
        getattr(pyfuncitem.obj, "__func__", pyfuncitem.obj)._hypothesis_internal_use_settings = fewer
    if not planned_too:
        return (yield)
    ours = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "tests"]
    with planned.measures_are_planned([pyfuncitem.module, *ours]):
        return (yield)


def slow_but(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters of a test, all marked slow but the ``fast`` ones, which represent them in `make test-fast`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def in_turn(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """All pairs for a test of two parameters, marked slow except for a subset that contains each value."""
    left, right = list(rows), list(columns)
    period = min(len(left), len(right))
    places = itertools.product(range(len(left)), range(len(right)))
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(left[i], right[j], marks=marks[(i - j) % period == 0]) for i, j in places]


def each_once(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """As many pairs as the longer of two lists, for a test whose parameters are paired in full by a faster one."""
    left, right = list(rows), list(columns)
    return [(left[i % len(left)], right[i % len(right)]) for i in range(max(len(left), len(right)))]


def lrp_0(canonizers: list[Any] | None = None) -> Composite:
    """LRP-0: Epsilon without a stabilizer, and Zennit's usual rules for layers without weights."""
    rules = [(Activation, Pass()), (BatchNorm, Pass()), (AvgPool, Norm()), (Linear, Epsilon(epsilon=0.0))]
    return LayerMapComposite(layer_map=rules, canonizers=canonizers)


def composite(name: str, canonizers: list[Any] | None = None) -> Composite:
    """A composite by its name in Zennit, or LRP-0; ``canonizers=[]`` also removes its default canonizers."""
    if name == "lrp_0":
        return lrp_0(canonizers)
    return COMPOSITES[name](canonizers=canonizers, **ARGUMENTS.get(name, {}))


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draws random biases and batch-norm statistics, and sets evaluation mode."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1, generator=draw)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=draw)
                module.running_mean.normal_(0, 0.1, generator=draw)
                module.running_var.uniform_(0.5, 1.5, generator=draw)
    return net.eval()


@functools.cache
def torchvision_net(name: str, width: int = 256) -> nn.Module:
    """A torchvision model with random weights, shared by all tests of a worker.

    Its hidden linear layers have ``width`` units instead of 4096, which saves most of the time and memory.
    """
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(weights=None, num_classes=10)
        linear = [number for number, module in enumerate(net.classifier) if isinstance(module, nn.Linear)]
        sizes = [net.classifier[linear[0]].in_features, *[width] * (len(linear) - 1), 10]
        for number, (inputs, outputs) in zip(linear, itertools.pairwise(sizes), strict=True):
            net.classifier[number] = nn.Linear(inputs, outputs)
    net = net.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, generator=draw)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return randomize(net)


def images(size: int, batch: int = 2) -> Tensor:
    """Gaussian noise in the shape of a batch of normalized images."""
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(1))


# -- the model is unchanged ---------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[tuple[str, object]]:
    """Everything that a call could change in a model, and the random states; tensors by identity and by value."""
    state: list[tuple[str, object]] = []
    for name, module in model.named_modules():
        state.append((f"{name}: class", type(module)))
        for key, value in module.__dict__.items():
            inner = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else None
            state.append((f"{name}.{key}", (id(value), inner, value if isinstance(value, (bool, int, str)) else None)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state.append((f"{name}: identity", (id(tensor), tensor.data_ptr(), tensor._version, tensor.shape)))
        state.append((f"{name}: value", tensor.detach().numpy().tobytes()))
        state.append((f"{name}: gradient", (tensor.requires_grad, id(tensor.grad), tensor._backward_hooks)))
        state.append((f"{name}: history", (tensor.is_leaf, tensor.grad_fn)))
    state.append(("state dict", list(model.state_dict())))
    state.append(("torch's random state", torch.get_rng_state().numpy().tobytes()))
    state.append(("numpy's random state", str(np.random.get_state())))
    state.append(("Python's random state", random.getstate()))
    state.append(("global modes", (torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    return state


@contextmanager
def untouched(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """Context that fails if its body changes a model or its inputs, even if the body raises an error."""
    before = state_of(model), [(x.clone(), x._version, x.requires_grad, x.grad) for x in inputs]
    try:
        yield
    finally:
        changed = [key for (key, old), (_, new) in zip(before[0], state_of(model), strict=True) if old != new]
        assert not changed, f"changed: {changed}"
        for x, (values, version, requires_grad, grad) in zip(inputs, before[1], strict=True):
            assert torch.equal(x.nan_to_num(), values.nan_to_num())
            assert (x._version, x.requires_grad) == (version, requires_grad)
            assert x.grad is grad


# -- largest errors, for the report -------------------------------------------------------------------------------


@pytest.fixture
def worst(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """Records an error of a test; the summary at the end of the run shows the largest of each name."""

    def record(name: str, value: float) -> None:
        record_property("worst", (name, value))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if planned.ANSWERS:
        terminalreporter.section("answers of plans")
        for reason, count in planned.ANSWERS.most_common():
            terminalreporter.write_line(f"{count:7}  {reason}")
    errors: dict[str, float] = {}
    for status in ("passed", "failed"):
        for report in terminalreporter.stats.get(status, ()):
            for key, value in getattr(report, "user_properties", ()):
                if key == "worst":
                    errors[value[0]] = max(errors.get(value[0], 0.0), value[1])
    if errors:
        terminalreporter.section("largest errors")
        for name, value in sorted(errors.items()):
            terminalreporter.write_line(f"{value:9.1e}  {name}")


@pytest.fixture
def own_kernels() -> Iterator[None]:
    """Removes the kernels that a test registers."""
    tables = [registry.KERNELS, registry.KERNELS_BY_FUNCTION]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
