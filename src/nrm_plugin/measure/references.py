"""Reference and composite of measures that explain a difference.

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any, Literal

from zennit.core import Composite

from ..composites import Normalized, Uncovered, normalize
from ..errors import DifferenceError, brief
from ..kernels.normalization import Residual
from ..model.inputs_and_outputs import Call
from ..model.references import reference_call, repeated, several_calls
from ..recording.recording import Reference
from .secant_composite import OnDifferences

Slopes = Literal["secant", "tangent"]


def reference_of(call: Call, reference: Any, slopes: Slopes) -> tuple[Call, Reference | None]:
    """Returns the call to record and its reference, or None if there is no reference.

    A list of references defines a mixture. The call then contains one copy of each sample per reference.

    Raises:
        DifferenceError: If the reference does not match the inputs.
        ValueError: If ``slopes`` is unknown or given without a reference.
    """
    if slopes not in ("secant", "tangent"):
        raise ValueError(f"slopes={brief(slopes)} is unknown; choose 'secant' or 'tangent'.")
    if reference is None:
        if slopes != "secant":
            raise ValueError("slopes= requires reference=; without a reference, relevance is propagated by rules.")
        return call, None
    is_tangent = slopes == "tangent"
    if not isinstance(reference, list):
        return call, Reference(reference_call(call, reference), is_tangent)
    if not reference:
        raise DifferenceError("reference=[] is an empty mixture; give at least one reference.")
    count = len(reference)
    return repeated(call, count), Reference(several_calls(call, reference), is_tangent, count)


def composite_of(
    composite: Composite | None,
    residual: Residual | None,
    gain_limit: float | None,
    uncovered: Uncovered | None,
    reference: Any,
) -> Normalized:
    """Returns the composite of a measure. With a reference but no composite, relevance follows secant slopes."""
    if reference is None:
        return normalize(composite, residual, gain_limit, uncovered)
    if composite is not None:
        return OnDifferences(normalize(composite, residual, gain_limit, uncovered))
    given = {"residual": residual, "gain_limit": gain_limit, "uncovered": uncovered}
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise TypeError(
            f"{unused[0]}= applies to the rules of a composite, but slopes to a reference absorb nothing. Omit it, or "
            "pass composite= to apply rules to differences."
        )
    return OnDifferences()


__all__ = ["Slopes", "composite_of", "reference_of"]
