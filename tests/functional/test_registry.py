"""Which functions have a kernel or a decomposition, by the module that registers it, and their names."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nrm_plugin.functional.registry import FunctionName, name_of
from tests.functional.kernel_matrices import Op, V, check, columns, draw

COUNT = """
import json
from collections import Counter
import nrm_plugin.functional
from nrm_plugin.functional import recurrent, registry
tables = {
    "kernels": registry.KERNELS,
    "kernels by function": registry.KERNELS_BY_FUNCTION,
    "decompositions": registry.DECOMPOSITIONS,
    "recurrences": recurrent.RECURRENCES,
}
of_package = lambda function: function.__module__.startswith("nrm_plugin.functional.")
modules = lambda table: (value.__module__.rpartition(".")[2] for value in table.values() if of_package(value))
print(json.dumps({name: Counter(modules(table)) for name, table in tables.items()}))
"""
REGISTERED = {
    "kernels": {
        "elementwise": 110,
        "averaging": 17,
        "products": 10,
        "weighted_functions": 1,
        "reductions": 4,
        "attention": 2,
    },
    "kernels by function": {"scatter": 3},
    "decompositions": {
        "decompositions": 23,
        "distance_decompositions": 9,
        "linear_algebra": 17,
        "quantiles_and_integrals": 6,
        "reductions": 1,
        "scatter": 17,
    },
    "recurrences": {"recurrent": 10},
}
"""Number of names that each module registers; update it together with the module."""


@pytest.mark.slow
def test_every_module_registers_its_functions_at_import():
    """Kernels register themselves, so a lost import would remove the kernels of a module without an error."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == REGISTERED


NAMES: list[tuple[Callable[..., Any], FunctionName]] = [
    (torch.add, FunctionName("add")),
    (Tensor.add_, FunctionName("add", in_place=True)),
    (Tensor.__radd__, FunctionName("add")),
    (Tensor.__iadd__, FunctionName("add", in_place=True)),
    (operator.itruediv, FunctionName("itruediv")),
    (torch.special.expit, FunctionName("sigmoid")),
    (torch.linalg.vector_norm, FunctionName("vector_norm")),
    (torch.relu_, FunctionName("relu", in_place=True)),
]


@pytest.mark.parametrize(("function", "name"), NAMES)
def test_the_name_of_a_function_is_without_marks_of_its_spelling(function, name):
    assert name_of(function) == name


EQUIVALENT: dict[str, tuple[Op, Op]] = {
    "expit": (torch.special.expit, torch.sigmoid),
    "arctan": (torch.arctan, torch.atan),
    "softmax": (lambda x: torch.special.softmax(x, -1), lambda x: x.softmax(-1)),
    "matmul": (lambda x: torch.linalg.matmul(x, V), lambda x: x @ V),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_a_namespace_is_another_spelling(name):
    x = draw(2, 4)
    one, other = (
        columns(lambda x, op=op: op(x) * x if op(x).shape == x.shape else op(x), [x]) for op in EQUIVALENT[name]
    )
    check(one, other)
