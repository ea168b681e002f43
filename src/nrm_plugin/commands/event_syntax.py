"""Parser for expressions of events such as ``features.28[3,7] & ~features.14[5]``, which are never evaluated as code.

- ``union``: one or more ``intersection``, separated by ``|``
- ``intersection``: one or more ``part``, separated by ``&``
- ``part``: ``~ part``, ``( union )``, ``ABSORBED``, ``layer``, or ``layer[channels]``
- ``layer``: a name as listed by the command ``layers``; in quotes if it contains spaces, signs or brackets,
  ``'body[0]'[3]``
- ``channels``: numbers and ranges such as ``10:20``, separated by commas
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import NRMError
from ..events.event import ABSORBED, Event, at

NAME = r"""'[^']+'|"[^"]+"|[^\s&|~()\[\]]+"""
TOKEN = re.compile(rf"\s*(?:(?P<sign>[&|~()])|(?P<atom>{NAME})\s*(?P<bracket>\[[^\[\]]*\]?)?)")
NUMBER = re.compile(r"\d{1,6}")
RANGE = re.compile(r"(\d{1,6})\s*:\s*(\d{1,6})")
DEEPEST = 50


class ConditionError(NRMError, ValueError):
    """Raised if an event expression cannot be parsed."""


@dataclass(frozen=True)
class Condition:
    """Event with its source expression.

    Attributes:
        text: The expression as given by the user.
        event: The event that the expression denotes.
        layers: Names of the layers in the event.
    """

    text: str
    event: Event
    layers: tuple[str, ...]


def parse(text: str) -> Condition:
    """Parses an event expression.

    Args:
        text: Layer names with optional channels in brackets, combined with ``&``, ``|``, ``~`` and parentheses.
            Brackets select channels, as in ``at(layer).channel([…])``.

    Raises:
        ConditionError: If the text does not follow the grammar. The message shows the position.
    """
    reader = _Reader(text)
    event = reader.union()
    if reader.sign or reader.atom:
        reader.fail("expected '&' or '|' between two parts")
    return Condition(" ".join(text.split()), event, tuple(dict.fromkeys(reader.layers)))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.layers: list[str] = []
        self._end = self._depth = 0
        self.sign = self.atom = ""
        self.bracket: str | None = None
        self.advance()

    def advance(self) -> None:
        """Advances to the next token."""
        self.start = self._end + len(self.text[self._end :]) - len(self.text[self._end :].lstrip())
        token = TOKEN.match(self.text, self._end)
        if token is None and self.text[self._end :].strip():
            self.sign, self.atom = self.text[self.start], ""
            self.fail("expected the name of a layer")
        self.sign, self.atom, self.bracket = token.group("sign", "atom", "bracket") if token else ("", "", None)
        self._inside = token.start("bracket") if token else self.start
        self._end = token.end() if token else len(self.text)

    def fail(self, why: str, got: str = "", place: int | None = None) -> None:
        """Raises :class:`ConditionError` at the current token, or for the given text and position."""
        got = got or self.sign or self.atom or "the end"
        place = self.start if place is None else place
        raise ConditionError(
            f"--given {self.text!r} is not an event: {why} at character {place + 1}, got {got}. Example: "
            "'features.28[3,7]' for the walks through channel 3 or 7 of a layer; combine events by &, | and ~."
        )

    def union(self) -> Event:
        event = self.intersection()
        while self.sign == "|":
            self.advance()
            event = event | self.intersection()
        return event

    def intersection(self) -> Event:
        event = self.part()
        while self.sign == "&":
            self.advance()
            event = event & self.part()
        return event

    def part(self) -> Event:
        self._depth += 1
        if self._depth > DEEPEST:
            self.fail(f"more than {DEEPEST} nested parentheses and negations")
        event = self._inner()
        self._depth -= 1
        return event

    def _inner(self) -> Event:
        if self.sign == "~":
            self.advance()
            return ~self.part()
        if self.sign == "(":
            self.advance()
            event = self.union()
            if self.sign != ")":
                self.fail("expected ')'")
            self.advance()
            return event
        if not self.atom:
            self.fail("expected the name of a layer")
        event = self._event(self.atom, self.bracket)
        self.advance()
        return event

    def _event(self, name: str, bracket: str | None) -> Event:
        if name == "ABSORBED" and bracket is None:
            return ABSORBED
        name = name[1:-1] if name[0] in "'\"" and name[-1] == name[0] else name
        self.layers.append(name)
        if bracket is None:
            return at(name)
        if not bracket.endswith("]"):
            self.fail("expected ']' after the channels", "the end", self._end)
        return at(name).channel(self._channels(bracket[1:-1]))

    def _channels(self, text: str) -> list[int]:
        channels: list[int] = []
        for part in text.split(","):
            span = RANGE.fullmatch(part.strip())
            if span:
                channels += range(int(span[1]), int(span[2]))
                if int(span[1]) >= int(span[2]):
                    self.fail("expected a range that ends after its start", part.strip(), self._inside)
            elif NUMBER.fullmatch(part.strip()):
                channels.append(int(part))
            else:
                self.fail("expected channels such as 3,7 or 10:20 in the brackets", repr(part.strip()), self._inside)
        return sorted(set(channels))
