"""Groups of the members of layers, which can be stored, named and applied to other inputs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import EventError, InputError, brief, printable
from ..events.event import Event, at
from ..recording.taps import Tap
from .groups import Over, labels_of

FORMAT = "nrm-plugin groups 1"


class HasTaps(Protocol):
    """Protocol for the methods of a measure that :class:`Groups` uses."""

    def _tap(self, layer: Any) -> Tap: ...


@dataclass(frozen=True, eq=False)
class Groups:
    """Partitions of the members (channels, positions, neurons) of several layers.

    Groups are returned by :func:`~nrm_plugin.find_groups`. They are found on some inputs and can be applied to any
    other inputs of the model.

    Attributes:
        layers: Names of the layers, from the output to the input.
        labels: The group of each member in each layer, of shape ``(members,)``.
        members: The kind of members in each layer (``"channel"``, ``"position"`` or ``"neuron"``), or a tensor with the
            member index of each neuron.
        names: The name of each group in each layer.
        masses: The mass of each group in each layer, averaged over the samples used to find the groups.
        kappas: The fraction of the dependence that the groups preserve, for each pair of consecutive layers, or NaN if
            the layers are independent or the joint relevance of all members was not computed.
        examples: Index of the sample with the largest absolute mass of each group, for each layer. Empty if only means
            are known, as is the case for a sweep.
        samples: Number of samples used to find the groups.
        source: Name of the file from which the groups were read, or empty if they were not read from a file. It is not
            stored.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
        >>> groups = find_groups(RelevanceMeasure(net, torch.rand(5, 3), 1), ["1", "input"], k=2)
        >>> groups.labels[0].shape, len(groups.names[0])
        (torch.Size([9]), 2)
    """

    layers: tuple[str, ...]
    labels: tuple[Tensor, ...]
    members: tuple[Over, ...]
    names: tuple[tuple[str, ...], ...]
    masses: tuple[tuple[float, ...], ...]
    kappas: tuple[float, ...]
    examples: tuple[tuple[int, ...], ...]
    samples: int
    source: str = ""

    @property
    def origin(self) -> str:
        """Description of the file from which the groups were read and of its samples. Empty if there is no file.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> groups = find_groups(RelevanceMeasure(net, torch.rand(5, 3), 1), ["1", "input"], k=2)
            >>> from dataclasses import replace
            >>> groups.origin, replace(groups, source="mine.safetensors").origin
            ('', 'mine.safetensors, where they were found on 5 samples')
        """
        samples = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        return f"{printable(self.source)}, where they were found on {samples}" if self.source else ""

    def __repr__(self) -> str:
        counts = ", ".join(f"{layer}: {len(names)}" for layer, names in zip(self.layers, self.names, strict=True))
        return f"Groups({counts}; κ={self.kappa:.2f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Groups):
            return NotImplemented
        return (
            self._plain() == other._plain()
            and self._tensors().keys() == other._tensors().keys()
            and all(torch.equal(values, other._tensors()[key]) for key, values in self._tensors().items())
        )

    def __hash__(self) -> int:
        return hash(self._plain())

    @property
    def kappa(self) -> float:
        """The mean of :attr:`kappas` over pairs of consecutive layers, ignoring NaN.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(9, 3), 1)
            >>> round(find_groups(mu, ["1", "input"], k=4).kappa, 5)  # no more than 4 members
            1.0
        """
        shares = [share for share in self.kappas if not math.isnan(share)]
        return sum(shares) / len(shares) if shares else math.nan

    def over(self, mu: HasTaps, layer: str) -> Tensor:
        """Returns the group of each neuron of a layer, ``mu.shape(layer)[1:]``, for use as ``over=`` and in events.

        Args:
            mu: A measure of the same model for any inputs.
            layer: Name of the layer.

        Raises:
            InputError: If the layer has no groups, or if its members for these inputs differ from the grouped ones.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> mu = RelevanceMeasure(net, torch.rand(5, 3), 1)
            >>> groups = find_groups(mu, ["1", "input"], k=2)
            >>> mu.marginal("1", over=groups.over(mu, "1")).shape
            torch.Size([5, 2])
        """
        tap, kind, labels = mu._tap(layer), self.members[self._number(layer)], self.labels[self._number(layer)]
        try:
            members = labels_of(tap, kind)
        except EventError:
            members = None
        if members is None or int(members.max()) + 1 != len(labels):
            raise InputError(
                f"the groups of {layer!r} have {len(labels)} members, but a tap of shape {tuple(tap.shape[1:])} "
                "has others. Groups apply to inputs with the same members; positions need inputs of one size."
            )
        return labels[members]

    def event(self, mu: HasTaps, layer: str, group: int) -> Event:
        """Returns the event that a walk crosses a group of a layer.

        Raises:
            InputError: If there is no such group.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> mu = RelevanceMeasure(net, torch.rand(1, 3), 1)
            >>> groups = find_groups(mu, ["1", "input"], k=2)
            >>> torch.allclose(mu(groups.event(mu, "1", 0)), torch.tensor(groups.masses[0][0]), atol=1e-5)
            True
        """
        labels = self.over(mu, layer)
        if not 0 <= group < len(self.names[self._number(layer)]):
            raise InputError(f"{layer!r} has groups 0 to {len(self.names[self._number(layer)]) - 1}, not {group!r}.")
        return at(layer)[labels == group]

    def named(self, names: Mapping[str, Sequence[str] | Mapping[int, str]]) -> Groups:
        """Returns a copy with renamed groups. The names of a layer are a list or a dictionary keyed by group index.

        Raises:
            InputError: If one of the layers or groups does not exist.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> groups = find_groups(RelevanceMeasure(net, torch.rand(5, 3), 1), ["1", "input"], k=2)
            >>> groups.named({"1": ["left", "right"]}).names[0]
            ('left', 'right')
        """
        new = list(self.names)
        for layer, given in names.items():
            number = self._number(layer)
            chosen = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
            if not set(chosen) <= set(range(len(new[number]))):
                raise InputError(f"names= of {layer!r} name groups {sorted(chosen)}; it has {len(new[number])}.")
            new[number] = tuple(chosen.get(group, name) for group, name in enumerate(new[number]))
        return replace(self, names=tuple(new))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the groups to a safetensors file.

        Examples:
            >>> import tempfile, os
            >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> groups = find_groups(RelevanceMeasure(net, torch.rand(5, 3), 1), ["1", "input"], k=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     groups.save(os.path.join(folder, "groups.safetensors"))
            ...     Groups.load(os.path.join(folder, "groups.safetensors")) == groups
            True
        """
        metadata = {"groups": json.dumps({"format": FORMAT, **self._plain_dict()})}
        save_file({key: values.contiguous() for key, values in self._tensors().items()}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Groups:
        """Reads groups from a file written by :meth:`save`.

        Raises:
            InputError: If the file does not contain groups.

        Examples:
            >>> Groups.load("weights.safetensors")
            Traceback (most recent call last):
            FileNotFoundError: ...
        """
        try:
            with safe_open(path, "pt") as file:
                plain = json.loads((file.metadata() or {})["groups"])
                if plain.pop("format") != FORMAT:
                    raise ValueError("its format is different")
                kinds = [file.get_tensor(f"members/{layer}") if kind is None else kind
                         for layer, kind in zip(plain["layers"], plain.pop("members"), strict=True)]  # fmt: skip
                labels = tuple(file.get_tensor(f"labels/{layer}") for layer in plain["layers"])
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{os.fspath(path)} was not written by Groups.save(): {brief(str(error))}.") from error
        known = {key: _tuple(value) for key, value in plain.items()}
        return cls(labels=labels, members=tuple(kinds), source=os.path.basename(os.fspath(path)), **known)

    def _number(self, layer: str) -> int:
        if layer not in self.layers:
            raise InputError(f"there are no groups for {brief(layer)}, only for {', '.join(self.layers)}.")
        return self.layers.index(layer)

    def _plain_dict(self) -> dict[str, Any]:
        kinds = [None if isinstance(kind, Tensor) else kind for kind in self.members]
        return {
            "layers": self.layers, "members": kinds, "names": self.names, "masses": self.masses,
            "kappas": self.kappas, "examples": self.examples, "samples": self.samples,
        }  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        """Returns the labels of all layers and those members that are tensors."""
        own = {f"labels/{layer}": labels for layer, labels in zip(self.layers, self.labels, strict=True)}
        kinds = zip(self.layers, self.members, strict=True)
        return own | {f"members/{layer}": kind for layer, kind in kinds if isinstance(kind, Tensor)}

    def _plain(self) -> str:
        return json.dumps(self._plain_dict())


def _tuple(value: Any) -> Any:
    return tuple(_tuple(one) for one in value) if isinstance(value, list) else value
