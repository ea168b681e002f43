"""Settings: differences are reported, and equal objects have equal descriptions."""

from __future__ import annotations

import pytest
import torch
from zennit.composites import EpsilonPlus, EpsilonPlusFlat

from nrm_plugin import Interception, NRMDefault, RelevanceMeasure, at
from nrm_plugin.dataset import Marginal, Sink, SweepError, sweep
from nrm_plugin.dataset.sweep_settings import described
from nrm_plugin.imports import MOVED, stored_path
from nrm_plugin.kernels.batch_norm_fusion import fuse
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, net


def changed_weight():
    model = net()
    with torch.no_grad():
        model[4].bias[3] += 1e-6
    return model


CHANGES = {
    "weights": ({"model": changed_weight()}, "model"),
    "structure": ({"model": torch.nn.Sequential(*net(), torch.nn.Identity()).eval()}, "model.structure"),
    "length": ({"data": Data(49)}, r"samples \(was 50, now 49\)"),
    "queries": ({"queries": [*QUERIES, Sink("2")]}, r"queries.sink\(2\)"),
    "other query": (
        {"queries": [Marginal("2"), *QUERIES[1:]]},
        r"queries.marginal\(4\) \(removed\); queries.marginal\(2\) \(added\)",
    ),
    "seed": ({"seed": 1}, r"seed \(was 0, now 1\)"),
    "target": ({"target": "label"}, "target"),
    "composite": ({"composite": EpsilonPlusFlat()}, "composite.name"),
    "a rule": ({"composite": NRMDefault(epsilon=0.3)}, "composite.settings"),
    "residual": ({"residual": "sink"}, "residual"),
    "gain limit": ({"gain_limit": 4.0}, r"gain_limit \(was 2.0, now 4.0\)"),
    "unpack": ({"unpack": lambda batch: (batch[0] + 1, batch[1])}, "unpack"),
}


@pytest.mark.medium
@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_different_settings_are_not_mixed(begun, changes, message):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    given = {"model": net(), "data": Data(), "queries": QUERIES, **OPTIONS, **changes}
    with pytest.raises(SweepError, match=message):
        sweep(out=begun, **given)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_the_description_of_a_composite_does_not_depend_on_its_use():
    rules = EpsilonPlusFlat()
    before = described(rules)
    RelevanceMeasure(net(), Data(2).x, 1, composite=rules).marginal("4")
    assert described(rules) == before == described(EpsilonPlusFlat())
    assert described(EpsilonPlus()) != before != described(EpsilonPlusFlat(epsilon=1e-5))


def test_settings_distinguish_objects_that_behave_differently():
    assert described({"a", "b", "c"}) == described({"c", "b", "a"}) != described({"a", "b"})
    assert described({"x": torch.arange(3)}) == described({"x": torch.arange(3)})
    assert described(torch.arange(3)) != described(torch.arange(3).float())
    assert described(torch.arange(3)) != described(torch.arange(3) + 1)
    assert described(torch.arange(4)) != described(torch.arange(4).reshape(2, 2))

    def closing_over(value):
        def recursive(x):
            return recursive if x else value

        return recursive

    assert described(closing_over(1)) == described(closing_over(1)) != described(closing_over(2))


def test_classes_of_this_package_keep_the_names_of_stored_sweeps():
    """Their modules may move, but a stored sweep with such a composite or output must be resumable."""
    (name,) = described(at("fc"))
    assert name == "nrm_plugin.events.Atom"
    (name,) = interception = described(Interception(fuse=fuse))
    assert name == "nrm_plugin.functional.interception.Interception"
    assert interception[name]["fuse"]["function"] == "nrm_plugin.fusion.fuse"
    assert list(interception[name]["normalization"]) == ["nrm_plugin.steps.Normalization"]
    first: dict[str, str] = {}
    for old, present in MOVED.items():  # a module that moved twice keeps its first name
        first.setdefault(present, old)
    assert {present: stored_path(f"nrm_plugin.{present}") for present in first} == {
        present: f"nrm_plugin.{old}" for present, old in first.items()
    }
    assert stored_path("torch.nn") == "torch.nn"
