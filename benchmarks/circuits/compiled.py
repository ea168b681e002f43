"""A compiled transformer as a circuit of heads and neurons, and the edges of its program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.circuits import increment
from benchmarks.circuits.circuit import Edges, Task, metric
from benchmarks.circuits.nets import CircuitNet, Pairs, Wire, summed
from benchmarks.circuits.slopes import MASKED, Tangents

Weights = dict[str, Tensor]


class Compiled(CircuitNet):
    """An unrolled Phi-3: edges lead from the embedding, heads and neurons to the query, key and value of each later
    head, to the gate and the input of each later neuron, and to the logits.

    Heads and neurons without weights are omitted. Outputs are the logits of all tokens at all positions,
    ``(N, T * K)``.
    """

    def __init__(self, weights: Weights, settings: dict[str, Any], length: int, vocabulary: int) -> None:
        self.size, self.eps = settings["head_dim"], settings["rms_norm_eps"]
        steps: dict[str, nn.Module] = {}
        nodes, stream = {}, ["embedding"]
        kept = [used(weights, n, self.size) for n in range(settings["num_hidden_layers"])]
        for n, (heads, neurons) in enumerate(kept):
            for kind, parts, reads in (("head", heads, 3), ("neuron", neurons, 2)):
                if parts:
                    steps[f"{kind}s{n}"], nodes[f"{kind}s{n}"] = summed(len(stream), reads * len(parts)), list(stream)
                    stream = stream + [f"{kind} {n}.{part}" for part in parts]
        steps["logits"], nodes["logits"] = summed(len(stream), 1), stream
        super().__init__(steps, nodes)
        self.kept, self.tokens = kept, nn.Parameter(weights["model.embed_tokens.weight"][:vocabulary])
        self.unembed = nn.Parameter(weights["model.norm.weight"][:, None] * self.tokens.data.T)
        self.ins, self.outs = nn.ParameterDict(), nn.ParameterDict()
        for n in range(len(kept)):
            self._take(weights, n)
        self.register_buffer("later", torch.full((length, length), MASKED).triu(1))
        angles = torch.arange(length)[:, None] / settings["rope_parameters"]["rope_theta"] ** (
            torch.arange(0, self.size, 2) / self.size
        )
        self.register_buffer("angles", torch.cat([angles, angles], 1))
        half = self.size // 2
        turn = torch.zeros(self.size, self.size)
        turn[half:, :half], turn[:half, half:] = -torch.eye(half), torch.eye(half)
        self.register_buffer("turn", turn)

    def _take(self, weights: Weights, n: int) -> None:
        """Stores output weights, and input weights ``(readers, D, …)`` including the norm, of the parts of a block."""
        heads, neurons = self.kept[n]
        block = {name.removeprefix(f"model.layers.{n}."): value for name, value in weights.items()}
        read = (block["self_attn.qkv_proj.weight"] * block["input_layernorm.weight"]).unflatten(0, (3, -1, self.size))
        self.ins[f"heads{n}"] = read[:, list(heads)].flatten(0, 1).transpose(1, 2).clone()
        write = block["self_attn.o_proj.weight"].T.unflatten(0, (-1, self.size))
        self.outs[f"heads{n}"] = write[list(heads)].clone()
        read = (block["mlp.gate_up_proj.weight"] * block["post_attention_layernorm.weight"]).unflatten(0, (2, -1))
        self.ins[f"neurons{n}"] = read[:, list(neurons)].flatten(0, 1)[:, :, None].clone()
        self.outs[f"neurons{n}"] = block["mlp.down_proj.weight"].T[list(neurons)][:, None].clone()

    def embed(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.tokens).unsqueeze(1)

    def body(self, h: Tensor, wire: Wire, slopes: Tangents) -> Tensor:
        for n, (heads, neurons) in enumerate(self.kept):
            if heads:
                read = slopes.rms_norm(wire(f"heads{n}", h), self.eps) @ self.ins[f"heads{n}"]
                q, k, v = read.chunk(3, 1)
                scores = slopes.matmul(self.turned(q), self.turned(k).transpose(2, 3)) / self.size**0.5 + self.later
                h = torch.cat([h, slopes.matmul(slopes.softmax(scores), v) @ self.outs[f"heads{n}"]], 1)
            if neurons:
                read = slopes.rms_norm(wire(f"neurons{n}", h), self.eps) @ self.ins[f"neurons{n}"]
                gate, up = read.chunk(2, 1)
                h = torch.cat(
                    [h, slopes.product(slopes.activation(gate, functional.silu), up) @ self.outs[f"neurons{n}"]], 1
                )
        return (slopes.rms_norm(wire("logits", h), self.eps) @ self.unembed)[:, 0].flatten(1)

    def turned(self, a: Tensor) -> Tensor:
        """Applies the rotary position embedding."""
        return a * self.angles.cos() + (a @ self.turn) * self.angles.sin()


def used(weights: Weights, n: int, size: int) -> tuple[list[int], list[int]]:
    """Returns the heads and neurons of a block with nonzero output weights."""
    heads = weights[f"model.layers.{n}.self_attn.o_proj.weight"].unflatten(1, (-1, size)).abs().sum((0, 2))
    neurons = weights[f"model.layers.{n}.mlp.down_proj.weight"].abs().sum(0)
    return heads.nonzero()[:, 0].tolist(), neurons.nonzero()[:, 0].tolist()


def loaded(folder: Path, length: int) -> Compiled:
    """Returns the compiled network of a folder, in float64."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            weights |= {name: stored.get_tensor(name).double() for name in stored.keys()}  # noqa: SIM118
    settings = json.loads((folder / "config.json").read_text())
    net = Compiled(weights, settings, length, len(increment.TOKENS))
    return net.double().eval().requires_grad_(False)


# -- questions ------------------------------------------------------------------------------------------------------


def pairs(bits: int, count: int, draw: torch.Generator) -> Pairs:
    """Returns pairs of numbers, each with a bit in which their successors differ."""
    drawn: list[tuple[int, int, int]] = []
    while len(drawn) < count:
        one, other, late = (int(torch.randint(high, (), generator=draw)) for high in (2**bits, 2**bits, bits))
        if increment.successor(one, bits)[late] != increment.successor(other, bits)[late]:
            drawn.append((one, other, late))
    place = torch.tensor([(bits + 1 + late) * len(increment.TOKENS) for *_, late in drawn])
    t, u = (place + torch.tensor([increment.successor(both[n], bits)[late] for *both, late in drawn]) for n in range(2))
    clean, corrupted = (increment.sequences([both[n] for both in drawn], bits) for n in range(2))
    return clean, corrupted, t, u


# -- the program's edges --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Ground truth about the network, from its schematic.

    Args:
        edges: 1 for the edges of the program, 0 for all others; by step, ``(readers, nodes)``.
        names: The value that each node computes; "erase" and "constant" are not values of the program.
        values: The nodes that compute a value of the program that depends on the input.
    """

    edges: Edges
    names: dict[str, str]
    values: frozenset[str]


def known(net: Compiled, bits: int) -> Known:
    """Finds the edges of the program by tracking, for each column, the nodes that have written to it since its erasure.

    An edge of the program leads from a node that computes a value to a node that reads it from one of its columns with
    a nonzero weight. Constants and erasures have no edges.
    """
    edges = {name: torch.zeros_like(step.weight[:, :, 0, 0]) for name, step in net.steps.items()}
    contents: dict[int, set[str]] = {c: {"embedding"} for c in range(1, 1 + EMBEDDED)}
    names = {"embedding": "embedding"} | {node: "constant" for node in net.nodes["logits"][1:]}
    operations = increment.operations(bits)
    for n in range(len(net.kept)):
        for kind in ("heads", "neurons"):
            branch = [one for one in operations if one.layer == n and getattr(one, kind)]
            for one in branch:
                names |= {f"{kind[:-1]} {n}.{part}": one.name for part in getattr(one, kind)}
                if one.name not in ("erase", "constant"):
                    read(net, kind, n, one, contents, edges)
            for one in (one for one in branch if one.name == "erase"):
                contents |= {column: set() for column in one.writes}
            for one in (one for one in branch if one.name not in ("erase", "constant")):
                for column in one.writes:
                    contents[column] = contents.get(column, set()) | {
                        f"{kind[:-1]} {n}.{part}"
                        for part in getattr(one, kind)
                        if writes(net, kind, n, part, column) and reads(net, kind, n, part, edges)
                    }
    for column in range(1, 1 + EMBEDDED):
        for node in contents[column]:
            edges["logits"][0, net.nodes["logits"].index(node)] = 1
    values = {
        f"{kind[:-1]} {n}.{part}"
        for n, both in enumerate(net.kept)
        for kind, parts in zip(("heads", "neurons"), both, strict=True)
        for part in parts
        if reads(net, kind, n, part, edges)
    }
    return Known(edges, names, frozenset(values | {"embedding"}))


EMBEDDED = 8
"""Columns of the embedding, starting at column 1; column 0 is constantly 1."""


def read(net: Compiled, kind: str, n: int, one: increment.Operation, contents: dict[int, set[str]], to: Edges) -> None:
    """Marks the edges to the heads or neurons of an operation from all nodes with values in the columns it reads."""
    kept, parts, step = net.kept[n][kind == "neurons"], getattr(one, kind), f"{kind}{n}"
    for reader in range(len(to[step])):
        if kept[reader % len(kept)] in parts:
            for column in one.reads:
                if bool(net.ins[step][reader, column].any()):
                    for node in contents.get(column, set()):
                        to[step][reader, net.nodes[step].index(node)] = 1


def writes(net: Compiled, kind: str, n: int, part: int, column: int) -> bool:
    """Returns True if a head or neuron writes to a column with a nonzero weight."""
    row = net.kept[n][kind == "neurons"].index(part)
    return bool(net.outs[f"{kind}{n}"][row, :, column].any())


def reads(net: Compiled, kind: str, n: int, part: int, edges: Edges) -> bool:
    """Returns True if a head or neuron reads any value; others are constant."""
    kept = net.kept[n][kind == "neurons"]
    return bool(edges[f"{kind}{n}"][kept.index(part) :: len(kept)].any())


def meeting(net: Compiled) -> Edges:
    """Returns 1 for edges whose reader has a nonzero weight to a column that the node writes at any time, else 0."""
    outs = {"embedding": net.tokens.abs().sum(0) > 0}
    for n, both in enumerate(net.kept):
        for kind, parts in zip(("head", "neuron"), both, strict=True):
            for row, part in enumerate(parts):
                outs[f"{kind} {n}.{part}"] = net.outs[f"{kind}s{n}"][row].abs().sum(0) > 0
    ins = {name: weights.abs().sum(2) > 0 for name, weights in net.ins.items()} | {
        "logits": (net.unembed.abs().sum(1) > 0)[None]
    }
    return {
        step: ins[step].double() @ torch.stack([outs[node] for node in nodes]).double().T > 0
        for step, nodes in net.nodes.items()
    }


def active(task: Task, edges: Edges, least: float = 0.01) -> Tensor:
    """Returns the edges of the program that change the answer when patched alone, in either direction, ``(N, E)``.

    Either the edge takes its corrupted value while all others are clean, or the edge is clean while all others are
    corrupted. The change must be at least the share ``least`` of the change due to all edges.
    """
    found = torch.zeros(len(task.whole), sum(one.numel() for one in edges.values()), dtype=torch.bool)
    offset = 0
    for step, values in edges.items():
        for reader, node in values.nonzero().tolist():
            for inside in (0.0, 1.0):
                circuit = task.edges(1 - inside)
                circuit[step][:, reader, node] = inside
                moved = (task.run(circuit) - (task.empty if inside else task.whole)).abs()
                place = offset + reader * values.shape[1] + node
                found[:, place] |= moved > least * (task.whole - task.empty).abs()
        offset += values.numel()
    return found


def answered(task: Task) -> float:
    """Returns the share of the pairs that the network answers correctly, both clean and corrupted."""
    clean, corrupted, t, u = task.pairs
    right = [metric(task.net(x), (clean, corrupted, a, b)) > 0 for x, a, b in ((clean, t, u), (corrupted, u, t))]
    return float((right[0] & right[1]).double().mean())
