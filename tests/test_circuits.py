"""The benchmark of circuits: metrics by hand, circuits node by node, scores as derivatives and as joint relevance."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.circuits import __main__ as command
from benchmarks.circuits import metrics, nets, scores
from benchmarks.circuits.circuit import Task, by_step, flat, metric
from benchmarks.circuits.slopes import RelP, Secants, max_slopes

NAMES = list(nets.NETS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def untrained(name, pairs=3):
    """A task with a small random net of this kind."""
    torch.manual_seed(0)
    net = {
        "MLP": lambda: nets.MLP(64, 8, 6, 10),
        "CNN": lambda: nets.CNN(3, 2, 3),
        "residual CNN": lambda: nets.ResidualCNN(nets.Rolled(2, 2)),
        "transformer": lambda: nets.Transformer(16, 9, layers=2, heads=2, width=8),
    }[name]()
    net = net.double().eval().requires_grad_(False)
    if name == "transformer":
        return Task.of(net, nets.twins(torch.Generator().manual_seed(0), pairs))
    shape = (64,) if name == "MLP" else (1, 8, 8)
    x, x0 = torch.rand(2, pairs, *shape, dtype=torch.float64)
    return Task.of(net, (x, x0, torch.arange(pairs), torch.arange(pairs) + 3))


# -- metrics --------------------------------------------------------------------------------------------------------


def test_areas_of_curves_made_by_hand():
    f = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 1.0]])
    shares = [0.0, 0.5, 1.0]
    torch.testing.assert_close(metrics.cpr(f, shares), torch.tensor([0.75, 1.25]))
    torch.testing.assert_close(metrics.cmd(f, shares), torch.tensor([0.25, 0.75]))  # above 1 is a distance too


def test_areas_are_linear_in_the_share_and_start_at_the_smallest():
    steps = [b - a for a, b in pairwise(metrics.SHARES)]
    last_only = torch.tensor([[0.0]] * 9 + [[1.0]])
    assert float(metrics.cpr(last_only)) == pytest.approx(steps[-1] / 2)
    assert float(metrics.cpr(torch.ones(10, 1))) == pytest.approx(0.999)


def test_the_strongest_edges_are_ranked_by_sign_or_size():
    values = torch.tensor([[3.0, -4.0, 1.0, 2.0]])
    assert metrics.strongest(values, 0.5).tolist() == [[1, 0, 0, 1]]
    assert metrics.strongest(values.abs(), 0.5).tolist() == [[1, 1, 0, 0]]
    assert metrics.strongest(values, 0.74).sum() == 2  # whole edges only
    assert metrics.strongest(values, 1.0).sum() == 4
    with pytest.raises(ValueError, match="not finite"):
        metrics.strongest(torch.tensor([[0.0, torch.nan]]), 0.5)


def test_the_circuit_of_a_share_of_a_hundred_edges_has_that_many():
    values = torch.rand(1, 100)
    assert [int(metrics.strongest(values, share).sum()) for share in metrics.SHARES] == [
        0,
        0,
        0,
        1,
        2,
        5,
        10,
        20,
        50,
        100,
    ]


def test_correlation_equals_that_of_numpy():
    a, b = torch.rand(2, 4, 9, dtype=torch.float64)
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(metrics.correlation(a, b), expected)
    assert metrics.correlation(torch.ones(1, 3), torch.rand(1, 3)).tolist() == [0]


# -- circuits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_all_edges_are_the_net_and_none_is_the_corrupted_run(name):
    task = untrained(name)
    torch.testing.assert_close(task.run(task.edges(1.0)), task.whole)
    torch.testing.assert_close(task.run(task.edges(0.0)), task.empty)
    torch.testing.assert_close(task.empty, metric(task.net(task.pairs[1]), task.pairs))
    assert float((task.whole - task.empty).abs().min()) > 1e-3
    assert command.identities(task) < 1e-9


def test_the_unrolled_residual_net_is_the_rolled_one():
    rolled = nets.Rolled(3, 2)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(nets.ResidualCNN(rolled)(x), rolled(x))


def halves(task):
    """A random circuit."""
    values = (torch.rand_like(flat(task.edges(1.0))) < 0.5).double()
    return by_step(values, task.edges(1.0))


def test_a_circuit_of_neurons_is_evaluated_edge_by_edge():
    task = untrained("MLP", pairs=2)
    circuit = halves(task)
    for n in range(2):
        values, fixed = task.pairs[0][n].tolist(), task.pairs[1][n].tolist()
        for name, layer in task.steps:
            new, old = [], []
            for r, (weights, bias) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)):
                inside = circuit[name][n, r].bool().tolist()
                chosen = [a if is_in else a0 for a, a0, is_in in zip(values, fixed, inside, strict=True)]
                new.append(bias + sum(w * a for w, a in zip(weights, chosen, strict=True)))
                old.append(bias + sum(w * a for w, a in zip(weights, fixed, strict=True)))
            values, fixed = [[max(z, 0.0) for z in row] if name != "layer3" else row for row in (new, old)]
        t, u = int(task.pairs[2][n]), int(task.pairs[3][n])
        assert float(task.run(circuit)[n]) == pytest.approx(values[t] - values[u], abs=1e-12)


def test_a_circuit_of_channels_is_evaluated_edge_by_edge():
    task = untrained("residual CNN", pairs=2)
    circuit, steps = halves(task), dict(task.steps)

    def reads(name, n, nodes, fixed):
        step, rows = steps[name], []
        for r in range(step.out_channels):
            total = step.bias[r]
            for s, (a, a0) in enumerate(zip(nodes, fixed, strict=True)):
                chosen = a if circuit[name][n, r, s] else a0
                kernel = step.weight[r : r + 1, s : s + 1]
                total = total + functional.conv2d(chosen[None, None], kernel, None, step.stride, step.padding)[0, 0]
            rows.append(total)
        return rows

    for n in range(2):
        nodes, fixed = [task.pairs[0][n, 0]], [task.pairs[1][n, 0]]
        nodes, fixed = reads("stem", n, nodes, fixed), list(task.corrupted.read["first1"][n])
        for block in (1, 2):
            inner = [functional.silu(z) for z in reads(f"first{block}", n, nodes, fixed)]
            nodes = nodes + reads(f"second{block}", n, inner, list(task.corrupted.read[f"second{block}"][n]))
            fixed = list(task.corrupted.read["output" if block == 2 else "first2"][n])
        outputs = reads("output", n, nodes, fixed)
        t, u = int(task.pairs[2][n]), int(task.pairs[3][n])
        torch.testing.assert_close(task.run(circuit)[n], (outputs[t] - outputs[u]).squeeze())


def test_a_circuit_of_heads_is_evaluated_edge_by_edge():
    task = untrained("transformer", pairs=2)
    circuit, net = halves(task), task.net

    def norm(h):
        return functional.layer_norm(h, h.shape[-1:])

    for n in range(2):
        fixed = task.corrupted.read["logits"][n]
        nodes = [net.tokens(task.pairs[0][n]) + net.positions]

        def gathered(name, r, n=n, fixed=fixed, nodes=nodes):
            row = circuit[name][n, r]
            return norm(sum(a if row[s] else fixed[s] for s, a in enumerate(nodes)))

        for layer in range(2):
            outputs = []
            for head in range(2):
                q, k, v = (
                    gathered(f"attention{layer}", part * 2 + head) @ net.qkv[layer][part * 2 + head]
                    for part in range(3)
                )
                weights = (q @ k.T / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
                outputs.append(weights @ v @ net.out[layer][head])
            nodes += outputs
            nodes.append(net.down[layer](functional.gelu(net.up[layer](gathered(f"mlp{layer}", 0)))))
        outputs = net.unembed(gathered("logits", 0)[-1])
        t, u = int(task.pairs[2][n]), int(task.pairs[3][n])
        torch.testing.assert_close(task.run(circuit)[n], outputs[t] - outputs[u])


def test_the_twin_of_a_sequence_has_another_answer_and_the_same_tokens():
    clean, corrupted, t, u = nets.twins(torch.Generator().manual_seed(0), 50)
    assert bool((clean.sort(1).values == corrupted.sort(1).values).all())
    assert bool((t != u).all())
    for sequence, answer in (*zip(clean, t, strict=True), *zip(corrupted, u, strict=True)):
        keys, values = sequence[:-1:2].tolist(), sequence[1:-1:2].tolist()
        assert values[keys.index(int(sequence[-1]))] == int(answer)


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_secants_explain_all_of_the_difference_at_the_output_and_at_the_input(name):
    task = untrained(name)
    edges = scores.secants(task).edges(task)
    torch.testing.assert_close(list(edges.values())[-1].sum((1, 2)), task.whole - task.empty)
    node = metrics.node_scores(task, edges)
    inputs = [n for n, places in enumerate(metrics.nodes(task).values()) if places[0][0] == next(iter(edges))]
    torch.testing.assert_close(node[:, inputs].sum(1), task.whole - task.empty)


@pytest.mark.parametrize("name", NAMES)
def test_joint_relevance_against_a_reference_is_the_secant_score(name):
    task = untrained(name)
    expected, actual = (score(task).edges(task) for score in (scores.secants, scores.reference_measure))
    for step in expected:
        torch.testing.assert_close(actual[step], expected[step], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["MLP", "CNN"])
def test_lrp_0_is_gradient_times_activation_in_a_net_of_relus(name):
    task = untrained(name)
    assert_same(task, scores.lrp_0(task), scores.gradient_times_activation(task), 1e-6)
    assert_same(task, scores.attribution_patching(task, RelP()), scores.attribution_patching(task), 1e-12)


def assert_same(task, one, other, near):
    one, other = one.edges(task), other.edges(task)
    for step in one:
        torch.testing.assert_close(one[step], other[step], rtol=near, atol=near)


@pytest.mark.parametrize("name", NAMES)
def test_eap_is_the_derivative_of_a_circuit_in_the_strength_of_an_edge(name):
    task = untrained(name)
    expected, size = flat(scores.attribution_patching(task).edges(task)), 1e-5
    for edge in range(0, expected.shape[1], 7):
        weaker = flat(task.edges(1.0))
        weaker[:, edge] -= size
        slope = (task.whole - task.run(by_step(weaker, task.edges(1.0)))) / size
        torch.testing.assert_close(slope, expected[:, edge], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_single_patches_are_evaluated_as_circuits_without_an_edge_or_a_node(name):
    task = untrained(name)
    effects = metrics.edge_effects(task, torch.tensor([0]))[:, 0]
    without = task.edges(1.0)
    next(iter(without.values()))[:, 0, 0] = 0
    torch.testing.assert_close(effects, task.whole - task.run(without))
    assert metrics.node_effects(task).shape == metrics.node_scores(task, task.edges(0.0)).shape


def test_patching_the_only_input_node_is_the_corrupted_run():
    task = untrained("CNN")
    torch.testing.assert_close(metrics.node_effects(task)[:, 0], task.whole - task.empty)
    task = untrained("transformer")  # the embedding is read by all steps, whose other nodes follow it
    stream = metrics.nodes(task)["embedding"]
    assert [step for step, _ in stream] == list(task.net.nodes)


def test_integrated_gradients_visit_the_points_of_the_published_code(monkeypatch):
    task = untrained("MLP")
    visited = []
    real = scores.gradients

    def noted(task, h, *slopes):
        visited.append(h)
        return real(task, h, *slopes)

    monkeypatch.setattr(scores, "gradients", noted)
    x, x0 = task.pairs[:2]
    for offset in (1.0, 0.5):
        visited.clear()
        scores.integrated_gradients(task, offset)
        expected = [x + (n + offset) / 8 * (x0 - x) for n in range(8)]
        torch.testing.assert_close(visited, expected)


def test_scores_agree_in_a_linear_net(monkeypatch):
    task = untrained("MLP")
    monkeypatch.setattr(torch, "relu", lambda z: z)
    task = Task.of(task.net, task.pairs)
    for score in (scores.secants, scores.integrated_gradients, lambda task: scores.attribution_patching(task, RelP())):
        assert_same(task, score(task), scores.attribution_patching(task), 1e-12)


@pytest.mark.parametrize("slopes", [RelP(), RelP(is_frozen=True), Secants()])
@pytest.mark.parametrize("name", NAMES)
def test_slopes_do_not_change_values(name, slopes):
    task = untrained(name)
    both = torch.cat(scores.embedded(task))
    run = scores.trace(task.net, both, slopes)
    torch.testing.assert_close(run.outputs, task.net.body(both, task.net.plain, nets.TANGENTS))


def test_attention_weights_are_constants_of_the_ah_rule_only():
    task = untrained("transformer")
    frozen, free = (scores.attribution_patching(task, RelP(is_frozen)).edges(task) for is_frozen in (True, False))
    assert not bool(frozen["attention1"][:, :4].any())  # queries and keys
    assert bool(free["attention1"][:, :4].any())
    assert bool(frozen["attention1"][:, 4:].any())


def test_slopes_of_the_maximum_by_hand_and_in_sum():
    x, x0 = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    # Either switch of 0 → 3 first: the maximum 2 → 3, then 3 → 3; or of 2 → 1 first: 2 → 1, then 1 → 3.
    torch.testing.assert_close(max_slopes(x, x0), torch.tensor([[(1 + 2) / 2 / 3, (0 - 1) / 2 / -1]]))
    x, x0 = torch.randn(2, 50, 4, dtype=torch.float64)
    torch.testing.assert_close((max_slopes(x, x0) * (x - x0)).sum(-1), x.amax(-1) - x0.amax(-1))


@pytest.mark.parametrize(
    "name", [name for name in scores.SCORES if name not in (scores.REFERENCE, scores.PLANNED, "LRP-0")]
)
def test_passes_are_counted(name, monkeypatch):
    task = untrained("CNN")
    passes = {"forward": 0, "backward": 0}
    body, grad = task.net.body, torch.autograd.grad

    def forward(h, *rest):
        passes["forward"] += len(h) // 3
        return body(h, *rest)

    def backward(outputs, inputs, *rest):
        passes["backward"] += isinstance(inputs, list)  # the products with weights and the slopes have single inputs
        return grad(outputs, inputs, *rest)

    monkeypatch.setattr(task.net, "body", forward)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    scores.SCORES[name].of(task)
    assert (passes["forward"], passes["backward"]) == (scores.SCORES[name].forward, scores.SCORES[name].backward)


# -- command --------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_the_quick_mode_prints_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "trained", lambda name, seed, pairs: (*untrained_parts(name, pairs), 1.0))
    monkeypatch.setattr(command, "RESULTS", tmp_path / "circuits.json")
    monkeypatch.setattr(command, "EDGES", 5)
    monkeypatch.setattr(command, "TIMED", 1)
    threads = torch.get_num_threads()
    command.main(["--quick", "--nets", "CNN"])
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in scores.SCORES)
    assert not list(tmp_path.iterdir())


def untrained_parts(name, pairs):
    task = untrained(name, 7)
    return task.net, task.pairs


def test_the_results_have_enough_pairs_and_keep_their_identities():
    results = json.loads(command.RESULTS.read_text())
    assert list(results["nets"]) == NAMES
    for net in results["nets"].values():
        assert net["pairs"] >= 200
        assert net["largest error of the whole and of the empty circuit"] < 1e-9
        for row in net["scores"].values():
            low, high = row["CMD"][1:]
            assert low <= row["CMD"][0] <= high
