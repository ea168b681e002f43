"""The commands ``explain`` and ``layers``: their arguments, in the order in which a person would ask for them."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..dataset.images import ImageError, check_image_file, shown
from . import messages as words
from .composite_names import check_composite_name, names
from .event_syntax import parse
from .explain_images import explain
from .explanation import CHANNELS, Request, RequestError, check_device, taps
from .flow import HTML_MISSING, MOST, FlowOptions, flows
from .model_loading import Subject, load
from .output_files import check_folder

EXPLAIN = """\
Which pixels speak for what a network sees? Explains pictures with any torchvision classifier, or one of your own,
by the normalized relevance measure: all relevance is 1, red pixels speak for the class, blue ones against it."""

FLOW = """\
Which channels hand relevance to which? Draws the joint relevance of the channels of some layers as a flow from the
pixels to the class. What is not shown is lumped, so that all relevance, 100 %, is in each layer."""

FLOW_EXAMPLES = """\
examples:
  nrm-plugin flow cat.jpg --model vgg16 --layers input features.14 features.28 output
      the patches, the 8 most relevant channels of two layers, and the class
  nrm-plugin flow cat.jpg --model resnet50 --layers input layer3 layer4 --coverage 0.5 --top 20 --dark
      of each layer as few channels as hold half of its relevance, 20 at most; for a dark background
  nrm-plugin layers --model vgg16
      names of layers

for each picture NAME the folder gets
  NAME-flow.png      the flow
  NAME-flow.html     the same to hover over, in one file that needs no network; with pip install 'nrm-plugin[html]'
  NAME-flow.json     the numbers, with all settings; FlowGraph.from_json reads them
  NAME-layers.png    what crosses, was absorbed above or goes around each layer, beside plain LRP
Results of other settings or of another picture are never overwritten: the new ones are called NAME-2-...

exit status: 0; 1 where some pictures could not be explained; 2 where none can be, because of the options"""

EXAMPLES = """\
examples:
  nrm-plugin explain cat.jpg --model vgg16
      what the network sees in the picture, and where; its weights are downloaded once
  nrm-plugin explain *.jpg --model resnet50 --target "tiger cat" --out cats
      one class in many pictures; its name or index
  nrm-plugin explain cat.jpg --model vgg16 --weights vgg16-397923af.pth
      without a connection: a state dict or safetensors file; --weights none tries the command with random ones
  nrm-plugin layers --model vgg16
      names for the next two
  nrm-plugin explain cat.jpg --model vgg16 --layer features.28
      the channels of a layer that carry most, and what each of them draws on
  nrm-plugin explain cat.jpg --model vgg16 --given "features.28[3,7]" --given "features.28[3] & ~features.21[40:50]"
      the pixels for the walks through channel 3 or 7 of a layer alone; & and, | or, ~ not
  nrm-plugin explain scan.png --model my_nets.py:make --weights mine.safetensors --size 128 --mean 0.5 --std 0.25
      your own: a function without arguments that returns a module, here one for grey pictures

for each picture NAME the folder gets
  NAME-relevance.png           the picture as the network gets it, beside its heat map
  NAME-relevance.safetensors   all numbers, with model, weights, rules and versions in the metadata
  NAME-LAYER.png, .csv         with --layer: heat maps of the most relevant channels, mass of all of them
  NAME-given.png               with --given: the conditional heat maps
Results of other settings or of another picture are never overwritten: the new ones are called NAME-2-...

exit status: 0; 1 where some pictures could not be explained; 2 where none can be, because of the options"""


def new_command(commands: Any, name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a command, whose texts keep their lines."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_explain(commands: Any) -> None:
    """Adds the command that explains pictures."""
    parser = new_command(
        commands, "explain", "explain pictures with a torchvision classifier or one of your own", EXPLAIN, EXAMPLES
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="a picture: PNG, JPEG, WebP, TIFF, GIF, …"
    )
    add_model(parser, "torchvision's default, downloaded once")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--target", metavar="CLASS",
                       help="index or name of the class to explain (default: the predicted one)")  # fmt: skip
    asked.add_argument("--layer", action="append", default=[], metavar="LAYER", dest="layers",
                       help="tell the channels of this layer; may be repeated")  # fmt: skip
    asked.add_argument("--given", action="append", default=[], metavar="EVENT",
                       help="a heat map for the walks through these neurons alone, such as 'features.28[3,7]'; "
                       "may be repeated")  # fmt: skip
    asked.add_argument("--channels", type=_count, default=CHANNELS, metavar="N",
                       help="how many channels of a layer to draw (default: %(default)s)")  # fmt: skip
    add_how(parser)
    parser.add_argument("--out", type=Path, default=Path("nrm-explained"), metavar="DIR",
                        help="folder for the results; made where it is missing (default: %(default)s)")  # fmt: skip
    parser.set_defaults(command=_explain)


def add_how(parser: argparse.ArgumentParser) -> None:
    """Options for the rules, the device and the amount at once."""
    how = parser.add_argument_group("how it is computed")
    _add_composite(how)
    how.add_argument("--residual", choices=("redistribute", "sink"), default="redistribute",
                     help="what rules do not hand down is handed down after all, up to the gain limit, or stays where "
                     "it is and is accounted for (default: %(default)s)")  # fmt: skip
    how.add_argument("--gain-limit", type=_gain, metavar="G",
                     help="largest factor for that: a number of at least 1, or inf (default: 2)")  # fmt: skip
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, … (default: %(default)s)")


def add_flow(commands: Any) -> argparse.ArgumentParser:
    """Adds the command that draws the flow of relevance through layers; returns its parser."""
    parser = new_command(commands, "flow", "draw how relevance flows through some layers", FLOW, FLOW_EXAMPLES)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="a picture, as for explain")
    add_model(parser, "torchvision's default, downloaded once", required=False)
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--layers", nargs="+", required=True, metavar="LAYER",
                       help="the layers, in any order, each above or below the others; input is cut into patches, "
                       "output has the classes")  # fmt: skip
    asked.add_argument("--target", metavar="CLASS",
                       help="index or name of the class to explain (default: the predicted one)")  # fmt: skip
    asked.add_argument("--top", type=_top, default=FlowOptions.top, metavar="N",
                       help="most channels of a layer to show (default: %(default)s)")  # fmt: skip
    asked.add_argument("--coverage", type=_share, metavar="SHARE",
                       help="of each layer only the fewest channels that hold this share of its relevance, such as "
                       "0.9 (default: no such limit)")  # fmt: skip
    asked.add_argument("--patches", type=_count, default=FlowOptions.patches, metavar="N",
                       help="patches of the picture along each side (default: %(default)s)")  # fmt: skip
    add_how(parser)
    parser.add_argument("--dark", action="store_true", help="pictures for a dark background")
    parser.add_argument("--out", type=Path, default=Path("nrm-flow"), metavar="DIR",
                        help="folder for the results; made where it is missing (default: %(default)s)")  # fmt: skip
    parser.set_defaults(command=_flow)
    return parser


def add_layers(commands: Any) -> None:
    """Adds the command that lists the layers of a model."""
    parser = commands.add_parser(
        "layers",
        help="list the layers of a model, for --layer and --given",
        description="Lists the layers of a model from the input to the output, by the names that `nrm-plugin explain` "
        "takes: their shapes, and the rule or kernel that hands relevance through each.",
    )
    add_model(parser, "none, as they change nothing here")
    _add_composite(parser)
    parser.set_defaults(command=_layers)


def add_model(parser: argparse.ArgumentParser, default: str, required: bool = True) -> None:
    """Options for the model and for how its inputs are prepared; ``default`` says what weights it has by itself."""
    group = parser.add_argument_group("the model")
    group.add_argument("--model", required=required, metavar="NAME",
                       help="a torchvision classifier such as vgg16, or package.module:factory or file.py:factory: a "
                       "function without arguments that returns a module, or the module itself")  # fmt: skip
    group.add_argument("--weights", metavar="NAME|FILE|none",
                       help="torchvision's by name, such as IMAGENET1K_V1 or DEFAULT; a file with a state dict (.pth, "
                       f".pt, .safetensors); none: random (default: {default}; your own has its own)")  # fmt: skip
    group.add_argument("--classes", type=Path, metavar="FILE",
                       help="names of the classes, one for each line (default: those of the weights)")  # fmt: skip
    group.add_argument("--size", type=_size, metavar="PIXELS",
                       help="scale the short side to this, and take the middle square (default: as the weights want "
                       "it; for your own model scale to 256 and take the middle 224)")  # fmt: skip
    group.add_argument("--mean", type=_numbers, metavar="R,G,B",
                       help="subtracted from pixels between 0 and 1; a single number for a model of grey pictures "
                       "(default: as the weights want it; for your own model that of ImageNet)")  # fmt: skip
    group.add_argument("--std", type=_numbers, metavar="R,G,B", help="what they are divided by then")


def _add_composite(parser: Any) -> None:
    parser.add_argument("--composite", default="nrm_default", metavar="RULES",
                        help=f"which rules: {', '.join(names())} (default: %(default)s)")  # fmt: skip


# -- commands -------------------------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> int:
    with one_line_warnings():
        request = request_of(options)
        check_folder(options.out)
        device = check_device(request.device)
        images, problems = _present(options.images)
        if images:  # else there is no need to fetch a model
            subject = subject_of(options, options.weights)
            subject.model.to(device)
            print(words.heading(subject, request))
            for found in explain(images, subject, request, options.out):
                for line in ("", *words.outcome(subject, found)) if found.answer else ():
                    print(line, flush=True)
                problems += found.problems
    return _told(problems, "explain")


def _flow(options: argparse.Namespace) -> int:
    missing = [name for name, value in (("IMAGE", options.images), ("--model", options.model)) if not value]
    if missing:
        raise RequestError(f"the following arguments are required: {', '.join(missing)}")
    wanted = FlowOptions(options.top, options.coverage, options.patches, options.dark)
    with one_line_warnings():
        request = request_of(options)
        check_folder(options.out)
        device = check_device(request.device)
        images, problems = _present(options.images)
        if images:
            subject = subject_of(options, options.weights)
            subject.model.to(device)
            print(words.heading(subject, request))
            for found in flows(images, subject, request, wanted, options.out):
                for line in ("", *words.flow(subject, found)) if found.graph else ():
                    print(line, flush=True)
                problems += found.problems
            if find_spec("plotly") is None:
                print(f"nrm-plugin: note: {HTML_MISSING}", file=sys.stderr)
    return _told(problems, "flow")


def _told(problems: list[str], command: str) -> int:
    """Prints what was not possible; returns the exit status."""
    if problems:
        print(f"\nnrm-plugin {command}: {len(problems)} could not be done:", file=sys.stderr)
    for problem in problems:
        print(f"  {' '.join(problem.split())}", file=sys.stderr)
    return 1 if problems else 0


def _layers(options: argparse.Namespace) -> None:
    check_composite_name(options.composite)
    is_own = ":" in options.model
    with one_line_warnings():
        subject = subject_of(options, options.weights or (None if is_own else "none"), tell=False)
        rows = taps(subject, options.composite)
    for line in words.table(rows, ("layer", "shape", "operation", "rule or kernel", "note")):
        print(line)


def _present(images: list[Path]) -> tuple[list[Path], list[str]]:
    """The files that are there, and what is wrong with the others."""
    present, problems = [], []
    for path in dict.fromkeys(images):
        try:
            check_image_file(path)
            present.append(path)
        except ImageError as error:
            problems.append(str(error))
    return present, problems


def request_of(options: argparse.Namespace) -> Request:
    """What is asked for, checked."""
    check_composite_name(options.composite)
    if options.gain_limit is not None and options.residual == "sink":
        raise RequestError("--gain-limit has no meaning with --residual sink, which hands down nothing more.")
    return Request(
        target=options.target,
        layers=tuple(dict.fromkeys(options.layers)),
        given=tuple(dict.fromkeys(parse(text) for text in getattr(options, "given", ()))),
        composite=options.composite,
        residual=options.residual,
        gain_limit=2.0 if options.gain_limit is None else options.gain_limit,
        device=options.device,
        channels=getattr(options, "channels", CHANNELS),
    )


def subject_of(options: argparse.Namespace, weights: str | None, tell: bool = True) -> Subject:
    """The model with its weights; what there is to know of it is told."""
    categories = class_names(options.classes) if options.classes else ()
    subject = load(options.model, weights, options.size, options.mean, options.std, categories)
    for note in subject.notes if tell else ():
        print(f"nrm-plugin: warning: {note}", file=sys.stderr)
    return subject


def class_names(path: Path) -> list[str]:
    """The names of the classes in a file, one for each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"--classes {shown(path)} is no text in UTF-8.") from error
    except OSError as error:
        raise RequestError(f"cannot read --classes {shown(path)}: {error.strerror or error}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return [" ".join(line.split()) for line in lines]


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings of the measure without the place in the code, which says nothing to who called from a shell."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"nrm-plugin: warning: {message}", file=sys.stderr)
        yield


# -- values ---------------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    return _whole(text, 8192, "number of pixels from 1 to 8192")


def _top(text: str) -> int:
    return _whole(text, MOST, f"number from 1 to {MOST}, for which a picture has room")


def _count(text: str) -> int:
    return _whole(text, 64, "number from 1 to 64")


def _whole(text: str, most: int, what: str) -> int:
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no {what}")


def _share(text: str) -> float:
    value = _real(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and up to 1, such as 0.9")
    return value


def _gain(text: str) -> float:
    value = _real(text)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return value


def _real(text: str) -> float:
    """A number; not a number where the text is none, which no comparison lets through."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor three with commas between them")
    return values
