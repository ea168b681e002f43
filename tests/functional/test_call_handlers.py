"""The handlers of observed functions: their order, and which one handles a call.

Covers: nrm_plugin.functional.observed_call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from nrm_plugin.functional.call_handlers import HANDLERS, NOT_HANDLED
from nrm_plugin.functional.function_call import Settings
from nrm_plugin.functional.intercepted_pass import InterceptedPass
from nrm_plugin.functional.observed_call import ObservedCall

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
SPARSE = torch.eye(4).to_sparse()
ROW = torch.tensor([1, 3])
CALLS: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
    ("metadata", torch.Tensor.detach, (X,)),
    ("indexed write", torch.index_put, (X, (ROW,), X[:2])),
    ("constants", torch.add, (SPARSE.to_dense(), 1)),
    ("attention", F.scaled_dot_product_attention, (X, X, X.detach())),
    ("sparse product", torch.matmul, (SPARSE, X)),
    ("computed layer", F.linear, (X, X, X[0])),
    ("kernel", torch.add, (X, X)),
    ("kernel", F.linear, (X, X.detach())),
    ("recurrence", torch.gru_cell, (X, X, X.detach().repeat(3, 1), X.detach().repeat(3, 1))),
    ("decomposition", torch.lerp, (X, X, 0.5)),
    ("python function", torch.norm, (X,)),
    ("in place", torch.Tensor.transpose_, (X * 1, 0, 1)),
    ("route or unknown", torch.reshape, (X, (2, 8))),
    ("route or unknown", torch.logcumsumexp, (X, 0)),
]


def test_handlers_have_names_and_reasons_of_their_own():
    assert len({handler.name for handler in HANDLERS}) == len({handler.reason for handler in HANDLERS}) == len(HANDLERS)
    assert [handler.name for handler in HANDLERS][-1] == "route or unknown"


@pytest.mark.parametrize(("name", "function", "args"), CALLS)
def test_the_first_handler_that_applies_handles_a_call(name, function, args):
    forward_pass = InterceptedPass(Settings(), nullcontext())
    call = ObservedCall.of(function, args, {}, "")
    applied = next(h.name for h in HANDLERS if h.run(call, forward_pass) is not NOT_HANDLED)
    assert applied == name
