"""Explanations of a text model of transformers: which words are evidence for a class, a masked or the next token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Composite

from ..errors import (
    CancellationError,
    DifferenceError,
    InputError,
    NullEventError,
    TargetError,
    UnsupportedOperationError,
    brief,
)
from ..events.event import Event, at
from ..kernels.normalization import Residual
from ..measure.attention_events import head_count
from ..measure.measure import RelevanceMeasure
from ..model.contrast import REST
from .terminal_output import REST as THE_REST
from .terminal_output import lines
from .text_tasks import Task, task_of, tokenized
from .words import Tokens, Word

BEST = 5
"""Number of predictions and of units of a layer that are kept."""
AUTO = "auto"
"""Mask tokens in place of the words are the reference, where the tokenizer has one and no rules are given."""


@dataclass(frozen=True)
class Row:
    """Relevance of the words under one condition, or together with one unit of a layer.

    Attributes:
        title: What the walks cross.
        mass: Mass of these walks.
        relevance: Relevance of each word, ``(words,)``, on the CPU: of all of it for a unit, of the walks for a
            condition, where it sums to 1; None if the condition has no mass to divide by.
        problem: The reason why it is None.
    """

    title: str
    mass: float
    relevance: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class TextExplanation:
    """The explanation of one text. ``print`` shows it in a terminal; ``plots.text_page`` returns it as HTML.

    Attributes:
        text: The text, with its tokens and words.
        kind: ``"class"``, ``"mask"``, ``"next"`` or ``"token"``.
        target: Name of the explained class or token.
        against: What it is compared with; empty if nothing.
        reference: The text or the token in place of every word from which the difference is explained; empty if none.
        output: The explained number: an output, a difference of outputs, or its change from the reference.
        predictions: The most likely classes or tokens, with their probabilities.
        tokens: Relevance of each token, ``(T,)``, on the CPU.
        words: Relevance of each word, ``(words,)``. Positive relevance is evidence for the target, and all relevance,
            with the absorbed one, sums to 1, or to -1 if the output is negative: if the target is behind what it is
            compared with, or further behind than with the reference.
        decoder: Relevance of the token with which a decoder starts.
        absorbed: Relevance that ends at constants or in rules.
        variation: Sum of all absolute relevance at the tokens; rounding errors and cancellation grow with it.
        layers: For each layer, its most relevant units.
        given: One row for each condition.
        measure: The measure, for further queries.

    Examples:
        >>> explanation = explain_text(model, tokenizer, "a dull film", "negative")
        >>> explanation.words.shape, round(abs(float(explanation.words.sum())), 4)
        (torch.Size([5]), 1.0)
    """

    text: Tokens
    kind: str
    target: str
    against: str
    reference: str
    output: float
    predictions: tuple[tuple[str, float], ...]
    tokens: Tensor
    words: Tensor
    decoder: float
    absorbed: float
    variation: float
    layers: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    given: tuple[Row, ...] = ()
    measure: RelevanceMeasure | None = field(default=None, repr=False, compare=False)

    def lines(self, width: int = 80, color: bool = False) -> list[str]:
        """Returns the explanation as lines for a terminal of the given width, with colours if ``color``.

        Examples:
            >>> max(map(len, explanation.lines(width=60))) <= 60
            True
        """
        return lines(self, width, color)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def explain_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    target: str | int | None = None,
    *,
    against: str | int | None = REST,
    reference: str | None = AUTO,
    position: int | None = None,
    layers: Sequence[str] | str = (),
    given: Sequence[Event | str] | Event | str = (),
    composite: Composite | None = None,
    residual: Residual | None = None,
    gain_limit: float | None = None,
) -> TextExplanation:
    """Explains what a text model of transformers predicts, by the words of the text.

    What is explained follows from the model: the class of a text, the token behind the mask, the next token, or the
    first token that a decoder writes.

    Args:
        model: A model with a head, in evaluation mode.
        tokenizer: Its tokenizer.
        text: The text; with a mask token for a masked language model.
        target: Name or index of the class, or the token; by default the most likely one.
        against: What the target is compared with: ``"rest"`` for all others, weighted by their softmax, one of them, or
            None to explain the output alone.
        reference: Another text with the same number of tokens, or a token that replaces every word, but no special
            token: explain the change of the prediction from there; nothing is absorbed. By default, ``"auto"``,
            the tokenizer's mask token, if it has one, no rules are given, and both predictions can be compared, which
            needs that they differ and that a mixture of experts takes the same path. None to explain the prediction
            itself, by the rules of the composite.
        position: The token whose prediction is explained, where a model predicts several.
        layers: Layers or sites, such as ``blocks.1.attn``, of which the most relevant heads or channels are listed.
        given: Events or names, such as ``blocks.1.attn.head.3``: the words are shown for these walks alone.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`; like the next two, it makes None the default of
            ``reference``.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Raises:
        InputError: If the model, the text or the position do not fit.
        TargetError: If a class or token is unknown.
        DifferenceError: If the reference does not fit the text.
        UnknownLayerError: If a layer is unknown.

    Examples:
        >>> explanation = explain_text(model, tokenizer, "a dull film", "negative")
        >>> explanation.reference
        '[MASK]'
        >>> [word.text for word in explanation.text.words]
        ['[CLS]', 'a', 'dull', 'film', '[SEP]']

    Source: docs/text.md.
    """
    task = task_of(model, tokenizer, text, position)
    chosen = int(task.logits.argmax()) if target is None else task.index(target, "target")
    compared = against if against == REST or against is None else task.index(against, "against")
    if len(task.logits) == 1:
        compared = None
    measure = partial(
        RelevanceMeasure,
        model,
        task.inputs,
        chosen,
        against=compared,
        composite=composite,
        residual=residual,
        gain_limit=gain_limit,
        additional_forward_kwargs=task.others,
        output=task.output,
    )
    if reference == AUTO:
        is_ruled = any(setting is not None for setting in (composite, residual, gain_limit))
        mask = None if is_ruled else getattr(tokenizer, "mask_token", None)
        reference, mu = _of_masks(measure, task, tokenizer, mask)
    else:
        mu = measure(reference=None if reference is None else _reference(task, tokenizer, reference))
    ends = [name for name in mu.ends if mu.shape(name)[1:2] == task.text.ids.shape[1:]]
    if not ends:
        raise InputError(
            f"{type(model).__name__} looks up no row per token, so that relevance of tokens is not defined."
        )
    words = Words(mu, ends, task)
    tokens = words.relevance()
    started = sum(float(mu.sign * mu.marginal(end).sum()) for end in mu.ends if end not in ends)
    return TextExplanation(
        task.text,
        task.kind,
        task.name(chosen),
        _name(task, chosen, compared),
        reference or "",
        float(mu.output),
        _predictions(task, chosen),
        tokens,
        task.text.of_words(tokens),
        started,
        float(mu.sign) - float(tokens.sum()) - started,
        float(mu.variation(ends[0])),
        {layer: tuple(words.units(layer)) for layer in _listed(layers)},
        tuple(words.given(event) for event in _listed(given)),
        mu,
    )


def _name(task: Task, chosen: int, compared: int | str | None) -> str:
    """Returns the name of what the target is compared with: of the only other class, if there are two."""
    if compared is None:
        return ""
    if isinstance(compared, str) and len(task.logits) != 2:
        return THE_REST
    return task.name(1 - chosen if isinstance(compared, str) else compared)


def _listed(values: Any) -> list[Any]:
    is_one = isinstance(values, (str, Event)) or not isinstance(values, Iterable)
    return [values] if is_one else list(values)


def _predictions(task: Task, chosen: int) -> tuple[tuple[str, float], ...]:
    shares = torch.softmax(task.logits.double(), 0)
    best = task.logits.argsort(descending=True, stable=True)[:BEST].tolist()
    return tuple((task.name(index), float(shares[index])) for index in dict.fromkeys([*best, chosen]))


def _of_masks(
    measure: Callable[..., RelevanceMeasure], task: Task, tokenizer: Any, mask: str | None
) -> tuple[str | None, RelevanceMeasure]:
    """Returns the mask and the measure of the change from a text of masks.

    Without a mask token, if the prediction is the same there, or if the model takes another path, as by other experts,
    the measure is of the prediction itself.
    """
    if mask:
        with contextlib.suppress(DifferenceError, TargetError, UnsupportedOperationError):
            return str(mask), measure(reference=_reference(task, tokenizer, str(mask)))
    return None, measure()


def _reference(task: Task, tokenizer: Any, reference: str) -> dict[str, Tensor]:
    """Returns the ids of the reference: another text, or one token in place of every token that is not special."""
    ids = task.text.ids
    alone = tokenizer.encode(reference, add_special_tokens=False)
    other, _ = tokenized(tokenizer, reference, ids.device)
    if other.ids.shape == ids.shape:
        replaced = other.ids
    elif len(alone) == 1:
        is_special = torch.zeros_like(ids, dtype=torch.bool)
        is_special[0, [place for word in task.text.words if word.is_special for place in word.tokens]] = True
        replaced = torch.where(is_special, ids, alone[0])
    else:
        raise DifferenceError(
            f"reference={brief(reference)} has {other.ids.shape[1]} tokens and the text has {ids.shape[1]}: "
            f"{' '.join(other.tokens)} and {' '.join(task.text.tokens)}. Give a text with as many tokens, or one "
            "token, such as the mask or unknown token, that replaces all."
        )
    return {"input_ids": replaced} | {key: value for key, value in task.inputs.items() if key != "input_ids"}


@dataclass(frozen=True)
class Words:
    """Relevance of the tokens of a text in a measure.

    Attributes:
        mu: The measure.
        ends: Names of the taps where walks end at the tokens.
        task: The task.
    """

    mu: RelevanceMeasure
    ends: list[str]
    task: Task

    def relevance(self, **of: Any) -> Tensor:
        """Returns the relevance of the tokens, ``(…, T)`` on the CPU, with the sign of evidence for the target."""
        maps = self.mu.marginal(self.ends, over="position", **of)
        summed = torch.stack(list(maps.values())).sum(0)
        return float(self.mu.sign) * summed[..., 0, :].cpu()

    def units(self, layer: str) -> Iterable[Row]:
        """Yields the most relevant heads of an attention call, or channels of another layer."""
        heads = head_count(self.mu._recording, layer)
        count = self.mu.shape(layer)[self.mu.channel_dim(layer)] if heads is None else heads
        kind = "channel" if heads is None else "head"
        events: list[Event] = [at(layer).head(n) if heads else at(layer).channel(n) for n in range(count)]
        channels = heads is None
        mass = self.mu.marginal(layer, over="channel")[0].flatten() if channels else self.mu(events)[:, 0]
        mass = float(self.mu.sign) * mass.cpu()
        order = [unit for unit in mass.abs().argsort(descending=True, stable=True)[:BEST].tolist() if mass[unit]]
        if order:
            rows = self.task.text.of_words(self.relevance(joint=[events[unit] for unit in order]))
            yield from (Row(f"{kind} {unit}", float(mass[unit]), row) for unit, row in zip(order, rows, strict=True))

    def given(self, condition: Event | str) -> Row:
        """Returns the relevance of the words given an event."""
        event = at(condition) if isinstance(condition, str) else condition
        title = condition if isinstance(condition, str) else str(condition)
        mass = float(self.mu.sign) * float(self.mu(event))
        try:
            tokens = float(self.mu.sign) * self.relevance(given=event)  # of a condition, which has no sign
        except NullEventError:
            return Row(title, mass, None, "no relevance passes through these walks")
        except CancellationError:
            return Row(title, mass, None, "positive and negative relevance of these walks cancel")
        is_against = self.mu.explains_difference and mass < 0
        return Row(title, mass, self.task.text.of_words(-tokens if is_against else tokens))


__all__ = ["Row", "TextExplanation", "Word", "explain_text"]
