"""The best channel walks of VGG16 over five layers in 60 seconds, compared with a greedy graph of equal size.

    python -m benchmarks.top_walks

Weights are random, so the rows assess the search, not heat maps. The greedy graph is built as in zennit-crp: the most
relevant channels of the first layer, then for each of them its most relevant channels in the next layer, and so on.
Every choice here is conditioned on the whole prefix, whereas zennit-crp uses the parent only. Writes the figures with
the environment to benchmarks/results/top_walks.json. If the processor seconds are below the budget, the core was shared
with other processes; ``--clock processor`` applies the budget to processor seconds instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torchvision.models import vgg16
from zennit.composites import EpsilonPlus

from benchmarks import tables
from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, top_walks
from nrm_plugin.search.layer_chain import LayerChain

RESULTS = Path(__file__).parent / "results" / "top_walks.json"
LAYERS = ["features.28", "features.21", "features.14", "features.7", "features.2"]
WIDTHS = [5, 5, 2, 2, 1]
RULES = {"NRMAbsolute": NRMAbsolute, "EpsilonPlus": lambda: Normalized(EpsilonPlus()), "NRMDefault": NRMDefault}


def greedy(mu: RelevanceMeasure, layers: list[str], widths: list[int]) -> tuple[list[float], float]:
    """Returns the mass of each walk of a greedy graph, and processor seconds."""
    begin = time.process_time()
    with torch.no_grad():
        chain = LayerChain(mu, layers, "channel")
        vectors, masses = chain.first().unsqueeze(0), torch.empty(0)
        for level, width in enumerate(widths):
            sums = chain.sums(level, vectors)
            tops = sums.abs().topk(width).indices
            masses = sums.gather(1, tops).flatten()
            if level < chain.last:
                masks = chain.labels[level] == tops[..., None]
                split = (vectors[:, None] * masks).flatten(0, 1)
                vectors = torch.cat([chain.propagate(level, part) for part in split.split(8)])
    return masses.tolist(), time.process_time() - begin


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def row(model: torch.nn.Module, size: int, rule: str, seconds: float, clock: str) -> dict[str, object]:
    """Returns the results of the search and of the greedy graph for one image."""
    torch.manual_seed(size)
    image = torch.rand(1, 3, size, size)
    mu = RelevanceMeasure(model, image, 281, composite=RULES[rule](), max_memory=2 << 30)
    k = torch.tensor(WIDTHS).prod().item()
    begin = time.process_time()
    with patch("nrm_plugin.search.walk_bounds.time", SimpleNamespace(perf_counter=CLOCKS[clock])):
        result = top_walks(mu, LAYERS, int(k), budget=seconds)
    used = time.process_time() - begin
    masses, took = greedy(mu, LAYERS, WIDTHS)
    ranked = sorted((abs(m) for m in masses), reverse=True)
    ours = [abs(walk.mass) for walk in result.walks]
    return {
        "size": size,
        "rule": rule,
        "walks": len(result.walks),
        "certified": result.certified,
        "largest": max(ours, default=0.0),
        "smallest": min(ours, default=0.0),
        "missed": result.missed,
        "expanded": result.expanded,
        "clock": clock,
        "seconds": round(result.seconds, 1),
        "processor_seconds": round(used, 1),
        "mass": sum(ours),
        "greedy_largest": ranked[0],
        "greedy_mass": sum(ranked),
        "greedy_seconds": round(took, 1),
        "greedy_among_ours": sum(m >= min(ours, default=0.0) * (1 - 1e-4) for m in ranked),
        "walk_variation": float(mu.walk_variation()) if rule != "NRMDefault" else None,
    }


def main() -> None:
    """Measures all rows, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = vgg16(weights=None).eval()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for size in arguments.sizes:
        for rule in arguments.rules:
            rows = [old for old in rows if (old["size"], old["rule"]) != (size, rule)]
            rows.append(row(model, size, rule, arguments.seconds, arguments.clock))
            print(json.dumps(rows[-1]), flush=True)
            environment = {"python": platform.python_version(), "torch": version("torch"), "zennit": version("zennit")}
            environment["threads"] = str(torch.get_num_threads())
            text = {"environment": environment, "layers": LAYERS, "widths": WIDTHS, "rows": rows}
            RESULTS.write_text(json.dumps(text, indent=1) + "\n")
    tables.write("top_walks")


if __name__ == "__main__":
    main()
