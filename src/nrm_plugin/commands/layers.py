"""Arguments and entry point of ``nrm-plugin layers``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .options import add_composite, add_model

if TYPE_CHECKING:
    from .model_loading import LoadedModel

DESCRIPTION = """\
Lists the layers of a model from the input to the output, under the names that --layer and --given take: their shapes,
and the rule or kernel that propagates relevance through each."""

EXAMPLES = """\
example:
  nrm-plugin layers --model vgg16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``layers``."""
    add_model(parser, "none, as the list does not depend on them")
    add_composite(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the layers and returns the exit status."""
    from .composite_names import check_composite_name
    from .messages import table
    from .resolved_options import model_of, one_line_warnings

    check_composite_name(options.composite)
    is_own = ":" in options.model
    with one_line_warnings():
        loaded = model_of(options, options.weights or (None if is_own else "none"), notes=False)
        rows = layer_rows(loaded, options.composite)
    for line in table(rows, ("layer", "shape", "operation", "rule or kernel", "note")):
        print(line)
    return 0


def layer_rows(loaded: LoadedModel, composite: str) -> list[tuple[str, ...]]:
    """Returns the name, shape without batch dimension, operation, rule and note of each tap.

    Raises:
        RequestError: If the model fails or if the number of outputs differs from the number of class names.
    """
    import torch

    from ..measure.measure import RelevanceMeasure
    from ..recording.coverage import coverage
    from .composite_names import composite_of
    from .request import check_class_names, failures_of_the_model

    preprocessing = loaded.preprocessing
    inputs = torch.zeros(1, len(preprocessing.mean), preprocessing.size, preprocessing.size)
    rules = composite_of(composite, preprocessing.bounds(inputs))
    with failures_of_the_model(loaded, inputs):
        mu = RelevanceMeasure(loaded.model, inputs, start=torch.ones_like, composite=rules, uncovered="gradient")
        covered = coverage(loaded.model, inputs, rules).rows
    if mu.outputs.ndim == 2:
        check_class_names(loaded, mu.outputs.shape[1])
    steps = {f"{row.name}:{row.call}": row for row in covered} | {row.name: row for row in covered if not row.call}
    rows: list[tuple[str, ...]] = []
    for name in mu.layers:
        step = steps.get(name)
        shape = "×".join(map(str, mu.shape(name)[1:]))
        rows.append((name, shape, *((step.operation, step.rule, step.note) if step else ("", "", ""))))
    return rows
