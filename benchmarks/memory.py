"""Peak memory and time of a decoder of 24 layers and 2,048 tokens, without a limit and with ``max_memory``.

``python -m benchmarks.memory`` measures each limit in a separate process, compares the results with those of the whole
recording, and writes them as JSON and as the tables of ``docs/memory.md``; this takes some minutes on one core. Stored
results are not measured again, except with ``--again``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoder, tables
from benchmarks.cost.timing import RETURNING, reset, resident
from benchmarks.speed import environment
from nrm_plugin import NRMAbsolute, NRMDefault, RelevanceMeasure, at

RESULTS = Path(__file__).parent / "results/memory.json"
LAYERS, TOKENS, TARGET = 24, 2048, 3
SIZES = {"WIDTH": 64, "HIDDEN": 128, "HEADS": 1, "KEY_HEADS": 1, "VOCABULARY": 500}
LIMITS: tuple[int | None, ...] = (None, 128, 64, 32, 16)
"""Limits in MiB; None for the whole recording."""


def answers(mu: RelevanceMeasure) -> dict[str, Tensor]:
    """Returns the marginals at the input and after every block, the sink, and the mass of an event."""
    maps = mu.marginal(["input", *(f"blocks.{k}" for k in range(LAYERS))])
    event = at("blocks.20").channel(3) & ~at("blocks.19").channel(5)
    return {**maps, "absorbed": mu.sink("input"), "event": mu(event)}


def measured(limit: int | None, folder: Path) -> dict[str, Any]:
    """Measures peaks and times in this process, and the difference from the whole recording in ``folder``."""
    torch.set_num_threads(1)
    for name, size in SIZES.items():
        setattr(decoder, name, size)
    torch.manual_seed(0)
    net, small = decoder.Decoder(LAYERS).eval(), decoder.Decoder(1).eval()
    x = torch.randn(1, TOKENS, SIZES["WIDTH"])
    once = RelevanceMeasure(small, x[:, :8], TARGET, max_memory=1)  # imports and initializations
    once.marginal("input")
    gc.collect()
    before = resident()[0]
    reset()
    start = time.process_time()
    mu = RelevanceMeasure(net, x, TARGET, max_memory=None if limit is None else limit << 20)
    row: dict[str, Any] = {"limit": limit, "recorded": resident()[0] - before}
    recorded = time.process_time()
    mu.marginal("input")
    row |= {"peak": resident()[1] - before, "record": recorded - start, "pass": time.process_time() - recorded}
    row["parts"] = 1 if mu._recording.parts is None else len(mu._recording.parts.ranges)
    found = answers(mu)
    row["peak of all"] = resident()[1] - before
    path = folder / "whole.pt"
    if limit is None:
        torch.save(found, path)
    whole = torch.load(path)
    row["difference"] = max(float((found[key] - whole[key]).abs().max()) for key in whole)
    row["total"] = float(abs(found["input"].sum() + found["absorbed"].sum() - 1))
    return row


def formats() -> list[dict[str, Any]]:
    """Measures models in half precision: errors of totals, and differences from float64, relative to V."""
    for name, size in SIZES.items():
        setattr(decoder, name, size)
    rows = []
    for dtype, composite in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (NRMDefault, NRMAbsolute)
    ):
        torch.manual_seed(0)
        net = decoder.Decoder(6).to(dtype).eval()
        x = torch.randn(1, 256, SIZES["WIDTH"]).to(dtype)
        mu = RelevanceMeasure(net, x, TARGET, composite=composite())
        exact = RelevanceMeasure(copy.deepcopy(net).double(), x.double(), TARGET, composite=composite())
        layers = [layer for layer in mu.layers if layer.startswith("blocks")]
        variation = {layer: float(mu.variation(layer)) for layer in layers}
        maps, full = mu.marginal(layers), exact.marginal(layers)
        totals = [abs(float(maps[k].sum() + mu.sink(k) + mu.bypass(k)) - 1) / variation[k] for k in layers]
        apart = [float((maps[k] - full[k]).abs().sum()) / variation[k] for k in layers]
        neuron = [float((maps[k] - full[k]).abs().max()) / variation[k] for k in layers]
        row = {"dtype": str(dtype).removeprefix("torch."), "composite": composite.__name__}
        rows.append({**row, "total": max(totals), "neuron": max(neuron), "sum": max(apart)})
    return rows


def plain_gradient() -> dict[str, Any]:
    """Returns the peak and time of the plain gradient."""
    torch.set_num_threads(1)
    for name, size in SIZES.items():
        setattr(decoder, name, size)
    torch.manual_seed(0)
    net = decoder.Decoder(LAYERS).eval().requires_grad_(False)
    x = torch.randn(1, TOKENS, SIZES["WIDTH"], requires_grad=True)
    torch.autograd.grad(net(x[:, :8])[:, TARGET].sum(), x)
    gc.collect()
    before = resident()[0]
    reset()
    start = time.process_time()
    torch.autograd.grad(net(x)[:, TARGET].sum(), x)
    return {"peak": resident()[1] - before, "pass": time.process_time() - start}


def spawned(*options: object) -> dict[str, Any]:
    """Returns the result of this module in another process."""
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **RETURNING}, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="measure all limits again")
    parser.add_argument("--limit", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "nrm-memory", help="answers")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    if args.limit:
        row = plain_gradient() if args.limit == "gradient" else measured(json.loads(args.limit), args.folder)
        print(json.dumps(row))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() and not args.again else {"rows": []}
    known["formats"] = formats()
    known["gradient"] = known.get("gradient") or spawned("--limit", "gradient")
    for limit in LIMITS:
        rows = {row["limit"]: row for row in known["rows"]}
        if limit not in rows or (limit is None and not (args.folder / "whole.pt").exists()):
            rows[limit] = spawned("--limit", json.dumps(limit), "--folder", args.folder)
            print(rows[limit], flush=True)
        known["rows"] = [rows[one] for one in LIMITS if one in rows]
        known |= {"environment": environment(), "layers": LAYERS, "tokens": TOKENS, **SIZES}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    tables.write("memory")


if __name__ == "__main__":
    main()
