"""Execution of a sweep from the command line: queries, progress, skipped samples and exit status."""

from __future__ import annotations

import argparse
import contextlib
import sys
from itertools import pairwise
from typing import Any, cast

import torch

from ..dataset.evaluation import Target
from ..dataset.image_folder import PreprocessedImageFolder
from ..dataset.queries import Activation, Bypass, EventMass, Joint, Maps, Marginal, Query, Sink, Variation
from ..dataset.stored_sweep import Sweep
from ..dataset.sweep_layout import Manifest, SettingsError, arrow
from ..dataset.sweep_runner import sweep
from ..errors import EventError, NRMError, UnknownLayerError, printable
from ..model.contrast import REST
from . import messages
from .composite_names import composite_of
from .event_syntax import parse
from .failures import FAILED, INTERRUPTED, errors, line
from .model_loading import LoadedModel
from .request import NONE, Against, Request, RequestError, check_class_names, check_device, output_count, target_of
from .resolved_options import model_of, one_line_warnings, request_of
from .sweep_data import SAMPLES, data_of

SKIPPED = 3
"""Exit status of a sweep that is complete except for skipped samples."""
LISTED = 20
"""Maximum number of skipped samples that are printed."""


def sweep_data(options: argparse.Namespace) -> int:
    """Runs a sweep and returns the exit status.

    Raises:
        NRMError: If options conflict with each other, with the model or with the stored results.
    """
    arrow()  # raises before a model is loaded
    with one_line_warnings():
        request = request_of(options)
        device = check_device(request.device)
        queries = queries_of(options)
        loaded = model_of(options, options.weights)
        data = data_of(options.data, loaded)
        loaded.model.to(device)
        target = _target(options.target, loaded, data)
        against = _against(options, loaded, data)
        print(messages.heading(loaded, request), flush=True)
        try:
            stored = _swept(options, loaded, request, data, queries, target, against)
        except (SettingsError, UnknownLayerError, EventError) as error:  # caused by the options
            if options.joint and "is not below" in str(error):
                raise RequestError(f"{error} List --layers from the output to the input.") from error
            raise
        except (NRMError, OSError) as error:
            print(line(error, options), file=errors())
            return FAILED
        except KeyboardInterrupt:
            folder = printable(options.out)
            print(f"interrupted; {folder} is consistent. Run the same command to continue.", file=errors())
            return INTERRUPTED
    print(summary(stored))
    return print_skipped(stored)


def queries_of(options: argparse.Namespace) -> list[Query]:
    """Returns the queries selected by the options."""
    layers = list(dict.fromkeys(options.layers))
    queries: list[Query] = []
    for layer in layers:
        queries += [Marginal(layer), Sink(layer), Bypass(layer), Variation(layer)]
        queries += [Activation(layer)] if options.activations else []
    queries += [Joint(upper, lower) for upper, lower in pairwise(layers)] if options.joint else []
    queries += [Maps("input", over="position")] if options.heat_maps else []
    conditions = dict.fromkeys(parse(text) for text in options.events)
    return [*queries, *(EventMass(condition.event, name=condition.text) for condition in conditions)]


def _target(text: str, loaded: LoadedModel, data: Any) -> Target:
    """Returns the explained target. Checks the class names and, for ``"label"``, the labels of an image folder.

    Raises:
        RequestError: If there are not as many class names as outputs or if the class does not exist.
        SweepError: If images have no label.
    """
    is_class = text not in ("prediction", "label")
    if text == "label" and isinstance(data, PreprocessedImageFolder):
        data.check_labels()
    count = output_count(loaded, _first_inputs(data)) if is_class or loaded.categories else None
    if count is not None:
        check_class_names(loaded, count)
    known = count or len(loaded.categories) or None
    return target_of(text, loaded.categories, known) if is_class else cast(Target, text)


def _against(options: argparse.Namespace, loaded: LoadedModel, data: Any) -> Against:
    """Returns the contrast of the explained class.

    Raises:
        RequestError: If the contrast does not exist or is the explained class itself.
    """
    if options.against in (None, NONE):
        return None
    if options.against == REST:
        return REST
    count = output_count(loaded, _first_inputs(data))
    index = target_of(options.against, loaded.categories, count or len(loaded.categories) or None, "--against")
    if options.target == str(index):
        raise RequestError(f"--against {options.against} is the explained class. Give another class, or rest.")
    return index


def _first_inputs(data: Any) -> Any:
    """Returns the first inputs of the user's dataset, or None for image folders and datasets without indexing."""
    if isinstance(data, PreprocessedImageFolder) or not hasattr(data, "__getitem__"):
        return None
    with contextlib.suppress(Exception):  # any error that the user's dataset raises is reported by the sweep itself
        sample = data[0]
        first = sample[0] if isinstance(sample, (list, tuple)) else sample
        return torch.as_tensor(first)[None]
    return None


def _swept(
    options: argparse.Namespace,
    loaded: LoadedModel,
    request: Request,
    data: Any,
    queries: list[Query],
    target: Target,
    against: Against,
) -> Sweep:
    """Runs the sweep and writes the list of sample files even if it fails."""
    on_ray = {"concurrency": options.concurrency, "num_gpus": options.gpus} if options.engine == "ray" else None
    try:
        return sweep(
            loaded.model,
            data,
            queries,
            options.out,
            target=target,
            against=against,
            composite=composite_of(request.composite, loaded.bounds),
            residual=request.residual,
            gain_limit=request.gain_limit,
            batch_size=options.batch_size,
            shard=options.shard_size,
            num_workers=options.workers,
            on_error=options.on_error,
            retry_failed=options.retry_failed,
            engine=options.engine,
            engine_options=on_ray,
            progress=not options.quiet,
        )
    finally:
        with contextlib.suppress(NRMError, OSError):
            if (
                isinstance(data, PreprocessedImageFolder)
                and Manifest.read(options.out).settings["data"] == data.fingerprint
            ):
                data.write_list(options.out / SAMPLES)


def summary(stored: Sweep) -> str:
    """Summarizes the stored results in one line."""
    if not stored.is_complete:
        return f"This process has finished; others are still writing to {printable(stored.path)}."
    count = (stored.manifest.samples or 0) - len(stored.manifest.failed)
    return f"{count} samples, {len(stored.queries)} queries in {printable(stored.path)}"


def print_skipped(stored: Sweep) -> int:
    """Prints damaged files and skipped samples. Returns the exit status."""
    failed = stored.manifest.failed
    for entry in stored.manifest.bad_shards:
        print(f"nrm-plugin sweep: warning: recomputed a damaged file: {entry['why']}", file=sys.stderr)
    if not failed:
        return 0
    were = "1 sample was" if len(failed) == 1 else f"{len(failed)} samples were"
    print(f"\nnrm-plugin sweep: {were} skipped:", file=errors())
    for entry in failed[:LISTED]:
        print(f"  sample {entry['sample']}: {printable(entry['why'])}", file=errors())
    if len(failed) > LISTED:
        print(f"  and {len(failed) - LISTED} more, listed in {stored.path / 'manifest.json'}", file=errors())
    return SKIPPED
