"""Sweeps on a Ray cluster and evaluation of batches for Ray Data and Hugging Face datasets."""

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
from ..model.inputs_and_outputs import Output
from .evaluation import Evaluation, Target, Unpack, check_target, dtype_of
from .queries import Maps, Query, check_queries
from .shard_writer import concatenated, tables
from .sweep_job import OnProgress, SweepJob
from .sweep_layout import SweepError

INPUTS, LABEL, SAMPLE = "inputs", "label", "sample"


class SweepBatches:
    """Callable that evaluates queries on a batch of columns and returns the rows of a sweep.

    Use it in ``ray.data.Dataset.map_batches(SweepBatches, fn_constructor_kwargs={…}, …)`` and
    ``datasets.Dataset.map(SweepBatches(…), batched=True, with_indices=True, remove_columns=…)``.

    Args:
        model: The network in evaluation mode, or a function without arguments that returns it, called once per worker.
        queries: The queries to evaluate; ``Maps`` queries are not supported.
        target: As in :func:`~nrm_plugin.dataset.sweep`.
        composite: As in :func:`~nrm_plugin.dataset.sweep`.
        residual: As in :func:`~nrm_plugin.dataset.sweep`.
        gain_limit: As in :func:`~nrm_plugin.dataset.sweep`.
        output: As in :func:`~nrm_plugin.dataset.sweep`.
        against: As in :func:`~nrm_plugin.dataset.sweep`.
        unpack: Function that converts a batch of columns to ``(inputs, labels)``. By default, these are the columns
            ``inputs`` and ``label``.
        device: Device of the model. Defaults to its current device.

    Raises:
        SweepError: If one of the queries is of type ``Maps``, which has no rows.
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
        against: Any = None,
        unpack: Unpack | None = None,
        device: str | None = None,
    ) -> None:
        check_target(target)
        checked = check_queries(queries)
        for query in checked:
            if isinstance(query, Maps):
                raise SweepError(f"{query.name} is a query for maps, which are not rows. Use sweep(…) to store maps.")
        network = model if isinstance(model, nn.Module) else model()
        network = network if device is None else network.to(device)
        rules = normalize(composite, residual, gain_limit, None)
        columns = partial(_columns, dtype=dtype_of(network))
        self.evaluation = Evaluation(network, checked, rules, target, unpack or columns, output, against)

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int] | None = None) -> dict[str, Any]:
        """Evaluates a batch.

        Args:
            batch: Columns, including ``sample`` unless ``indices`` are given.
            indices: Index of each sample in the dataset.

        Returns:
            The columns of :func:`~nrm_plugin.dataset.sweep_layout.schema`, with NaN for undefined values.

        Raises:
            SweepError: If the sample indices are missing.
        """
        if indices is None and SAMPLE not in batch:
            raise SweepError(
                f"the batch has no column {SAMPLE!r} of sample indices; its columns are {', '.join(batch)}. Add it, or "
                "set with_indices=True for Hugging Face datasets."
            )
        sample = [int(number) for number in (batch[SAMPLE] if indices is None else indices)]
        results = concatenated([self.evaluation(sample, batch)], self.evaluation.queries)
        names = [query.name for query in self.evaluation.queries]
        value = "double" if self.evaluation.is_double else "float"
        parts = [table for name in names for _, table in tables(results, name, names, value)]
        columns = {key: [part[key].to_numpy() for part in parts] for key in parts[0].column_names}
        return {key: np.concatenate(values) for key, values in columns.items()}


def _columns(batch: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """Converts columns to inputs and labels, casting floating-point inputs to ``dtype``."""
    if INPUTS not in batch:
        raise SweepError(
            f"the batch has no column {INPUTS!r}; its columns are {', '.join(batch)}. Pass unpack=, a function that "
            "returns (inputs, labels) of a batch."
        )
    labels, inputs = batch.get(LABEL), torch.as_tensor(np.asarray(batch[INPUTS]))
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return inputs, None if labels is None else torch.as_tensor(np.asarray(labels))


# -- whole sweeps ---------------------------------------------------------------------------------------------------


class _Worker:
    """Ray worker that evaluates shards with its own copy of the model.

    Args:
        job: Settings and data of the sweep.
        is_on_gpu: Whether to run the model on the GPU.
    """

    def __init__(self, job: SweepJob, is_on_gpu: bool) -> None:
        job.evaluation.model.to("cuda" if is_on_gpu else "cpu")
        self.job = job

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        samples: list[int] = []
        message = ""
        try:
            self.job.run([int(number) for number in batch["shard"]], 0, samples.append)
        except NRMError as error:  # Ray would wrap exceptions in its own type
            message = str(error)
        except Exception as error:
            message = "".join(traceback.format_exception(error))
        return {"samples": [sum(samples)], "error": [message]}


def run(
    job: SweepJob,
    numbers: Sequence[int],
    on_progress: OnProgress,
    concurrency: int | tuple[int, int] | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1,
) -> None:
    """Evaluates shards on Ray workers, each with its own model. Shards of failed workers are evaluated again.

    Args:
        job: The sweep job. All machines must be able to access its folder.
        numbers: Indices of the shards.
        on_progress: Callback that receives the number of new samples after each shard.
        concurrency: Number of workers, or their minimum and maximum number. Defaults to the number that fits on the
            cluster.
        num_gpus: Number of GPUs per worker, possibly a fraction.
        num_cpus: Number of CPUs per worker and of threads of its model.

    Raises:
        MissingExtraError: If Ray is not installed.
        SweepError: As raised by :meth:`~nrm_plugin.dataset.sweep_job.SweepJob.run`.
    """
    ray, data = extra("ray", "ray"), extra("ray.data", "ray")
    if not ray.is_initialized():
        ray.init(address=None, log_to_driver=False)
    slots = ray.cluster_resources()
    available = int(slots.get("GPU", 0) / num_gpus) if num_gpus else int(slots.get("CPU", 1) / num_cpus)
    workers = concurrency or max(1, min(available, len(numbers)))
    smallest, largest = workers if isinstance(workers, tuple) else (workers, workers)
    absolute = replace(job, folder=job.folder.resolve())
    shards = data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    results = shards.map_batches(
        _Worker,
        fn_constructor_args=(absolute, bool(num_gpus)),
        batch_size=1,
        compute=data.ActorPoolStrategy(min_size=smallest, max_size=largest),
        num_gpus=num_gpus,
        num_cpus=None if num_gpus else num_cpus,
    )
    for row in results.iter_rows():
        if row["error"]:
            raise SweepError(f"a worker stopped: {row['error']}")
        on_progress(int(row["samples"]))


__all__ = ["SweepBatches", "run"]
