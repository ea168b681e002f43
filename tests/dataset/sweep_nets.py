"""A small network and data for the tests of sweeps, also imported by other processes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from torch import nn
from torch.utils.data import Dataset

from nrm_plugin import at
from nrm_plugin.dataset import (
    Activation,
    Bypass,
    Conditional,
    EventMass,
    Joint,
    Maps,
    Marginal,
    Peak,
    Sink,
    Sweep,
    Variation,
)
from nrm_plugin.dataset.checksums import Segments, row_group_ends, to_bytes

EVENT = at("2").channel([1, 2])
QUERIES = [Marginal("4"), Joint("4", "2"), EventMass(EVENT), Sink("4"), Maps("input", over="position")]
MASK = torch.zeros(6, 12, 12).bool()


MASK[2, 3:7] = True


QUADRANTS = torch.arange(4).reshape(1, 2, 2).repeat_interleave(6, 1).repeat_interleave(6, 2)
EVERY_QUERY = {
    "channels": Marginal("4"),
    "positions": Marginal("4", "position"),
    "neurons": Marginal("2", "neuron"),
    "labels": Marginal("input", QUADRANTS, name="quadrants"),
    "joint event": Marginal("input", joint=EVENT & ~at("4").channel(3)),
    "given": Marginal("4", given=EVENT),
    "input side": Marginal(at("4", "input")),
    "joint": Joint("4", "2"),
    "next joint": Joint("2", "input"),
    "joint past a layer": Joint("output", "2"),
    "joint of labels": Joint("2", "input", over=("channel", QUADRANTS), name="to quadrants"),
    "mass": EventMass(at("2")[MASK]),
    "mass given": EventMass(at("4").channel(3), given=EVENT),
    "conditional": Conditional(at("input")[0], "4"),
    "conditional of neurons": Conditional(at("input")[0], "4", "neuron"),
    "sink": Sink("4"),
    "bypass": Bypass("4"),
    "variation": Variation("2"),
    "largest activation": Activation("4"),
    "mean activation": Activation("2", "mean"),
    "activation of the output": Activation("output", "sum"),
    "peak": Peak("4"),
    "peak of activation": Peak("5", "activation"),
    "maps": Maps(),
    "maps given": Maps("2", given=EVENT, over="position"),
}
OPTIONS = {"batch_size": 4, "shard": 8, "progress": False}


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3),
            nn.ReLU(True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
        ).eval()  # fmt: skip


class Data(Dataset):
    """Images of noise, with possible failures of a reader.

    Args:
        count: Number of samples.
        bad: Samples that cannot be read.
        wait: Seconds that a sample takes.
        kill: A file; if it does not exist, the process that reads sample 21 creates it and kills itself.
        is_noisy: Whether a random transform is applied.
    """

    def __init__(self, count=50, bad=(), wait=0.0, kill: Path | None = None, is_noisy=False):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 3, 12, 12, generator=generator)
        self.bad, self.wait, self.kill, self.is_noisy = bad, wait, kill, is_noisy

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("the file is cut off")
        time.sleep(self.wait)
        if self.kill is not None and index == 21 and not self.kill.exists():
            self.kill.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.randn(()) * random.random() if self.is_noisy else 0.0
        return self.x[index] + noise, index % 4


def write_sums(path: Path) -> None:
    """Writes the checksums of a shard that a test has forged."""
    ends = row_group_ends(parquet.read_metadata(path))
    maps = path.parents[1] / "maps" / f"{path.stem}.safetensors"
    sums = {"rows": Segments.of(path, ends).to_json(), "maps": Segments.of(maps).to_json() if maps.exists() else None}
    path.with_name(f"_{path.stem}.json").write_bytes(to_bytes(sums))


def contents(folder):
    """All rows and maps by sample; asserts that no row is repeated."""
    stored = Sweep.open(folder)
    order = [(name, "ascending") for name in ("query", "group", "lower", "sample")]
    files = [parquet.read_table(path) for path in sorted((Path(folder) / "rows").glob("*.parquet"))]
    rows = {}
    for table in files:
        for row in table.to_pylist():
            key = (row["query"], row["group"], row["lower"], row["sample"])
            assert key not in rows, "a row is repeated"
            rows[key] = (row["target"], row["prediction"], row["value"])
    assert len(rows) == len(stored.rows())
    assert stored.rows().num_columns == len(order) + 3
    maps = {}
    for path in sorted((Path(folder) / "maps").glob("*.safetensors")):
        from safetensors.torch import load_file

        tensors = load_file(path)
        for name in tensors.keys() - {"sample", "target", "prediction"}:
            maps |= {(name, int(k)): row.tolist() for k, row in zip(tensors["sample"], tensors[name], strict=True)}
    return rows, maps
