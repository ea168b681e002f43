"""Lookup of composites by name in Zennit's registry."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import Tensor
from zennit.composites import COMPOSITES
from zennit.core import Composite

from ..composites import Normalized  # registers the composites of this package as well
from ..errors import NRMError


class CompositeError(NRMError, ValueError):
    """Raised if a composite is unknown or requires arguments without a command-line option."""


def composite_names() -> list[str]:
    """Returns the names of all registered composites, except normalized variants of other composites."""
    return sorted(name for name, kind in COMPOSITES.items() if _plain(kind) is kind)


def check_composite_name(name: str) -> None:
    """Raises :class:`CompositeError` with similar names if Zennit's registry does not contain ``name``."""
    if name not in COMPOSITES:
        near = difflib.get_close_matches(name, COMPOSITES, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise CompositeError(f"no composite named {name!r}.{hint} Available: {', '.join(composite_names())}.")


def composite_of(name: str, bounds: tuple[Tensor, Tensor]) -> Composite:
    """Constructs a composite by name.

    Args:
        name: Name of the composite in Zennit's registry.
        bounds: Lowest and highest input values, of shape ``(1, C, 1, 1)`` each, for composites with a box rule.

    Raises:
        CompositeError: If the name is unknown or if the composite has other required arguments.
    """
    check_composite_name(name)
    kind = _plain(COMPOSITES[name])
    given: dict[str, Any] = dict(zip(("low", "high"), bounds, strict=True))
    parameters = inspect.signature(kind).parameters.values()
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [item.name for item in parameters if item.default is inspect.Parameter.empty and item.kind not in free]
    missing = [item for item in needed if item not in given]
    if missing:
        raise CompositeError(
            f"the composite {name} requires {', '.join(missing)}, for which there is no option. Use it from Python: "
            f"RelevanceMeasure(model, inputs, target, composite={kind.__name__}({', '.join(missing)}=…))."
        )
    composite: Composite = kind(**{item: given[item] for item in needed})
    return composite.composite if isinstance(composite, Normalized) else composite


def _plain(kind: type[Composite]) -> type[Composite]:
    """Returns the composite class inside a normalized one. The commands normalize every composite themselves."""
    return getattr(kind, "wrapped", kind) if issubclass(kind, Normalized) else kind
