"""A small network and data for the tests of sweeps, also imported by other processes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from nrm_plugin import at
from nrm_plugin.dataset import EventMass, Joint, Maps, Marginal, Sink

EVENT = at("2").channel([1, 2])
QUERIES = [Marginal("4"), Joint("4", "2"), EventMass(EVENT), Sink("4"), Maps("input", over="position")]
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
