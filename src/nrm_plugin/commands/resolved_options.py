"""Conversion of command-line options to requests, loaded models and class names."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import printable
from .composite_names import check_composite_name
from .event_syntax import parse
from .image_references import BLUR
from .model_loading import LoadedModel, load
from .options import BOTH, CHANNELS, DEFAULT_RULES, NO_REFERENCE, OF_LAYERS
from .request import SECANTS, Request, RequestError


def request_of(options: argparse.Namespace) -> Request:
    """Converts command-line options to a request.

    Raises:
        RequestError: If two options conflict.
        CompositeError: If the composite is unknown.
        ConditionError: If an event cannot be parsed.
    """
    drawn, reference = getattr(options, "map", None), getattr(options, "reference", None)
    has_rules = options.composite or options.gain_limit is not None or options.residual == "sink"
    finds_background = drawn is not None and not reference and not has_rules
    reference = None if reference == NO_REFERENCE else reference
    layers_reference = None if options.composite or reference else BLUR if drawn == BOTH else None
    if drawn == OF_LAYERS and not options.composite:
        reference = reference or BLUR
    composite = options.composite or (SECANTS if reference else DEFAULT_RULES)
    if composite == SECANTS:
        _check_no_rules(options)
    else:
        check_composite_name(composite)
    if options.gain_limit is not None and options.residual == "sink":
        raise RequestError("--gain-limit has no effect with --residual sink, which redistributes nothing.")
    return Request(
        target=options.target,
        against=getattr(options, "against", None),
        layers=tuple(dict.fromkeys(options.layers)),
        given=tuple(dict.fromkeys(parse(text) for text in getattr(options, "given", ()))),
        composite=composite,
        residual=options.residual,
        gain_limit=2.0 if options.gain_limit is None else options.gain_limit,
        device=options.device,
        channels=getattr(options, "channels", CHANNELS),
        reference=reference,
        map=drawn,
        layers_reference=layers_reference,
        finds_background=finds_background,
    )


def _check_no_rules(options: argparse.Namespace) -> None:
    """Raises :class:`RequestError` if options for rules are given without a composite."""
    given = {"--gain-limit": options.gain_limit is not None, "--residual sink": options.residual == "sink"}
    for name in (name for name, is_given in given.items() if is_given):
        raise RequestError(
            f"{name} applies to the rules of a composite, but slopes to a reference absorb nothing. Omit it, or pass "
            "--composite to apply rules to differences."
        )


def model_of(options: argparse.Namespace, weights: str | None, notes: bool = True) -> LoadedModel:
    """Loads the model given by the options. Prints notes about it if ``notes`` is True."""
    categories = class_names(options.classes) if options.classes else ()
    loaded = load(
        options.model, weights, options.size, options.mean, options.std, categories, getattr(options, "fit", "crop")
    )
    for note in loaded.notes if notes else ():
        print(f"nrm-plugin: warning: {note}", file=sys.stderr)
    return loaded


def class_names(path: Path) -> list[str]:
    """Reads class names from a file, one per line.

    Raises:
        RequestError: If the file cannot be read or is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"--classes {printable(path)} is not text in UTF-8.") from error
    except OSError as error:
        raise RequestError(f"cannot read --classes {printable(path)}: {error.strerror or error}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return [" ".join(line.split()) for line in lines]


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Context manager that prints warnings on a single line, without the source code.

    Matplotlib's missing-glyph warnings are suppressed; a note lists the missing characters when a figure is saved.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"nrm-plugin: warning: {message}", file=sys.stderr)
        yield
