"""Several pictures in a row: what is wrong with one does not lose the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..dataset.images import load_image, shown
from ..errors import ModelStateError, NRMError, UnsupportedOperationError, UnsupportedRuleError
from .composite_names import CompositeError
from .explanation import Answer, Request, RequestError, answer
from .model_loading import Subject
from .output_files import write

COMMON = (RequestError, CompositeError, ModelStateError, UnsupportedOperationError, UnsupportedRuleError)
"""Errors that every other picture would meet as well."""


@dataclass(frozen=True)
class Outcome:
    """What became of one picture.

    Attributes:
        path: Its file.
        answer: None where there is none.
        files: What was written.
        problems: What was not possible.
    """

    path: Path
    answer: Answer | None = None
    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def explain(paths: Sequence[Path], subject: Subject, request: Request, out: Path) -> Iterator[Outcome]:
    """Explains pictures one by one; each is written before the next is read.

    Args:
        paths: The files; one that is named twice is read once.
        subject: The model, on the device of the request.
        request: What to ask.
        out: Folder that exists.

    Raises:
        NRMError: One of :data:`COMMON`: no picture can be explained so.
    """
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        try:
            found = answer(subject, load_image(path), request)
            files = write(subject, request, found, out, taken)
        except COMMON:
            raise
        except (NRMError, OSError) as error:
            text = str(error) if isinstance(error, NRMError) else f"{error.strerror or error}"
            yield Outcome(path, problems=[text if shown(path) in text else f"{shown(path)}: {text}"])
            continue
        problems = [
            f"{shown(path)}, --given {given.condition.text!r}: {given.problem}"
            for given in found.given
            if given.problem
        ]
        yield Outcome(path, found, files, problems)
