"""The flow of one carry through the compiled network, run by transformers: masses, table and figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.circuits import increment
from nrm_plugin import FlowGraph, RelevanceMeasure
from nrm_plugin.plots import flow_figure

FIGURE = "known-circuit.png"
BITS, NUMBER, OTHER, LATE = 5, 0b00111, 0b00000, 1
"""Numbers whose successors are compared, and index of the explained bit of the answer, with the highest bit first."""
SHOWN = {
    "tokens": ("blocks.0.resid_pre", "", 0),
    "MLP 0": ("blocks.0.mlp.neuron", "neurons", 0),
    "heads 1": ("blocks.1.attn", "heads", 1),
    "MLP 1": ("blocks.1.mlp.neuron", "neurons", 1),
    "MLP 2": ("blocks.2.mlp.neuron", "neurons", 2),
    "MLP 3": ("blocks.3.mlp.neuron", "neurons", 3),
    "heads 4": ("blocks.4.attn", "heads", 4),
    "MLP 4": ("blocks.4.mlp.neuron", "neurons", 4),
    "MLP 6": ("blocks.6.mlp.neuron", "neurons", 6),
    "logits": ("output", "", 0),
}
"""Site, kind of part and block of each column of the figure."""
PREDICTED = {
    "is 1": 1, "bit 0": 1 / 4, "bit 1": 1 / 4, "bit 2": 1 / 2, "carry 2": 1 / 2, "carry 3": 1, "sum 3": 1,
    "copy 3": 1, "say 3": 1, "bit said": 1,
}  # fmt: skip
"""Masses that the program implies: if both inputs of a conjunction change, each has half of its mass; all other values
have mass 0."""


def network() -> nn.Module:
    """Returns the compiled network as transformers loads it, in float64, including the normalization layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(increment.compiled(BITS), dtype=torch.float64).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Phi3RMSNorm":  # it computes in float32
                exact = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                exact.weight.data = child.weight.data
                setattr(parent, name, exact)
    return model.requires_grad_(False)


def measured() -> RelevanceMeasure:
    """Returns the measure of the logit of 1 minus that of 0, at the position at which the bit is generated."""
    ids, model = increment.sequences([NUMBER, OTHER], BITS), network()
    start = torch.zeros(1, ids.shape[1], model.config.vocab_size, dtype=torch.float64)
    start[0, BITS + 1 + LATE, [1, 2]] = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    return RelevanceMeasure(model, ids[:1], start=start, reference=ids[1:])


def masks(mu: RelevanceMeasure, site: str, kind: str, layer: int) -> dict[str, Tensor]:
    """Returns the neurons of a site that compute each value, at all tokens."""
    shape = mu.marginal(site).shape[1:]
    found: dict[str, Tensor] = {}
    for one in increment.operations(BITS):
        parts = list(getattr(one, kind))
        if one.layer == layer and parts:
            mask = found.setdefault(one.name, torch.zeros(shape, dtype=torch.bool))
            mask[parts if kind == "heads" else (slice(None), parts)] = True
    return found


def graph(mu: RelevanceMeasure) -> FlowGraph:
    """Returns the flow from the tokens to the answer; columns have the names of :data:`SHOWN`."""
    over: dict[str, dict[str, Tensor]] = {}
    for site, kind, layer in SHOWN.values():
        if kind:
            over[site] = masks(mu, site, kind, layer)
    length, width = mu.marginal("blocks.0.resid_pre").shape[1:]
    texts = ["<bos>", *f"{NUMBER:0{BITS}b}", "\\n", *f"{NUMBER + 1:0{BITS}b}"[:-1]]
    place = torch.arange(length)[:, None].expand(length, width)
    over["blocks.0.resid_pre"] = {f"{text} ({number})": place == number for number, text in enumerate(texts)}
    answer = torch.zeros(mu.marginal("output").shape[1:], dtype=torch.bool)
    answer[BITS + 1 + LATE, [1, 2]] = True
    over["output"] = {"says 1": answer}
    flow = mu.flow([site for site, *_ in SHOWN.values()], over=over, top=None, min_mass=0.01)
    names = {site: name for name, (site, *_) in SHOWN.items()}
    return replace(flow, layers=tuple(replace(layer, name=names[layer.name]) for layer in flow.layers))


def results(images: Path) -> dict[str, Any]:
    """Draws the figure into a folder; returns the masses of all values by name, of all erasures, and of tokens."""
    mu = measured()
    flow = graph(mu)
    heading = "00111 + 1 = 01000: why does the second digit say 1, and not 0 as after 00000?"
    flow_figure(flow, heading, caption="", finding="", width=16).savefig(images / FIGURE, dpi=85)
    masses: dict[str, dict[str, float]] = {}
    for name, (site, kind, layer) in SHOWN.items():
        if kind:
            values = mu.marginal(site)[0]
            found = masks(mu, site, kind, layer)
            masses[name] = {key: round(float(values[mask].sum()), 6) + 0.0 for key, mask in found.items()}
    tokens = mu.marginal("blocks.0.resid_pre")[0].sum(-1)
    edges = [[e.upper.label, e.lower.label, round(e.mass, 6)] for e in flow.edges if abs(e.mass) > 1e-6]
    return {
        "change of the logits": float(mu.output[0]), "masses": masses, "edges": edges,
        "predicted": PREDICTED, "tokens": [round(float(mass), 6) + 0.0 for mass in tokens],
    }  # fmt: skip
