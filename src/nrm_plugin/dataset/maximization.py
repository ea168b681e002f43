"""One pass over data that finds the reference examples of channels and events, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..errors import InputError
from ..events.event import Event
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..recording.module_outputs import module_outputs
from .activations import single_activations
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
    r"""The samples in which each channel of some layers carries the most relevance, from one pass over the data.

    Memory holds ``k`` samples of each channel and target, however many samples come. Of equal values the first
    samples are taken.

    Args:
        model: The network, in evaluation mode.
        data: A data set of ``(input, label)``, a loader of it that does not shuffle, or any batches of that form.
            Samples are numbered as they come.
        layers: Names of layers whose channels are ranked.
        k: How many samples of each.
        by: ``"relevance"``, ``"activation"`` or both; activations are what a module returns.
        events: Events to be ranked by their mass, by name.
        target: What is explained: the label, the predicted class, or one class for all samples.
        unit: ``"measure"``: shares of all relevance, ``μ``. ``"output"``: the usual LRP score, ``μ`` times the
            explained output. ``"layer"``: that score as a share of the absolute scores of all channels of the layer,
            and activations likewise, as zennit-crp has it by default.
        reduce: ``"sum"`` over the positions of a channel, or ``"max"``: its strongest one.
        per_target: Also the best samples of each target.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As there.
        gain_limit: As there.
        uncovered: As there.
        batch_size: Samples of a pass, where ``data`` is a data set.
        device: Where the model is; that of its parameters by default.
        show_progress: Show a progress bar.

    Raises:
        ReferencesError: A loader that shuffles, batches of another form, nothing to rank.
        InputError: Arguments that do not fit.
        UnknownLayerError: No layer of a name.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randint(2, (20,)))
        >>> found = find_references(net, data, ["0"], k=3)
        >>> found.of("0").samples.shape, found.of("0", by="activation", target=1).target
        (torch.Size([4, 3]), 1)

    Source: Achtibat et al. (Nature Machine Intelligence 2023), for relevance maximization; events are ours.
    """
    search = _Search(list(layers), k, tuple(by), dict(events or {}), unit, reduce, per_target)
    rules = normalize(composite, residual, gain_limit, uncovered)
    place = device if device is not None else next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = _batches(data, batch_size)
    with module_outputs(model, search.active) as outputs:
        for inputs, labels in tqdm(batches, disable=not show_progress, unit="batch"):
            chooser = _Chooser(target, labels, len(inputs))
            mu = RelevanceMeasure(model, inputs.to(place), start=chooser, composite=rules)
            search.add(mu, chooser.targets, single_activations(outputs))
    return search.found()


class _Chooser:
    """The start of a measure; remembers what it chose."""

    def __init__(self, target: object, labels: Tensor | None, count: int) -> None:
        if target == "label" and labels is None:
            raise ReferencesError(
                "the data have no labels. Explain what is predicted: target='prediction', or a class."
            )
        if target not in ("label", "prediction") and (isinstance(target, bool) or not isinstance(target, int)):
            raise InputError(f"target={target!r} is unknown; choose 'label', 'prediction', or the number of a class.")
        self.targets = torch.full((count,), -1)
        self._wanted = target
        if isinstance(target, int):
            self.targets = torch.full((count,), target)
        elif target == "label" and labels is not None:
            self.targets = labels.detach().cpu().reshape(-1).long()

    def __call__(self, output: Tensor) -> Tensor:
        """One-hot over the outputs ``(N, C)``."""
        if output.ndim != 2:
            raise InputError(f"references are of classifiers with an output (N, classes), got {tuple(output.shape)}.")
        if self._wanted == "prediction":
            self.targets = output.argmax(1).cpu()
        if len(self.targets) != len(output):
            raise ReferencesError(f"there are {len(self.targets)} labels for {len(output)} samples.")
        if not bool(((self.targets >= 0) & (self.targets < output.shape[1])).all()):
            low, high = int(self.targets.min()), int(self.targets.max())
            raise InputError(f"targets {low} to {high} were given, but the model has {output.shape[1]} outputs.")
        return nn.functional.one_hot(self.targets.to(output.device), output.shape[1]).to(output)


class _Search:
    """Ranks what a batch shows among what came before."""

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
            raise InputError(f"k={k!r} must be a whole number of at least 1.")
        for what, value, known in (
            ("unit", unit, ("measure", "output", "layer")),
            ("reduce", reduce, ("sum", "max")),
            *(("by", one, ("relevance", "activation")) for one in by),
        ):
            if value not in known:
                raise InputError(f"{what}={value!r} is unknown; choose {' or '.join(map(repr, known))}.")
        if not events and not (layers and by):
            raise ReferencesError("nothing to rank: name layers, or events.")
        if events and unit == "layer":
            raise InputError("unit='layer' is a share of a layer, and an event has none; choose 'measure' or 'output'.")
        self.layers = layers if "relevance" in by else []
        self.active = layers if "activation" in by else []
        self.events, self.unit, self.reduce = events, unit, reduce
        rankings: dict[tuple[str, By], Ranking] = {}
        for one in by:
            rankings |= {(layer, one): Ranking(k, per_target) for layer in layers}
        if events:
            rankings[EVENTS, "relevance"] = Ranking(k, per_target)
        self.rankings, self.groups, self.count = rankings, dict[str, Sequence[int | str]](), 0

    def found(self) -> FoundReferences:
        if not self.count:
            raise ReferencesError("the data hand out no sample.")
        places = {
            (name, by, target): ranking.of(target)
            for (name, by), ranking in self.rankings.items()
            for target in (None, *ranking.targets)
        }
        return FoundReferences(self.groups, places, self.count)

    def add(self, mu: RelevanceMeasure, targets: Tensor, activity: Mapping[str, Tensor]) -> None:
        samples = torch.arange(self.count, self.count + mu.batch)
        scale = mu.output if self.unit != "measure" else torch.ones_like(mu.output)
        relevance = mu.marginal(self.layers) if self.layers else {}
        for by, maps in (("relevance", relevance), ("activation", activity)):
            for layer, values in maps.items():
                if by == "relevance" and self.unit != "measure":
                    # Before the largest is sought: where the output is negative, signs turn.
                    values = values * scale.view(-1, *(1,) * (values.ndim - 1))
                score, positions = _reduced(values, mu.channel_dim(layer), self.reduce)
                if self.unit == "layer":
                    score = score / score.abs().sum(1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
                self._rank(layer, by, score, samples, targets, positions)  # type: ignore[arg-type]
        if self.events:
            masses = mu(list(self.events.values())).T * scale[:, None]
            self._rank(EVENTS, "relevance", masses, samples, targets, None)
        self.count += mu.batch

    def _rank(
        self, name: str, by: By, score: Tensor, samples: Tensor, targets: Tensor, positions: Tensor | None
    ) -> None:
        score = score.detach().cpu()
        if not bool(score.isfinite().all()):
            first = int(samples[~score.isfinite().all(1)][0])
            raise ReferencesError(f"{by} of {name!r} is not finite in sample {first}, and cannot be ranked.")
        if name not in self.groups:
            self.groups[name] = list(self.events) if name == EVENTS else list(range(score.shape[1]))
        self.rankings[name, by].add(score, samples, targets, None if positions is None else positions.cpu())


def _reduced(values: Tensor, channel_dim: int, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Of each channel its sum or largest value, and where that was; ``(N, C)`` each."""
    flat = values.movedim(channel_dim, 1).flatten(2) if values.ndim > 2 else values.unsqueeze(-1)
    largest, positions = flat.max(-1)
    return (flat.sum(-1) if reduce == "sum" else largest), positions


def _batches(data: TorchDataset[Any] | Iterable[Any], batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    if isinstance(data, DataLoader):
        sampler = data.batch_sampler.sampler if type(data.batch_sampler) is BatchSampler else data.sampler
        if not isinstance(sampler, SequentialSampler) and not isinstance(
            data.dataset, torch.utils.data.IterableDataset
        ):
            raise ReferencesError(
                f"samples are numbered as they come, and this loader hands them out by a {type(sampler).__name__}. "
                "Give a loader with shuffle=False, or the data set itself."
            )
    elif isinstance(data, TorchDataset):
        # With a generator of its own it does not draw from the caller's.
        data = DataLoader(data, batch_size, generator=torch.Generator())
    for batch in data:
        parts = [batch] if isinstance(batch, Tensor) else list(batch)
        if not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor):
            raise ReferencesError("a batch must be a tensor of inputs, or (inputs, labels).")
        labels = torch.as_tensor(parts[1]) if len(parts) == 2 else None
        yield parts[0], labels


__all__ = ["find_references"]
