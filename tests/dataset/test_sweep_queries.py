"""Queries of a sweep: as JSON, and compared with separate calls of the measure and plain hooks."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from nrm_plugin import ABSORBED, RelevanceMeasure, activations, at
from nrm_plugin.dataset import (
    Activation,
    Bypass,
    Conditional,
    EventMass,
    Joint,
    Maps,
    Marginal,
    Peak,
    Sink,
    SweepError,
    Variation,
    sweep,
)
from nrm_plugin.dataset.queries import check_queries, from_json
from nrm_plugin.errors import EventError
from nrm_plugin.events.serialization import event_from_json, event_to_json
from tests.conftest import untouched
from tests.dataset.sweep_nets import EVENT, OPTIONS, Data, net

MASK = torch.zeros(6, 12, 12).bool()
MASK[2, 3:7] = True
QUADRANTS = torch.arange(4).reshape(1, 2, 2).repeat_interleave(6, 1).repeat_interleave(6, 2)


# -- as JSON ---------------------------------------------------------------------------------------------------------

indices = st.one_of(
    st.integers(-3, 5),
    st.lists(st.integers(0, 5), max_size=3),
    st.builds(slice, st.none() | st.integers(0, 3), st.none() | st.integers(3, 6), st.none() | st.integers(1, 2)),
    st.just(...),
    st.tuples(st.integers(0, 2), st.just(...), st.integers(0, 2)),
    st.lists(st.booleans(), min_size=1, max_size=4).map(torch.tensor),
    st.just(torch.tensor([[1, 2], [0, 3]], dtype=torch.int32)),
)
atoms = st.builds(
    at, st.sampled_from("abc"), st.sampled_from(["input", "output", "sink"]), st.none() | st.just("any") | st.just(1),
    st.none() | st.just(0) | st.just("key"),
)  # fmt: skip
leaves = st.one_of(
    atoms,
    st.just(ABSORBED),
    st.builds(lambda atom, index: atom[index], atoms, indices),
    st.builds(lambda atom, index: atom.channel(index), atoms, st.integers(0, 3) | st.just([1, 2])),
)
events = st.recursive(
    leaves, lambda e: st.builds(lambda a, b: a & b, e, e) | st.builds(lambda a, b: a | b, e, e) | e.map(lambda a: ~a)
)


@settings(deadline=None)
@given(events)
def test_an_event_survives_json(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    "event",
    [
        at("attn").head(2),
        at("attn", call=1).token([0, 3]),
        ~at("attn").pair(slice(1, 3), 0) & at("attn").head([0, 1]).token(torch.tensor([True, False, True])),
    ],
    ids=str,
)
def test_heads_and_tokens_survive_json(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    "data",
    [
        *(None, 3, {}, {"at": 3}, {"or": []}, {"all": []}, {"at": "a", "side": "up"}, {"at": "a", "index": {"x": 1}}),
        *({"attention": "a", "keys": 1}, {"attention": "a", "side": "input"}, {"attention": "a", "heads": {"x": 1}}),
    ],
)
def test_what_is_not_an_event_raises(data):
    with pytest.raises(EventError):
        event_from_json(data)


def test_a_module_has_no_name_in_json():
    with pytest.raises(EventError, match="Use its name"):
        event_to_json(at(nn.ReLU()))


QUERIES = {
    "channels": Marginal("4"),
    "positions": Marginal("4", "position"),
    "neurons": Marginal("2", "neuron"),
    "labels": Marginal("input", QUADRANTS, name="quadrants"),
    "joint event": Marginal("input", joint=EVENT & ~at("4").channel(3)),
    "given": Marginal("4", given=EVENT),
    "input side": Marginal(at("4", "input")),
    "joint": Joint("4", "2"),
    "next joint": Joint("2", "input"),
    "joint past a layer": Joint("output", "2"),
    "joint of labels": Joint("2", "input", over=("channel", QUADRANTS), name="to quadrants"),
    "mass": EventMass(at("2")[MASK]),
    "mass given": EventMass(at("4").channel(3), given=EVENT),
    "conditional": Conditional(at("input")[0], "4"),
    "conditional of neurons": Conditional(at("input")[0], "4", "neuron"),
    "sink": Sink("4"),
    "bypass": Bypass("4"),
    "variation": Variation("2"),
    "largest activation": Activation("4"),
    "mean activation": Activation("2", "mean"),
    "activation of the output": Activation("output", "sum"),
    "peak": Peak("4"),
    "peak of activation": Peak("5", "activation"),
    "maps": Maps(),
    "maps given": Maps("2", given=EVENT, over="position"),
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_survives_json(query):
    again = from_json(json.loads(json.dumps(query.to_json())))
    assert again == query
    assert hash(again) == hash(query)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Marginal(3), "name of a layer"),
        (lambda: Marginal(at("a")[3]), "without an index"),
        (lambda: Marginal("a", over="row"), "choose 'channel'"),
        (lambda: Marginal("a", torch.rand(3)), "integer labels"),
        (lambda: Marginal("a", joint=EVENT, given=EVENT), "not both"),
        (lambda: Activation("a", "median"), "choose 'max'"),
        (lambda: Peak("a", "gradient"), "choose 'relevance'"),
        (lambda: check_queries([Marginal("a"), Marginal("a")]), "Give one of them another name"),
        (lambda: check_queries([]), "no queries"),
        (lambda: check_queries(["features.28"]), r"Marginal\('layer'\)"),
        (lambda: check_queries(Marginal("a", name="sample")), "name of a column"),
        (lambda: from_json({"kind": "Median"}), "Kinds are"),
        (lambda: from_json({"kind": "Marginal"}), "not a query"),
    ],
)
def test_what_is_not_a_query_raises(make, message):
    with pytest.raises(SweepError, match=message):
        make()


# -- results --------------------------------------------------------------------------------------------------------


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
    stored = sweep(model, TensorDataset(x), list(QUERIES.values()), tmp_path_factory.mktemp("sweep"), **OPTIONS)
    handle.remove()
    return stored, expected(model, x), forwards


@pytest.mark.parametrize("name", QUERIES)
def test_a_result_equals_that_of_the_measure(results, name):
    stored, wanted, _ = results
    found, wanted = as_tensor(stored, QUERIES[name]), wanted[name]
    assert stored.manifest.value == "double"
    assert found.shape == wanted.shape
    is_defined = ~found.isnan()
    assert is_defined.double().mean() > (0.5 if "conditional" in name else 0.99)
    torch.testing.assert_close(found[is_defined], wanted[is_defined], rtol=1e-7, atol=1e-9)


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


def test_samples_targets_and_predictions_are_stored(tmp_path):
    model, data = net(), Data(10)
    outputs = model(data.x)
    stored = sweep(model, data, [Marginal("4")], tmp_path / "label", target="label", **OPTIONS)
    rows = stored.samples().to_pydict()
    assert rows == {
        "sample": list(range(10)),
        "target": [k % 4 for k in range(10)],
        "prediction": outputs.argmax(1).tolist(),
    }
    alone = sweep(model, data, [Maps()], tmp_path / "maps", target="label", **OPTIONS)
    assert alone.samples().to_pydict() == rows
    chosen = sweep(model, data, [Sink("4")], tmp_path / "function", target=lambda batch: 3 - batch[1], **OPTIONS)
    assert chosen.samples()["target"].to_pylist() == [3 - k % 4 for k in range(10)]
    assert set(
        sweep(model, data, [Sink("4")], tmp_path / "class", target=2, **OPTIONS).samples()["target"].to_pylist()
    ) == {2}


def test_inputs_may_be_mappings_and_the_model_is_unchanged(tmp_path):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, pixels):
            return {"logits": self.net(pixels)}

    data, model = Data(10), Keyword().eval()
    listed = [{"pixels": x, "label": label} for x, label in data]
    state = torch.get_rng_state()
    with untouched(model):
        found = sweep(
            model, listed, [Marginal("net.4"), Activation("net.4")], tmp_path / "a", target="label", **OPTIONS
        )
    assert torch.equal(torch.get_rng_state(), state)
    plain = sweep(net(), data, [Marginal("4"), Activation("4")], tmp_path / "b", target="label", **OPTIONS)
    for name in ("marginal", "activation"):
        assert found.rows(f"{name}(net.4)")["value"].equals(plain.rows(f"{name}(4)")["value"])
