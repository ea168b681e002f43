"""Search for reference examples: the samples with the most relevance for channels and events, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..errors import InputError, TargetError
from ..events.event import Event
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..model.devices import by_sample
from ..plan.reuse import Measures
from ..recording.module_outputs import module_outputs
from .activations import single_activations
from .evaluation import device_of, predicted_classes
from .examples import EVENTS, By, FoundReferences, ReferencesError
from .ranking import Ranking

Unit = Literal["measure", "output", "layer"]
Reduce = Literal["sum", "max"]


def find_references(
    model: nn.Module,
    data: TorchDataset[Any] | Iterable[Any],
    layers: Sequence[str] = (),
    k: int = 9,
    *,
    by: Sequence[By] = ("relevance", "activation"),
    events: Mapping[str, Event] | None = None,
    target: Literal["label", "prediction"] | int = "label",
    against: Any = None,
    unit: Unit = "measure",
    reduce: Reduce = "sum",
    per_target: bool = True,
    composite: Composite | None = None,
    residual: Residual | None = None,
    gain_limit: float | None = None,
    uncovered: Uncovered | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> FoundReferences:
    r"""Finds the samples in which each channel has the largest relevance or activation, in one pass over the data.

    The memory is proportional to ``k`` for each channel and target, regardless of the number of samples. Ties are
    broken by sample index.

    Args:
        model: The network, in evaluation mode.
        data: A dataset of ``(input, label)`` pairs, a data loader without shuffling, or an iterable of such batches.
            Samples are numbered in iteration order.
        layers: Names of the layers whose channels are ranked.
        k: Number of samples per channel.
        by: ``"relevance"``, ``"activation"`` or both. Activations are outputs of modules.
        events: Events keyed by name. Samples are also ranked by the mass of each event.
        target: Explained class: the label, the prediction, or one class for all samples.
        against: As in :class:`~nrm_plugin.RelevanceMeasure`, such as ``"rest"``. Relevance is then multiplied by the
            sign of the difference. Large values are thus evidence for the target.
        unit: ``"measure"`` for ``μ``, a fraction of the total relevance; ``"output"`` for the usual LRP score, ``μ``
            times the explained output; or ``"layer"``, the default of zennit-crp, for the LRP score divided by the sum
            of the absolute scores of all channels of the layer and for activations normalized in the same way.
        reduce: ``"sum"`` or ``"max"`` over the positions of a channel.
        per_target: Whether to rank the samples of each target as well.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.
        batch_size: Number of samples per batch if ``data`` is a dataset.
        device: Device of the inputs. Defaults to the device of the model.
        show_progress: Whether to show a progress bar.

    Raises:
        ReferencesError: If the loader shuffles, a batch has a different format, or neither layers nor events are given.
        InputError: If an argument is invalid.
        TargetError: If targets do not match the outputs.
        UnknownLayerError: If the model has no layer with one of the given names.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(2, (20,)))
        >>> references = find_references(net, data, ["0"], k=3)
        >>> references.of("0").samples.shape, references.of("0", by="activation", target=1).target
        (torch.Size([4, 3]), 1)

    Source: Achtibat et al. (Nature Machine Intelligence 2023), for relevance maximization; the extension to events is
    new in this package.
    """
    if target not in ("label", "prediction") and (isinstance(target, bool) or not isinstance(target, int)):
        raise InputError(f"target={target!r} is unknown; choose 'label', 'prediction', or the index of a class.")
    search = _Search(list(layers), k, tuple(by), dict(events or {}), unit, reduce, per_target)
    rules = normalize(composite, residual, gain_limit, uncovered)
    device = device_of(model) if device is None else device
    take = RelevanceMeasure if search.active else Measures()  # a plan does not run modules
    with module_outputs(model, search.active) as outputs:
        for inputs, labels in tqdm(_batches(data, batch_size), disable=not show_progress, unit="batch"):
            classes = partial(_explained_classes, target, labels)
            mu = take(model, inputs.to(device), classes, composite=rules, against=against)
            search.add(mu, classes(mu.outputs).int(), single_activations(outputs))
    return search.references()


def _explained_classes(target: str | int, labels: Tensor | None, outputs: Tensor) -> Tensor:
    """Returns the explained class of each sample, as a tensor of shape ``(N,)``.

    Raises:
        InputError: If the model is not a classifier.
        ReferencesError: If labels are missing or if there are not as many labels as outputs.
        TargetError: If a class is negative.
    """
    if outputs.ndim != 2:
        raise InputError(f"references require a classifier with outputs (N, classes), got {tuple(outputs.shape)}.")
    if target == "label":
        if labels is None:
            raise ReferencesError("the data have no labels. Set target='prediction', or a class.")
        classes = labels.detach().reshape(-1).long()
        if len(classes) != len(outputs):
            raise ReferencesError(f"there are {len(classes)} labels for {len(outputs)} samples.")
    else:
        classes = torch.full((len(outputs),), target) if isinstance(target, int) else predicted_classes(outputs)
    if bool((classes < 0).any()):
        raise TargetError(f"target {int(classes.min())} is negative; classes are counted from 0.")
    return classes.cpu()


class _Search:
    """Rankings of all layers and events, updated batch by batch."""

    def __init__(
        self,
        layers: list[str],
        k: int,
        by: tuple[By, ...],
        events: dict[str, Event],
        unit: Unit,
        reduce: Reduce,
        per_target: bool,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k={k!r} must be an integer of at least 1.")
        for name, value, known in (
            ("unit", unit, ("measure", "output", "layer")),
            ("reduce", reduce, ("sum", "max")),
            *(("by", one, ("relevance", "activation")) for one in by),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r} is unknown; choose {' or '.join(map(repr, known))}.")
        if not events and not (layers and by):
            raise ReferencesError("nothing to rank: pass layers or events.")
        if events and unit == "layer":
            raise InputError("unit='layer' is undefined for events; choose 'measure' or 'output'.")
        self.layers = layers if "relevance" in by else []
        self.active = layers if "activation" in by else []
        self.events, self.unit, self.reduce = events, unit, reduce
        self.rankings: dict[tuple[str, By], Ranking] = {
            (layer, one): Ranking(k, per_target) for one in by for layer in layers
        }
        if events:
            self.rankings[EVENTS, "relevance"] = Ranking(k, per_target)
        self.groups: dict[str, Sequence[int | str]] = {}
        self.count = 0

    def references(self) -> FoundReferences:
        if not self.count:
            raise ReferencesError("the data have no samples.")
        rankings = {
            (name, by, target): ranking.of(target)
            for (name, by), ranking in self.rankings.items()
            for target in (None, *ranking.targets)
        }
        return FoundReferences(self.groups, rankings, self.count)

    def add(self, mu: RelevanceMeasure, targets: Tensor, activations: Mapping[str, Tensor]) -> None:
        samples = torch.arange(self.count, self.count + mu.batch)
        scale = mu.sign if self.unit == "measure" else mu.output
        relevance = mu.marginal(self.layers) if self.layers else {}
        for layer, values in relevance.items():
            # Values are scaled before the maximum over positions because a negative output reverses the order.
            scaled = values * by_sample(scale, values)
            self._rank(layer, "relevance", *self._scores(scaled, mu.channel_dim(layer)), samples, targets)
        for layer, values in activations.items():
            self._rank(
                layer,
                "activation",
                *self._scores(mu._tap(layer).layout.unfold(values), mu.channel_dim(layer)),
                samples,
                targets,
            )
        if self.events:
            masses = mu(list(self.events.values())).T * scale[:, None]
            self._rank(EVENTS, "relevance", masses, None, samples, targets)
        self.count += mu.batch

    def _scores(self, values: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
        """Returns the score of each channel and the position of its largest value, each of shape ``(N, C)``."""
        flat = values.movedim(channel_dim, 1).flatten(2) if values.ndim > 2 else values.unsqueeze(-1)
        largest, positions = flat.max(-1)
        score = flat.sum(-1) if self.reduce == "sum" else largest
        if self.unit == "layer":
            score = score / score.abs().sum(1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
        return score, positions

    def _rank(
        self, name: str, by: By, score: Tensor, positions: Tensor | None, samples: Tensor, targets: Tensor
    ) -> None:
        score = score.detach().cpu()
        if not bool(score.isfinite().all()):
            first = int(samples[~score.isfinite().all(1)][0])
            raise ReferencesError(f"{by} of {name!r} is not finite in sample {first}, and cannot be ranked.")
        if name not in self.groups:
            self.groups[name] = list(self.events) if name == EVENTS else list(range(score.shape[1]))
        self.rankings[name, by].add(score, samples, targets, None if positions is None else positions.cpu())


def _batches(data: TorchDataset[Any] | Iterable[Any], batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    if isinstance(data, DataLoader):
        sampler = data.batch_sampler.sampler if type(data.batch_sampler) is BatchSampler else data.sampler
        is_iterable = isinstance(data.dataset, torch.utils.data.IterableDataset)
        if not isinstance(sampler, SequentialSampler) and not is_iterable:
            raise ReferencesError(
                f"samples are numbered in iteration order, but this loader uses a {type(sampler).__name__}. Pass a "
                "loader with shuffle=False, or the dataset itself."
            )
    elif isinstance(data, TorchDataset):
        # With its own generator, the loader does not use the global random state.
        data = DataLoader(data, batch_size, generator=torch.Generator())
    for batch in data:
        parts = [batch] if isinstance(batch, Tensor) else list(batch)
        if not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor):
            raise ReferencesError("a batch must be a tensor of inputs, or (inputs, labels).")
        labels = torch.as_tensor(parts[1]) if len(parts) == 2 else None
        yield parts[0], labels


__all__ = ["find_references"]
