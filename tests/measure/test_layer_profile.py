"""Mass, sink, bypass and variation of each layer, compared with plain LRP."""

from __future__ import annotations

import pytest
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands.demo_values import plain_sums
from nrm_plugin.demo.model import load_digits, load_model
from nrm_plugin.errors import InputError
from nrm_plugin.measure.layer_profile import ProfileRow, profile
from nrm_plugin.plots.flow import profile_figure


@pytest.mark.medium
def test_the_profile_has_the_totals_of_each_layer_and_of_plain_lrp():
    model, digits = load_model(), load_digits()[0][:1]
    rules = EpsilonPlus()
    mu = RelevanceMeasure(model, digits, 0, composite=rules)
    leaky = RelevanceMeasure(model, digits, 0, composite=EpsilonPlus(), residual="sink")
    names = ["features.12", "input", "features.7"]
    rows = profile(mu, names, leaky)
    assert [row.layer for row in rows] == ["features.12", "features.7", "input"]
    zennit = plain_sums(model, digits, [0], EpsilonPlus(), names)
    for row in rows:
        assert row.plain == pytest.approx(float(zennit[row.layer]), rel=1e-4)
        assert row.mass + row.sink + row.bypass == pytest.approx(1, abs=1e-5)
        assert (row.mass, row.variation) == (
            pytest.approx(float(mu.marginal(row.layer).sum())), pytest.approx(float(mu.variation(row.layer)))
        )  # fmt: skip
    assert abs(rows[-1].plain - rows[-1].mass) > 0.01
    assert {row.layer for row in profile(mu)} >= {"output", "features.0", "input"}
    left, right = profile_figure(rows, "heading", dark=True).axes
    assert right.lines[0].get_xdata().tolist() == [row.variation for row in rows]
    (marks,) = [line for line in left.lines if line.get_label() == "sum of plain LRP"]
    assert marks.get_xdata().tolist() == [row.plain for row in rows]
    with pytest.raises(InputError, match="residual='sink'; this one redistributes"):
        profile(mu, plain=mu)


def test_the_profile_of_a_signed_rule_has_a_logarithmic_scale():
    rows = [ProfileRow("a", 1.0, 0.0, 0.0, 1.0), ProfileRow("b", 0.9, 0.1, 0.0, 4000.0)]
    assert profile_figure(rows).axes[1].get_xscale() == "log"
    assert profile_figure(rows[:1]).axes[1].get_xscale() == "linear"
