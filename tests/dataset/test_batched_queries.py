"""Results of queries equal separate calls of the measure and plain hooks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from nrm_plugin import RelevanceMeasure, activations, at
from nrm_plugin.dataset import (
    EventMass,
    sweep,
)
from tests.dataset.sweep_nets import EVENT, EVERY_QUERY, MASK, OPTIONS, QUADRANTS, Data, net


def expected(model, x):
    """The same quantities from separate calls of one measure of all samples, in float64."""
    with torch.no_grad():
        target = model(x).argmax(1)
    mu = RelevanceMeasure(model, x, target)
    activation = activations(model, x, ["2", "4", "5"])
    inside = [at("2").channel(k) for k in range(6)]
    both = mu([at("4").channel(3) & EVENT, EVENT])
    crossing = mu.marginal("4", "channel")
    neurons = mu.marginal("input", "neuron").flatten(1)
    quadrant = [QUADRANTS.expand(3, 12, 12).flatten() == k for k in range(4)]
    to_input = mu.marginal("input", joint=inside).flatten(2)
    return {
        "channels": crossing,
        "positions": mu.marginal("4").sum(1).flatten(1),
        "neurons": mu.marginal("2").flatten(1),
        "labels": torch.stack([neurons[:, k].sum(1) for k in quadrant], 1),
        "joint event": mu.marginal("input", "channel", joint=EVENT & ~at("4").channel(3)),
        "given": mu.marginal("4", "channel", given=EVENT),
        "input side": mu.marginal(at("4", "input"), "channel"),
        "joint": torch.stack([mu.marginal("2", "channel", joint=at("4").channel(k)) for k in range(8)], 1),
        "next joint": to_input.unflatten(2, (3, 144)).sum(3).movedim(0, 1),
        "joint past a layer": torch.stack([mu.marginal("2", "channel", joint=at("output")[k]) for k in range(4)], 1),
        "joint of labels": torch.stack([to_input[..., k].sum(2).T for k in quadrant], 2),
        "mass": mu.marginal("2")[:, MASK].sum(1),
        "mass given": both[0] / both[1],
        "conditional": torch.stack([mu(at("input")[0] & at("4").channel(k)) for k in range(8)], 1) / crossing,
        "conditional of neurons": mu.conditional(at("input")[0], "4").flatten(1),
        "sink": mu.sink("4"),
        "bypass": mu.bypass("4"),
        "variation": mu.variation("2"),
        "largest activation": activation["4"].flatten(2).max(2).values,
        "mean activation": activation["2"].mean((2, 3)),
        "activation of the output": model(x).detach(),
        "peak": mu.marginal("4").flatten(2).argmax(2).double(),
        "peak of activation": activation["5"].flatten(2).argmax(2).double(),
        "maps": mu.marginal("input"),
        "maps given": mu.marginal("2", given=EVENT).sum(1),
    }


def as_tensor(stored, query):
    """The rows of a query as ``(N, *groups)``, inserted one by one."""
    if stored.queries[query.name].is_map:
        return stored.maps(query.name, range(10))
    groups = stored.queries[query.name].groups
    values = torch.full((10, *groups), 99.0, dtype=torch.float64)
    for row in stored.rows(query.name).to_pylist():
        index = tuple(number for number in (row["group"], row["lower"]) if number >= 0)
        assert values[(row["sample"], *index)] == 99, "a row is repeated"
        values[(row["sample"], *index)] = torch.nan if row["value"] is None else row["value"]
    return values


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    model, x = net().double(), Data(10).x.double()
    forwards = []
    handle = model[0].register_forward_pre_hook(lambda *call: forwards.append(len(call[1][0])))
    stored = sweep(model, TensorDataset(x), list(EVERY_QUERY.values()), tmp_path_factory.mktemp("sweep"), **OPTIONS)
    handle.remove()
    return stored, expected(model, x), forwards


@pytest.mark.medium
@pytest.mark.parametrize("name", EVERY_QUERY)
def test_a_result_equals_that_of_the_measure(results, name):
    stored, wanted, _ = results
    values, wanted = as_tensor(stored, EVERY_QUERY[name]), wanted[name]
    assert stored.manifest.value == "double"
    assert values.shape == wanted.shape
    is_defined = ~values.isnan()
    assert is_defined.double().mean() > (0.5 if "conditional" in name else 0.99)
    torch.testing.assert_close(values[is_defined], wanted[is_defined], rtol=1e-7, atol=1e-9)


SIGNED = {"channels", "joint", "joint event", "mass", "sink", "bypass", "maps"}
UNSIGNED = {"given", "mass given", "conditional", "variation", "largest activation", "maps given"}


@pytest.mark.medium
@pytest.mark.parametrize("name", sorted(SIGNED | UNSIGNED))
def test_masses_of_a_negative_difference_change_their_sign(name, tmp_path):
    """So that positive values are evidence for the target in every sample; quotients and activations remain."""
    model, x = net().double(), Data(10).x.double()
    mu = RelevanceMeasure(model, x, 0, against="rest")
    assert (mu.sign < 0).any()
    query = EVERY_QUERY[name]
    stored = sweep(model, TensorDataset(x), query, tmp_path, **{**OPTIONS, "target": 0, "against": "rest"})
    values = as_tensor(stored, query)
    ours = {
        "channels": lambda: mu.marginal("4", "channel"),
        "joint": lambda: mu.joint("4", "2"),
        "joint event": lambda: mu.marginal("input", "channel", joint=EVENT & ~at("4").channel(3)),
        "mass": lambda: mu(at("2")[MASK]),
        "sink": lambda: mu.sink("4"),
        "bypass": lambda: mu.bypass("4"),
        "maps": lambda: mu.marginal("input"),
        "given": lambda: mu.marginal("4", "channel", given=EVENT, min_ratio=0),
        "mass given": lambda: mu(at("4").channel(3), given=EVENT, min_ratio=0),
        "conditional": lambda: mu.joint("4", "input")[:, :, 0] / mu.marginal("4", "channel"),
        "variation": lambda: mu.variation("2"),
        "largest activation": lambda: activations(model, x, ["4"])["4"].flatten(2).amax(2),
        "maps given": lambda: mu.marginal("2", given=EVENT, min_ratio=0).sum(1),
    }[name]()
    signs = mu.sign if name in SIGNED else torch.ones(10)
    expected = ours * signs.reshape(-1, *(1,) * (ours.ndim - 1)).to(ours)
    is_defined = ~values.isnan()
    assert is_defined.any()
    torch.testing.assert_close(values[is_defined], expected.to(values)[is_defined], rtol=1e-7, atol=1e-9)


def test_the_model_runs_once_for_each_batch(results):
    assert results[2] == [4, 4, 2]


def test_a_quotient_by_almost_zero_is_null(tmp_path):
    model, x = net(), Data(6).x
    mass = RelevanceMeasure(model, x, model(x).argmax(1))(EVENT)
    edge = float(mass.abs().sort().values[2])
    stored = sweep(
        model, TensorDataset(x), EventMass(at("4"), given=EVENT, min_ratio=edge, name="q"), tmp_path, **OPTIONS
    )
    is_null = [row["value"] is None for row in stored.rows("q").sort_by("sample").to_pylist()]
    assert is_null == (mass.abs() <= edge).tolist()
    assert sum(is_null) == 3
    assert len(stored.top("q", k=9)) == 3
