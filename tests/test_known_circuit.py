"""The benchmark of a compiled circuit: the unrolled network head by head, the program's edges by hand, and AUROC."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.circuits import compiled, increment, known, scores
from benchmarks.circuits.circuit import Task, by_step, flat, metric
from benchmarks.circuits.increment import Operation
from benchmarks.circuits.slopes import MASKED, RelP, Secants, Tangents

ROOT = Path(__file__).parents[1]
SETTINGS = {"num_hidden_layers": 2, "head_dim": 4, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 100.0}}
WIDTH, HEADS, NEURONS, LENGTH, VOCABULARY = 12, 2, 3, 5, 6


def weights():
    """Random weights in the layout of Phi-3; head 1 of block 0 and neuron 0 of block 1 write nothing."""
    torch.manual_seed(0)
    found = {"model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH), "model.norm.weight": torch.rand(WIDTH) + 0.5}
    for n in range(2):
        shapes = {
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
            "self_attn.qkv_proj": (3 * HEADS * 4, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * 4),
            "mlp.gate_up_proj": (2 * NEURONS, WIDTH),
            "mlp.down_proj": (WIDTH, NEURONS),
        }
        found |= {f"model.layers.{n}.{name}.weight": torch.randn(shape) / 2 for name, shape in shapes.items()}
    found["model.layers.0.self_attn.o_proj.weight"][:, 4:] = 0
    found["model.layers.1.mlp.down_proj.weight"][:, 0] = 0
    return {name: value.double() for name, value in found.items()}


def net():
    return compiled.Compiled(weights(), SETTINGS, LENGTH, VOCABULARY).double().eval().requires_grad_(False)


def task():
    torch.manual_seed(1)
    clean, corrupted = torch.randint(VOCABULARY, (2, 4, LENGTH))
    return Task.of(net(), (clean, corrupted, torch.tensor([24, 25, 26, 27]), torch.tensor([29, 28, 29, 28])))


def rotated(x, theta=100.0):
    """Rotary embedding, pair by pair."""
    turned = torch.empty_like(x)
    for place, i in itertools.product(range(LENGTH), range(2)):
        angle = place / theta ** (2 * i / 4)
        a, b = x[place, i], x[place, i + 2]
        turned[place, i] = a * math.cos(angle) - b * math.sin(angle)
        turned[place, i + 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def slow_logits(ids):
    """Phi-3, one head after the other, without unrolling."""
    w = weights()
    h = w["model.embed_tokens.weight"][ids]

    def normed(h, gain):
        return h / (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[gain]

    for n in range(2):
        p = f"model.layers.{n}."
        q, k, v = (normed(h, p + "input_layernorm.weight") @ w[p + "self_attn.qkv_proj.weight"].T).split(HEADS * 4, 1)
        mixed = []
        for head in range(HEADS):
            part = slice(4 * head, 4 * head + 4)
            logits = rotated(q[:, part]) @ rotated(k[:, part]).T / 2
            later = torch.ones(LENGTH, LENGTH).triu(1).bool()
            mixed.append(logits.masked_fill(later, -torch.inf).softmax(-1) @ v[:, part])
        h = h + torch.cat(mixed, 1) @ w[p + "self_attn.o_proj.weight"].T
        gate, up = (normed(h, p + "post_attention_layernorm.weight") @ w[p + "mlp.gate_up_proj.weight"].T).chunk(2, 1)
        h = h + (functional.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return normed(h, "model.norm.weight") @ w["model.embed_tokens.weight"].T


def test_the_unrolled_net_is_phi_3():
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([slow_logits(row).flatten() for row in ids])
    torch.testing.assert_close(net()(ids), expected)
    assert net().kept == [([0], [0, 1, 2]), ([0, 1], [1, 2])]  # what writes nothing is left out


def test_all_edges_are_the_net_and_none_is_the_corrupted_run():
    one = task()
    torch.testing.assert_close(one.run(one.edges(1.0)), one.whole)
    torch.testing.assert_close(one.run(one.edges(0.0)), metric(one.net(one.pairs[1]), one.pairs))


@pytest.mark.medium
@pytest.mark.parametrize("name", ["secant", "tangent"])
def test_joint_relevance_of_edges_equals_plain_code(name):
    one = task()
    found = scores.reference_measure(one, name).edges(one)
    plain = scores.secants(one) if name == "secant" else scores.attribution_patching(one)
    torch.testing.assert_close(flat(found), flat(plain.edges(one)), rtol=1e-8, atol=1e-10)
    if name == "secant":  # the edges to the logits are a cut
        torch.testing.assert_close(found["logits"].sum((1, 2)), one.whole - one.empty)


def test_slopes_of_gates_and_of_root_mean_square_norms():
    torch.manual_seed(0)
    z, z0, a, a0 = torch.randn(4, 3, 5, dtype=torch.float64)

    def value(slopes, z, a):
        return slopes.product(functional.silu(slopes.rms_norm(z, 1e-5)), a)

    for slopes in (Tangents(), RelP(), Secants()):
        both = torch.cat([z, z0]), torch.cat([a, a0])
        torch.testing.assert_close(value(slopes, *both), value(Tangents(), *both))
    z.requires_grad_()
    a.requires_grad_()
    halves = torch.autograd.grad(RelP().product(z, a).sum(), (z, a))
    torch.testing.assert_close(halves, (a.detach() / 2, z.detach() / 2))
    (frozen,) = torch.autograd.grad(RelP().rms_norm(z, 1e-5).sum(), z)
    torch.testing.assert_close(frozen * z, RelP().rms_norm(z, 1e-5))
    both = torch.cat([z, z0]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(Secants().rms_norm(both, 1e-5)[:3].sum(), both)
    change = Tangents().rms_norm(z, 1e-5) - Tangents().rms_norm(z0, 1e-5)
    torch.testing.assert_close((slope[:3] * (z - z0)).sum(1), change.sum(1))


# -- the program ----------------------------------------------------------------------------------------------------


def toy(monkeypatch):
    """A net in which neuron 0 writes column 9, which is copied by a head, erased, and written again."""
    w = {name: torch.zeros_like(value) for name, value in weights().items()}
    w["model.embed_tokens.weight"][:, 1:9] = 1
    for name in w:
        if "norm" in name:
            w[name][:] = 1
    up, down = "mlp.gate_up_proj.weight", "mlp.down_proj.weight"
    w[f"model.layers.0.{up}"][0, 1] = w[f"model.layers.0.{down}"][9, 0] = 1  # reads the embedding, writes 9
    w["model.layers.1.self_attn.qkv_proj.weight"][16, 9] = w["model.layers.1.self_attn.o_proj.weight"][10, 0] = 1
    w[f"model.layers.1.{up}"][0, 9] = w[f"model.layers.1.{up}"][3, 10] = 1  # its gate reads 9, its input 10
    w[f"model.layers.1.{down}"][9, 0], w[f"model.layers.1.{down}"][9, 1] = -1, 1  # erases 9, writes 9
    w[f"model.layers.1.{up}"][1, 10], w[f"model.layers.1.{up}"][4, 0] = 1, 1
    operations = [
        Operation("first", 0, (), (0,), (9,), tuple(range(1, 9))),
        Operation("copy", 1, (0,), (), (10,), (9,)),
        Operation("erase", 1, (), (0,), (9,), (9, 10)),
        Operation("second", 1, (), (1,), (2,), (10,)),
    ]
    w[f"model.layers.1.{down}"][2, 1] = 1
    monkeypatch.setattr(increment, "operations", lambda bits: operations)
    return compiled.Compiled(w, SETTINGS, LENGTH, VOCABULARY).double()


def named_edges(one, edges):
    return {
        (one.nodes[step][column], step, row)
        for step, values in edges.items()
        for row, column in values.nonzero().tolist()
    }


def test_edges_of_the_program_follow_the_columns(monkeypatch):
    one = toy(monkeypatch)
    found = compiled.known(one, bits=2)
    assert named_edges(one, found.edges) == {
        ("embedding", "neurons0", 0),
        ("neuron 0.0", "heads1", 2),  # the value, not query or key
        ("head 1.0", "neurons1", 1),  # the gate of neuron 1; what neuron 0 erases is no edge
        ("embedding", "logits", 0),
        ("neuron 1.1", "logits", 0),
    }
    assert found.values == {"embedding", "neuron 0.0", "head 1.0", "neuron 1.1"}
    assert found.names["neuron 1.0"] == "erase"
    meeting = named_edges(one, compiled.meeting(one))
    assert named_edges(one, found.edges) < meeting
    assert ("neuron 0.0", "neurons1", 0) in meeting  # erased, but the column is shared
    assert ("embedding", "neurons1", 0) not in meeting


def test_active_edges_change_the_answer_when_patched_alone():
    one = task()
    edges = {name: (torch.rand_like(values[0]) < 0.1).double() for name, values in one.edges(1.0).items()}
    found = compiled.active(one, edges, least=0.05)
    whole, order = (one.whole - one.empty).abs(), flat({name: values[None] for name, values in edges.items()})[0]
    assert bool((found.any(0) <= order.bool()).all())
    for place in order.nonzero()[:, 0].tolist():
        mask = torch.zeros(len(whole), len(order), dtype=torch.float64).index_fill(1, torch.tensor(place), 1)
        only = by_step(mask, one.edges(1.0))
        without = {name: 1 - values for name, values in only.items()}
        moved = torch.maximum((one.run(only) - one.empty).abs(), (one.run(without) - one.whole).abs())
        torch.testing.assert_close(found[:, place], moved > 0.05 * whole)
    assert 0 < int(found.sum()) < int(order.sum()) * len(whole)


def test_pairs_differ_in_the_bit_that_is_asked_for():
    clean, corrupted, t, u = compiled.pairs(4, 30, torch.Generator().manual_seed(0))
    for row, other, right, wrong in zip(clean.tolist(), corrupted.tolist(), t.tolist(), u.tolist(), strict=True):
        place = right // len(increment.TOKENS)
        assert place == wrong // len(increment.TOKENS)
        for ids, answer in ((row, right), (other, wrong)):
            assert ids[0] == 4
            assert ids[5] == 3
            number = sum((bit - 1) << (3 - i) for i, bit in enumerate(ids[1:5]))
            bits = [1 + (((number + 1) % 16) >> (3 - i) & 1) for i in range(4)]
            assert ids[6:] == bits[:-1]
            assert answer % len(increment.TOKENS) == bits[place - 5]
        assert right != wrong


# -- metrics --------------------------------------------------------------------------------------------------------


def test_auroc_counts_pairs_and_halves_ties():
    values = torch.tensor([[3.0, 1.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    known_edges = torch.tensor([True, False, True, False, False])
    pairs = [(3.0, 1.0), (3.0, 0.0), (3.0, 2.0), (1.0, 1.0), (1.0, 0.0), (1.0, 2.0)]
    by_hand = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert known.auroc(values, known_edges).tolist() == [pytest.approx(by_hand), 0.5]


def test_a_shared_score_is_that_of_the_mean():
    values, weights_of = torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mean, low, high = known.shared(values, torch.tensor([True, False, False]), weights_of)
    assert mean == 1.0  # of 2, 1.5 and 1
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_the_text_of_the_page_states_stored_figures():
    results = json.loads((ROOT / "benchmarks/results/known_circuit.json").read_text())
    text = " ".join((ROOT / "docs/known-circuit.md").read_text().split())
    ours = "reference measure"
    others = [name for name in results["scores"] if name != ours]
    active = {name: row["active edges"][0] for name, row in results["scores"].items()}
    most = max(active[name] for name in others)
    assert f"Its AUROC is {active[ours]:.3f}, compared with at most {most:.3f} for the other scores." in text
    distance = {name: row["CMD"][0] for name, row in results["scores"].items()}
    least = min(distance[name] for name in others)
    assert f"their CMD is {distance[ours]:.3f}, compared with at least {least:.3f}." in text
    seconds = results["processor seconds"]
    assert f"the measure takes {seconds[ours] / seconds['EAP']:.0f} times the CPU time of EAP" in text


def test_attention_masks_later_tokens():
    assert math.exp(MASKED) == 0
