"""A transformer that increments binary numbers: its weights are compiled from a program, nothing is trained.

torchwright compiles the program to a network with the Phi-3 architecture, and records which heads and neurons compute
each value, where in the residual stream every value is stored, and when it is erased. The compiler requires
``ortools``, and loading the network requires ``transformers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.real import packages

HEAD, WIDTH, HEADS = 16, 64, 10
"""Dimensions of a head and of the residual stream, and number of heads per layer."""
TOKENS = ("<unk>", "0", "1", "\n", "<bos>", "<eos>")
"""The vocabulary, in the order of the ids."""


def compiled(bits: int) -> Path:
    """Returns the folder of the compiled network with its schematic; it is compiled at the first call."""
    folder = packages.cache() / "trained" / f"increment-{bits}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            torchwright = packages.module("torchwright", "torchwright")
            answer, embedding = program(bits)
            sizes = {"d": WIDTH, "d_head": HEAD, "n_heads": HEADS, "max_seq_len": 64}
            torchwright.compile_hf_bundle(answer, embedding, folder, **sizes)
    return folder


def program(bits: int) -> tuple[Any, Any]:
    """Returns the program, as a graph of torchwright: its last node and the embedding of tokens.

    After ``<bos> b … b \\n``, the network generates the bits of the number plus one, modulo ``2 ** bits``, with the
    highest bit first. Truth values are 1 and -1.
    """
    graph, linear, gates, attention, tokens = (
        packages.module("torchwright", f"torchwright.{name}")
        for name in ("graph", "ops.linear", "ops.swiglu", "ops.attention_ops", "ops.inout_nodes")
    )
    copy = attention.attend_to_offset
    embedding = tokens.create_embedding(vocab=list(TOKENS[1:]))
    rope, of = tokens.create_rope_config(d_head=HEAD, max_positions=64), embedding.get_embedding

    is_one = named(gates.equals_vector(embedding, of("1")), "is 1")
    is_newline = named(gates.equals_vector(embedding, of("\n")), "is newline")
    bit = [named(copy(rope, is_one, delta_pos=-1 - n), f"bit {n}") for n in range(bits)]
    carry, sums = bit[0], [named(linear.negate(bit[0]), "sum 0")]
    for n in range(1, bits):
        flipped = named(linear.negate(bit[n]), f"not bit {n}")
        sums.append(named(gates.select(carry, flipped, bit[n]), f"sum {n}"))
        if n < bits - 1:
            carry = named(gates.compare(linear.sum_nodes([bit[n], carry]), 1.0), f"carry {n + 1}")
    said = []
    for late, value in enumerate(reversed(sums)):
        turn = named(copy(rope, is_newline, delta_pos=-late), f"turn {late}") if late else is_newline
        latched = named(copy(rope, value, delta_pos=-late), f"copy {bits - 1 - late}") if late else value
        said.append(named(gates.cond_gate(turn, latched), f"say {bits - 1 - late}"))
    half = (of("1") - of("0")) / 2
    answer = graph.Linear(named(linear.sum_nodes(said), "bit said"), half[None], (of("1") + of("0")) / 2, name="answer")
    return answer, embedding


def named(node: Any, name: str) -> Any:
    """Returns the node, with a name that appears in the schematic."""
    node.name = name
    return node


def sequences(numbers: list[int], bits: int) -> Tensor:
    """Returns the ids of ``<bos> number \\n`` and all bits of its successor but the last, ``(N, 2 * bits + 1)``."""
    texts = ([4, *(1 + int(b) for b in f"{n:0{bits}b}"), 3, *successor(n, bits)[:-1]] for n in numbers)
    return torch.tensor(list(texts))


def successor(number: int, bits: int) -> list[int]:
    """Returns the ids of the bits of the number plus one, the highest first."""
    return [1 + int(b) for b in f"{(number + 1) % 2**bits:0{bits}b}"]


@dataclass(frozen=True)
class Operation:
    """An operation in the schematic: a value that heads or neurons of one branch compute.

    Args:
        name: Name of the value; "erase" for memory management, "constant" for constants.
        layer: Index of the block.
        heads, neurons: Heads, or neurons of the MLP, that compute it.
        writes: Columns of the residual stream to which they write.
        reads: Columns from which they read values, except for queries and keys of attention.
    """

    name: str
    layer: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    writes: tuple[int, ...]
    reads: tuple[int, ...]


CONSTANTS = {"compute_literal_value", "clear_literal_seed"}


def operations(bits: int) -> list[Operation]:
    """Returns all operations of the compiled network, in the order of execution."""
    payload = packages.module("torchwright", "torchwright").load_schematic(compiled(bits)).payload
    names = {node["id"]: node.get("name") for node in payload["graphs"]["source"]["nodes"]}
    sources = {node["id"]: node["source_nodes"] for node in payload["graphs"]["lowered"]["nodes"]}
    found = []
    for layer in payload["schedule"]["layers"]:
        for one in layer["attention_operations"] + layer["mlp_operations"]:
            label = next((names[source] for source in sources.get(one["node"], ()) if names[source]), "other")
            if one["type"] in CONSTANTS:
                label = "constant"
            elif one["role"] == "memory_management":
                label = "erase"
            heads = columns([one["heads"]]) if one.get("heads") else ()
            neurons = columns(one.get("hidden_slots") or [])
            written, read = columns(one["target_columns"]), columns(one["source_columns"] or [])
            found.append(Operation(label, layer["index"], heads, neurons, written, read))
    return found


def columns(runs: list[list[int]]) -> tuple[int, ...]:
    """Returns the columns in ranges ``[start, length]``."""
    return tuple(column for start, length in runs for column in range(start, start + length))
