"""The commands that read a sweep: ``references``, and ``flow --from``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..composites import normalize
from ..dataset.crops import Crop, crops
from ..dataset.examples import References, is_of_channels, references
from ..dataset.glocal import difference, flow_of_sweep
from ..dataset.glocal_plots import difference_figure
from ..dataset.image_folder import PictureFolder
from ..dataset.images import shown
from ..dataset.reference_plots import MOST, reference_figure
from ..dataset.settings import described, digest, model_fingerprint
from ..dataset.stored_sweep import Sweep
from ..dataset.sweep_layout import ShardError
from ..measure.flow_graph import FlowError, FlowGraph
from ..plots.flow import flow_figure
from ..plots.flow_html import save_sankey
from ..plots.heatmaps import save
from ..plots.ribbons import DARK, LIGHT, percent
from . import messages as words
from .composite_names import composite_of
from .explain import add_how, add_model, class_names, new_command, one_line_warnings, request_of, subject_of
from .explanation import Request, RequestError, check_device, target_of
from .flow import HTML_MISSING, free_stem
from .model_loading import Subject
from .output_files import PACKAGES, check_folder, plain, quietly, short
from .sweep import ERROR, FILES, data_of

REFERENCES = """\
What does a channel stand for? Lists the pictures of a sweep in which each channel carries the most relevance, and
with --model and --data draws the parts of them that the channel sees."""

EXAMPLES = """\
examples:
  nrm-plugin references swept --query features.28
      of the 8 channels that carry most, the 9 pictures in which they carry it; no model is needed
  nrm-plugin references swept --query features.28 --groups 5 7 --target 281 --k 4 --by activation
      the 4 pictures of class 281 that excite two channels most; of a sweep with --activations
  nrm-plugin references swept --query features.28 --model vgg16 --data photos
      also a picture: a row for each channel, its references cut to what it sees

for the layer or query NAME the folder gets
  NAME-references.json   the references, with all settings
  NAME-references.png    with --model and --data: the picture
Results of another question are never overwritten: the new ones are called NAME-2-...

exit status: 0 done; 1 stopped by an error, such as a damaged file; 2 nothing done, because of the options"""

Command = Callable[[argparse.Namespace], int]


def add_references(commands: Any) -> None:
    """Adds the command that lists and draws reference examples."""
    parser = new_command(
        commands,
        "references",
        "list the pictures of a sweep in which channels carry most relevance",
        REFERENCES,
        EXAMPLES,
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="folder of nrm-plugin sweep")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--query", required=True, metavar="LAYER|QUERY",
                       help="a layer of the sweep, or one of its queries by name")  # fmt: skip
    asked.add_argument("--by", choices=("relevance", "activation"), default="relevance",
                       help="what pictures are ranked by (default: %(default)s)")  # fmt: skip
    asked.add_argument("--groups", nargs="+", type=_number, metavar="N",
                       help="these channels (default: those whose references have the largest mean)")  # fmt: skip
    asked.add_argument("--rows", type=_most, default=8, metavar="N",
                       help="how many channels, where they are not named (default: %(default)s)")  # fmt: skip
    asked.add_argument("--k", type=_most, default=9, metavar="N",
                       help="pictures of each channel (default: %(default)s)")  # fmt: skip
    asked.add_argument("--target", metavar="CLASS",
                       help="only pictures of which this class was explained; its name with --model")  # fmt: skip
    drawn = parser.add_argument_group("the picture")
    drawn.add_argument("--data", metavar="FOLDER|DATASET", help="what was swept")
    drawn.add_argument("--style", choices=("mask", "plain", "heat", "both"), default="mask",
                       help="fade what carries no relevance, or show heat maps (default: %(default)s)")  # fmt: skip
    drawn.add_argument("--whole", action="store_true", help="whole pictures instead of what a channel sees: faster")
    drawn.add_argument("--dark", action="store_true", help="for a dark background")
    add_model(parser, "torchvision's default, downloaded once", required=False)
    add_how(parser)
    parser.add_argument("--out", type=Path, default=Path("nrm-references"), metavar="DIR",
                        help="folder for the results; made where it is missing (default: %(default)s)")  # fmt: skip
    parser.set_defaults(command=_guarded(_references))


def add_from(parser: argparse.ArgumentParser) -> None:
    """Adds to the command ``flow`` what it takes to draw the mean flow of a sweep."""
    of_pictures: Command = parser.get_default("command")
    group = parser.add_argument_group("the mean flow of a data set, instead of pictures")
    group.add_argument("--from", type=Path, metavar="SWEEP", dest="sweep",
                       help="folder of nrm-plugin sweep --joint, with these --layers; takes no model")  # fmt: skip
    group.add_argument("--minus", metavar="CLASS",
                       help="draw what --target has more than this class: red, and less: blue")  # fmt: skip

    def command(options: argparse.Namespace) -> int:
        if options.sweep is not None:
            return _guarded(_flow)(options)
        if options.minus is not None:
            raise RequestError("--minus compares classes of a sweep: name it by --from SWEEP.")
        return of_pictures(options)

    parser.set_defaults(command=command)


def _guarded(command: Command) -> Command:
    """Damaged files end with another status than options that do not fit."""

    def run(options: argparse.Namespace) -> int:
        with one_line_warnings():
            check_folder(options.out)
            try:
                return command(options)
            except (ShardError, OSError) as error:
                print(f"nrm-plugin {options.name}: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
                return ERROR

    return run


# -- references -----------------------------------------------------------------------------------------------------


def _references(options: argparse.Namespace) -> int:
    if (options.model is None) != (options.data is None):
        raise RequestError("a picture takes both --model and --data: the net, and what was swept.")
    sweep = Sweep.open(options.sweep)
    options.layers = ()
    wanted, options.target = options.target, None
    request = request_of(options)
    subject = None if options.model is None else subject_of(options, options.weights)
    target = _target(wanted, subject)
    found = references(sweep, options.query, None, options.k, options.by, target)
    groups = _chosen(found, options.groups, options.rows)
    files = _files(sweep.path)
    rows = None if subject is None else _crops(options, sweep, found, groups, subject, request)
    of = "" if target is None else f", of class {target}"
    print(shown(f"{sweep.path}: {found.name}, by {options.by}{of}"))
    for line in _listed(found, groups, files):
        print(shown(line))
    for path in _write(options, sweep, found, groups, files, rows):
        print(f"-> {shown(path)}")
    if rows is None:
        print("nrm-plugin: note: no picture: that takes --model and --data", file=sys.stderr)
    return 0


def _target(text: str | None, subject: Subject | None) -> int | None:
    if text is None:
        return None
    if subject is not None:
        return target_of(text, subject.categories, len(subject.categories) or sys.maxsize)
    if not text.isascii() or not text.isdecimal():
        raise RequestError(f"--target {text!r}: without --model, give the index of the class.")
    return int(text)


def _chosen(found: References, asked: Sequence[int] | None, count: int) -> list[int | str]:
    """The rows to show: those asked for, or those with the largest mean of their references."""
    if asked is not None:
        if len(asked) > MOST:
            raise RequestError(f"--groups names {len(asked)}, and a picture has room for {MOST}.")
        for group in asked:
            found.row(group)
        return list(dict.fromkeys(asked))
    order = found.values.nanmean(1).argsort(descending=True, stable=True)[:count].tolist()
    return [found.groups[row] for row in order]


def _listed(found: References, groups: Sequence[int | str], files: Sequence[str]) -> list[str]:
    lines = []
    for group in groups:
        row = found.row(group)
        cells = [
            f"{_file(files, sample) or f'sample {sample}'} ({_value(value, found)})"
            for sample, value in zip(found.of(group), found.values[row].tolist(), strict=False)
        ]
        lines.append(f"  {group}: {', '.join(cells)}")
    return lines


def _file(files: Sequence[str], sample: int) -> str | None:
    """Its name; None where the list does not have it."""
    return files[sample] if 0 <= sample < len(files) else None


def _value(value: float, found: References) -> str:
    return percent(value).replace("−", "-") if found.by == "relevance" else f"{value:.4g}"


def _files(folder: Path) -> list[str]:
    """Names of the files that samples are, where the sweep listed them."""
    try:
        with (folder / FILES).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [row["file"] for row in csv.DictReader(file)]
    except (OSError, KeyError, csv.Error):
        return []


def _crops(
    options: argparse.Namespace,
    sweep: Sweep,
    found: References,
    groups: Sequence[int | str],
    subject: Subject,
    request: Request,
) -> dict[int | str, list[Crop]]:
    device = check_device(request.device)
    if not is_of_channels(sweep.query(found.name)):
        raise RequestError(
            f"{found.name!r} is not of the channels of a layer, for which pictures are cut; leave out --model."
        )
    data = data_of(options.data, subject)
    subject.model.to(device)
    rules = composite_of(request.composite, subject.prepare.bounds(next(subject.model.parameters())))
    normalized = normalize(rules, request.residual, request.gain_limit, None)
    _check_same(sweep, subject, request, data, digest(described(normalized.composite)))
    return crops(
        subject.model,
        data,
        found,
        groups,
        options.k,
        layer=sweep.query(found.name).layers[0],
        whole=options.whole,
        picture=lambda image: subject.prepare.undone(image[None]),
        composite=normalized,
    )


def _check_same(sweep: Sweep, subject: Subject, request: Request, data: Any, composite: str) -> None:
    """Raises :class:`RequestError` where pictures would be of another model, of other rules or of other data."""
    settings = sweep.manifest.settings
    if settings["model"] != model_fingerprint(subject.model):
        raise RequestError(
            f"{shown(subject.name)} (weights: {subject.weights}) is another model than that of the sweep."
        )
    other = settings["composite"]["settings"] != composite
    gain = "inf" if request.gain_limit == float("inf") else request.gain_limit
    if other or settings["residual"] != request.residual or settings["gain_limit"] != gain:
        raise RequestError(
            f"the sweep has the rules {settings['composite']['name']}, residual {settings['residual']}, gain limit "
            f"{settings['gain_limit']}. Say the same by --composite, --residual and --gain-limit."
        )
    if isinstance(data, PictureFolder) and settings.get("data") != data.fingerprint:
        raise RequestError(f"{shown(data.folder)} holds other pictures than those that were swept.")


def _write(
    options: argparse.Namespace,
    sweep: Sweep,
    found: References,
    groups: Sequence[int | str],
    files: Sequence[str],
    rows: dict[int | str, list[Crop]] | None,
) -> list[Path]:
    about = {
        "sweep": sweep.manifest.fingerprint, "query": found.name, "by": found.by, "target": found.target,
        "k": options.k, "groups": list(groups),
        "picture": None if rows is None else [options.style, options.whole, options.dark],
    }  # fmt: skip
    ends = ["references.json", *([] if rows is None else ["references.png"])]
    info = sweep.query(found.name)
    is_plain = info.name == f"{info.kind.lower()}({', '.join(info.layers)})"
    name = "-".join(info.layers) if is_plain else info.name
    stem = free_stem(options.out, plain(name), about, ends, set(), ends[0])
    paths = [options.out / f"{stem}-{end}" for end in ends]
    numbers = [
        {
            "group": group,
            "samples": found.of(group),
            **{
                key: getattr(found, key)[found.row(group)].tolist()[: len(found.of(group))]
                for key in ("values", "targets", "positions")
            },
            **({"files": [_file(files, sample) for sample in found.of(group)]} if files else {}),
        }
        for group in groups
    ]
    more = {"settings": about, "versions": {name: version(name) for name in PACKAGES}, "references": numbers}
    paths[0].write_text(json.dumps(more, allow_nan=False) + "\n", encoding="utf-8")
    if rows is not None:
        of = "" if found.target is None else f", class {found.target}"
        heading = f"{short(found.name)} by {found.by}{of}"
        unit = "%" if found.by == "relevance" else ""
        with quietly():
            figure = reference_figure(rows, options.style, heading, options.dark, unit=unit)
            save(figure, paths[1], (DARK if options.dark else LIGHT).paper)
    return paths


# -- flow -----------------------------------------------------------------------------------------------------------


def _flow(options: argparse.Namespace) -> int:
    taken = [name for name, value in (("IMAGE", options.images), ("--model", options.model)) if value]
    if taken:
        raise RequestError(f"--from reads a sweep and takes no {' and no '.join(taken)}.")
    if options.minus is not None and options.target is None:
        raise RequestError("--minus compares two classes: give the other one by --target.")
    sweep = Sweep.open(options.sweep)
    categories = class_names(options.classes) if options.classes else []
    target, minus = (_class(text, categories) for text in (options.target, options.minus))
    limits = {"top": options.top, "coverage": options.coverage}
    if minus is None:
        graph = _mean(sweep, options.layers, target, categories, limits)
    else:
        both = [_mean(sweep, options.layers, of, categories, {"top": None}) for of in (target, minus)]
        graph = difference(*both).smaller(**limits)
    name = shown(sweep.path)
    of = "" if target is None else f" of class {_called(target, categories)}"
    of += "" if minus is None else f" less class {_called(minus, categories)}"
    print(f"{name}: mean flow{of}")
    for line in words.layers(graph):
        print(shown(line))
    for path in _draw(options, sweep, graph, target, minus, categories):
        print(f"  -> {shown(path)}")
    if find_spec("plotly") is None:
        print(f"nrm-plugin: note: {HTML_MISSING}", file=sys.stderr)
    return 0


def _class(text: str | None, categories: Sequence[str]) -> int | None:
    return None if text is None else target_of(text, categories, len(categories) or sys.maxsize)


def _called(target: int, categories: Sequence[str]) -> str:
    return shown(categories[target]) if target < len(categories) else str(target)


def _mean(
    sweep: Sweep, layers: Sequence[str], target: int | None, categories: Sequence[str], limits: dict[str, Any]
) -> FlowGraph:
    names = {"output": categories} if categories else None
    orders = [list(layers), list(layers)[::-1]]
    known = [info.layers for info in sweep.queries.values() if info.kind == "Joint"]
    order = orders[1] if len(layers) > 1 and (layers[1], layers[0]) in known else orders[0]
    try:
        return flow_of_sweep(sweep, order, target, names=names, **limits)
    except FlowError as error:
        hint = "" if "flow_queries" not in str(error) else f" Or: nrm-plugin sweep --joint --layers {' '.join(order)}"
        raise FlowError(f"{error}{hint}") from error


def _draw(
    options: argparse.Namespace,
    sweep: Sweep,
    graph: FlowGraph,
    target: int | None,
    minus: int | None,
    categories: Sequence[str],
) -> list[Path]:
    about = {
        "sweep": sweep.manifest.fingerprint, "layers": list(options.layers), "target": target, "minus": minus,
        "top": options.top, "coverage": options.coverage, "dark": options.dark,
    }  # fmt: skip
    ends = ["flow.png", "flow.json", *(["flow.html"] if find_spec("plotly") else [])]
    stem = free_stem(options.out, sweep.path.resolve().name, about, ends, set(), "flow.json")
    files = [options.out / f"{stem}-{end}" for end in ends]
    of = "" if target is None else f" for class {_called(target, categories)}"
    heading = f"{short(sweep.path.resolve().name)}: mean flow of relevance{of}"
    with quietly():
        if minus is None or target is None:
            figure = flow_figure(graph, heading.replace("$", r"\$"), options.dark)
        else:
            heading += f" less class {_called(minus, categories)}"
            first, second = (_called(one, categories) for one in (target, minus))
            figure = difference_figure(graph, first, second, heading.replace("$", r"\$"), options.dark)
        save(figure, files[0], (DARK if options.dark else LIGHT).paper)
    versions = {name: version(name) for name in PACKAGES}
    text = json.dumps(graph.to_dict() | {"settings": about, "versions": versions}, allow_nan=False)
    files[1].write_text(text + "\n", encoding="utf-8")
    if len(files) > 2:
        save_sankey(graph, files[2], heading)
    return files


# -- values ---------------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of a channel")


def _most(text: str) -> int:
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= MOST:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MOST}, for which a picture has room")


__all__ = ["add_from", "add_references"]
