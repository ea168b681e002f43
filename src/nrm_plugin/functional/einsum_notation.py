"""Normal form of ``torch.einsum`` calls: one subscript per operand, with one letter per dimension."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Einsum:
    """Arguments of a ``torch.einsum`` call.

    Attributes:
        subscripts: Subscript of each operand, without ellipsis.
        output: Subscript of the output.
        operands: Tensors that are contracted, in order.
    """

    subscripts: tuple[str, ...]
    output: str
    operands: tuple[Any, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments as an equation followed by the operands."""
        return (f"{','.join(self.subscripts)}->{self.output}", *self.operands)


def read_einsum(args: Sequence[Any], rank: Callable[[Any], int]) -> Einsum:
    """Parses the arguments of ``torch.einsum``: an equation and operands, or operands alternating with integer lists.

    Args:
        args: Arguments of the call.
        rank: Function that returns the number of dimensions of an operand.
    """
    if isinstance(args[0], str):
        equation, operands = args[0], args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = operands[0]
    else:
        equation, operands = _equation_of(args[1::2]), args[: len(args) - len(args) % 2 : 2]
        equation += f"->{_letters(args[-1])}" if len(args) % 2 else ""
    return _without_ellipsis(equation.replace(" ", ""), tuple(operands), rank)


def _equation_of(numbers: Sequence[Any]) -> str:
    return ",".join(_letters(item) for item in numbers)


def _letters(numbers: Sequence[Any]) -> str:
    return "".join("..." if number is Ellipsis else string.ascii_letters[number] for number in numbers)


def _without_ellipsis(equation: str, operands: tuple[Any, ...], rank: Callable[[Any], int]) -> Einsum:
    left, arrow, output = equation.partition("->")
    subscripts = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [rank(one) - len(s) + 3 if "..." in s else 0 for one, s in zip(operands, subscripts, strict=True)]
    names = "".join(free[: max(hidden)])
    full = [s.replace("...", names[len(names) - size :]) for s, size in zip(subscripts, hidden, strict=True)]
    if not arrow:
        once = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        output = names + "".join(once)
    return Einsum(tuple(full), output.replace("...", names), operands)


__all__ = ["Einsum", "read_einsum"]
