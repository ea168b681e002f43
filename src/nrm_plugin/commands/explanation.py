"""What is asked of a picture, and what the measure answers. Nothing is printed or written here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from zennit.core import Composite

from ..dataset.images import Picture
from ..errors import CancellationError, HookedContainerError, NRMError, NullEventError, UncoveredLayerError
from ..events.event import at
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..recording.coverage import coverage
from .composite_names import composite_of
from .event_syntax import Condition
from .model_loading import Subject

CHANNELS = 7


class RequestError(NRMError, ValueError):
    """A question that this model has no answer to, whatever the picture."""


@dataclass(frozen=True)
class Request:
    """What to ask of every picture.

    Attributes:
        target: Index or name of the class to explain; None for the predicted one.
        layers: Layers whose channels are told.
        given: Conditions, with one heat map each.
        composite: Name in Zennit's registry.
        residual, gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        device: Where to compute.
        channels: How many channels of a layer get a heat map.
    """

    target: str | None = None
    layers: tuple[str, ...] = ()
    given: tuple[Condition, ...] = ()
    composite: str = "nrm_default"
    residual: Residual = "redistribute"
    gain_limit: float | None = 2.0
    device: str = "cpu"
    channels: int = CHANNELS


@dataclass(frozen=True)
class Share:
    """Where the relevance is at one tap; mass, sink and bypass sum to 1.

    Attributes:
        mass, sink, bypass, variation: As in :class:`~nrm_plugin.RelevanceMeasure`.
    """

    mass: float
    sink: float
    bypass: float
    variation: float


@dataclass(frozen=True)
class LayerAnswer:
    """One layer.

    Attributes:
        name: Of the tap.
        relevance: Of each neuron, without the batch.
        mass: Of each channel, ``(C,)``.
        share: Of the layer.
        top: The channels of most absolute mass.
        maps: What each of these draws on, ``(len(top), H, W)``: its joint relevance with the pixels.
    """

    name: str
    relevance: Tensor
    mass: Tensor
    share: Share
    top: list[int]
    maps: Tensor


@dataclass(frozen=True)
class GivenAnswer:
    """One condition.

    Attributes:
        condition: The condition.
        mass: Of the event.
        relevance: Of the inputs given the event, ``(C, H, W)``; None where the measure refuses to divide.
        problem: Why it did.
    """

    condition: Condition
    mass: float
    relevance: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """Everything about one picture; tensors are on the CPU.

    Attributes:
        picture: The picture.
        image: What the model saw of it, ``(3, S, S)`` in [0, 1].
        outputs: Of the model, ``(K,)``.
        target: The class that is explained.
        relevance: Of the inputs, ``(C, S, S)``.
        share: At the inputs.
        layers: The layers asked for.
        given: The conditions asked for.
    """

    picture: Picture
    image: Tensor
    outputs: Tensor
    target: int
    relevance: Tensor
    share: Share
    layers: list[LayerAnswer] = field(default_factory=list)
    given: list[GivenAnswer] = field(default_factory=list)


def answer(subject: Subject, picture: Picture, request: Request) -> Answer:
    """Asks the measure of one picture.

    Args:
        subject: The model, on the device of the request.
        picture: The picture.
        request: What to ask.

    Raises:
        RequestError: Target, layers or conditions do not fit the model, or the model fails.
        NRMError: The model has no measure with these rules.
    """
    inputs = subject.prepare(picture.image).to(request.device)
    chooser = Chooser(subject, request.target)
    mu = measured(subject, inputs, request, chooser)
    check_layers(mu, subject, [*request.layers, *(name for given in request.given for name in given.layers)])
    relevance = mu.marginal("input")[0]
    return Answer(
        picture,
        subject.prepare.undone(inputs).cpu(),
        chooser.outputs.cpu(),
        chooser.target,
        relevance.cpu(),
        _share(mu, "input", relevance),
        [_layer(mu, name, request.channels) for name in request.layers],
        [_given(mu, condition) for condition in request.given],
    )


def check_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        RequestError: No such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        has = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        has += ["mps"] if torch.backends.mps.is_available() else []
        text = (str(error).splitlines() or [""])[0].rstrip(".")
        raise RequestError(f"--device {name} cannot be used: {text}. Here are: {', '.join(['cpu', *has])}.") from error
    return device


def taps(subject: Subject, composite: str) -> list[tuple[str, ...]]:
    """Every layer that can be asked for: name, shape without the batch, operation, rule, note.

    Args:
        subject: The model; the output does not depend on its weights.
        composite: Name in Zennit's registry.

    Raises:
        RequestError: The model fails.
    """
    inputs = torch.zeros(1, len(subject.prepare.mean), subject.prepare.size, subject.prepare.size)
    rules = composite_of(composite, subject.prepare.bounds(inputs))
    with _told_by(subject, inputs):
        mu = RelevanceMeasure(subject.model, inputs, start=torch.ones_like, composite=rules, uncovered="gradient")
        found = coverage(subject.model, inputs, rules).rows
    steps = {f"{row.name}:{row.call}": row for row in found} | {row.name: row for row in found if not row.call}
    lines: list[tuple[str, ...]] = []
    for name in mu.layers:
        row = steps.get(name)
        shape = "×".join(map(str, mu.shape(name)[1:]))
        lines.append((name, shape, *((row.operation, row.rule, row.note) if row else ("", "", ""))))
    return lines


# -- inside ---------------------------------------------------------------------------------------------------------


class Chooser:
    """The start of a measure, chosen when the outputs are there: the model then runs only once.

    Attributes:
        outputs: ``(K,)``.
        target: The class.
    """

    def __init__(self, subject: Subject, wanted: str | None) -> None:
        self.subject, self.wanted = subject, wanted
        self.outputs, self.target = torch.empty(0), 0

    def __call__(self, outputs: Tensor) -> Tensor:
        name = self.subject.name
        if outputs.ndim > 2 or (outputs.ndim == 2 and outputs.shape[1] == 0):
            raise RequestError(
                f"the output of {name} has shape {tuple(outputs.shape)}. Explained are classifiers, with an output of "
                "one number for each class: wrap the model in a module that reduces its output to these."
            )
        self.outputs = outputs[0].reshape(-1).clone()
        count, known = len(self.outputs), self.subject.categories
        self.target = int(self.outputs.argmax()) if self.wanted is None else target_of(self.wanted, known, count)
        return torch.nn.functional.one_hot(torch.tensor([self.target]), count).to(outputs).reshape(outputs.shape)


def target_of(wanted: str, categories: Sequence[str], count: int) -> int:
    """The index of a class.

    Args:
        wanted: An index, or a name, whose case does not matter.
        categories: Names of the classes; empty where they are not known.
        count: Number of classes.

    Raises:
        RequestError: No such class; the message lists near names.
    """
    if wanted.strip().lstrip("+-").isdecimal():
        index = int(wanted)
        if not 0 <= index < count:
            raise RequestError(f"--target {index} is out of range: the model has {count} classes, 0 to {count - 1}.")
        return index
    if not categories:
        raise RequestError(
            f"--target {wanted!r} is a name, but the names of the classes are not known for these weights. Give the "
            f"index, 0 to {count - 1}, or the names in a file, one for each line: --classes FILE."
        )
    folded = [name.casefold() for name in categories]
    key = " ".join(wanted.casefold().split())
    found = [index for index, name in enumerate(folded) if name == key]
    if len(found) > 1:
        raise RequestError(f"--target {wanted!r} is the name of {len(found)} classes. Give the index: {found}.")
    if found and found[0] >= count:
        raise RequestError(f"--target {wanted!r} is class {found[0]}, but the model has only {count} classes.")
    if found:
        return found[0]
    inside = [name for name in folded if key and key in name]
    near = list(dict.fromkeys([*inside[:5], *difflib.get_close_matches(key, folded, n=5, cutoff=0.6)]))[:5]
    hint = ", ".join(f"{categories[folded.index(name)]} ({folded.index(name)})" for name in near)
    raise RequestError(
        f"there is no class {wanted!r}. "
        + (f"Near names: {hint}." if near else f"Give the name as the model has it, or the index, 0 to {count - 1}.")
    )


class _told_by:  # noqa: N801  (reads as a word: with _told_by(…))
    """What a model raises on an input becomes one line that says so."""

    def __init__(self, subject: Subject, inputs: Tensor) -> None:
        self.subject, self.shape = subject, tuple(inputs.shape)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NRMError):
            text = " ".join(f"{type(error).__name__}: {error}".split())
            shape = "×".join(map(str, self.shape))
            raise RequestError(
                f"{self.subject.name} fails on an input of {shape} ({text[:300]}). If that is not its input, "
                "see --size, --mean and --std."
            ) from error


def measured(subject: Subject, inputs: Tensor, request: Request, chooser: Chooser) -> RelevanceMeasure:
    """The measure of one prepared picture.

    Raises:
        RequestError: The target does not fit, the model fails, or the composite has no rule for one of its layers.
    """
    composite: Composite = composite_of(request.composite, subject.prepare.bounds(inputs))
    try:
        with _told_by(subject, inputs):
            return RelevanceMeasure(
                subject.model,
                inputs,
                start=chooser,
                composite=composite,
                residual=request.residual,
                gain_limit=request.gain_limit,
            )
    except UncoveredLayerError as error:
        where = str(error).partition(" has no rule")[0]
        raise RequestError(
            f"--composite {request.composite} has no rule for {where}, whose gradient alone would lose track of "
            "relevance. Take another composite, such as nrm_default or epsilon_plus_flat."
        ) from error


def check_layers(mu: RelevanceMeasure, subject: Subject, names: Sequence[str]) -> None:
    """Raises :class:`RequestError` for a layer that the measure has not, with near names."""
    known = mu.layers
    for name in names:
        calls = [layer for layer in known if layer.startswith(f"{name}:")]
        if name in known:
            continue
        if len(calls) > 1:
            raise RequestError(f"{name} is called {len(calls)} times. Say which call: {', '.join(calls)}.")
        try:
            mu.shape(name)
        except HookedContainerError as error:
            raise RequestError(str(error)) from error
        except NRMError:
            # A block that hands on what its last layer returned goes by the name of that in the list of taps.
            modules = [module for module, _ in subject.model.named_modules() if module]
            near = difflib.get_close_matches(name, dict.fromkeys([*known, *modules]), n=5, cutoff=0.4)
            hint = f"Near names: {', '.join(near)}. " if near else ""
            raise RequestError(
                f"{subject.name} has no layer {name!r}. {hint}All are listed by: nrm-plugin layers --model "
                f"{subject.name}"
            ) from None


def _share(mu: RelevanceMeasure, layer: str, relevance: Tensor) -> Share:
    numbers = (relevance.sum(), mu.sink(layer), mu.bypass(layer), mu.variation(layer))
    return Share(*(float(number) for number in numbers))


def _layer(mu: RelevanceMeasure, name: str, channels: int) -> LayerAnswer:
    relevance = mu.marginal(name)
    mass = mu.marginal(name, over="channel")[0].flatten()
    order = mass.abs().argsort(descending=True, stable=True)[:channels].tolist()
    top = [index for index in order if mass[index] != 0]
    maps = mu.marginal("input", joint=[at(name).channel(channel) for channel in top])[:, 0].sum(1)
    return LayerAnswer(name, relevance[0].cpu(), mass.cpu(), _share(mu, name, relevance[0]), top, maps.cpu())


def _given(mu: RelevanceMeasure, condition: Condition) -> GivenAnswer:
    mass = 0.0
    try:
        mass = float(mu(condition.event))
        return GivenAnswer(condition, mass, mu.marginal("input", given=condition.event)[0].cpu())
    except NullEventError:
        return GivenAnswer(condition, mass, None, "no relevance goes this way, so there is none to be shared out")
    except CancellationError:
        problem = f"positive and negative relevance cancel to {100 * mass:.2g} % on this way, too little to divide by"
        return GivenAnswer(condition, mass, None, f"{problem}. Take fewer channels at a time")
    except NRMError as error:
        raise RequestError(f"--given {condition.text!r}: {error}") from error
