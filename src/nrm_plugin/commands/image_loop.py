"""Loop over several images that continues if one of them fails."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..dataset.images import ImageError, LoadedImage, check_image_file, load_image
from ..errors import ModelStateError, NRMError, UnsupportedOperationError, UnsupportedRuleError, printable
from . import messages
from .composite_names import CompositeError
from .failures import FAILED, errors
from .image_references import ReferenceImageError
from .model_loading import LoadedModel
from .output_files import OutputError, check_folder
from .request import Request, RequestError, check_device
from .resolved_options import model_of, one_line_warnings, request_of

COMMON = (
    OutputError, RequestError, ReferenceImageError, CompositeError, ModelStateError, UnsupportedOperationError,
    UnsupportedRuleError,
)  # fmt: skip
"""Errors that affect all images and therefore stop the command unless an image was already explained."""


@dataclass(frozen=True)
class Printed:
    """Output of a command for one image.

    Attributes:
        lines: Lines for stdout.
        problems: Failures, which are listed on stderr at the end.
    """

    lines: list[str]
    problems: list[str] = field(default_factory=list)


Explain = Callable[[LoadedModel, LoadedImage, Request, Path, set[str]], Printed]
"""Function that explains an image, writes files to a folder, and adds their stem to the set of used stems."""


def explain_each(options: argparse.Namespace, explain: Explain) -> int:
    """Explains images one by one and writes the files of each image before reading the next.

    Args:
        options: The parsed options of the command.
        explain: Function applied to each image.

    Returns:
        The exit status, which is 1 if an image could not be explained.

    Raises:
        NRMError: If no image can be explained with these options.
    """
    with one_line_warnings():
        request = request_of(options)
        check_folder(options.out)
        device = check_device(request.device)
        images, problems = readable(options.images)
        if images:  # without images, no model is downloaded
            loaded = model_of(options, options.weights)
            loaded.model.to(device)
            print(messages.heading(loaded, request))
            taken: set[str] = set()
            common: tuple[type[Exception], ...] = COMMON
            for path in images:
                printed = _explained(path, common, lambda image: explain(loaded, image, request, options.out, taken))
                common = (OutputError,) if printed.lines else common
                for line in ("", *printed.lines) if printed.lines else ():
                    print(line, flush=True)
                problems += printed.problems
    return print_problems(problems, options.name)


def _explained(path: Path, common: tuple[type[Exception], ...], explain: Callable[[LoadedImage], Printed]) -> Printed:
    try:
        return explain(load_image(path))
    except common:
        raise
    except (NRMError, OSError) as error:
        text = str(error) if isinstance(error, NRMError) else f"{error.strerror or error}"
        return Printed([], [text if printable(path) in text else f"{printable(path)}: {text}"])


def readable(images: list[Path]) -> tuple[list[Path], list[str]]:
    """Returns the readable image files without duplicates and an error message for each of the others."""
    present, problems = [], []
    for path in dict.fromkeys(images):
        try:
            check_image_file(path)
            present.append(path)
        except ImageError as error:
            problems.append(str(error))
    return present, problems


def print_problems(problems: list[str], command: str) -> int:
    """Prints the failures to stderr and returns the exit status."""
    if problems:
        print(f"\nnrm-plugin {command}: {len(problems)} failed:", file=errors())
    for problem in problems:
        print(f"  {' '.join(problem.split())}", file=errors())
    return FAILED if problems else 0
