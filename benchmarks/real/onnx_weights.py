"""Weights of an ONNX file, without the ``onnx`` package.

An ONNX file is a protocol buffer; this reads only the initializers of its graph. The numbers of the fields are those of
ONNX's ``onnx.proto``: ``ModelProto.graph`` 7, ``GraphProto.initializer`` 5, and of ``TensorProto`` dims 1, data type 2,
name 8, raw data 9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GRAPH, INITIALIZER = 7, 5
DIMS, TYPE, NAME, RAW = 1, 2, 8, 9
FLOAT = 1
"""The data type float32."""


def weights(path: Path) -> dict[str, Tensor]:
    """Returns the float32 initializers that are stored as raw bytes, by name."""
    found = {}
    for number, graph in _fields(memoryview(path.read_bytes())):
        if number == GRAPH and isinstance(graph, memoryview):
            for place, value in _fields(graph):
                if place == INITIALIZER and isinstance(value, memoryview):
                    found.update(_tensor(value))
    return found


def _tensor(message: memoryview) -> dict[str, Tensor]:
    """Returns one initializer by its name; empty if it is not a raw float32 tensor."""
    fields = list(_fields(message))
    by_number = dict(fields)
    raw, name = by_number.get(RAW), by_number.get(NAME)
    if by_number.get(TYPE) != FLOAT or not isinstance(raw, memoryview) or not isinstance(name, memoryview):
        return {}
    shape: list[int] = []
    for number, value in fields:
        if number == DIMS:
            shape += [value] if isinstance(value, int) else list(_packed(value))
    values = np.frombuffer(raw, "<f4").copy()
    if values.size != math.prod(shape):
        raise ValueError(f"the initializer {bytes(name).decode()} has {values.size} values, but the shape {shape}.")
    return {bytes(name).decode(): torch.from_numpy(values.reshape(shape))}


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields the number and value of each field; numbers of fixed width are skipped."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
        elif kind == 2:
            size, place = _varint(message, place)
            yield number, message[place : place + size]
            place += size
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError(f"not a protocol buffer: wire type {kind} at byte {place}.")


def _packed(message: memoryview) -> Iterator[int]:
    place = 0
    while place < len(message):
        value, place = _varint(message, place)
        yield value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Decodes a number in base 128, lowest digit first; returns it with the position after it."""
    value = shift = 0
    while True:
        digit = message[place]
        value |= (digit & 127) << shift
        place, shift = place + 1, shift + 7
        if digit < 128:
            return value, place
