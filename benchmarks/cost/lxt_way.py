"""Relevance by LXT for models for which it has rules: torchvision's vision transformers, and BERT of transformers.

LXT replaces methods of torch's classes permanently; here they are restored after each run, so that the other
computations in the process are unaffected.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from benchmarks.cost.nets import Embedded

Patches = Mapping[type[nn.Module], Callable[[type[nn.Module]], object]]


@contextmanager
def patched(patches: Patches) -> Iterator[None]:
    """Applies LXT's rules to these classes, and restores their methods."""
    before = {kind: dict(vars(kind)) for kind in patches}
    try:
        for kind, patch in patches.items():
            patch(kind)
        yield
    finally:
        for kind, known in before.items():
            for name in set(vars(kind)) - set(known):
                delattr(kind, name)
            for name, value in known.items():
                if vars(kind)[name] is not value:
                    setattr(kind, name, value)


def prepared(model: nn.Module) -> tuple[nn.Module, Patches]:
    """Returns the model that LXT runs, and the classes it has rules for.

    Raises:
        ImportError: If LXT or a transformers that it supports is not installed.
        NotImplementedError: If LXT has no rules for the model.
    """
    if isinstance(model, VisionTransformer):
        return model, importlib.import_module("lxt.efficient.models.vit_torch").cp_LRP
    if isinstance(model, Embedded):
        bert = importlib.import_module("lxt.efficient.models.bert")
        twin = Embedded(bert.BertForSequenceClassification(model.model.config))
        twin.load_state_dict(model.state_dict())
        kinds = {kind: patch for kind, patch in bert.attnLRP.items() if isinstance(kind, type)}
        return twin.eval().requires_grad_(False), kinds
    raise NotImplementedError("LXT has no rules for this model")


def relevance(model: nn.Module, patches: Patches, x: Tensor, target: int) -> Tensor:
    """Returns gradient times input with LXT's rules."""
    leaf = x.clone().requires_grad_()
    with patched(patches):
        (gradient,) = torch.autograd.grad(model(leaf)[:, target].sum(), leaf)
    return gradient * x


def way(model: nn.Module, x: Tensor, target: int) -> Callable[[], object]:
    """Returns LXT's pass; the model is prepared at the first call."""
    state: list[Any] = []

    def work() -> object:
        if not state:
            state.append(prepared(model))
        return relevance(*state[0], x, target)

    return work
