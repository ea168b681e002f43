"""Explanations of several texts and their output files."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..attribution.text import AUTO, Row, TextExplanation, explain_text
from ..errors import UnknownLayerError, printable
from ..plots.text_page import text_page
from .composite_names import composite_of
from .output_files import versions, write_json, writing
from .request import NONE, SECANTS, Request, RequestError
from .text_models import TextModel


@dataclass(frozen=True)
class Texts:
    """Explanations of texts by the same model and request.

    Attributes:
        loaded: The model and its tokenizer.
        request: Settings shared by all texts.
        options: The parsed options of the command.
    """

    loaded: TextModel
    request: Request
    options: argparse.Namespace

    def explained(self, text: str, **changed: Any) -> TextExplanation:
        """Explains one text. ``changed`` overrides arguments of :func:`~nrm_plugin.attribution.text.explain_text`."""
        request = self.request
        rules: dict[str, Any] = {"composite": None, "residual": None, "gain_limit": None}
        if request.composite != SECANTS:
            bounds = (torch.zeros(1), torch.ones(1))
            rules = {"composite": composite_of(request.composite, bounds), "residual": request.residual}
            rules["gain_limit"] = request.gain_limit if request.residual == "redistribute" else None
        arguments: dict[str, Any] = {
            "against": None if request.against == NONE else request.against or "rest",
            "reference": request.reference,
            "position": self.options.position,
            "layers": request.layers,
            "given": [condition.event for condition in request.given],
            **rules,
        }
        try:
            result = explain_text(
                self.loaded.model, self.loaded.tokenizer, text, request.target, **{**arguments, **changed}
            )
        except UnknownLayerError as error:
            raise RequestError(f"{error} --sites lists the names of heads, neurons and the residual stream.") from error
        titles = [condition.text for condition in request.given]
        given = tuple(
            Row(title, row.mass, row.relevance, row.problem) for title, row in zip(titles, result.given, strict=False)
        )
        return TextExplanation(**{**vars(result), "given": given})

    def sites(self, text: str) -> Iterator[str]:
        """Yields the site names and their shapes, one per line."""
        mu = self.explained(text, layers=(), given=()).measure
        assert mu is not None
        if not mu.sites:
            yield "this model has no residual connections, from which sites are derived; its layers:"
        names = mu.sites or mu.layers
        width = max(len(name) for name in names)
        for name in names:
            yield f"{name:{width}}  {'×'.join(map(str, mu.shape(name)[1:]))}"
        heads = next((name for name in mu.sites if name.endswith("attn")), None)
        neurons = next((name for name in mu.sites if name.endswith("neuron")), None)
        parts = [f"{heads}.head.0 is one head"] if heads else []
        parts += [f"{neurons}.0 is one neuron"] if neurons else []
        if parts:
            yield f"For --given, {', '.join(parts)}."


def reference_of(options: argparse.Namespace) -> str | None:
    """Returns the requested reference. The default is :data:`AUTO`, or None if rules are given."""
    if options.reference is None:
        has_rules = options.composite or options.residual == "sink" or options.gain_limit is not None
        return None if has_rules else AUTO
    return None if options.reference == NONE else str(options.reference)


def texts_of(given: Sequence[str]) -> list[str]:
    """Returns the texts with the lines of stdin in place of ``-``.

    Raises:
        RequestError: If all texts are empty.
    """
    texts = [line.rstrip("\n") for text in given for line in (sys.stdin if text == "-" else [text])]
    nonempty = [text for text in texts if text.strip()]
    if not nonempty:
        raise RequestError("there is no text to explain: give it in quotes, or - for one text per line of stdin.")
    return nonempty


def _title(name: str) -> str:
    """Returns the name of a model without the path to its folder."""
    return Path(name).resolve().name if Path(name).exists() else name


def write(
    results: Sequence[TextExplanation], loaded: TextModel, request: Request, options: argparse.Namespace
) -> list[Path]:
    """Writes the HTML page and the raw values of all texts. Returns the paths."""
    page, numbers = options.out / "texts.html", options.out / "texts.json"
    with writing(page) as temporary:
        temporary.write_text(
            text_page(results, f"Relevance of words, {printable(_title(loaded.name))}"), encoding="utf-8"
        )
    settings = {
        "model": printable(loaded.name),
        "composite": request.composite,
        "residual": request.residual,
        "gain_limit": "inf" if request.gain_limit == math.inf else request.gain_limit,
        "reference": request.reference,
        "versions": versions(),
    }
    write_json(numbers, {"settings": settings, "texts": [_numbers(result) for result in results]})
    return [page, numbers]


def _numbers(result: TextExplanation) -> dict[str, Any]:
    return {
        "text": result.text.text,
        "target": result.target,
        "against": result.against,
        "reference": result.reference or None,
        "output": result.output,
        "predictions": [list(pair) for pair in result.predictions],
        "tokens": list(result.text.tokens),
        "token_relevance": result.tokens.tolist(),
        "words": [word.text for word in result.text.words],
        "word_relevance": result.words.tolist(),
        "decoder": result.decoder,
        "absorbed": result.absorbed,
        "variation": result.variation,
        "layers": {layer: [_row(row) for row in rows] for layer, rows in result.layers.items()},
        "given": [_row(row) for row in result.given],
    }


def _row(row: Row) -> dict[str, Any]:
    relevance = None if row.relevance is None else row.relevance.tolist()
    return {"title": row.title, "mass": row.mass, "word_relevance": relevance, "problem": row.problem}


__all__ = ["Texts", "reference_of", "texts_of", "write"]
