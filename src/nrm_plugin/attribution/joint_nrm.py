"""Joint relevance of two layers with the interface of a Captum attribution method."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Uncovered
from ..events.event import Atom
from ..kernels.normalization import Residual
from ..model.inputs_and_outputs import Output
from .base import Layer, Unit, as_tuple, in_unit
from .nrm import NRM


class JointNRM:
    """Captum attribution method for the joint relevance of the channels or neurons of two layers.

    Args:
        model: The network; ``torch.nn.DataParallel`` is unwrapped.
        upper: The layer nearer to the output: a module, its name or ``at(…)``.
        lower: A layer below ``upper``.
        composite: As in :class:`NRM`.
        residual: As in :class:`NRM`.
        gain_limit: As in :class:`NRM`.
        uncovered: As in :class:`NRM`.
        output: As in :class:`NRM`.
        batched: As in :class:`NRM`.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 10))
        >>> JointNRM(net, net[2], net[0]).attribute(torch.randn(2, 3, 6, 6), target=5).shape
        torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        upper: Layer,
        lower: Layer,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        uncovered: Uncovered | None = None,
        *,
        output: Output | Atom | None = None,
        batched: bool = True,
    ) -> None:
        self.upper, self.lower = upper, lower
        self._inputs = NRM(model, composite, residual, gain_limit, uncovered, output=output, batched=batched)

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        over: str = "channel",
        unit: Unit = "output",
        *,
        against: Any = None,
        baselines: Any = None,
    ) -> Tensor:
        """Computes the joint relevance of each pair of channels or neurons.

        Args:
            inputs: Inputs of shape ``(N, …)``, or a tuple of such tensors.
            target: The output to explain, in Captum's format; see :meth:`NRM.attribute`.
            additional_forward_args: Additional arguments for the model.
            over: ``"channel"`` or ``"neuron"``.
            unit: ``"output"`` for joint relevance multiplied by the explained output, or ``"measure"`` for unscaled
                joint relevance.
            against: Output or outputs to contrast with; see :meth:`NRM.attribute`.
            baselines: If given, the relevance explains the change in the output relative to the baselines; see
                :meth:`NRM.attribute`.

        Returns:
            Joint relevance of shape ``(N, upper, lower)``, with ``N = 1`` for ``batched=False``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> x = torch.randn(5, 3)
            >>> joint = JointNRM(net, "2", "0").attribute(x, target=1)
            >>> torch.allclose(joint.sum(1), LayerNRM(net, "0").attribute(x, target=1), atol=1e-6)
            True
        """
        start = as_tuple(inputs)[0], target, additional_forward_args
        measure = self._inputs.measure(*start, against=against, baselines=baselines)
        upper, lower = self._inputs._layer(self.upper), self._inputs._layer(self.lower)
        return in_unit(measure.joint(upper, lower, over), measure.output, unit)
