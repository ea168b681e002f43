"""Runs sweeps repeatedly in processes that are killed: ``python killed.py FOLDER SEED KILLS``.

The packages are imported once, and each attempt is a fork. For the sweep in ``FOLDER/time`` a process is killed after
a random time; for those in ``FOLDER/fsync`` and ``FOLDER/replace`` it kills itself in one of its calls of that name.
Prints the number of kills for each.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from nrm_plugin.dataset import Sweep, sweep
from tests.dataset.sweep_nets import QUERIES, Data, net


def attempt(folder: Path, killed_at: tuple[str, int] | None) -> None:
    if (folder / "manifest.json").exists():
        stored = Sweep.open(folder)
        assert len(stored.rows("sink(4)")) == len(set(stored.rows("sink(4)")["sample"].to_pylist()))
    if killed_at is not None:
        name, left = killed_at
        owner = os if name == "fsync" else pathlib.Path
        original = getattr(owner, name)

        def dying(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, dying)
    sweep(net(), Data(60, wait=0.01), QUERIES, folder, batch_size=2, shard=2, progress=False)


def forked(folder: Path, killed_at: tuple[str, int] | None = None, seconds: float | None = None) -> bool:
    """Returns True if the attempt ended without being killed."""
    process = os.fork()
    if process == 0:
        try:
            attempt(folder, killed_at)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("an attempt failed")
    return os.WIFEXITED(status)


def main() -> None:
    seed, kills = int(sys.argv[2]), int(sys.argv[3])
    for where in ("time", "fsync", "replace"):
        folder, draw, killed = Path(sys.argv[1]) / where, random.Random(seed), 0
        folder.mkdir()
        while killed < kills:
            at = None if where == "time" else (where, draw.randint(1, 14))
            if forked(folder, at, draw.uniform(0.02, 0.5) if where == "time" else None):
                break
            killed += 1
        assert forked(folder)
        print(killed)


if __name__ == "__main__":
    main()
