"""The command ``sweep``: a folder of pictures or a data set of your own through a model, stored as rows."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from ..dataset.evaluation import Target
from ..dataset.image_folder import PreprocessedImageFolder
from ..dataset.images import shown
from ..dataset.queries import Activation, Bypass, EventMass, Joint, Maps, Marginal, Query, Sink, Variation
from ..dataset.runner import sweep
from ..dataset.stored_sweep import Sweep
from ..dataset.sweep_layout import Manifest, SettingsError, SweepError, arrow
from ..errors import EventError, NRMError, UnknownLayerError
from . import messages as words
from .composite_names import composite_of
from .event_syntax import parse
from .explain import add_how, add_model, new_command, one_line_warnings, request_of, subject_of
from .explanation import Request, check_device, target_of
from .model_loading import Subject, imported

ERROR, SKIPPED, INTERRUPTED = 1, 3, 130
LISTED = 20
FILES = "samples.csv"

SWEEP = """\
Asks of every picture of a folder which channels of some layers carry its relevance, and stores the answers as
Parquet. What is written stays: the same command goes on where it was stopped, whatever stopped it."""

EXAMPLES = """\
examples:
  nrm-plugin sweep photos --model vgg16 --layers features.28 features.21 --out swept
      relevance of the channels of two layers, for the predicted class of each picture
  nrm-plugin sweep photos --model vgg16 --layers features.28 features.21 --joint --activations --heat-maps --out swept
      also of each pair of channels, the largest activations, and heat maps
  nrm-plugin sweep my_data.py:validation --model my_nets.py:make --layers conv5 --target label --batch-size 64
      your own: a data set, or a function that makes it, of prepared inputs, or (inputs, label)
  torchrun --nproc-per-node 4 --no-python nrm-plugin sweep photos --model vgg16 --layers features.28 --out swept
      four processes share the pictures

the folder gets
  manifest.json          what was asked, with all settings, and how far it came
  samples.csv            which sample is which file, where pictures of a folder are read
  rows/, by-query/       the numbers as Parquet: as they came, and sorted by query, group and value
  maps/                  with --heat-maps: safetensors

exit status: 0 complete; 1 stopped by an error; 2 nothing done, because of the options; 3 complete but for samples that
were left out, which are listed; 130 interrupted. What is written can be read after each of them."""


def add_sweep(commands: Any) -> None:
    """Adds the command that asks a whole data set."""
    parser = new_command(
        commands, "sweep", "ask the measure of every picture of a folder, and store the answers", SWEEP, EXAMPLES
    )
    parser.add_argument("data", metavar="FOLDER|DATASET",
                        help="a folder of pictures, with a folder inside for each class where there are labels; or "
                        "package.module:name or file.py:name of a data set or of a function that makes it")  # fmt: skip
    add_model(parser, "torchvision's default, downloaded once")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--layers", nargs="+", required=True, metavar="LAYER",
                       help="relevance of each channel, what is absorbed above or goes around, variation")  # fmt: skip
    asked.add_argument("--joint", action="store_true",
                       help="also of each pair of channels of layers that follow one another in --layers")  # fmt: skip
    asked.add_argument("--activations", action="store_true", help="also the largest activation of each channel")
    asked.add_argument("--heat-maps", action="store_true", help="also a heat map of the input")
    asked.add_argument("--event", action="append", default=[], metavar="EVENT", dest="events",
                       help="also the mass of an event, such as 'features.28[3,7]'; may be repeated")  # fmt: skip
    asked.add_argument("--target", default="prediction", metavar="CLASS",
                       help="prediction, label, or the index or name of one class (default: %(default)s)")  # fmt: skip
    add_how(parser)
    work = parser.add_argument_group("how it is worked through")
    work.add_argument("--batch-size", type=_positive, default=16, metavar="N",
                      help="pictures at once (default: %(default)s)")  # fmt: skip
    work.add_argument("--workers", type=_count, default=0, metavar="N",
                      help="processes that read pictures ahead (default: %(default)s)")  # fmt: skip
    work.add_argument("--on-error", choices=("skip", "raise"), default="skip",
                      help="pictures that cannot be read are left out and listed, or stop the sweep (default: "
                      "%(default)s)")  # fmt: skip
    work.add_argument("--retry-failed", action="store_true", help="try pictures that were left out before again")
    work.add_argument("--engine", choices=("local", "ray"), default="local",
                      help="here, or on the machines of a Ray cluster (default: %(default)s)")  # fmt: skip
    work.add_argument("--concurrency", type=_positive, metavar="N", help="workers of Ray (default: all slots)")
    work.add_argument("--gpus", type=float, metavar="N", help="GPUs of each worker of Ray (default: none)")
    work.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--out", type=Path, default=Path("nrm-swept"), metavar="DIR",
                        help="folder for the results; made where it is missing (default: %(default)s)")  # fmt: skip
    parser.set_defaults(command=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    arrow()  # before a model is loaded
    with one_line_warnings():
        request = request_of(options)
        device = check_device(request.device)
        queries = queries_of(options)
        subject = subject_of(options, options.weights)
        data = data_of(options.data, subject)
        target = _target(options.target, subject)
        subject.model.to(device)
        print(words.heading(subject, request), flush=True)
        try:
            found = _run(options, subject, request, data, queries, target)
        except (SettingsError, UnknownLayerError, EventError):
            raise  # because of the options
        except (NRMError, OSError) as error:
            print(f"nrm-plugin sweep: error: {' '.join(str(error).split())}", file=sys.stderr)
            return ERROR
        except KeyboardInterrupt:
            print(f"interrupted; what is in {shown(options.out)} is whole. The same command goes on.", file=sys.stderr)
            return INTERRUPTED
    for line in _summary(found):
        print(line)
    return _told(found)


def _run(
    options: argparse.Namespace, subject: Subject, request: Request, data: Any, queries: list[Query], target: Target
) -> Sweep:
    like = next(subject.model.parameters())
    spread = {"concurrency": options.concurrency, "num_gpus": options.gpus} if options.engine == "ray" else None
    return _swept(
        subject.model,
        data,
        queries,
        options.out,
        target=target,
        composite=composite_of(request.composite, subject.prepare.bounds(like)),
        residual=request.residual,
        gain_limit=request.gain_limit,
        batch_size=options.batch_size,
        num_workers=options.workers,
        on_error=options.on_error,
        retry_failed=options.retry_failed,
        engine=options.engine,
        engine_options=spread,
        progress=not options.quiet,
    )


def _swept(model: nn.Module, data: Any, queries: list[Query], out: Path, **options: Any) -> Sweep:
    """A sweep, with a list of the files that its samples are, however it ended."""
    try:
        return sweep(model, data, queries, out, **options)
    finally:
        with contextlib.suppress(NRMError, OSError):
            if isinstance(data, PreprocessedImageFolder) and Manifest.read(out).settings["data"] == data.fingerprint:
                data.write_list(out / FILES)


def queries_of(options: argparse.Namespace) -> list[Query]:
    """The queries that options speak of."""
    layers = list(dict.fromkeys(options.layers))
    queries: list[Query] = []
    for layer in layers:
        queries += [Marginal(layer), Sink(layer), Bypass(layer), Variation(layer)]
        queries += [Activation(layer)] if options.activations else []
    queries += [Joint(upper, lower) for upper, lower in pairwise(layers)] if options.joint else []
    queries += [Maps("input", over="position")] if options.heat_maps else []
    conditions = dict.fromkeys(parse(text) for text in options.events)
    return [*queries, *(EventMass(condition.event, name=condition.text) for condition in conditions)]


def data_of(name: str, subject: Subject) -> Any:
    """A folder of pictures, or a data set of the user's own.

    Raises:
        SweepError: It is neither, or making it failed.
    """
    if ":" not in name or Path(name).exists():
        return PreprocessedImageFolder(Path(name), subject.prepare, subject.categories)
    found = imported(name, "DATASET")
    if hasattr(found, "__getitem__") or not callable(found):
        return found
    try:
        return found()
    except Exception as error:  # whatever the user's code raises
        raise SweepError(f"calling {name} without arguments failed: {type(error).__name__}: {error}") from error


def _target(text: str, subject: Subject) -> Target:
    if text == "prediction":
        return "prediction"
    if text == "label":
        return "label"
    return target_of(text, subject.categories, len(subject.categories) or sys.maxsize)


def _summary(found: Sweep) -> Iterator[str]:
    manifest = found.manifest
    if not found.is_complete:
        yield f"This process is done; others are still writing to {shown(found.path)}."
        return
    count = (manifest.samples or 0) - len(manifest.failed)
    yield f"{count} samples, {len(found.queries)} queries, all in {shown(found.path)}"


def _told(found: Sweep) -> int:
    """Prints what was not possible; returns the exit status."""
    manifest = found.manifest
    for entry in manifest.bad_shards:
        print(f"nrm-plugin sweep: warning: was damaged and is done again: {entry['why']}", file=sys.stderr)
    if not manifest.failed:
        return 0
    print(f"\nnrm-plugin sweep: {_samples(len(manifest.failed))} left out:", file=sys.stderr)
    for entry in manifest.failed[:LISTED]:
        print(f"  sample {entry['sample']}: {shown(entry['why'])}", file=sys.stderr)
    if len(manifest.failed) > LISTED:
        print(f"  and {len(manifest.failed) - LISTED} more, listed in {found.path / 'manifest.json'}", file=sys.stderr)
    return SKIPPED


def _samples(count: int) -> str:
    return "1 sample was" if count == 1 else f"{count} samples were"


def _positive(text: str) -> int:
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= 1 << 20:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


__all__ = ["add_sweep"]
