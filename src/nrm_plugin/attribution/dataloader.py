"""Attribution for all batches of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError, brief
from .neuron_nrm import NeuronNRM
from .nrm import NRM

Reduce = Literal["mean", "sum"]


class DataLoaderNRM:
    """Computes attributions over the batches of a data loader.

    Captum's ``DataLoaderAttribution`` ablates features across the whole dataset and therefore supports only
    ``FeatureAblation``. This class needs only one pass per batch. As in Captum, an ``InputRole`` specifies how each
    part of a batch is used.

    Args:
        attr_method: An :class:`~nrm_plugin.NRM`, :class:`~nrm_plugin.LayerNRM` or :class:`~nrm_plugin.NeuronNRM`.

    Raises:
        TypeError: If ``attr_method`` is not a supported method.
        InputError: If ``attr_method`` has ``batched=False``.

    Examples:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(10, 3), torch.randint(2, (10,)))
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> method = DataLoaderNRM(NRM(net))
        >>> method.attribute(DataLoader(data, 4), (0, 2), target=lambda batch: batch[1]).shape
        torch.Size([10, 3])
        >>> method.attribute(DataLoader(data, 4), (0, 2), target=1, reduce="mean").shape
        torch.Size([3])
    """

    def __init__(self, attr_method: NRM) -> None:
        if not isinstance(attr_method, NRM):
            raise TypeError(
                f"DataLoaderNRM takes NRM, LayerNRM or NeuronNRM, got {type(attr_method).__name__}; for "
                "FeatureAblation use captum.attr.DataLoaderAttribution."
            )
        if not attr_method.batched:
            raise InputError(
                "the batches of a data loader consist of samples, but the method has batched=False, which treats all "
                "inputs together as one sample. Call its attribute() for each graph or sequence."
            )
        self.attr_method = attr_method

    def attribute(
        self,
        dataloader: Iterable[Any],
        input_roles: tuple[int, ...] | None = None,
        target: Any | Callable[[Any], Any] = None,
        reduce: Reduce | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Computes the attributions of all samples, or their sum or mean.

        Args:
            dataloader: Iterable of batches, which are tensors, or tuples or lists of tensors.
            input_roles: As in Captum's ``InputRole``: 0 for explained inputs, 1 for additional arguments of the model,
                2 for parts that are not passed to the model. By default, all parts are explained inputs.
            target: As in ``attr_method.attribute``, or a function that maps a batch to its target. Not supported by
                ``NeuronNRM``, which takes ``neuron_selector=`` instead.
            reduce: ``"sum"`` or ``"mean"`` over samples, accumulated batch by batch. By default, the attributions of
                all samples are concatenated.
            show_progress: Whether to show a progress bar.
            kwargs: Additional arguments of ``attr_method.attribute``.

        Returns:
            The result of ``attr_method.attribute`` for all samples. A reduced result has no batch dimension.

        Raises:
            ValueError: If ``reduce`` or a role is unknown or the data loader is empty.

        Examples:
            >>> net = torch.nn.Linear(3, 2)
            >>> batches = [torch.randn(4, 3), torch.randn(2, 3)]
            >>> single = DataLoaderNRM(NRM(net)).attribute(batches, target=1)
            >>> total = DataLoaderNRM(NRM(net)).attribute(batches, target=1, reduce="sum")
            >>> single.shape, torch.allclose(single.sum(0), total, atol=1e-5)
            (torch.Size([6, 3]), True)
        """
        if reduce not in (None, "mean", "sum"):
            raise ValueError(f"reduce={brief(reduce)} is unknown; choose None, 'sum' or 'mean'.")
        rows: list[list[Tensor]] = []
        attributions, samples = None, 0
        for batch in tqdm(dataloader, disable=not show_progress):
            explained, others = _by_role(batch, input_roles)
            chosen = target(batch) if callable(target) else target
            given = {} if isinstance(self.attr_method, NeuronNRM) and chosen is None else {"target": chosen}
            attributions = self.attr_method.attribute(explained, additional_forward_args=others, **given, **kwargs)
            samples += len(next(_leaves(explained)))
            new = list(_leaves(attributions))
            if reduce is not None:
                new = [part.sum(0) for part in new]
                rows = [[part + add for part, add in zip(rows[0], new, strict=True)]] if rows else [new]
            else:
                rows.append(new)
        if attributions is None:
            raise ValueError("the data loader is empty.")
        if reduce is None:
            parts = [torch.cat(column) for column in zip(*rows, strict=True)]
        else:
            parts = [part / samples for part in rows[0]] if reduce == "mean" else rows[0]
        return _like(attributions, iter(parts))


def _by_role(batch: Any, roles: tuple[int, ...] | None) -> tuple[Any, tuple[Any, ...] | None]:
    """Splits a batch into the explained inputs and the additional arguments of the model."""
    if isinstance(batch, Tensor):
        if roles not in (None, (0,)):
            raise ValueError(f"input_roles={roles} has {len(roles)} roles, but a batch is a single tensor.")
        return batch, None
    parts = tuple(batch)
    roles = (0,) * len(parts) if roles is None else tuple(int(getattr(role, "value", role)) for role in roles)
    if len(roles) != len(parts) or not set(roles) <= {0, 1, 2} or 0 not in roles:
        raise ValueError(
            f"input_roles={roles} does not match a batch of {len(parts)} parts: give 0 (explained), 1 (passed to the "
            "model) or 2 (not passed) for each, and 0 at least once."
        )
    explained = tuple(part for part, role in zip(parts, roles, strict=True) if role == 0)
    others = tuple(part for part, role in zip(parts, roles, strict=True) if role == 1)
    return explained[0] if len(explained) == 1 else explained, others or None


def _leaves(form: Any) -> Iterator[Tensor]:
    if isinstance(form, Tensor):
        yield form
    else:
        for part in form:
            yield from _leaves(part)


def _like(form: Any, parts: Iterator[Tensor]) -> Any:
    """Packs tensors into tuples and lists with the structure of ``form``."""
    return next(parts) if isinstance(form, Tensor) else type(form)(_like(part, parts) for part in form)
