r"""The initial relevance of a measure that explains a difference.

.. math:: \mu(n_L = k) = s_k \Delta f_k / \sum_k s_k \Delta f_k

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import FoldingError, PrecisionWarning, TargetError, samples, warn
from ..kernels.reference_pass import LEAST
from ..model.autocast import is_short
from ..model.targets import MIN_TOTAL, sample_sums
from ..recording.sample_independence import tolerance_of

ROUNDING = 16
"""Minimum ratio of the difference between outputs to their rounding error."""
PRECISE = 1e-3
"""Largest rounding error, as a fraction of the difference between outputs, for which no warning is issued."""


def difference_start(recording: Any, vector: Tensor) -> tuple[Tensor, Tensor]:
    r"""Computes the start vector of a measure that explains a difference and the difference itself.

    Args:
        recording: A recording with one or several references per sample.
        vector: The weights ``s`` of the outputs, of shape ``(N, …)``; they may sum to zero.

    Returns:
        The start vector in the layout of the output; and :math:`\sum_k s_k \Delta f_k`, of shape ``(N,)``, averaged
        over references.

    Warns:
        PrecisionWarning: If the difference of a sample has fewer than three significant digits in float32 or float64.

    Raises:
        TargetError: If the weighted differences of a sample are zero or cancel.
        FoldingError: If a sample depends on other samples or on its position in the batch.
    """
    count = recording.references
    outputs, vector = recording.unfolded(), vector.repeat_interleave(count, 0)
    _check_copies(outputs.detach().reshape(len(outputs) // count, count, -1))
    parts = vector * recording.differences()
    form = (len(parts) // count, -1)
    total = sample_sums(parts.reshape(form))
    _check_different(total, *(values.reshape(form) for values in (parts, vector, outputs)))
    shape = (-1, *(1,) * (parts.ndim - 1))
    return recording.started(parts / total.repeat_interleave(count).reshape(shape)), total / count


def _check_copies(outputs: Tensor) -> None:
    """Raises :class:`FoldingError` if copies of a sample have different outputs.

    Args:
        outputs: The outputs of shape ``(N, B, …)``, with one copy per reference.
    """
    count = outputs.shape[1]
    if count == 1:
        return
    bad = (outputs - outputs[:, :1]).abs().amax((1, 2)) > tolerance_of(outputs)
    if bool(bad.any()):
        raise FoldingError(
            f"with {count} references, the model runs on {count} copies of each sample, and its outputs differ between "
            f"copies ({samples(bad.tolist())}): it uses constants for each position in the batch, or draws random "
            "numbers. Pass such constants as additional_forward_args, whose rows are repeated, or use one reference."
        )


def _check_different(total: Tensor, parts: Tensor, vector: Tensor, outputs: Tensor) -> None:
    rounding = (torch.finfo(outputs.dtype).eps * sample_sums((vector * outputs).abs())).to(total.dtype)
    least = 2 * LEAST[total.dtype] * sample_sums(vector.abs())
    bad = total.abs() <= MIN_TOTAL * sample_sums(parts.abs()) + ROUNDING * rounding + least
    imprecise = bad if is_short(outputs) else bad | (rounding > PRECISE * total.abs())
    if not bool(imprecise.any()):
        return
    if bool(bad.any()):
        raise TargetError(
            f"the explained output is the same for the input and the reference ({samples(bad.tolist())}): the "
            "weighted differences are 0, or cancel, so nothing can be normalized. Choose another reference or target."
        )
    share = float((rounding / total.abs()).max())
    warn(
        f"the outputs at the input and at the reference are so similar ({samples(imprecise.tolist())}) that their "
        f"difference has a relative rounding error of {share:.0e} in {str(outputs.dtype).removeprefix('torch.')}, and "
        "so do all masses. Compute in float64, `model.double()` and `inputs.double()`, or choose another reference.",
        PrecisionWarning,
    )


__all__ = ["difference_start"]
