"""Measurements of one net; nets run in parallel, each in its own process with one thread."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.default_composite import Net, resamples
from benchmarks.faithfulness import latent, pixels, planted
from benchmarks.faithfulness.nets import NETS

PARTS = ("latent", "planted", "input")
PLANTED = "planted"
SLOWEST_FIRST = ("shapes, transformer", "shapes, residual", "digits", PLANTED)
Results = dict[str, Any]


def latent_results(net: Net) -> Results:
    """Evaluates neuron flipping on one net."""
    areas, curves = latent.neuron_flipping(net)
    return {**about(net), "curves": curves, **latent.COMPARISON.results(areas, resamples(net.group))}


def input_results(net: Net) -> Results:
    """Evaluates heat maps on one net."""
    by_method, curves, differences = pixels.measured(net)
    return {
        **about(net),
        "cascades": curves,
        "differences to Quantus": differences,
        **pixels.COMPARISON.results(by_method, resamples(net.group)),
    }


def planted_results(samples: int) -> Results:
    """Evaluates the recovery of planted paths."""
    net, streams, carries = planted.planted_net(samples)
    weights = resamples(net.group)
    edges = planted.recovery(net, streams, carries)
    channels = planted.planted_channels(net, streams, carries)
    return {
        **about(net),
        "same without weights between streams": planted.severed(net, streams, within=False),
        "same without weights within streams": planted.severed(net, streams, within=True),
        "questions": {
            "channels of all layers": planted.CHANNELS.results(channels, weights),
            **{question: planted.EDGES.results(by_method, weights) for question, by_method in edges.items()},
        },
    }


def about(net: Net) -> Results:
    """Describes the samples and layers."""
    return {
        "samples": len(net.images),
        "images": int(net.group.max()) + 1,
        "accuracy": net.accuracy,
        "layers": net.layers,
    }


RESULTS_OF_PART: dict[str, Callable[[Net], Results]] = {"latent": latent_results, "input": input_results}


Done = tuple[str, dict[str, Results], dict[str, list[int]]]
"""Name of a net, results of its parts, and wall and processor seconds of each part."""


def task(name: str, parts: Sequence[str], samples: int) -> Done:
    """Runs all measurements of one net."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = [time.perf_counter(), time.process_time()]
    results: dict[str, Results] = {}
    seconds: dict[str, list[int]] = {}

    def lap(key: str) -> None:
        nonlocal started
        now = [time.perf_counter(), time.process_time()]
        seconds[f"{key}, {name}"] = [round(end - start) for end, start in zip(now, started, strict=True)]
        started = now

    if name == PLANTED:
        results[PLANTED] = planted_results(samples)
        lap("all")
    else:
        net = NETS[name](samples)
        lap("training")
        for part in parts:
            results[part] = RESULTS_OF_PART[part](net)
            lap(part)
    return name, results, seconds


def run(parts: Sequence[str], nets: Sequence[str], samples: int, processes: int) -> Iterator[Done]:
    """Yields the results of :func:`task` for each net, in order of completion; the slowest net starts first.

    Args:
        parts: Elements of ``PARTS``.
        nets: Elements of ``NETS``.
        samples: Number of samples for each net.
        processes: Number of nets in parallel.
    """
    names = [*(nets if {"latent", "input"} & set(parts) else ()), *([PLANTED] if PLANTED in parts else ())]
    names.sort(key=SLOWEST_FIRST.index)
    net_parts = [part for part in parts if part != PLANTED]
    os.environ["TQDM_DISABLE"] = "1"  # progress bars of several processes overwrite each other
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(task, name, net_parts, samples) for name in names]):
            yield done.result()
