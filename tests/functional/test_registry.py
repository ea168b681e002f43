"""Which functions have a kernel or a decomposition, by the module that registers it, and their names."""

from __future__ import annotations

import pytest
import torch

from tests.functional.kernel_matrices import Op, V, check, columns, draw

ALIKE: dict[str, tuple[Op, Op]] = {
    "expit": (torch.special.expit, torch.sigmoid),
    "arctan": (torch.arctan, torch.atan),
    "softmax": (lambda x: torch.special.softmax(x, -1), lambda x: x.softmax(-1)),
    "matmul": (lambda x: torch.linalg.matmul(x, V), lambda x: x @ V),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_namespace_is_another_spelling(name):
    x = draw(2, 4)
    one, other = (columns(lambda x, op=op: op(x) * x if op(x).shape == x.shape else op(x), [x]) for op in ALIKE[name])
    check(one, other)
