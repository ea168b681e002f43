"""The demo, which explains how the bundled network classifies held-out digits by a table of layers and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..demo.model import load_digits, load_model
from .demo_figures import save_budgets, save_flow, save_sample
from .demo_values import TABLE_COMPOSITE, Row, Sample, choose, layer_rows


@dataclass(frozen=True)
class Report:
    """Results of the demo.

    Attributes:
        samples: The explained digits.
        accuracy: Accuracy of the network on all held-out digits.
        rows: One row per layer of :data:`~nrm_plugin.commands.demo_values.LAYERS`.
        figures: Figure files: three per digit and the layer budgets of all digits.
        flow: Figure and HTML page of the flow for the first digit.
        against: ``"rest"`` if the figures contrast each digit with the other digits, or ``"none"``.
        composite: Name of the composite used for the rows.
    """

    samples: list[Sample]
    accuracy: float
    rows: list[Row]
    figures: list[Path]
    flow: list[Path]
    against: str = "rest"
    composite: str = TABLE_COMPOSITE.__name__


def demo_report(kinds: Sequence[str], out: Path, against: str = "rest") -> Report:
    """Explains held-out digits and saves the figures.

    Args:
        kinds: ``"0"`` to ``"9"`` for a digit, or ``"misread"`` for a misclassified one. A repeated kind
            selects its next digit.
        out: Output folder, which must exist.
        against: ``"rest"`` or ``"none"``.

    Raises:
        DemoError: If no kind is given, or more digits of a kind are requested than exist.
        OSError: If a figure cannot be written.
    """
    with _one_thread():
        model, (images, labels) = load_model(), load_digits()
        samples, accuracy = choose(model, images, labels, kinds)
        chosen = images[[sample.index for sample in samples]]
        rows = layer_rows(model, chosen, [sample.predicted for sample in samples])
        figures = []
        pairs = list(zip(samples, chosen, strict=True))
        for sample, image in tqdm(pairs, desc="figures", unit="digit", delay=2, disable=None, leave=False):
            figures += save_sample(model, sample, image, out, against)
        figures.append(save_budgets(rows, samples, chosen, TABLE_COMPOSITE.__name__, out))
        flow = save_flow(model, samples[0], chosen[:1], out, against)
        return Report(samples, accuracy, rows, figures, flow, against)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Context manager that limits torch to one thread. The tensors are too small to benefit from several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
