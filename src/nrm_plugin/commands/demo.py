"""The demo: held-out digits explained with the embedded network, as a table and as pictures.

``docs/images/demo.png`` is the ``6-joint.png`` that ``nrm-plugin demo`` writes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import EpsilonPlus
from zennit.core import Composite

from ..demo.model import load_digits, load_model
from ..errors import NRMError
from ..events.event import at
from ..measure.flow_heat_maps import flow_maps
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, patches
from ..plots.flow import flow_figure
from ..plots.flow_html import save_sankey
from ..plots.heatmaps import Budget, budgets, heat_maps, image_and_heat_map, save
from ..plots.ribbons import percent
from .demo_joint import joint_figure, joint_relevance

LAYERS = (
    "classifier.3", "classifier.0", "features.12", "features.10", "features.7", "features.5", "features.2",
    "features.0", "input",
)  # fmt: skip
"""Rows of the table, from the output down; what lies between them hands relevance on unchanged."""
RULES = EpsilonPlus
"""Composite of the table and the budgets: Zennit's own, as our default does not leak. The pictures use the default."""
UPPER, LOWER = "features.12", "features.7"
CHANNELS, CONDITIONS, PATCHES = 6, 7, 4
MISREAD = "misread"
DEFAULT = ("6", "3", "9", MISREAD)


class DemoError(NRMError, ValueError):
    """A demo was asked for that there are no digits for."""


@dataclass(frozen=True)
class Sample:
    """One held-out digit.

    Attributes:
        name: Beginning of the names of its pictures.
        index: Its number among the held-out digits.
        label: What it is.
        read: What the network reads; this is explained.
    """

    name: str
    index: int
    label: int
    read: int

    def __str__(self) -> str:
        return f"held-out digit {self.index}: a {self.label}, read as {self.read}"


@dataclass(frozen=True)
class Row:
    """One layer, ``(N,)`` each, dimensionless.

    Attributes:
        layer: Name of the tap.
        plain: Sum of the relevance that Zennit alone hands to it, from 1 at the output.
        mass, sink, bypass: Of the measure; together 1.
        variation: Of the measure, at least 1.
    """

    layer: str
    plain: Tensor
    mass: Tensor
    sink: Tensor
    bypass: Tensor
    variation: Tensor


@dataclass(frozen=True)
class Report:
    """What a demo found and wrote.

    Attributes:
        samples: The digits.
        accuracy: Share of all held-out digits that the network reads rightly.
        rows: One for each of :data:`LAYERS`.
        files: The pictures, the one to look at first in front.
        flow: Picture of the flow of the first digit, and where plotly is there its page.
    """

    samples: list[Sample]
    accuracy: float
    rows: list[Row]
    files: list[Path]
    flow: list[Path] = field(default_factory=list)


def run(wanted: Sequence[str], out: Path) -> Report:
    """Explain held-out digits and write pictures.

    Args:
        wanted: ``"0"`` to ``"9"``, or ``"misread"``; one that comes twice gets two digits.
        out: An existing folder.

    Raises:
        DemoError: Nothing is wanted, or more digits of a kind than there are.
        OSError: A picture cannot be written.
    """
    with _one_thread():
        model, (images, labels) = load_model(), load_digits()
        samples, accuracy = choose(model, images, labels, wanted)
        chosen = images[[sample.index for sample in samples]]
        rows = layer_rows(model, chosen, [sample.read for sample in samples])
        files = []
        for sample, image in tqdm(
            _pairs(samples, chosen), desc="pictures", unit="digit", delay=2, disable=None, leave=False
        ):
            files += draw_sample(model, sample, image, out)
        files.append(draw_budgets(rows, samples, chosen, out))
        return Report(samples, accuracy, rows, files, draw_flow(model, samples[0], chosen[:1], out))


@torch.no_grad()
def choose(model: nn.Module, images: Tensor, labels: Tensor, wanted: Sequence[str]) -> tuple[list[Sample], float]:
    """Of each kind that is wanted, the digits that the network is surest of, and the share that it reads rightly.

    Raises:
        DemoError: Nothing is wanted, or something that is neither a digit nor ``"misread"``, or more than there are.
    """
    sure, read = model(images).double().log_softmax(1).max(1)
    samples: list[Sample] = []
    for kind in wanted:
        if kind == MISREAD:
            candidates = (read != labels).nonzero()[:, 0]
        elif kind in {str(digit) for digit in range(10)}:
            candidates = ((labels == int(kind)) & (read == labels)).nonzero()[:, 0]
        else:
            raise DemoError(f"{kind!r} is neither a digit from 0 to 9 nor {MISREAD!r}.")
        number = sum(sample.name.split("-")[0] == kind for sample in samples)
        if number >= len(candidates):
            raise DemoError(f"{kind!r} is wanted {number + 1} times, but only {len(candidates)} digits are held out.")
        index = int(candidates[sure[candidates].argsort(descending=True, stable=True)[number]])
        name = kind if number == 0 else f"{kind}-{number + 1}"
        samples.append(Sample(name, index, int(labels[index]), int(read[index])))
    if not samples:
        raise DemoError("no digit is wanted.")
    return samples, float((read == labels).double().mean())


def layer_rows(model: nn.Module, images: Tensor, target: Sequence[int]) -> list[Row]:
    """Plain Zennit and the measure, both with :data:`RULES`, layer by layer.

    Args:
        model: The network.
        images: ``(N, 1, 16, 16)``.
        target: Class to explain, one for each image.
    """
    mu = RelevanceMeasure(model, images, list(target), composite=RULES())
    plain = plain_sums(model, images, target, RULES(), LAYERS)
    masses = mu.marginal(list(LAYERS))
    return [
        Row(layer, plain[layer], masses[layer].flatten(1).sum(1), mu.sink(layer), mu.bypass(layer), mu.variation(layer))
        for layer in LAYERS
    ]


def plain_sums(
    model: nn.Module, images: Tensor, target: Sequence[int], composite: Composite, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Sum of Zennit's own relevance at each layer, ``(N,)``, from 1 at the target; nothing of this package is used.

    Args:
        model: The network.
        images: ``(N, …)``.
        target: Class to explain, one for each image.
        composite: Rules of all layers.
        layers: Names of modules, and ``"input"``.
    """
    model = copy.deepcopy(model)  # Zennit 1.0 leaves other parameters behind than it found
    leaf = images.clone().requires_grad_()
    seen = {"input": leaf}
    with composite.context(model):
        handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
            for name, module in model.named_modules()
            if name in layers
        ]
        try:
            output = model(leaf)
        finally:
            for handle in handles:
                handle.remove()
        start = torch.nn.functional.one_hot(torch.tensor(target), output.shape[1]).to(output)
        found = torch.autograd.grad(output, list(seen.values()), start)
    return {name: relevance.flatten(1).sum(1) for name, relevance in zip(seen, found, strict=True)}


def draw_sample(model: nn.Module, sample: Sample, image: Tensor, out: Path) -> list[Path]:
    """Three pictures of one digit: joint relevance of two layers, pixels, channels.

    Args:
        model: The network.
        sample: What the digit is.
        image: ``(1, 16, 16)``.
        out: Folder.
    """
    mu = RelevanceMeasure(model, image[None], sample.read)
    subject = f"{str(sample).capitalize()}. "
    relevance = mu.marginal("input")[0].sum(0)
    found = joint_relevance(mu, [UPPER, LOWER], CHANNELS)
    joint = joint_figure(mu, image, relevance, found, heading=f"{subject}Which channels say {sample.read}?")
    titles = ("image", f"relevance for “{sample.read}”")
    pixels = image_and_heat_map(image, relevance, titles, subject.rstrip(". "))
    mass = mu.marginal(UPPER, over="channel")[0]
    top = mass.abs().argsort(descending=True, stable=True)[:CONDITIONS].tolist()
    maps = mu.marginal("input", given=[at(UPPER).channel(channel) for channel in top])[:, 0].sum(1)
    channels = heat_maps(
        list(maps),
        [f"channel {channel}  ({percent(float(mass[channel]))})" for channel in top],
        f"{subject}What the channels of {UPPER} draw on",
        image,
    )
    figures = {"joint": joint, "pixels": pixels, "channels": channels}
    return [save(figure, out / f"{sample.name}-{kind}.png") for kind, figure in figures.items()]


def draw_budgets(rows: Sequence[Row], samples: Sequence[Sample], images: Tensor, out: Path) -> Path:
    """One picture with the layer budget of every digit.

    Args:
        rows: The layers, ``(N,)`` each.
        samples: ``N`` digits.
        images: ``(N, 1, 16, 16)``.
        out: Folder.
    """

    def line(what: str, number: int) -> list[float]:
        return [float(getattr(row, what)[number]) for row in rows]

    panels = [
        Budget(
            f"“{sample.read}”" if sample.read == sample.label else f"{sample.label} read as “{sample.read}”",
            mass=line("mass", number),
            sink=line("sink", number),
            bypass=line("bypass", number),
            reference=line("plain", number),
            image=images[number],
        )
        for number, sample in enumerate(samples)
    ]
    figure = budgets(
        [row.layer for row in rows], panels, f"Relevance of each layer with {RULES.__name__}, from the output down",
        "plain Zennit",
    )  # fmt: skip
    return save(figure, out / "budgets.png")


def draw_flow(model: nn.Module, sample: Sample, image: Tensor, out: Path) -> list[Path]:
    """The flow of one digit from patches of its picture to what it is read as; a page as well where plotly is there.

    Args:
        model: The network.
        sample: What is explained.
        image: ``(1, 1, 16, 16)``.
        out: Folder.
    """
    mu = RelevanceMeasure(model, image, sample.read)
    over = {"input": patches(image.shape[2:], PATCHES)}
    rows = {number: "row {}, col {}".format(*divmod(number, PATCHES)) for number in range(PATCHES**2)}
    names: dict[str, Names] = {"input": rows, "output": [f"“{digit}”" for digit in range(10)]}
    graph = mu.flow(["input", LOWER, UPPER, "output"], over, top=CHANNELS, names=names)
    maps = flow_maps(mu, graph, over)
    heading = f"{str(sample).capitalize()}. How relevance flows"
    files = [save(flow_figure(graph, heading, maps=maps), out / f"{sample.name}-flow.png")]
    if find_spec("plotly"):
        files.append(save_sankey(graph, out / f"{sample.name}-flow.html", heading, maps))
    return files


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the tensors of this network, so small that further threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pairs(samples: Sequence[Sample], images: Tensor) -> list[tuple[Sample, Tensor]]:
    return list(zip(samples, images, strict=True))
