"""Identification of the input modifiers and the reducer of a rule by evaluating them on test values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from zennit.core import BasicHook
from zennit.rules import ZBox

from ..model.trace_guards import audit, holds
from .known_rules import is_known_linear

_KNOWN_SIGNS: dict[type, list[float]] = {}
"""Branch signs of known rules, keyed by type. All instances of a type have the same signs."""


def modified_inputs(rule: BasicHook, inputs: Tensor) -> list[Tensor]:
    """Returns the modified inputs of a rule, one per branch.

    Equal inputs share memory. For example, the positive part of nonnegative activations is the input itself.
    """
    known, sources = [inputs], []
    # The bounds of ZBox may have the shape of an image, which does not match the probe, and are not parts of the input.
    positive = is_known_linear(rule) and not isinstance(rule, ZBox) and is_positive(inputs)
    for modifier in rule.input_modifiers:
        part = _part(modifier, inputs) if positive else ""
        if part:
            sources.append(inputs if part == "positive" else inputs.new_zeros(()).expand(inputs.shape))
            continue
        source = modifier(inputs).detach()
        same = next((other for other in known if _is_equal(other, source)), source)
        known.append(same)
        sources.append(same)
    return sources


def _part(modifier: Callable[[Tensor], Tensor], inputs: Tensor) -> str:
    """Returns ``"positive"`` or ``"negative"`` if a modifier selects that part of its input, and otherwise ``""``."""
    probe = inputs.new_tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    modified = modifier(probe)
    if modified.shape != probe.shape:
        return ""
    if modified.equal(probe.clamp(min=0)):
        return "positive"
    return "negative" if modified.equal(probe.clamp(max=0)) else ""


def is_positive(source: Tensor) -> bool:
    """Returns True if all elements are nonnegative."""
    return source.numel() == 0 or holds("no negative input", lambda: source.amin() >= 0)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and holds("equal inputs", lambda: torch.equal(one, other))


def is_zero(source: Tensor) -> bool:
    """Returns True if all elements are zero."""
    return holds("zero input", lambda: _is_zero(source))


def _is_zero(source: Tensor) -> bool:
    """Returns True if all elements are zero. Checks a few elements first, which usually settles the answer."""
    few = source[(slice(0, 1),) * source.ndim] if not any(source.stride()) else source.flatten()[:4096]
    if bool(few.any()):
        return False
    return few.numel() == source.numel() or not any(source.stride()) or not bool(source.any())


def signs_of(rule: BasicHook, sources: Sequence[Tensor]) -> list[float] | None:
    """Returns the signs ``ρ_k`` of a reducer ``Σ ρ_k in_k g_k``, or None if the reducer has another form.

    If all elements of the modified inputs are one, the reducer can also be ``Σ ρ_k g_k``.
    """
    signs = _KNOWN_SIGNS.get(type(rule))
    if signs is None:
        with audit():
            signs = _tried_signs(rule, sources)
        if signs is not None and is_known_linear(rule):
            _KNOWN_SIGNS[type(rule)] = signs
    return signs


def _tried_signs(rule: BasicHook, sources: Sequence[Tensor]) -> list[float] | None:
    count = len(sources)
    shape = (2,) * max(sources[0].ndim, 1)
    # Fixed, irregular numbers, since a kernel may be read inside torch.vmap, where random numbers cannot be drawn.
    numbers = torch.arange(1, 2 * count * 2 ** len(shape) + 1, dtype=torch.float64)
    noise = (3 * torch.sin(numbers**2)).to(sources[0]).reshape(2, count, *shape)
    inputs, gradients = list(noise[0]), list(noise[1])
    ones, zeros = torch.ones_like(noise[0, 0]), torch.zeros_like(noise[0, 0])
    try:
        units = [
            rule.reducer([ones] * count, [ones if index == unit else zeros for index in range(count)])
            for unit in range(count)
        ]
        reduced = rule.reducer(inputs, gradients)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None  # a reducer that requires the actual shapes
    signs = [float(unit.flatten()[0]) for unit in units]
    if any(bool((unit != unit.flatten()[0]).any()) for unit in units):
        return None
    by_product = sum(sign * source * part for sign, source, part in zip(signs, inputs, gradients, strict=True))
    by_gradient = sum(sign * part for sign, part in zip(signs, gradients, strict=True))
    if torch.allclose(reduced, by_product):
        return signs
    is_of_ones = all(bool((source == 1).all()) for source in sources)
    return signs if torch.allclose(reduced, by_gradient) and is_of_ones else None
