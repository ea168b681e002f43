"""Exact path patching: the net is run again, once for each site of the path. Plain PyTorch, without the package.

The lowest set takes its values from the reference run. The next set takes its values from the resulting run, while all
other activations, and thus all other paths, keep their values from the clean run. This repeats up to the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.path_patching.nets import Case


class Patching:
    """Runs of ``rest``, given the activations of the sites in the clean run and in the reference run.

    Args:
        case: Net and samples.
        start: ``"zero"`` for zero activations of the lowest site, ``"input"`` for the reference input.
    """

    def __init__(self, case: Case, start: str) -> None:
        self.case = case
        self.inputs = case.inputs(case.x)
        zero = torch.zeros_like(self.inputs[0]), *self.inputs[1:]
        self.start = zero if start == "zero" else case.inputs(case.other)
        self.clean, outputs = self.run({})
        self.value = case.explained(outputs)
        self.reference, _ = self.run({}, self.start)

    @torch.no_grad()
    def run(
        self, patched: dict[str, Tensor], inputs: tuple[Tensor, ...] = (), until: str | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See :meth:`Case.run`; by default from the clean inputs."""
        return self.case.run(inputs or self.inputs, patched, until)

    def effects(self, sites: Sequence[str], lower: Sequence[Tensor], upper: Sequence[Sequence[Tensor]]) -> Tensor:
        """Returns the decrease of the explained output for each chain of sets, ``(N, upper, lower)``.

        Args:
            sites: Sites of the chain, lowest first.
            lower: Masks of the lowest site.
            upper: For each further chain, one mask for each of the other sites.
        """
        columns = []
        for mask in lower:
            values = self.patched(sites[0], mask, self.reference[sites[0]], sites[1])[0][sites[1]]
            columns.append(torch.stack([self.decrease(sites[1:], masks, values) for masks in upper], 1))
        return torch.stack(columns, 2)

    def single(self, site: str, masks: Sequence[Tensor]) -> Tensor:
        """Returns the decrease when a set of one site takes its values from the reference run, ``(N, masks)``."""
        return torch.stack([self.decrease([site], [mask], self.reference[site]) for mask in masks], 1)

    def decrease(self, sites: Sequence[str], masks: Sequence[Tensor], values: Tensor) -> Tensor:
        """Returns the decrease if the first set takes the given values and each later set the resulting values."""
        for number, (site, mask) in enumerate(zip(sites, masks, strict=True)):
            above = sites[number + 1] if number + 1 < len(sites) else None
            seen, outputs = self.patched(site, mask, values, above)
            values = seen[above] if above else values
        return self.value - self.case.explained(outputs)

    def patched(self, site: str, mask: Tensor, values: Tensor, until: str | None) -> tuple[dict[str, Tensor], Tensor]:
        return self.run({site: torch.where(mask, values, self.clean[site])}, until=until)
