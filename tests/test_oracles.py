"""The oracle itself: its matrices agree with Zennit, its masses sum to one, and its queries agree with each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zennit.layer import Sum

from tests.nets import (
    BUILDERS,
    LINEAR_RULES,
    SUM_RULES,
    Case,
    Chain,
    rule_maps,
    tiny_net,
    tiny_nets,
    zennit_composite,
    zennit_rule,
)
from tests.oracles import (
    AbsoluteShare,
    AlphaBeta,
    Epsilon,
    Flat,
    Node,
    Norm,
    Route,
    Rule,
    Walks,
    activations,
    dense,
    enumerate_walks,
    gain,
    normalized,
    steps,
)

examples = settings(deadline=None, max_examples=60)

CALLED_ONCE = tuple(name for name in BUILDERS if name != "reused")
POLICIES = st.one_of(st.just(("sink", 1.0)), st.tuples(st.just("redistribute"), st.sampled_from([1.0, 2.0, np.inf])))

LINEAR_MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (4,)),
    "no bias": (nn.Linear(4, 3, bias=False), (4,)),
    "tokens": (nn.Linear(3, 2), (4, 3)),
    "conv1d dilated": (nn.Conv1d(2, 3, 2, dilation=2), (2, 6)),
    "conv1d circular": (nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"), (2, 4)),
    "conv2d strided": (nn.Conv2d(2, 2, 3, stride=2, padding=1), (2, 4, 4)),
    "conv2d grouped": (nn.Conv2d(4, 4, 2, groups=2), (4, 3, 3)),
    "conv2d reflect": (nn.Conv2d(1, 2, 3, padding=2, padding_mode="reflect"), (1, 3, 3)),
    "conv3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 2, 3, 2)),
    "transposed1d": (nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1), (2, 3)),
    "transposed2d": (nn.ConvTranspose2d(2, 2, 2, groups=2, padding=1), (2, 3, 3)),
    "avgpool": (nn.AvgPool2d(2, stride=1, padding=1), (2, 3, 3)),
    "adaptive": (nn.AdaptiveAvgPool1d(2), (2, 5)),
    "sum": (Sum(), (3, 2)),
}


def drawn(name: str) -> tuple[nn.Module, Tensor]:
    """A module with signed weights and biases, and a signed input that contains zeros."""
    module, shape = LINEAR_MODULES[name]
    generator = torch.Generator().manual_seed(len(name))
    module = copy.deepcopy(module).double()
    for param in module.parameters():
        param.data = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    return module, torch.where(a.abs() < 0.2, 0.0, a)


def zennit_matrix(module: nn.Module, a: Tensor, rule: Rule) -> np.ndarray:
    """``T[i, j]``: Zennit's relevance of input ``i`` for one unit of relevance at output ``j``."""
    outputs = module(a[None]).numel()
    x = a.expand(outputs, *a.shape).clone().requires_grad_()
    handle = zennit_rule(rule).register(module)
    z = module(x)
    units = torch.eye(outputs, dtype=torch.float64).reshape(z.shape)
    (relevance,) = torch.autograd.grad(z, x, units)
    handle.remove()
    return relevance.flatten(1).T.numpy()


def zennit_relevance(case: Case, rules: Mapping[str, Rule]) -> dict[str, Tensor]:
    """Relevance by Zennit alone: the gradient at the input and at the output of every module."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    with zennit_composite(case.spec, rules).context(case.net) as net:
        names = {node.tap: node.module for node in case.spec if node.module is not None}
        handles = [module.register_forward_hook(keep(name)) for name, module in names.items()]
        outputs["input"] = case.x.clone().requires_grad_()
        net(outputs["input"]).backward(case.start)
        for handle in handles:
            handle.remove()
    case.net.zero_grad()
    return {name: tensor.grad for name, tensor in outputs.items()}


def walks_of(case: Case, n: int = 0, **kwargs: object) -> Walks:
    return enumerate_walks(case.spec, case.x[n], case.start[n], **kwargs)


def assert_close(actual: object, expected: object, walks: Walks | None = None) -> None:
    """Equal up to 1e-10 of the walk variation, which bounds the rounding error of every sum."""
    scale = 1.0 if walks is None else max(1.0, walks.variation())
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10 * scale)


# Matrices.


@pytest.mark.parametrize("name", LINEAR_MODULES)
def test_the_dense_matrix_reproduces_the_module(name):
    module, a = drawn(name)
    W, b = dense(module, a)
    assert_close(a.flatten().numpy() @ W + b, module(a[None]).detach().flatten())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (name, rule)
        for name, (module, _) in LINEAR_MODULES.items()
        for rule in LINEAR_RULES + SUM_RULES + (Epsilon(0.0),)
        if isinstance(rule, (Norm, Flat)) or list(module.parameters())
    ],
    ids=str,
)
def test_the_matrix_of_a_rule_equals_zennits(name, rule):
    module, a = drawn(name)
    np.testing.assert_allclose(rule(module, a), zennit_matrix(module, a, rule), rtol=1e-9, atol=1e-12)


def test_parameters_are_modified_before_padding_sums_them():
    module = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False).double()
    module.weight.data = torch.tensor([[[-1.0, 0.0, 3.0]]], dtype=torch.float64)
    W, _ = dense(module, torch.ones(1, 2, dtype=torch.float64), torch.relu)
    np.testing.assert_array_equal(W, [[0, 3], [3, 0]])


@pytest.mark.parametrize("name", LINEAR_MODULES)
def test_absolute_shares_sum_to_one_or_zero(name):
    module, a = drawn(name)
    T = AbsoluteShare()(module, a)
    assert (T >= 0).all()
    assert set(T.sum(0).round(12)) <= {0.0, 1.0}
    dead = AbsoluteShare()(module, torch.zeros_like(a))
    equal = AbsoluteShare("equal")(module, torch.zeros_like(a))
    assert (dead == 0).all()
    assert set(equal.sum(0).round(12)) <= {0.0, 1.0}
    assert equal.sum() > 0


def test_absolute_shares_of_a_sum_in_an_example():
    a = torch.tensor([[3.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    expected = [[0.75, 0], [0.25, 0], [0, 0], [0, 0]]
    np.testing.assert_allclose(AbsoluteShare()(Sum(), a), expected)
    np.testing.assert_allclose(AbsoluteShare("equal")(Sum(), a)[:, 1], [0, 0, 0.5, 0.5])


def test_max_pooling_routes_to_the_first_of_equal_maxima():
    a = torch.tensor([[[1.0, 2.0], [2.0, 0.0]]], dtype=torch.float64)
    np.testing.assert_array_equal(Route()(nn.MaxPool2d(2), a)[:, 0], [0, 1, 0, 0])


@pytest.mark.parametrize("limit", [1.0, 2.0, 5.0, np.inf])
def test_the_gain_is_continuous_and_bounded(limit):
    columns = np.linspace(-1, 1, 2001)
    gains = np.array([gain(c, "redistribute", limit) for c in columns])
    assert ((gains >= 1) & (gains <= limit)).all()
    assert (gains[columns <= 0] == 1).all()
    # The slope is steepest at c = 1/G, where it is that of 1/c.
    assert limit == np.inf or np.abs(np.diff(gains)).max() <= 1e-3 * limit**2 + 1e-12
    assert gain(4.0, "redistribute", limit) == 0.25
    assert gain(0.5, "sink", limit) == 1
    with pytest.raises(ValueError, match="redistribute"):
        gain(1.0, "leak", limit)


@examples
@given(st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=1, max_size=4), POLICIES)
def test_a_step_and_its_sink_sum_to_one(columns, policy):
    T, sink = normalized(np.diag(columns), *policy)
    np.testing.assert_allclose(T.sum(0) + sink, 1, atol=1e-12)


# Nets and their structure.


@pytest.mark.parametrize("name", BUILDERS)
def test_the_spec_describes_the_net(name):
    case = tiny_net(name, seed=3, batch=1)
    outputs: dict[str, list[Tensor]] = {}
    for tap in {node.tap for node in case.spec if node.module is not None}:
        module = case.net.get_submodule(tap)
        # Clones because an in-place ReLU overwrites the tap that is its input.
        module.register_forward_hook(lambda m, a, out, tap=tap: outputs.setdefault(tap, []).append(out.clone()))
    output = case.net(case.x)
    value = activations(case.spec, case.x[0])
    for (tap, call), tensor in value.items():
        if tap in outputs:
            assert_close(tensor, outputs[tap][call][0].detach())
    assert_close(list(value.values())[-1], output[0].detach())


@pytest.mark.parametrize("name", BUILDERS)
def test_nets_are_deterministic_and_have_dead_units_and_few_walks(name):
    state = torch.random.get_rng_state()
    one, two = tiny_net(name, seed=5, signed=True), tiny_net(name, seed=5, signed=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.net(one.x), two.net(two.x))
    assert torch.equal(one.start, two.start)
    value = activations(one.spec, one.x[0])
    assert any((tensor == 0).any() for (tap, _), tensor in value.items() if "relu" in tap)
    assert len(walks_of(one)) < 20_000


# Conservation.


@examples
@given(st.data(), tiny_nets(), POLICIES)
def test_masses_sum_to_one_at_every_tap(data, case, policy):
    rules = data.draw(rule_maps(case, ours=True))
    for n in range(len(case.x)):
        walks = walks_of(case, n, rules=rules, residual=policy[0], gain_limit=policy[1])
        everything = np.ones(len(walks), bool)
        assert_close(walks.mass(everything), 1, walks)
        assert_close(walks.mass(walks.survives) + walks.mass(~walks.survives), 1, walks)
        assert_close(walks.mass(walks.survives), walks.marginal("input").sum(), walks)
        for node in case.spec:
            split = walks.split(*node.key)
            assert_close(sum(split), 1, walks)
            assert_close(split.crossing, walks.marginal(*node.key).sum(), walks)
            coarse, fine = walks.tap_variation(*node.key, sinks="step"), walks.tap_variation(*node.key)
            chain = np.array([1, coarse, fine, walks.variation()])
            assert (chain[:-1] <= chain[1:] * (1 + 1e-9)).all()


@examples
@given(st.data(), tiny_nets(CALLED_ONCE, max_batch=2))
def test_unnormalized_marginals_equal_zennits_relevance_at_every_tap(data, case):
    rules = data.draw(rule_maps(case))
    plain = zennit_relevance(case, rules)
    for n in range(len(case.x)):
        walks = walks_of(case, n, rules=rules, residual="sink")
        for tap, relevance in plain.items():
            assert_close(walks.marginal(tap) * case.start[n].sum().item(), relevance[n], walks)


@examples
@given(st.data(), tiny_nets(["reused"], max_batch=1))
def test_a_reused_module_is_two_steps(data, case):
    """With a copy of the module for the second call, Zennit gives the expected relevance."""
    rules = data.draw(rule_maps(case))
    net = case.net
    lin, relu = copy.deepcopy(net.lin), copy.deepcopy(net.relu)
    chain = Chain(lin0=net.lin, relu0=net.relu, lin1=lin, relu1=relu, head=net.head)
    unrolled = replace(case, net=chain, spec=chain.spec())
    chain_rules = {"lin0": rules["lin"], "lin1": rules["lin"], "head": rules["head"]}
    plain = zennit_relevance(unrolled, chain_rules)
    walks = walks_of(case, rules=rules, residual="sink")
    for node, copied in zip(case.spec, unrolled.spec, strict=True):
        assert_close(walks.marginal(*node.key) * case.start.sum().item(), plain[copied.tap][0], walks)


@examples
@given(st.data(), tiny_nets(), POLICIES)
def test_marginals_given_survival_are_products_of_forward_and_backward_masses(data, case, policy):
    rules = data.draw(rule_maps(case, ours=True))
    walks = walks_of(case, rules=rules, residual=policy[0], gain_limit=policy[1])
    kernels = steps(case.spec, case.x[0], rules, *policy)
    survival = [np.ones(kernels[0].sink.shape)]
    for step in kernels[1:]:
        survival.append(sum(survival[parent] @ T for parent, T in step.down))
    mass = [np.zeros(step.sink.shape) for step in kernels]
    mass[-1] = (case.start[0] / case.start[0].sum()).numpy()
    for n in reversed(range(len(kernels))):
        for parent, T in kernels[n].down:
            mass[parent] += T @ mass[n]
    Z = survival[-1] @ mass[-1]
    for n, node in enumerate(case.spec):
        assert_close(walks.marginal(*node.key).ravel(), mass[n], walks)
        assert_close(walks.sink(*node.key).ravel(), mass[n] * kernels[n].sink, walks)
        assert_close(walks.marginal(*node.key, event=walks.survives).ravel(), survival[n] * mass[n], walks)
    if abs(Z) > 1e-3 * walks.variation():
        given_survival = walks.given(walks.survives)
        assert_close(given_survival.mass(given_survival.survives), 1)
        assert_close(given_survival.marginal("input").ravel() * Z, mass[0], walks)


@pytest.mark.parametrize("seed", range(5))
def test_lrp_0_without_biases_equals_gradient_times_input(seed):
    case = tiny_net("no_bias_relu", seed)
    rules = {f"fc{k}": Epsilon(0.0) for k in (1, 2, 3)}
    for n in range(len(case.x)):
        x = case.x[n].clone().requires_grad_()
        output = (case.net(x[None])[0] * case.start[n]).sum()
        (gradient,) = torch.autograd.grad(output, x)
        walks = walks_of(case, n, rules=rules, residual="sink")
        assert_close(walks.marginal("input"), (x * gradient / output).detach(), walks)
        assert_close(walks.mass(walks.survives), 1, walks)


# Queries on walks that can be counted by hand.


def test_queries_for_a_single_neuron_in_an_example():
    lin = nn.Linear(2, 1).double()
    lin.weight.data = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    lin.bias.data = torch.tensor([1.0], dtype=torch.float64)
    spec = [Node("input", 0, "input", None, ()), Node("lin", 0, "linear", lin, (("input", 0),))]
    x = torch.tensor([3.0, 1.0], dtype=torch.float64)
    # z = 2 * 3 - 1 * 1 + 1 = 6: shares 1 and -1/6, column sum 5/6, and the bias absorbs 1/6.
    leaky = enumerate_walks(spec, x, 0, {"lin": Epsilon(0.0)}, residual="sink")
    np.testing.assert_allclose(leaky.marginal("input"), [1, -1 / 6])
    np.testing.assert_allclose(leaky.sink("lin"), [1 / 6])
    np.testing.assert_allclose(leaky.split("input"), [5 / 6, 1 / 6, 0])
    np.testing.assert_allclose([leaky.tap_variation("input"), leaky.variation()], 4 / 3)
    full = enumerate_walks(spec, x, 0, {"lin": Epsilon(0.0)})
    np.testing.assert_allclose(full.marginal("input"), [6 / 5, -1 / 5])


def test_a_tap_on_one_branch_is_bypassed_by_the_other():
    case = tiny_net("skip", seed=1)
    walks = walks_of(case, rules={"block.add": AbsoluteShare(), "block.conv2": Flat()})
    branch = walks.crosses("block.conv2")
    reached = walks.crosses("block.stack")
    split = walks.split("block.conv1")
    assert_close(split.bypass, walks.mass(~walks.crosses("block.conv1") & reached & ~branch), walks)
    assert 0 < walks.split("block.conv2").crossing < 1
    parts = [walks.mass(reached & ~branch), walks.mass(branch)]
    assert_close(walks.marginal("block.stack").sum((0, 1)), parts, walks)
    assert not walks.split("relu1").bypass
    above = {walks.spec[n].tap for n in walks.above("block.conv1")}
    assert above == {"block.relu", "block.conv2", "block.stack", "block.add", "relu2", "flatten", "head"}
    assert walks.mass(lambda walk: ("block.conv2", 0) in walk.neurons) == pytest.approx(walks.mass(branch))


def test_mass_absorbed_in_a_parallel_branch_counts_as_bypass():
    case = tiny_net("fork", seed=2)
    walks = walks_of(case, rules={"shallow": Epsilon(1.0)}, residual="sink")
    assert abs(walks.mass(walks.absorbed_in("shallow"))) > 0
    assert walks.node("shallow") not in walks.above("deep1")
    assert walks.node("shallow") in walks.above("stem")
    through = walks.mass(walks.crosses("shallow"))
    above_both = walks.mass(np.isin(walks.absorbed, walks.above("join")) | walks.absorbed_in("join"))
    assert_close(walks.split("deep2").bypass, through, walks)
    assert_close(walks.split("deep2").absorbed, above_both, walks)


@examples
@given(tiny_nets(["skip", "fork", "reused"], max_batch=1), st.integers(0, 2))
def test_joints_conditionals_and_walks_from_inner_taps_agree(case, index):
    walks = walks_of(case)
    upper = case.spec[-3].key
    lower = case.spec[1].key
    joint = walks.joint(upper, lower)
    both = walks.crosses(*upper) & walks.crosses(*lower)
    assert_close(joint.sum(), walks.mass(both), walks)
    assert_close(joint.sum(0), walks.marginal(*lower, event=walks.crosses(*upper)).ravel(), walks)
    index = index % len(joint)
    below = enumerate_walks(case.spec, case.x[0], index, top=upper)
    mass = walks.marginal(*upper).ravel()[index]
    assert_close(below.marginal(*lower).ravel() * mass, joint[index], walks)
    if abs(mass) > 1e-6:
        condition, event = walks.crosses(*upper, [index]), walks.crosses(*lower, [0])
        expected = pytest.approx(below.marginal(*lower).flat[0], rel=1e-6, abs=1e-9)
        assert walks.conditional(event, condition) == expected


@examples
@given(tiny_nets(max_batch=1))
def test_walk_variation_is_one_if_and_only_if_no_walk_is_negative(case):
    flat = {node.tap: Flat() for node in case.spec if node.kind == "linear"}
    flat |= {node.tap: AbsoluteShare() for node in case.spec if node.kind in ("sum", "avgpool")}
    assert enumerate_walks(case.spec, case.x[0], 0, flat).variation() == pytest.approx(1)
    signed = enumerate_walks(case.spec, case.x[0], 0, {tap: AlphaBeta() for tap in flat if "pool" not in tap})
    assert (signed.variation() > 1 + 1e-9) == bool((signed.masses < -1e-9).any())


def test_events_must_be_boolean_arrays():
    walks = walks_of(tiny_net("chain_mlp"))
    with pytest.raises(TypeError, match="boolean array"):
        walks.mass(np.array([0, 1]))
    assert walks.mass(walks.crosses("output")) == pytest.approx(1)
