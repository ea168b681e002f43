"""The benchmark of path patching: exact patching by enumerated walks and by hand, scores where they are exact."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from zennit.composites import EpsilonPlusFlat

from benchmarks.circuits import nets as circuit_nets
from benchmarks.path_patching import __main__ as command
from benchmarks.path_patching import chains, channels, figure, nets, pages, scores
from benchmarks.path_patching.patching import Patching
from nrm_plugin import NRMAbsolute, NRMDefault, RelevanceMeasure, at

SITES = ("site", "middle", "last")
PLACES = range(4), range(3), range(5), range(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Skipping(nn.Module):
    """Linear layers with a skip connection around the second one."""

    def __init__(self, activation=nn.Identity):
        super().__init__()
        self.site, self.middle, self.last = nn.Identity(), nn.Linear(4, 3), nn.Linear(3, 5)
        self.around, self.output, self.activation = nn.Linear(4, 5, bias=False), nn.Linear(5, 2), activation()

    def forward(self, a):
        a = self.site(a)
        z = self.last(self.activation(self.middle(a)))
        return self.output(self.activation(z) + self.around(a))


def tiny(rest, samples=3, against=True):
    """A case with a linear layer below the lowest site."""
    whole = nets.Whole(nn.Linear(6, 4), rest).double().eval().requires_grad_(False)
    x, other = torch.randn(2, samples, 6, dtype=torch.float64)
    target = torch.zeros(samples, dtype=torch.long)
    return nets.Case(whole, SITES, x, other, target, target + 1 if against else None)


def mask(size, *chosen):
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)


CHAINS = scores.Chains(
    SITES, [mask(4, 0), mask(4, 1, 3)], [[mask(3, 1), mask(5, 2)], [mask(3, 0, 2), mask(5, 1, 2, 4)]]
)
START = pytest.mark.parametrize("start", scores.REFERENCES)


def enumerated(case, start, sets):
    """Sum over all walks through one neuron of every set of the product of weights, in a linear net."""
    rest = case.whole.rest
    a, a0 = case.whole.below(case.x), case.whole.below(case.other)
    change = a if start == "zero" else a - a0
    s = torch.tensor([1.0, -1.0], dtype=torch.float64)
    total = torch.zeros(len(a), dtype=torch.float64)
    for i, j, k, o in product(*PLACES):
        if sets[0][i] and sets[1][j] and sets[2][k]:
            total += change[:, i] * rest.middle.weight[j, i] * rest.last.weight[k, j] * rest.output.weight[o, k] * s[o]
    return total


@START
def test_in_a_linear_net_patching_and_both_joints_are_sums_over_enumerated_walks(start):
    case = tiny(Skipping())
    expected = torch.stack(
        [torch.stack([enumerated(case, start, [a, *above]) for a in CHAINS.lower], 1) for above in CHAINS.upper], 1
    )
    exact = Patching(case, start).effects(CHAINS.sites, CHAINS.lower, CHAINS.upper)
    torch.testing.assert_close(exact, expected)
    for slopes in ("tangent", "secant"):
        torch.testing.assert_close(
            scores.against_reference(case, Patching(case, start), slopes).masses(CHAINS), expected
        )
    assert float(expected.abs().max()) > 1e-4


@START
def test_patching_equals_a_run_that_is_written_out(start):
    case = tiny(Skipping(nn.ReLU))
    rest, (lower, (middle, last)) = case.whole.rest, (CHAINS.lower[1], CHAINS.upper[1])
    a = case.whole.below(case.x)
    a0 = torch.zeros_like(a) if start == "zero" else case.whole.below(case.other)
    z = rest.middle(torch.where(lower, a0, a))
    z = rest.last(torch.where(middle, z, rest.middle(a)).relu())
    z = torch.where(last, z, rest.last(rest.middle(a).relu())).relu() + rest.around(a)
    expected = case.explained(rest(a)) - case.explained(rest.output(z))
    exact = Patching(case, start).effects(SITES, [lower], [[middle, last]])
    torch.testing.assert_close(exact[:, 0, 0], expected)
    assert float(expected.abs().max()) > 1e-4


@START
def test_a_set_of_one_site_is_patched_alone(start):
    case = tiny(Skipping(nn.ReLU))
    patching, rest = Patching(case, start), case.whole.rest
    a = case.whole.below(case.x)
    a0 = torch.zeros_like(a) if start == "zero" else case.whole.below(case.other)
    clean, other = (rest.last(rest.middle(one).relu()) for one in (a, a0))
    z = torch.where(CHAINS.upper[0][1], other, clean).relu() + rest.around(a)
    expected = patching.value - case.explained(rest.output(z))
    torch.testing.assert_close(patching.single("last", [CHAINS.upper[0][1]])[:, 0], expected)


@START
def test_the_whole_of_every_site_is_the_whole_change_or_that_without_the_bypass(start):
    case = tiny(Skipping(nn.ReLU))
    everything = scores.Chains(SITES[:1] + SITES[2:], [mask(4, 0, 1, 2, 3)], [[mask(5, *range(5))]])
    patching = Patching(case, start)
    a, a0 = case.inputs(case.x)[0], patching.start[0]
    bypass = (a - a0) @ case.whole.rest.around.weight.T @ case.whole.rest.output.weight.T
    change = patching.value - case.explained(patching.run({}, patching.start)[1]) - case.explained(bypass)
    torch.testing.assert_close(patching.effects(everything.sites, everything.lower, everything.upper)[:, 0, 0], change)
    secants = scores.against_reference(case, patching, "secant").masses(everything)[:, 0, 0]
    torch.testing.assert_close(secants, change)


def test_a_chain_starts_and_stops_at_sites_with_the_same_result():
    convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)
    whole, sites = nets.chain([*convolutions, nn.Flatten(), nn.Linear(8, 3)], [1, 3, 4])
    whole = whole.double().eval().requires_grad_(False)
    x, other = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    case = nets.Case(whole, sites, x, other, torch.tensor([0, 2]))
    hidden = nets.Whole(whole.below, Hidden(whole.rest))
    from_below = nets.Case(hidden, tuple(f"net.{site}" for site in sites), x, other, case.target)
    draw = torch.Generator().manual_seed(0)
    lowest = chains.third((3, 6, 6), draw)
    above = [chains.half((4, 4, 4), draw), chains.positions((2, 2, 2), draw)]
    values = [Patching(one, "input").effects(one.sites, [lowest], [above]) for one in (case, from_below)]
    torch.testing.assert_close(*values)
    assert float(values[0].abs().max()) > 1e-6


class Hidden(nn.Module):
    """A chain that is not an ``nn.Sequential`` itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, a):
        return self.net(a)


# -- scores -----------------------------------------------------------------------------------------------------------


@START
def test_products_of_single_foundare_written_out(start):
    case = tiny(Skipping(nn.ReLU), against=False)
    found = {(name, at): values for _, at, name, values in scores.predictions(case, {"kind": CHAINS}, crp=False)}
    patching = Patching(case, start)
    leaf = case.whole.below(case.x).requires_grad_()
    rest = case.whole.rest
    m = rest.middle(leaf)
    z = rest.last(m.relu())
    f = rest.output(z.relu() + rest.around(leaf))[:, 0]
    sets = CHAINS.lower[1], *CHAINS.upper[0]
    gradients = torch.autograd.grad(f.sum(), (leaf, m, z))
    shares = [((a * g) * s).sum(1) for a, g, s in zip((leaf, m, z), gradients, sets, strict=True)]
    expected = (shares[0] * shares[1] * shares[2] / f**2).detach()
    torch.testing.assert_close(found["product of gradient × activation", start][:, 0, 1], expected)
    changes = [
        ((a - patching.reference[site]) * g * s).sum(1)
        for site, a, g, s in zip(SITES, (leaf, m, z), gradients, sets, strict=True)
    ]
    total = patching.value - case.explained(patching.run({}, patching.start)[1])
    expected = (changes[0] * changes[1] * changes[2] / total**2).detach()
    torch.testing.assert_close(found["product of gradient × change", start][:, 0, 1], expected)
    sizes = [(a * s).abs().sum(1) / a.abs().sum(1) for a, s in zip((leaf, m, z), sets, strict=True)]
    expected = (sizes[0] * sizes[1] * sizes[2] * f).detach()
    torch.testing.assert_close(found["product of activations", start][:, 0, 1], expected)
    torch.testing.assert_close(  # without positions, the weights of GradCAM are the gradients
        found["product of GradCAM", start], found["product of gradient × activation", start]
    )
    exact = [patching.single(site, [one])[:, 0] for site, one in zip(SITES, sets, strict=True)]
    torch.testing.assert_close(
        found["product of exact single patches", start][:, 0, 1], exact[0] * exact[1] * exact[2] / total**2
    )


def test_edges_are_tangents_between_neighbouring_sets():
    case = tiny(Skipping(nn.ReLU))
    measure = scores.against_reference(case, Patching(case, "zero"), "tangent")
    first, second = measure.edges(CHAINS)
    pair = scores.Chains(SITES[:2], CHAINS.lower, [above[:1] for above in CHAINS.upper])
    torch.testing.assert_close(first, measure.masses(pair))
    for row, above in enumerate(CHAINS.upper):
        pair = scores.Chains(SITES[1:], above[:1], [above[1:]])
        torch.testing.assert_close(second[:, row], measure.masses(pair)[:, 0])


def test_the_weights_of_grad_cam_are_means_over_positions():
    gradients = torch.randn(2, 3, 4, 5)
    for n, k in product(range(2), range(3)):
        expected = torch.full((4, 5), float(gradients[n, k].mean()))
        torch.testing.assert_close(scores.weighted(gradients)[n, k], expected)


@pytest.mark.medium
@START
def test_the_measures_of_the_part_above_the_lowest_site_are_those_of_the_net(start):
    convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)
    whole, sites = nets.chain([*convolutions, nn.Flatten(), nn.Linear(8, 3)], [1, 3, 4])
    whole = whole.double().eval().requires_grad_(False)
    x, other = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    case = nets.Case(whole, sites, x, other, torch.tensor([0, 2]))
    chain = command.chains_of(case, [chains.Kind("sets", (0, 1, 2), chains.half, 2, 2)])["sets"]
    found = {name: values for _, at, name, values in scores.predictions(case, {"": chain}, crp=False) if at == start}
    composites = {"NRMDefault": NRMDefault(), "EpsilonPlusFlat": EpsilonPlusFlat(), "NRMAbsolute": NRMAbsolute()}
    expected = {name: RelevanceMeasure(whole, x, case.target, composite=one) for name, one in composites.items()}
    if start == "input":
        for slopes in ("tangent", "secant"):
            mu = RelevanceMeasure(whole, x, start=scores.signed(case), reference=other, slopes=slopes)
            expected[f"{slopes}s"] = mu
    for name, mu in expected.items():
        for row, above in enumerate(chain.upper):
            event = at(f"rest.{sites[1]}")[above[0]] & at(f"rest.{sites[2]}")[above[1]]
            masses = mu.marginal(f"rest.{sites[0]}", joint=event) * mu.output[:, None, None, None]
            for column, mask in enumerate(chain.lower):
                torch.testing.assert_close(found[f"joint, {name}"][:, row, column], (masses * mask).sum((1, 2, 3)))


# -- nets and sets ----------------------------------------------------------------------------------------------------


def test_the_residual_net_is_the_one_that_was_trained():
    rolled = circuit_nets.Rolled(3, 2).eval()
    twin = nets.rolled(circuit_nets.ResidualCNN(rolled))
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(nets.Whole(nets.ResidualBelow(twin), nets.ResidualRest(twin))(x), rolled(x))


def test_the_transformer_is_the_one_that_was_trained():
    net = circuit_nets.Transformer(16, 9, layers=2, heads=2, width=8).eval()
    x = circuit_nets.recall(torch.Generator().manual_seed(0), 3)[0]
    torch.testing.assert_close(nets.rolled_transformer(net)(x), net(x))


def test_sets_have_the_shape_of_a_site_and_are_not_drawn_twice():
    draw, shape = torch.Generator().manual_seed(0), (6, 4, 5)
    assert int(chains.single(shape, draw).sum()) == 20
    assert int(chains.third(shape, draw).flatten(1).all(1).sum()) == 2
    assert int(chains.half(shape, draw).flatten(1).all(1).sum()) == 3
    window = chains.positions(shape, draw)
    assert bool((window == window[:1]).all())
    assert int(window[0].sum()) == 4
    assert int(chains.tokens((2, 9, 8), draw)[0, :, 0].sum()) == 3
    assert int(chains.head_at_tokens((2, 9, 8), draw).sum()) == 4 * 8
    lower, upper = chains.Kind("", (0, 1), chains.single, upper=9).sets([(3, 2, 2), (4, 2, 2)])
    assert len(lower) == 3
    assert len(upper) == 4


def test_conditions_of_channels_are_those_without_positions():
    lower = [torch.ones(2, 3, 3, dtype=torch.bool)]
    whole = chains.along((4, 2, 2), 0, torch.tensor([1, 3]))
    window = chains.positions((4, 2, 2), torch.Generator().manual_seed(0))
    assert scores.is_of_channels(scores.Chains(("a", "b"), lower, [[whole]]))
    assert not scores.is_of_channels(scores.Chains(("a", "b"), lower, [[whole], [window]]))
    assert scores.chosen(whole) == [1, 3]


# -- channels of all layers -----------------------------------------------------------------------------------------

LAYERS = ("rest.last", "below", "rest.middle")


def test_in_a_linear_net_the_scores_of_all_layers_are_the_effects_of_single_channels():
    case = replace(tiny(Skipping(), against=False), layers=LAYERS)
    before, _ = channels.seen(case, case.other)
    effects = channels.single_effects(case, before)
    found = channels.against_reference(case, case.other)
    for score in ("μ, tangents", "μ, secants", "LayerIntegratedGradients"):
        torch.testing.assert_close(found[score], effects, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["LayerConductance"], effects, rtol=0.02, atol=0)  # its path is a little shorter
    zero = {layer: torch.zeros_like(one) for layer, one in before.items()}
    shared = channels.without_reference(case)
    effects = channels.single_effects(case, zero)
    torch.testing.assert_close(shared["gradient × activation"], effects)
    torch.testing.assert_close(shared["μ, LRP-0"], effects, rtol=1e-6, atol=1e-8)
    assert effects.shape == (3, 5 + 4 + 3)
    assert float(effects.abs().min()) > 1e-5


def test_the_effect_of_a_channel_is_that_of_a_net_whose_weights_to_it_are_zero():
    case = replace(tiny(Skipping(nn.ReLU)), layers=LAYERS)
    before, _ = channels.seen(case, case.other)
    zero = {layer: torch.zeros_like(one) for layer, one in before.items()}
    effects = channels.single_effects(case, zero)
    number = case.explained(case.whole(case.x))
    for column, (layer, channel) in enumerate(
        [*(("rest.last", n) for n in range(5)), *(("below", n) for n in range(4))]
    ):
        other = copy.deepcopy(case)
        other.whole.get_submodule(layer).weight.data[channel] = 0
        other.whole.get_submodule(layer).bias.data[channel] = 0
        torch.testing.assert_close(effects[:, column], number - other.explained(other.whole(case.x)))


def test_srg_is_largest_for_the_effects_themselves_in_a_linear_net():
    case = replace(tiny(Skipping()), layers=("rest.last",))
    before, _ = channels.seen(case, case.other)
    effects = channels.single_effects(case, before)
    best = channels.srg(case, effects, before)
    torch.testing.assert_close(channels.srg(case, -effects, before), -best)
    assert bool((best > channels.srg(case, effects.roll(1, 1), before)).all())


# -- results and tables ----------------------------------------------------------------------------------------------


def test_errors_are_ratios_of_sums_over_samples():
    error, size = torch.rand(2, 5)
    draw = torch.rand(3, 5)
    draw /= draw.sum(1, keepdim=True)
    found = command.ratios(error, size, draw)
    assert found[0] == pytest.approx(float(error.sum() / size.sum()), rel=1e-5)
    assert found[2] == pytest.approx(float((draw[1] * error).sum() / (draw[1] * size).sum()), rel=1e-5)
    assert command.bounds(torch.tensor([7.0, *range(41)])) == [7.0, 1.0, 39.0]


def test_results_of_a_photograph_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NRM_CACHE", str(tmp_path))
    monkeypatch.setattr(command, "KINDS", {"tiny": [chains.Kind("pairs", (0, 2), chains.single, 2, 2)]})
    case = tiny(Skipping(nn.ReLU), samples=1)
    found = command.chains_of(case, command.KINDS["tiny"])
    first = command.compared_once("tiny", case, found)
    assert first["pairs", "zero"]["joint, secants"]["size"].shape == (1,)
    monkeypatch.setattr(command, "compared", None)
    torch.testing.assert_close(command.compared_once("tiny", case, found), first)
    with pytest.raises(TypeError):
        command.compared_once("tiny", replace(case, x=case.x + 1), found)


def test_stages_of_an_efficientnet_end_where_the_width_changes():
    model = nn.Module()
    model._blocks = nn.ModuleList(nn.Module() for _ in range(9))
    for block, width in zip(model._blocks, (1, 2, 2, 3, 4, 4, 5, 6, 7), strict=True):
        block._project_conv = nn.Conv2d(1, width, 1)
    for name in ("_conv_stem", "_bn0", "_swish", "_conv_head", "_bn1", "_avg_pooling", "_fc"):
        setattr(model, name, nn.Identity())
    layers, sites = nets.efficientnet_layers(model)
    assert [layers[site]._project_conv.out_channels for site in sites] == [4, 5, 6]
    assert layers[sites[0] + 1]._project_conv.out_channels == 5


def test_rows_in_which_joint_relevance_is_first_or_level_are_counted():
    def measured(tangents, secants):
        scores = {
            "joint, tangents": {"minus best product": tangents, "error minus best product": tangents},
            "joint, secants": {"minus best product": secants, "error minus best product": secants},
        }
        return {"references": {"zero": {"scores": scores}}}

    ahead, level, behind = [1, 0.5, 2], [0, -1, 1], [-1, -2, -0.5]
    kinds = {
        "single channels, 2 layers": measured(ahead, behind),
        "single channels, 3 layers": measured(level, behind),
        "positions, 2 layers": measured(behind, level),
    }
    shown = pages._standing({"nets": {"one": {"kinds": kinds}}})
    assert "2 of 3 settings by correlation and 2 of 3 by error with tangents, and in 1 of 3 and 3 of 3 with" in shown
    assert shown.splitlines()[0].endswith(
        "the counts are 2 of 3 and 2 of 3."
    )  # single in 2 layers ahead, behind, level
    assert "| one | tangents | 1 | 1 | 1 | 1 | 1 | 1 |" in shown
    assert "| one | secants | 0 | 1 | 2 | 2 | 1 | 0 |" in shown


def test_the_summary_counts_settings_and_gives_the_median_and_range_of_the_differences():
    def measured(secants, default):
        rows = {"joint, secants": secants, "joint, tangents": secants, "joint, NRMDefault": default}
        return {"references": {"zero": {"scores": {score: {"minus best product": row} for score, row in rows.items()}}}}

    kinds = {
        "one": measured([0.3, 0.1, 0.4], [-0.5, -0.7, -0.1]),
        "two": measured([0.1, -0.2, 0.3], [-0.1, -0.3, 0.2]),
        "three": measured([-0.6, -0.8, -0.2], [-0.2, -0.3, -0.1]),
    }
    table = pages.path_patching_summary({"nets": {"tiny": {"kinds": kinds}}})["summary"].splitlines()
    ahead, behind = "1 / 1 / 1 | +0.10 (-0.60 to +0.30)", "0 / 1 / 2 | -0.20 (-0.50 to -0.10)"
    assert table[2] == f"| tiny | 3 | {ahead} | {ahead} | {behind} |"
    assert table[3] == "| **all** | 3 | **1 / 1 / 1** |  | **1 / 1 / 1** |  | **0 / 1 / 2** |  |"


def test_columns_in_which_a_score_is_within_the_interval_of_the_first_are_counted():
    same = {"correlation": [0.9, 0.8, 0.95], "SRG": [3, 2, 4]}
    fills = {"one": same, "two": {"correlation": [0.8, 0, 1], "SRG": [1.9, 0, 9]}}
    shown = pages._places({"nets": {"first": {"channels": {"zero": fills, "input": fills}}, "second": {}}})
    assert shown.splitlines() == ["| score | columns of 4 |", "|---|---|", "| one | 4 |", "| two | 2 |"]
    fills["three"] = {"correlation": [0.1, 0, 1], "SRG": [1, 0, 9]}
    shown = pages._places({"nets": {"first": {"channels": {"zero": fills, "input": fills}}, "second": {}}})
    assert shown.endswith("| two | 2 |\n| all others | 0 |")


def small_nets(count):
    return [replace(tiny(Skipping(nn.ReLU), samples=count, against=False), layers=LAYERS)]


@pytest.mark.medium
def test_the_command_measures_writes_and_renders(tmp_path, monkeypatch, capsys):
    kinds = [chains.Kind("single", (0, 2), chains.single, 3, 3), chains.Kind("sets", (0, 1, 2), chains.half, 3, 3)]
    monkeypatch.setenv("NRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "SAMPLES", 5)
    monkeypatch.setattr(command, "NETS", {"tiny": small_nets})
    monkeypatch.setattr(command, "KINDS", {"tiny": kinds})
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "ORDER", ("tiny",))
    monkeypatch.setattr(command, "FEW", (2, 1))
    out = tmp_path / "out"
    command.main(["--nets", "tiny", "--out", str(out)])
    assert "| single | zero |" in capsys.readouterr().out
    assert (out / figure.FIGURE).stat().st_size > 1000
    stored = json.loads((out / command.RESULTS).read_text())["nets"]["tiny"]
    assert stored["samples"] == 5
    row = stored["kinds"]["sets"]["references"]["input"]
    best = row["scores"][row["best product"]]["correlation"][0]
    assert best == max(one["correlation"][0] for name, one in row["scores"].items() if name.startswith("product"))
    assert set(stored["channels"]["input"]["μ, secants"]) == {"correlation", "SRG"}
    errors = [one["error"] for name, one in row["scores"].items() if name.startswith("product")]
    secants = row["scores"]["joint, secants"]
    assert secants["error minus best product"][0] == pytest.approx(secants["error"] - min(errors), rel=1e-2, abs=1e-3)
    tangents = row["scores"]["joint, tangents"]
    assert tangents["minus best product"][0] == pytest.approx(tangents["correlation"][0] - best, abs=1e-3)
    command.main(["--nets", "tiny", "--quick"])
    quick = json.loads((tmp_path / "cache" / "quick" / command.RESULTS).read_text())
    assert quick["nets"]["tiny"]["samples"] == 2


def test_the_figure_says_where_nothing_was_measured_and_that_higher_is_better(tmp_path, monkeypatch):
    results = json.loads(Path("benchmarks/results/path_patching.json").read_text())
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    figure.draw(results, tmp_path)
    (one,) = drawn
    kinds = [kind for net in results["nets"].values() for kind in net["kinds"].values()]
    for panel, start in zip(one.axes, figure.TITLES, strict=True):
        missing = sum(start not in kind["references"] for kind in kinds)
        assert sum(text.get_text() == "not measured" for text in panel.texts) == missing
    assert "higher is better" in one.get_suptitle()
