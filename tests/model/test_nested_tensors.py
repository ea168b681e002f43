"""Every tensor is found once, in order, at any depth."""

from __future__ import annotations

import torch

from nrm_plugin.model.nested_tensors import tensors_in


def test_tensors_are_found_in_lists_tuples_and_dictionaries_in_order():
    a, b, c, d = torch.arange(4.0).unbind()
    value = (a, [b, "text", None, {"x": c, "y": (3, [d])}], {1.0, 2.0})
    assert [float(tensor) for tensor in tensors_in(value)] == [0, 1, 2, 3]
    assert [tensor is a for tensor in tensors_in(a)] == [True]
    assert list(tensors_in({"empty": [], "number": 1.0})) == []
