r"""Relevance matrices: mean conditional relevance between the groups of two layers.

.. math:: T_{ij} = \frac{\sum_n |\mu_n(j)|\, \mu_n(i \mid j)}{\sum_n |\mu_n(j)|}, \qquad
          \sum_i T_{ij} + \mathrm{off}_j = 1

Samples are weighted by the absolute mass of ``j``. Samples with a small mass, whose conditional is unstable, thus
contribute little. Walks through ``j`` that do not cross the lower layer count toward ``off``. The weighting is new in
this package.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, brief

FORMAT = "nrm-plugin relevance matrix 1"


class RelevanceMatrix:
    r"""Mean conditional relevance of the groups in a layer given the groups in a layer above.

    Args:
        matrix: :math:`T_{ij} = \mathrm E[\mu(i \mid j)]`, of shape ``(K_lower, K_upper)``, with NaN in the columns of
            groups without relevance.
        off: Mean fraction of each upper group's mass in walks that do not cross the lower layer, of shape
            ``(K_upper,)``.
        weight: Mean absolute mass of each upper group, of shape ``(K_upper,)``.
        samples: Number of samples.
        upper: Name of the upper layer, or empty if unknown.
        lower: Name of the lower layer.

    Raises:
        InputError: If the shapes do not match.

    Examples:
        >>> one = RelevanceMatrix(torch.tensor([[0.5, 0.0], [0.3, 1.0]]), torch.tensor([0.2, 0.0]), torch.ones(2), 10)
        >>> one.apply(torch.tensor([[1.0, 1.0]]))
        tensor([[0.5000, 1.3000]])
    """

    # This is not a dataclass, since torchmetrics would map over its fields.
    def __init__(
        self, matrix: Tensor, off: Tensor, weight: Tensor, samples: int, upper: str = "", lower: str = ""
    ) -> None:
        if matrix.ndim != 2 or not off.shape == weight.shape == matrix.shape[1:]:
            raise InputError(
                "a relevance matrix (K_lower, K_upper) needs off and weight of shape (K_upper,); got "
                f"{tuple(matrix.shape)}, {tuple(off.shape)} and {tuple(weight.shape)}."
            )
        self.matrix, self.off, self.weight, self.samples = matrix, off, weight, samples
        self.upper, self.lower = upper, lower

    def __repr__(self) -> str:
        down, up = self.matrix.shape
        return f"RelevanceMatrix({up} groups of {self.upper!r} to {down} of {self.lower!r}, {self.samples} samples)"

    def apply(self, relevance: Tensor) -> Tensor:
        """Predicts the relevance of the lower groups from the upper groups. Returns shape ``(N, K_lower)``.

        Groups without relevance in the data do not contribute.

        Args:
            relevance: Relevance of the upper groups, of shape ``(N, K_upper)``.

        Raises:
            InputError: If the number of groups does not match.
        """
        if relevance.ndim != 2 or relevance.shape[1] != self.matrix.shape[1]:
            raise InputError(
                f"this matrix applies to relevance (N, {self.matrix.shape[1]}), got {tuple(relevance.shape)}."
            )
        return relevance @ self.matrix.nan_to_num(0.0).to(relevance).T

    def then(self, below: RelevanceMatrix) -> RelevanceMatrix:
        """Multiplies by the matrix of lower layers. Assumes that walks form a Markov chain over the groups.

        Args:
            below: Matrix whose upper groups are the lower groups of this matrix.

        Raises:
            InputError: If the upper layer or groups of ``below`` are not the lower layer and groups of this matrix.
        """
        if below.matrix.shape[1] != self.matrix.shape[0] or (self.lower and below.upper not in ("", self.lower)):
            raise InputError(
                f"a matrix to {self.matrix.shape[0]} groups of {brief(self.lower)} cannot be followed by one from "
                f"{below.matrix.shape[1]} groups of {brief(below.upper)}."
            )
        known, own = below.matrix.nan_to_num(0.0), self.matrix
        lost = torch.where(below.off.isnan(), 1.0, below.off)
        return RelevanceMatrix(
            known @ own, self.off + lost @ own, self.weight, min(self.samples, below.samples), self.upper, below.lower
        )

    def save(self, path: str | Path) -> None:
        """Saves the matrix as a safetensors file."""
        about = {"format": FORMAT, "samples": self.samples, "upper": self.upper, "lower": self.lower}
        tensors = {"matrix": self.matrix, "off": self.off, "weight": self.weight}
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"nrm": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> RelevanceMatrix:
        """Loads a matrix written by :meth:`save`.

        Raises:
            InputError: If the file does not contain a relevance matrix.
        """
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("nrm", "{}"))
            if about.get("format") != FORMAT:
                raise InputError(f"{str(path)!r} is not a file of RelevanceMatrix.save().")
            tensors = {key: file.get_tensor(key) for key in ("matrix", "off", "weight")}
        return cls(**tensors, samples=int(about["samples"]), upper=about["upper"], lower=about["lower"])


__all__ = ["RelevanceMatrix"]
