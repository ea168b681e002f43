"""Sweeps on the machines of a Ray cluster, and as a function of batches for Ray Data and for Hugging Face datasets."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from zennit.core import Composite

from ..composites import normalize
from ..errors import NRMError, extra
from ..events.event import Atom
from ..kernels.normalization import Residual
from ..model.inputs import Output
from .evaluation import Evaluation, Target, Unpack, check_target, dtype_of
from .queries import Maps, Query, check_queries
from .shard_writer import joined, tables
from .sweep_job import Job
from .sweep_layout import SweepError

INPUTS, LABEL, SAMPLE = "inputs", "label", "sample"


class SweepBatches:
    """Answers to queries for batches of columns, as rows of a sweep.

    For ``ray.data.Dataset.map_batches(SweepBatches, fn_constructor_kwargs={…}, …)`` and for
    ``datasets.Dataset.map(SweepBatches(…), batched=True, with_indices=True, remove_columns=…)``.

    Args:
        model: The network in evaluation mode, or a function without arguments that makes it, once for each worker.
        queries: What is asked; no maps.
        target: As in :func:`~nrm_plugin.dataset.sweep`.
        composite: As there.
        residual: As there.
        gain_limit: As there.
        output: As there.
        unpack: Finds ``(inputs, labels)`` in a batch of columns; by default the columns ``inputs`` and ``label``.
        device: Where to compute; where the model is by default.

    Raises:
        SweepError: A query asks for maps, which are no rows.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        queries: Query | Sequence[Query],
        *,
        target: Target = "prediction",
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        output: Output | Atom | None = None,
        unpack: Unpack | None = None,
        device: str | None = None,
    ) -> None:
        check_target(target)
        asked = check_queries(queries)
        for query in asked:
            if isinstance(query, Maps):
                raise SweepError(f"{query.name} asks for maps, which are no rows. Use sweep(…), which stores them.")
        made = model if isinstance(model, nn.Module) else model()
        rules = normalize(composite, residual, gain_limit, None)
        placed = made if device is None else made.to(device)
        columns = partial(_columns, dtype=dtype_of(placed))
        self.evaluation = Evaluation(placed, asked, rules, target, unpack or columns, output)

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int] | None = None) -> dict[str, Any]:
        """The rows of a batch.

        Args:
            batch: Columns; ``sample`` holds the numbers of the samples where no indices are given.
            indices: Numbers of the samples.

        Returns:
            The columns of :func:`~nrm_plugin.dataset.sweep_layout.schema`, of one length; NaN where there is no value.

        Raises:
            SweepError: The samples have no numbers.
        """
        if indices is None and SAMPLE not in batch:
            raise SweepError(
                f"the batch has no column {SAMPLE!r} with the numbers of its samples; it has {', '.join(batch)}. Add "
                "one, or with datasets pass with_indices=True."
            )
        sample = [int(number) for number in (batch[SAMPLE] if indices is None else indices)]
        found = joined([self.evaluation(sample, batch)], self.evaluation.queries)
        names = [query.name for query in self.evaluation.queries]
        kind = "double" if self.evaluation.is_double else "float"
        parts = [table for name in names for _, table in tables(found, name, names, kind)]
        columns = {key: [part[key].to_numpy() for part in parts] for key in parts[0].column_names}
        return {key: np.concatenate(values) for key, values in columns.items()}


def _columns(batch: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """Inputs and labels of a batch of columns; lists of numbers have lost their type."""
    if INPUTS not in batch:
        raise SweepError(
            f"the batch has no column {INPUTS!r}; it has {', '.join(batch)}. Say what is what by unpack=, a function "
            "that returns (inputs, labels) of such a batch."
        )
    labels, inputs = batch.get(LABEL), torch.as_tensor(np.asarray(batch[INPUTS]))
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return inputs, None if labels is None else torch.as_tensor(np.asarray(labels))


# -- whole sweeps ---------------------------------------------------------------------------------------------------


class _Worker:
    """One model, which evaluates shards as they come."""

    def __init__(self, job: Job, is_on_gpu: bool) -> None:
        job.evaluation.model.to("cuda" if is_on_gpu else "cpu")
        self.job = job

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        told: list[int] = []
        try:
            self.job.run([int(number) for number in batch["shard"]], 0, told.append)
        except Exception as error:  # Ray would hand on its text alone, among much of its own
            return {"samples": [sum(told)], "error": [str(error) if isinstance(error, NRMError) else _told(error)]}
        return {"samples": [sum(told)], "error": [""]}


def run(
    job: Job,
    numbers: Sequence[int],
    tell: Callable[[int], None],
    concurrency: int | tuple[int, int] | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1,
) -> None:
    """Evaluates and writes some shards on the workers of Ray, one model each; what a dead worker had is done again.

    Args:
        job: The work; its folder is seen by all machines.
        numbers: Which shards.
        tell: Called with the number of samples after each shard.
        concurrency: How many workers, or least and most; by default as many as there are slots.
        num_gpus: GPUs of each worker, or a part of one.
        num_cpus: Processors of each worker, and threads of its model.

    Raises:
        MissingExtraError: Ray is not installed.
        SweepError: As in :meth:`~nrm_plugin.dataset.sweep_job.Job.run`.
    """
    ray, data = extra("ray", "ray"), extra("ray.data", "ray")
    if not ray.is_initialized():
        ray.init(address=None, log_to_driver=False)
    slots = ray.cluster_resources()
    most = int(slots.get("GPU", 0) / num_gpus) if num_gpus else int(slots.get("CPU", 1) / num_cpus)
    wanted = concurrency or max(1, min(most, len(numbers)))
    least, largest = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    absolute = replace(job, folder=job.folder.resolve())
    shards = data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    done = shards.map_batches(
        _Worker,
        fn_constructor_args=(absolute, bool(num_gpus)),
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=least, max_size=largest),
        num_gpus=num_gpus,
        num_cpus=None if num_gpus else num_cpus,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise SweepError(f"a worker stopped: {row['error']}")
        tell(int(row["samples"]))


def _told(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


__all__ = ["SweepBatches", "run"]
