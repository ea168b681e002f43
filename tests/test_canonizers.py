"""Canonizers of Zennit that add, replace and share modules, alone and stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.canonizers import AttributeCanonizer, CompositeCanonizer, NamedMergeBatchNorm, SequentialMergeBatchNorm
from zennit.composites import EpsilonPlus, EpsilonPlusFlat
from zennit.layer import Sum

from nrm_plugin import RelevanceMeasure
from nrm_plugin.composites import Normalized
from tests.conftest import slow_but, untouched

torchvision = pytest.importorskip("torchvision")
canonizers = pytest.importorskip("zennit.torchvision")

X = torch.randn((3, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Joined(Block):
    """The same with a module for the sum: what the canonizers below make of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.join = Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.stack([x, self.b(torch.relu(self.a(x)))], -1))


def build(kind: type[Block], reuses: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [kind()] * 2 if reuses else [kind(), kind()]
    return nn.Sequential(*blocks, nn.Linear(4, 2)).double().eval()


def joining(sum_of: Callable[[], nn.Module]) -> AttributeCanonizer:
    """Replaces the forward pass of blocks and gives them a module for the sum."""

    def attributes(name: str, module: nn.Module) -> dict[str, Any] | None:
        if type(module) is not Block:
            return None
        return {"forward": Joined.forward.__get__(module), "join": sum_of()}

    return AttributeCanonizer(attributes)


ONE = Sum()
STACKS: dict[str, Callable[[], list[Any]]] = {
    "a module for each block": lambda: [joining(Sum)],
    "one module for all blocks": lambda: [joining(lambda: ONE)],
    "twice": lambda: [joining(Sum), joining(Sum)],
    "nested": lambda: [CompositeCanonizer([joining(Sum), joining(lambda: ONE)])],
}


@pytest.mark.parametrize("reuses", [False, True], ids=["blocks", "shared block"])
@pytest.mark.parametrize("stack", STACKS)
def test_modules_that_a_canonizer_adds_are_steps(stack, reuses):
    net, expected = build(Block, reuses), RelevanceMeasure(build(Joined, reuses), X, 1, composite=EpsilonPlus())
    with untouched(net):
        mu = RelevanceMeasure(net, X, 1, composite=EpsilonPlus(canonizers=STACKS[stack]()))
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"), rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.sink("input"), expected.sink("input"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stack", STACKS)
def test_a_context_removes_stacked_canonizers(stack):
    net, x = build(Block, reuses=False), X.clone().requires_grad_()
    with untouched(net), Normalized(EpsilonPlus(canonizers=STACKS[stack]())).context(net) as hooked:
        (relevance,) = torch.autograd.grad(hooked(x)[:, 1].sum(), x)
    expected = RelevanceMeasure(build(Joined, False), X, 1, composite=EpsilonPlus()).marginal("input")
    torch.testing.assert_close(relevance, expected, rtol=0, atol=1e-12)


def test_a_canonizer_that_raises_leaves_no_hooks():
    def attributes(name: str, module: nn.Module) -> dict[str, Any]:
        raise LookupError("of the user")

    net = build(Block, reuses=False)
    rules = Normalized(EpsilonPlus(canonizers=[joining(Sum), AttributeCanonizer(attributes)]))
    with untouched(net):
        for _ in range(2):
            with pytest.raises(LookupError, match="of the user"):
                RelevanceMeasure(net, X, 1, composite=rules)


def resnet(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = getattr(torchvision.models, kind)().double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    return net


RESIDUAL = {
    "resnet": lambda: [canonizers.ResNetCanonizer()],
    "merged before": lambda: [SequentialMergeBatchNorm(), canonizers.ResNetCanonizer()],
    "named": lambda: [NamedMergeBatchNorm([(["conv1"], "bn1")]), canonizers.ResNetBasicBlockCanonizer()],
}


@pytest.mark.medium
@pytest.mark.parametrize("stack", slow_but(RESIDUAL, "named"))
def test_resnet_canonizers_give_the_relevance_of_zennit(stack):
    image = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    net = resnet("resnet18")
    with untouched(net):
        mu = RelevanceMeasure(net, image, 3, composite=EpsilonPlusFlat(canonizers=RESIDUAL[stack]()), residual="sink")
    x = image.clone().requires_grad_()
    # Merged twice, Zennit's own composite cannot restore the model; the second time changes little.
    tolerance = 1e-4 if stack == "merged before" else 1e-7
    alone = RESIDUAL["named" if stack == "named" else "resnet"]()
    with EpsilonPlusFlat(canonizers=alone).context(resnet("resnet18")) as hooked:
        (expected,) = torch.autograd.grad(hooked(x)[:, 3].sum(), x)
    torch.testing.assert_close(mu.marginal("input"), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert "layer4.1.canonizer_sum" in mu.layers
