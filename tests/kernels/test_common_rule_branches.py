"""Common rules read in closed form, compared with the modifiers and the mapper of the rules themselves.

Covers: nrm_plugin.kernels.recognized_rules, nrm_plugin.kernels.rule_branch_reader.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zennit.core import BasicHook, ParamMod
from zennit.rules import ClampMod, Epsilon, ZPlus

from nrm_plugin import Absolute, ConservingEpsilon
from nrm_plugin.kernels import rule_branch_reader
from nrm_plugin.kernels.form import Form
from nrm_plugin.kernels.forward_state import Saved
from nrm_plugin.kernels.layer_call import LayerCall, forward
from nrm_plugin.kernels.normalization import Normalization
from nrm_plugin.kernels.recognized_rules import form_of
from nrm_plugin.kernels.rule_branch_kernel import BranchKernel
from nrm_plugin.kernels.rule_reader import read_rule_at
from nrm_plugin.kernels.step import FunctionStep
from tests.conftest import in_turn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (2, 5)),
    "tokens": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 4, 3)),
    "pointwise": (lambda: nn.Conv2d(3, 4, 1, bias=False), (2, 3, 2, 2)),
    "strided pointwise": (lambda: nn.Conv1d(3, 4, 1, stride=2), (2, 3, 4)),
    "padded pointwise": (lambda: nn.Conv1d(3, 4, 1, padding=1), (2, 3, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, dilation=2, groups=4), (2, 4, 4, 3)),
    "grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 1, 2)),
}
RULES: dict[str, Callable[[], BasicHook]] = {
    "ZPlus": lambda: ZPlus(0.1),
    "ZPlus without bias": lambda: ZPlus(zero_params="bias"),
    "Epsilon": lambda: Epsilon(0.3),
    "Epsilon without bias": lambda: Epsilon(zero_params=["bias"]),
    "Absolute": Absolute,
    "Absolute, stabilized": lambda: Absolute(0.5),
    "ConservingEpsilon": ConservingEpsilon,
    "ConservingEpsilon, stabilized": lambda: ConservingEpsilon(0.5, stabilizer=0.3),
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda x: x,
    "positive": Tensor.relu,
    "zero": torch.zeros_like,
}


def made(layer: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make().double().requires_grad_(False)
    module.weight[0] = 0  # type: ignore[index,operator]
    return module, change(torch.randn(shape, dtype=torch.float64))


def by_zennit(module: nn.Module, rule: BasicHook, x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance by the rule's own modifiers, mapper and reducer."""
    sources = [modify(x).clone().requires_grad_() for modify in rule.input_modifiers]
    outputs = []
    with torch.enable_grad():
        for source, modify in zip(sources, rule.param_modifiers, strict=True):
            with ParamMod.ensure(modify)(module) as modified:
                outputs.append(modified(source))
    mapped = rule.gradient_mapper(relevance, outputs)
    mapped = [mapped] if isinstance(mapped, Tensor) else list(mapped)
    return rule.reducer(sources, torch.autograd.grad(outputs, sources, mapped))


def by_columns(module: nn.Module, rule: BasicHook, x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Relevance of ones at the output, normalized, and the absorbed share: one column at a time."""
    like, total = module(x), torch.zeros_like(x)
    share = torch.empty_like(like)
    for number in range(like[0].numel()):
        unit = torch.zeros_like(like)
        unit.flatten(1)[:, number] = 1
        column = by_zennit(module, rule, x, unit)
        c = column.flatten(1).sum(1)
        gain = torch.where(c >= 1 / limit, 1 / c, 1 + (limit - 1) * limit * c.clamp(min=0))
        total += column * gain.reshape(-1, *(1,) * (x.ndim - 1))
        share.flatten(1)[:, number] = 1 - gain * c
    return total, share


@pytest.mark.parametrize(("layer", "name"), in_turn(LAYERS, RULES))
def test_the_kernel_is_the_normalized_rule(layer: str, name: str) -> None:
    for change in INPUTS.values():
        module, x = made(layer, change)
        rule = RULES[name]()
        step = FunctionStep("layer", module(x), lambda: read_rule_at(rule, module, x, "layer"), Normalization())  # noqa: B023
        relevance, share = by_columns(module, rule, x, 2.0)
        ones = torch.ones_like(module(x)).unsqueeze(0)
        (part,), absorbed = step.pull(ones)
        torch.testing.assert_close(part[0], relevance, rtol=1e-9, atol=1e-12)
        absorbed = torch.zeros_like(share) if absorbed is None else absorbed
        torch.testing.assert_close(absorbed.expand_as(share), share, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalization", [None, Normalization(), Normalization("sink"), Normalization(gain_limit=3.0)])
@pytest.mark.parametrize("name", RULES)
def test_both_readers_agree(name: str, normalization: Normalization | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[BranchKernel] = []
    module, x = made("conv")
    like = module(x)
    call = _call(RULES[name](), module, x)
    for is_closed in (True, False):
        if not is_closed:
            monkeypatch.setattr(rule_branch_reader, "closed_branches", lambda *_: None)
        kernel = rule_branch_reader.branch_kernel(call, call.rule, normalization)
        assert kernel is not None
        kernels.append(kernel)
    closed, general = kernels
    relevance, values = torch.randn((3, *like.shape), dtype=x.dtype), torch.randn((3, *x.shape), dtype=x.dtype)
    torch.testing.assert_close(closed.pull(relevance), general.pull(relevance), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(closed.column_sum(like), general.column_sum(like), rtol=1e-9, atol=1e-12)
    for one, other in zip(kernels[0].pull_absolute(relevance), kernels[1].pull_absolute(relevance), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    pushed = [kernel.push((values,), like.shape) for kernel in kernels]
    torch.testing.assert_close(*pushed, rtol=1e-9, atol=1e-12)
    bounds = [kernel.push_bound((values.abs(),), like.shape) for kernel in kernels]
    torch.testing.assert_close(*bounds, rtol=1e-9, atol=1e-12)


def _call(rule: BasicHook, module: nn.Module, x: Tensor) -> LayerCall:
    output = module(x)
    return LayerCall(rule, module, forward, Saved(x, values=False), Form(output), "layer", Saved(output))


def test_a_rule_changed_by_its_user_has_no_form() -> None:
    rule = ZPlus()
    assert form_of(rule) is not None
    rule.input_modifiers = [lambda x: x, rule.input_modifiers[1]]
    assert form_of(rule) is None
    rule = ZPlus()
    rule.param_modifiers = [ClampMod(min=0.5), rule.param_modifiers[1]]
    assert form_of(rule) is None
    rule = Epsilon()
    rule.reducer = lambda inputs, gradients: 2 * inputs[0] * gradients[0]
    assert form_of(rule) is None


@pytest.mark.parametrize("rule", [ZPlus(0.0), ZPlus(zero_params="weight"), Epsilon(lambda z: z + 1)])
def test_other_rules_have_no_form(rule: BasicHook) -> None:
    assert form_of(rule) is None
    assert form_of(type("Own", (ZPlus,), {})()) is None
