"""Explanations of Hugging Face Transformers models by the relevance of words."""

from __future__ import annotations

import contextlib
import re
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
from .terminal_text import REST as THE_REST
from .terminal_text import lines
from .text_predictions import Task, task_of, tokenized
from .words import Tokens, Word

BEST = 5
"""Number of predictions and of units per layer that an explanation lists."""
NEURONS = re.compile(r"\.(neuron\d*|post)$")
"""Pattern for sites whose channels are called neurons."""
AUTO = "auto"
"""Default of ``reference``, which selects the mask token if the tokenizer has one and no rules are given."""


@dataclass(frozen=True)
class Row:
    """Relevance of words, conditional on an event or joint with a unit (head or channel) of a layer.

    Attributes:
        title: Name of the condition or unit.
        mass: Mass of the condition or unit.
        relevance: Relevance of each word, of shape ``(words,)``, on the CPU. This is joint relevance for a unit and
            conditional relevance for a condition. Conditional relevance and absorbed relevance sum to 1, or to -1 if
            the condition is evidence against the target. None if the mass of the condition is zero or nearly cancels.
        problem: Reason why ``relevance`` is None.
    """

    title: str
    mass: float
    relevance: Tensor | None
    problem: str = ""


@dataclass(frozen=True)
class TextExplanation:
    """Explanation of one text. ``print`` formats it for a terminal, and ``plots.text_page`` converts it to HTML.

    Attributes:
        text: The text, with its tokens and words.
        kind: ``"class"``, ``"mask"``, ``"next"`` or ``"token"``.
        target: Name of the explained class or token.
        against: The class or token with which the target is compared. Empty if there is no contrast.
        reference: Reference text or the token that replaces every word. Empty if there is none.
        output: The explained scalar: an output, a difference between outputs, or the change of either relative to the
            reference.
        predictions: The most likely classes or tokens with their softmax values.
        tokens: Relevance of each token, of shape ``(T,)``, on the CPU.
        words: Relevance of each word, of shape ``(words,)``. Positive relevance is evidence for the target. Together
            with the absorbed relevance, it sums to 1, or to -1 if ``output`` is negative. It is negative if the
            target scores lower than the contrast or leads by less than it does for the reference.
        decoder: Relevance of the decoder's start token.
        absorbed: Relevance absorbed by constants and rules.
        variation: Sum of the absolute relevance of all tokens. The larger it is, the more relevance cancels and the
            larger the rounding errors are.
        layers: The most relevant units of each requested layer.
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
        """Formats the explanation as lines for a terminal, with colors if ``color`` is set.

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
    """Explains a prediction of a Hugging Face Transformers model by the relevance of each word of the text.

    What is explained depends on the model: the class of the text, the masked token, the next token, or the first token
    that a decoder generates.

    Args:
        model: A model with a prediction head, in evaluation mode.
        tokenizer: The tokenizer of the model.
        text: The text. For a masked language model, it contains a mask token.
        target: Name or index of a class, or a token. Defaults to the most likely one.
        against: Contrast for the target: ``"rest"`` for all other classes or tokens, weighted by their softmax; another
            class or token; or None to explain the output itself.
        reference: Another text with the same number of tokens, or a token that replaces all tokens except special
            tokens. The change in the prediction relative to this reference is then explained, and nothing is absorbed.
            The default, ``"auto"``, uses the tokenizer's mask token if there is one, no rules are given, and the two
            predictions can be compared: they must differ, and a mixture of experts must use the same experts for both.
            None explains the prediction itself by the rules of the composite.
        position: Index of the token whose prediction is explained, if the model predicts several.
        layers: Layers or sites, such as ``blocks.1.attn``, whose most relevant heads or channels are listed.
        given: Events or names, such as ``blocks.1.attn.head.3``. For each of them, the relevance of the words
            conditional on it is computed.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`. If this argument or one of the next two is given,
            ``reference`` defaults to None.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Raises:
        InputError: If the model, the text or the position is invalid.
        TargetError: If ``target`` or ``against`` is not a known class or token.
        DifferenceError: If the reference does not match the text.
        UnknownLayerError: If the model has no layer with one of the given names.

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
        if isinstance(compared, int):
            raise TargetError(f"against={brief(against)}: the model has a single output. Give against=None.")
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
            f"{type(model).__name__} does not look up a row per token, so relevance of tokens is not defined."
        )
    labels = (task.name(chosen), _name(task, chosen, compared), reference or "")
    return _explanation(Words(mu, ends, task), chosen, labels, _as_list(layers), _as_list(given))


def _explanation(
    words: Words,
    chosen: int,
    labels: tuple[str, str, str],
    layers: Sequence[str],
    given: Sequence[Event | str],
) -> TextExplanation:
    """Computes the relevance of tokens, words and layers.

    Args:
        words: The relevance of the text.
        chosen: Index of the explained output.
        labels: Names of the explained output, of its contrast, and of the reference.
        layers: Names of the layers whose relevance is listed.
        given: Events to condition the relevance of the words on, one at a time.
    """
    task, mu, tokens = words.task, words.mu, words.relevance()
    started = sum(float(mu.sign * mu.marginal(end).sum()) for end in mu.ends if end not in words.ends)
    return TextExplanation(
        task.text,
        task.kind,
        *labels,
        float(mu.output),
        _predictions(task, chosen),
        tokens,
        task.text.of_words(tokens),
        started,
        float(mu.sign) - float(tokens.sum()) - started,
        float(mu.variation(words.ends[0])),
        {layer: tuple(words.units(layer)) for layer in layers},
        tuple(words.given(event) for event in given),
        mu,
    )


def _name(task: Task, chosen: int, compared: int | str | None) -> str:
    """Returns the name of the contrast, or an empty string. With two classes, the rest is the other class."""
    if compared is None:
        return ""
    if isinstance(compared, str) and len(task.logits) != 2:
        return THE_REST
    return task.name(1 - chosen if isinstance(compared, str) else compared)


def _as_list(values: Any) -> list[Any]:
    is_one = isinstance(values, (str, Event)) or not isinstance(values, Iterable)
    return [values] if is_one else list(values)


def _predictions(task: Task, chosen: int) -> tuple[tuple[str, float], ...]:
    shares = torch.softmax(task.logits.double(), 0)
    best = task.logits.argsort(descending=True, stable=True)[:BEST].tolist()
    return tuple((task.name(index), float(shares[index])) for index in dict.fromkeys([*best, chosen]))


def _of_masks(
    measure: Callable[..., RelevanceMeasure], task: Task, tokenizer: Any, mask: str | None
) -> tuple[str | None, RelevanceMeasure]:
    """Returns the mask token and a measure that explains the change of the prediction relative to mask tokens.

    The token is None, and the measure explains the prediction itself, if there is no mask token, if the prediction is
    the same for both texts, or if the model runs different operations on them, such as different experts.
    """
    if mask:
        with contextlib.suppress(DifferenceError, TargetError, UnsupportedOperationError):
            return str(mask), measure(reference=_reference(task, tokenizer, str(mask)))
    return None, measure()


def _reference(task: Task, tokenizer: Any, reference: str) -> dict[str, Tensor]:
    """Returns the inputs of the reference: another text, or one token in place of all tokens except special tokens."""
    ids = task.text.ids
    if not isinstance(reference, str):
        raise InputError(f"reference={brief(reference)} is neither a text nor a token.")
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
            f"{' '.join(other.tokens)} and {' '.join(task.text.tokens)}. Give a text with as many tokens, or a single "
            "token, such as the mask or unknown token, to replace all of them."
        )
    return {"input_ids": replaced} | {key: value for key, value in task.inputs.items() if key != "input_ids"}


@dataclass(frozen=True)
class Words:
    """Computes the relevance of the tokens and words of a text from a measure.

    Attributes:
        mu: The measure to query.
        ends: Names of the token embeddings in the measure, at which walks (paths from the output down) end.
        task: Text and prediction that are explained.
    """

    mu: RelevanceMeasure
    ends: list[str]
    task: Task

    def relevance(self, **of: Any) -> Tensor:
        """Returns the relevance of tokens as a CPU tensor of shape ``(…, T)``. Positive values support the target."""
        maps = self.mu.marginal(self.ends, over="position", **of)
        summed = torch.stack(list(maps.values())).sum(0)
        return float(self.mu.sign) * summed[..., 0, :].cpu()

    def units(self, layer: str) -> Iterable[Row]:
        """Yields the most relevant heads of an attention layer, or channels of any other layer."""
        heads = head_count(self.mu._recording, layer)
        count = self.mu.shape(layer)[self.mu.channel_dim(layer)] if heads is None else heads
        kind = "head" if heads is not None else "neuron" if NEURONS.search(layer) else "channel"
        events: list[Event] = [at(layer).head(n) if heads else at(layer).channel(n) for n in range(count)]
        channels = heads is None
        mass = self.mu.marginal(layer, over="channel")[0].flatten() if channels else self.mu(events)[:, 0]
        mass = float(self.mu.sign) * mass.cpu()
        order = [unit for unit in mass.abs().argsort(descending=True, stable=True)[:BEST].tolist() if mass[unit]]
        if order:
            rows = self.task.text.of_words(self.relevance(joint=[events[unit] for unit in order]))
            yield from (Row(f"{kind} {unit}", float(mass[unit]), row) for unit, row in zip(order, rows, strict=True))

    def given(self, condition: Event | str) -> Row:
        """Returns the relevance of words conditional on an event."""
        event = at(condition) if isinstance(condition, str) else condition
        title = condition if isinstance(condition, str) else str(condition)
        mass = float(self.mu.sign) * float(self.mu(event))
        try:
            tokens = float(self.mu.sign) * self.relevance(given=event)  # conditional relevance is not signed
        except NullEventError:
            return Row(title, mass, None, "no relevance passes through these walks")
        except CancellationError:
            return Row(title, mass, None, "positive and negative relevance of these walks cancel")
        is_against = self.mu.explains_difference and mass < 0
        return Row(title, mass, self.task.text.of_words(-tokens if is_against else tokens))


__all__ = ["Row", "TextExplanation", "Word", "explain_text"]
