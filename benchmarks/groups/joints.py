"""Joint relevance and ablations of every input of a case, stored so that an interrupted run can resume."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from zennit.core import Composite

from nrm_plugin import NRMAbsolute, NRMDefault, RelevanceMeasure, find_groups
from nrm_plugin.measure.mean_joints import MeanJoints

from .nets import Case
from .partitions import K

COMPOSITES: dict[str, Callable[[], Composite]] = {"default": NRMDefault, "NRMAbsolute": NRMAbsolute}
DRAWS = 5
"""Random sets for each group."""
Arrays = dict[str, np.ndarray]


def of_input(case: Case, number: int, composite: str, file: Path) -> Arrays:
    """Returns the joints, masses, activations and ablations of one input; read from a file that has all of them."""
    return stored(file, _is_complete, lambda: _measured(case, number, composite), np.savez_compressed)


def stored(
    file: Path, is_complete: Callable[[Path], bool], measured: Callable[[], Arrays], save: Callable[..., None]
) -> Arrays:
    """Reads arrays from a file, which is written first, in one step, if it is not complete."""
    if not is_complete(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part.npz")
        save(partial, **measured())
        partial.replace(file)
    with np.load(file) as arrays:
        return dict(arrays)


def _is_complete(file: Path) -> bool:
    if not file.exists():
        return False
    with np.load(file) as arrays:
        return "same mass 0 mass" in arrays


def _measured(case: Case, number: int, composite: str) -> Arrays:
    x = case.inputs[number : number + 1]
    with torch.no_grad():
        outputs = case.model(x)
    target = int(outputs.argmax())
    mu = RelevanceMeasure(case.model, x, target, composite=COMPOSITES[composite]())
    joints = mu.joints(list(case.layers))
    arrays = {f"joint {pair}": joint[0].numpy() for pair, joint in enumerate(joints)}
    masses = mu.marginal(list(case.layers))
    means = MeanJoints(
        case.layers, ("channel",) * len(case.layers), tuple(joint[0].double().numpy() for joint in joints),
        tuple(_by_channel(mu, masses[layer], layer).sum(2).double().numpy() for layer in case.layers), 1,
    )  # fmt: skip
    groups = find_groups(means, list(case.layers), K)
    for place, layer in enumerate(case.layers):
        mass = torch.from_numpy(means.masses[place][0])
        arrays[f"mass {place}"] = mass.numpy()
        arrays[f"activation {place}"] = _by_channel(mu, _activation(case, layer, x), layer)[0].numpy()
        labels = {"groups": groups.labels[place], **_sets_alone(mass, groups.labels[place])}
        sets = {name: torch.nn.functional.one_hot(own).T for name, own in labels.items()}  # (sets, channels)
        sets["same mass"] = same_mass(mass, sets["groups"])
        for name, inside in sets.items():
            shape = [1] * len(mu.shape(layer))
            shape[0], shape[mu.channel_dim(layer) % len(shape)] = inside.shape
            ablated = case.ablated(layer, x, 1 - inside.reshape(shape).float())[:, target]
            arrays[f"{name} {place} mass"] = (inside.double() @ mass).numpy()
            arrays[f"{name} {place} change"] = ((outputs[0, target] - ablated) / outputs[0, target]).numpy()
    return arrays


def same_mass(mass: torch.Tensor, groups: torch.Tensor, draws: int = DRAWS, seed: int = 0) -> torch.Tensor:
    """Draws random sets with the sizes and, as nearly as possible, masses of groups, ``(draws * groups, channels)``.

    A random set is changed by the exchange of two channels that brings its mass closest to that of the group, until no
    exchange brings it closer. Which channels it has depends on their own masses only.

    Args:
        mass: Mass of each channel, ``(channels,)``.
        groups: The channels of each group, ``(groups, channels)``, 0 or 1.
        draws: Number of sets for each group.
        seed: Seed of the random sets.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros((draws * len(groups), len(mass)), dtype=groups.dtype)
    for row, group in enumerate(groups.repeat(draws, 1)):
        wanted, size = float((group * mass).sum()), int(group.sum())
        order = torch.randperm(len(mass), generator=generator)
        chosen, others = order[:size].clone(), order[size:].clone()
        while len(others) and size:
            missing = wanted - float(mass[chosen].sum())
            change = mass[others][:, None] - mass[chosen][None]  # (others, chosen)
            left = (missing - change).abs()
            best = int(left.argmin())
            if float(left.flatten()[best]) >= abs(missing) - 1e-12:
                break
            out, into = best % size, best // size
            chosen[out], others[into] = others[into].clone(), chosen[out].clone()
        found[row, chosen] = 1
    return found


def _sets_alone(mass: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sets with the sizes of the groups, filled with channels in the order of their masses, or at random."""
    sizes = torch.bincount(labels)
    ranks = mass.abs().argsort(descending=True)
    by_rank = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    alone, chance = torch.empty_like(labels), torch.empty_like(labels)
    alone[ranks] = by_rank
    chance[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))] = by_rank
    return {"alone": alone, "random": chance}


def _activation(case: Case, layer: str, x: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = case.model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        case.model(x)
    handle.remove()
    return kept[0]


def _by_channel(mu: RelevanceMeasure, values: torch.Tensor, layer: str) -> torch.Tensor:
    """Reshapes a tensor to ``(N, channels, positions)``."""
    return values.movedim(mu.channel_dim(layer), 1).flatten(2) if values.ndim > 2 else values[:, :, None]


def mean_of(parts: list[Arrays], layers: tuple[str, ...]) -> MeanJoints:
    """Returns the mean joint relevance of several inputs."""
    pairs = [
        np.mean([part[f"joint {pair}"] for part in parts], 0).astype(float) for pair, _ in enumerate(pairwise(layers))
    ]
    masses = [np.stack([part[f"mass {place}"] for part in parts]) for place, _ in enumerate(layers)]
    return MeanJoints(layers, ("channel",) * len(layers), tuple(pairs), tuple(masses), len(parts))
