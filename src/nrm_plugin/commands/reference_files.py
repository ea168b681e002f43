"""Reference examples of channels in a stored sweep, as a list in the terminal, as JSON and as a figure."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..composites import normalize
from ..dataset.content_check import check_samples, contents_to_compare
from ..dataset.crops import Crop, crops
from ..dataset.examples import References, is_of_channels, references
from ..dataset.image_folder import PreprocessedImageFolder
from ..dataset.reference_plots import MOST, reference_figure
from ..dataset.sample_batches import data_source
from ..dataset.stored_sweep import Sweep
from ..dataset.sweep_settings import described, differences, digest, is_same_model
from ..errors import printable
from ..plots.ribbons import percent
from .composite_names import composite_of
from .model_loading import LoadedModel
from .output_files import json_stem, name_part, save_figure, short, versions, write_json
from .request import INDEX, Request, RequestError, check_class_names, check_device, output_count, target_of
from .resolved_options import model_of, request_of
from .sweep_data import SAMPLES, data_of

Rows = dict[int | str, list[Crop]]
"""Crops keyed by channel."""


@dataclass(frozen=True)
class Listing:
    """References of the listed channels.

    Attributes:
        sweep: Sweep from which the references are read.
        references: References of all channels of the query.
        groups: The listed channels.
        files: File names of the samples, or empty if the sweep does not store them.
    """

    sweep: Sweep
    references: References
    groups: list[int | str]
    files: list[str]

    def file(self, sample: int) -> str | None:
        """Returns the file name of a sample, or None if unknown."""
        return self.files[sample] if 0 <= sample < len(self.files) else None

    def entry(self, group: int | str) -> dict[str, Any]:
        """Returns the references of a channel as a JSON object."""
        samples = self.references.of(group)
        row = self.references.row(group)
        values = {
            key: getattr(self.references, key)[row].tolist()[: len(samples)]
            for key in ("values", "targets", "positions")
        }
        files = {"files": [self.file(sample) for sample in samples]} if self.files else {}
        return {"group": group, "samples": samples, **values, **files}

    def line(self, group: int | str) -> str:
        """Formats the references of a channel as a line."""
        entry = self.entry(group)
        cells = [
            f"{self.file(sample) or f'sample {sample}'} ({_value(value, self.references.by)})"
            for sample, value in zip(entry["samples"], entry["values"], strict=True)
        ]
        return f"  {group}: {', '.join(cells)}"

    def title(self, preposition: str = ", of") -> str:
        """Returns a title with the ranking criterion and the class."""
        target = self.references.target
        return f"by {self.references.by}" + ("" if target is None else f"{preposition} class {target}")


def print_references(options: argparse.Namespace) -> int:
    """Prints references, writes their output files, and returns the exit status.

    Raises:
        RequestError: If the model, the rules or the data do not match the sweep or the class is unknown.
        NRMError: If the sweep does not contain the query or the channels.
    """
    if (options.model is None) != (options.data is None):
        raise RequestError("a figure requires both --model and --data: the model and the data of the sweep.")
    sweep = Sweep.open(options.sweep)
    requested, options.target, options.layers = options.target, None, ()
    request = request_of(options)
    loaded = None if options.model is None else model_of(options, options.weights)
    ranked = references(sweep, options.query, None, options.k, options.by, _target(requested, loaded))
    listing = Listing(sweep, ranked, _groups(ranked, options.groups, options.rows), _file_names(sweep.path))
    rows = None if loaded is None else _crops(options, listing, loaded, request)
    print(printable(f"{sweep.path}: {ranked.name}, {listing.title()}"))
    for group in listing.groups:
        print(printable(listing.line(group)))
    for path in _write(options, listing, rows):
        print(f"-> {printable(path)}")
    if rows is None:
        print("nrm-plugin: note: no figure: it requires --model and --data", file=sys.stderr)
    return 0


def _target(text: str | None, loaded: LoadedModel | None) -> int | None:
    if text is None:
        return None
    if loaded is not None:
        return target_of(text, loaded.categories, len(loaded.categories) or None)
    if not INDEX.fullmatch(text):
        raise RequestError(f"--target {text!r}: without --model, give the index of the class.")
    return target_of(text, (), None)


def _groups(ranked: References, requested: Sequence[int] | None, count: int) -> list[int | str]:
    """Returns the requested channels or, by default, those with the largest mean value over their references."""
    if requested is None:
        order = ranked.values.nanmean(1).argsort(descending=True, stable=True)[:count].tolist()
        return [ranked.groups[row] for row in order]
    if len(requested) > MOST:
        raise RequestError(f"--groups has {len(requested)} channels, but a figure can show at most {MOST}.")
    for group in requested:
        ranked.row(group)  # raises for an unknown channel
    return list(dict.fromkeys(requested))


def _value(value: float, by: str) -> str:
    return percent(value).replace("−", "-") if by == "relevance" else f"{value:.4g}"


def _file_names(folder: Path) -> list[str]:
    """Returns the file names of the samples, or an empty list if the sweep does not store them."""
    try:
        with (folder / SAMPLES).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [row["file"] for row in csv.DictReader(file)]
    except (OSError, KeyError, csv.Error):
        return []


# -- figure ---------------------------------------------------------------------------------------------------------


def _crops(options: argparse.Namespace, listing: Listing, loaded: LoadedModel, request: Request) -> Rows:
    device = check_device(request.device)
    query = listing.sweep.query(listing.references.name)
    if not is_of_channels(query):
        raise RequestError(
            f"{query.name!r} is not a query of the channels of a layer, for which images could be cropped; omit "
            "--model."
        )
    data = data_of(options.data, loaded)
    loaded.model.to(device)
    check_class_names(loaded, output_count(loaded) or len(loaded.categories))
    rules = composite_of(request.composite, loaded.bounds)
    normalized = normalize(rules, request.residual, request.gain_limit, None)
    _check_same(listing.sweep, loaded, request, data, digest(described(normalized.composite)))
    _check_images(listing, data)
    return crops(
        loaded.model,
        data,
        listing.references,
        listing.groups,
        options.k,
        layer=query.layers[0],
        against=listing.sweep.manifest.settings.get("against"),
        whole=options.whole,
        to_image=lambda image: loaded.preprocessing.inverse(image[None]),
        composite=normalized,
        show_progress=sys.stderr.isatty(),
    )


def _check_same(sweep: Sweep, loaded: LoadedModel, request: Request, data: Any, composite: str) -> None:
    """Raises :class:`RequestError` unless the model, the rules and the data match the sweep."""
    settings = sweep.manifest.settings
    if not is_same_model(settings, loaded.model):
        raise RequestError(f"{printable(loaded.name)} (weights: {loaded.weights}) is not the model of the sweep.")
    is_other = settings["composite"]["settings"] != composite
    gain_limit = "inf" if request.gain_limit == math.inf else request.gain_limit
    if is_other or settings["residual"] != request.residual or settings["gain_limit"] != gain_limit:
        raise RequestError(
            f"the rules of the sweep are {settings['composite']['name']}, residual {settings['residual']}, gain limit "
            f"{settings['gain_limit']}. Give the same --composite, --residual and --gain-limit."
        )
    if isinstance(data, PreprocessedImageFolder) and settings.get("data") != data.fingerprint:
        raise RequestError(f"the images in {printable(data.folder)} are not those of the sweep.")
    before, now = settings.get("preparation"), data_source(data, None, None).preparation
    if before is not None and before != now:
        raise RequestError(
            f"the preprocessing is not that of the sweep: {'; '.join(differences(before, now))}. Give the same --size, "
            "--mean and --std."
        )


def _check_images(listing: Listing, data: Any) -> None:
    """Checks that the shown samples have not changed since the sweep.

    Raises:
        SettingsError: If the samples have changed.
    """
    source, seed = data_source(data, None, None), listing.sweep.manifest.settings["seed"]
    if source.count is not None:
        shown_samples = {sample for group in listing.groups for sample in listing.references.of(group)}
        contents = contents_to_compare(source, listing.sweep.shards)
        contents = {sample: content for sample, content in contents.items() if sample in shown_samples}
        check_samples(listing.sweep.path, source, contents, seed)


# -- files ----------------------------------------------------------------------------------------------------------


def _write(options: argparse.Namespace, listing: Listing, rows: Rows | None) -> list[Path]:
    ranked = listing.references
    settings = {
        "sweep": listing.sweep.manifest.fingerprint, "query": ranked.name, "by": ranked.by, "target": ranked.target,
        "k": options.k, "groups": list(listing.groups),
        "figure": None if rows is None else [options.style, options.whole, options.dark],
    }  # fmt: skip
    query = listing.sweep.query(ranked.name)
    is_unnamed = query.name == f"{query.kind.lower()}({', '.join(query.layers)})"
    name = "-".join(query.layers) if is_unnamed else query.name
    ends = ["references.json", *([] if rows is None else ["references.png"])]
    stem = json_stem(options.out, name_part(name), ends, set(), settings)
    numbers, *figures = [options.out / f"{stem}-{end}" for end in ends]
    entries = [listing.entry(group) for group in listing.groups]
    write_json(numbers, {"settings": settings, "versions": versions(), "references": entries})
    for path in figures:
        heading = f"{short(ranked.name)} {listing.title(',')}"
        unit = "%" if ranked.by == "relevance" else ""
        save_figure(reference_figure(rows or {}, options.style, heading, options.dark, unit=unit), path, options.dark)
    return [numbers, *figures]
