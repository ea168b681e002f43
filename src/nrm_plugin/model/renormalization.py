"""Embeddings with ``max_norm``, whose weights torch renormalizes in place.

This package renormalizes copies of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from ..errors import ModelStateError

_EMBEDDINGS: tuple[Callable[..., Any], ...] = (F.embedding, F.embedding_bag)
_NAMES = ("input", "weight", None, "max_norm", "norm_type")
"""Names of the first positional arguments of the two embedding functions."""


class Tables:
    """Renormalized copies of embedding tables that torch would otherwise modify during a forward pass.

    Args:
        changed: The tables that torch would have changed so far, keyed by ``id()``. It is updated in place.
    """

    def __init__(self, changed: dict[int, Tensor]) -> None:
        self._changed = changed

    def passed(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a function, replacing a table that torch would modify with a renormalized copy.

        Args:
            function: Any function; only embeddings with ``max_norm`` receive a different table.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        if function in _EMBEDDINGS:
            given = {**{name: value for name, value in zip(_NAMES, args, strict=False) if name}, **kwargs}
            if given.get("max_norm") is not None and given["weight"].grad_fn is None:  # not a computed table
                new = {"weight": self._copy(given), "max_norm": None}
                first = tuple(new.get(name or "", value) for name, value in zip(_NAMES, args, strict=False))
                return (*first, *args[len(first) :]), {key: new.get(key, value) for key, value in kwargs.items()}
        return args, kwargs

    def _copy(self, given: dict[str, Any]) -> Tensor:
        table, ids = given["weight"], given["input"]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            copy: Tensor = table.detach().clone()
            norms = float(given["max_norm"]), float(given.get("norm_type", 2.0))
            torch.embedding_renorm_(copy, ids.detach().reshape(-1), *norms)
            if not torch.allclose(copy, table):
                self._changed[id(table)] = table  # kept alive, since the id of a freed tensor may be reused
        return copy

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Checks that a function does not use a table that torch would have modified earlier in this forward pass.

        Args:
            args: Positional arguments of the function.
            kwargs: Keyword arguments of the function.
            result: Return value of the function.

        Raises:
            ModelStateError: If such a table is used.
        """
        if not self._changed or not isinstance(result, Tensor) or id(result) in self._changed:
            return
        values = (*args, *kwargs.values())
        check_unused(self._changed, values)
        for value in values:
            if isinstance(value, (list, tuple)):
                check_unused(self._changed, value)


def check_unused(changed: Mapping[int, Tensor], values: Iterable[Any]) -> None:
    """Raises :class:`ModelStateError` if a value is an embedding table that torch would have renormalized."""
    if any(id(value) in changed for value in values):
        raise ModelStateError(
            "the model also uses the table of an embedding with max_norm as the weight of another layer, so torch "
            "would change this layer during the forward pass. Call `model(inputs)` once before: it renormalizes the "
            "rows that these inputs select."
        )


class TablesUnwritten(TorchFunctionMode):
    """Torch function mode that prevents embeddings with ``max_norm`` from modifying their weights in place."""

    def __init__(self) -> None:
        super().__init__()
        self._tables = Tables({})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, keywords = self._tables.passed(func, args, kwargs or {})
        return func(*args, **keywords)


__all__ = ["Tables", "TablesUnwritten", "check_unused"]
