"""Steps: calls of modules and functions, linked into the autograd graph by their normalized kernels.

The gradients that ``torch.autograd`` computes in this graph are relevance.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError, derivative_inside
from ..model.autocast import InFloat32, exact, is_short, working_dtype
from ..model.trace_guards import repeated
from .base import Kernel
from .forward_state import RUNNING, listener, not_recorded
from .normalization import Deficit, Normalization, Scaling
from .rule_branch_kernel import BranchKernel


class Holder(Protocol):
    """Interface of objects that run the model again to recompute the freed tensors of a step (call with a kernel)."""

    def fill(self, step: Step) -> None:
        """Recomputes the tensors of a step. They remain available until the tensors of another step are requested."""


class Step(ABC):
    r"""Call of a module or function, as a node of the computation graph with a normalized kernel.

    The kernel is the linear map by which the call propagates relevance, :math:`\tilde T_{ij} = g(c_j) T_{ij}`, and the
    sink absorbs :math:`R_j (1 - g(c_j) c_j)`.

    Args:
        name: Name of the layer or function.
        output: The output of the call, of shape ``(N, *out)``.
        normalization: The normalization of the columns.
        rule: Name of the rule or operation.

    Attributes:
        normalization: The normalization of the columns.
        call: Index of the call among the calls of the same module or function.
        dtype: The dtype of relevance at the output.
        device: The device of the output.
        is_short: Whether the model computed the output in a lower precision than float32. The kernel is in float32.
        uses: Number of known consumers of the output.
        attention: Layout of heads and tokens, if the step multiplies attention weights by values.
        keeps_rows: Whether each row of the output is known to depend only on the same row of the inputs.
        joined: Steps closer to the input whose tensors the kernel may read.
        holder: Object that recomputes the tensors of the step after they were freed, or None if they are never freed.
        number: Index of the step in the holder.
    """

    def __init__(self, name: str, output: Tensor, normalization: Normalization, rule: str) -> None:
        self.name = name
        self.call = 0
        self.number = 0
        self.holder: Holder | None = None
        self.joined: tuple[Step, ...] = ()
        self.rule = rule
        self.uses = 1
        self.attention: Any = None
        self.keeps_rows = False
        self.shape = output.shape
        self.dtype, self.device = working_dtype(output.dtype), output.device
        self.is_short = is_short(output)
        self.normalization = normalization
        self._kernel: Kernel | None = None
        self._scaling: Scaling | None = None
        self._lock = threading.RLock()

    @abstractmethod
    def _build(self) -> Kernel:
        """Constructs the kernel. Called when relevance first arrives."""

    @property
    def kernel(self) -> Kernel:
        """Kernel of the rule. It is already normalized if its columns are a :class:`Deficit`."""
        if self._kernel is not None:
            return self._kernel
        self.fill()
        with self._lock, torch.inference_mode(False), not_recorded(), self._arithmetic():
            return self._built()

    def _built(self) -> Kernel:
        """Returns or constructs the kernel. Must be called inside the contexts that :attr:`kernel` enters."""
        if self._kernel is None:
            with repeated(f"{self.name}:{self.call}"):
                self._kernel = self._build()
        return self._kernel

    def forget_kernel(self) -> None:
        """Discards the kernel, for example after fusion has changed the layer."""
        self._kernel = self._scaling = None

    def fill(self) -> None:
        """Recomputes the tensors of the step if they have been freed."""
        if self.holder is not None and self._kernel is None:
            self.holder.fill(self)

    def empty(self) -> None:
        """Frees all tensors of the step, keeping only its structure."""
        self.forget_kernel()

    def _scaling_by(self, kernel: Kernel) -> Scaling:
        """Computes the gain and the deficit of a kernel's columns."""
        if kernel.is_stochastic:
            return Scaling()
        if isinstance(kernel, BranchKernel) and isinstance(kernel.columns, Deficit):
            return Scaling(deficit=kernel.columns.share)
        like = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return self._scaling_of(kernel.column_sum(like).detach())

    def _scaling_of(self, column_sum: Tensor) -> Scaling:
        return self.normalization.scaling_by_blocks(column_sum)

    def _scaling_for(self, relevance: Tensor | None) -> Scaling:
        """Returns the gain and the deficit, valid where ``relevance`` is nonzero, or everywhere if it is None."""
        self.fill()
        with self._lock, not_recorded(), torch.inference_mode(False), torch.no_grad(), self._arithmetic():
            kernel = self._built()
            if kernel.complete_for(relevance) or self._scaling is None:
                self._scaling = self._scaling_by(kernel)
            return self._scaling

    def gain_for(self, relevance: Tensor) -> Tensor | None:
        """Returns ``g(c)``, valid where the relevance is nonzero, or None if all gains are one."""
        return self._scaling_for(relevance).gain

    def pull(self, relevance: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Propagates relevance of shape ``(K, N, *out)`` from the output to the inputs and the sink.

        Returns:
            The relevance at each input, of shape ``(K, N, *in)``, in any dtype; and the fraction absorbed by the sink,
            of shape ``(N, *out)``, or None for zero. The fraction is undefined where no relevance arrives.
        """
        with self._short_lived():
            scaling = self._scaling_for(relevance)
            kernel = self.kernel
            with self._arithmetic():
                return kernel.pull(_scaled(relevance, scaling.gain)), scaling.deficit

    def pull_absolute(self, mass: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        r"""Propagates the absolute mass of walks by :math:`|\tilde T_{ij}|`. The return value is as in :meth:`pull`."""
        with self._short_lived():
            scaling = self._scaling_for(mass)
            kernel = self.kernel
            with self._arithmetic():
                parts = kernel.pull_absolute(_scaled(mass, scaling.gain))
        return parts, None if scaling.deficit is None else scaling.deficit.abs()

    def push(self, values: tuple[Tensor | None, ...], absorbed: Tensor | None) -> Tensor | None:
        """Applies the transpose of :meth:`pull`, from the inputs and the sink to the output.

        Args:
            values: Values at each input, of shape ``(K, N, *in)``, or None for zeros.
            absorbed: Values at the sink, of shape ``(K, N, *out)``, or None for zeros.

        Returns:
            Values at the output, of shape ``(K, N, *out)``, or None for zeros.
        """
        with self._short_lived():
            scaling = self._scaling_for(None)
            result, values = None, self._converted(values)
            if any(value is not None for value in values):
                kernel = self.kernel
                with self._arithmetic():
                    result = _scaled(kernel.push(values, self.shape).detach(), scaling.gain)
        if absorbed is not None and scaling.deficit is not None:
            sunk = absorbed * scaling.deficit
            result = sunk if result is None else result + sunk
        return result if result is None else result.to(self.dtype)

    def push_bound(self, values: tuple[Tensor | None, ...]) -> Tensor:
        """Returns an upper bound on the transpose of :meth:`pull_absolute`. Values at the sink are zero."""
        with self._short_lived():
            scaling = self._scaling_for(None)  # also completes the kernel
            kernel = self.kernel
            with self._arithmetic():
                bound = kernel.push_bound(self._converted(values), self.shape).detach()
        return (bound if scaling.gain is None else bound * scaling.gain.abs()).to(self.dtype)

    @contextmanager
    def _short_lived(self) -> Iterator[None]:
        """Context manager that discards the kernel on exit if memory is limited."""
        try:
            yield
        finally:
            if self.holder is not None:
                self.forget_kernel()

    def _arithmetic(self) -> AbstractContextManager[Any]:
        return InFloat32() if self.is_short else nullcontext()

    def _converted(self, values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Converts values at the inputs to a common dtype that is at least as wide as the output dtype.

        In a step from float64 to float32, values are not rounded before the step. Conditional on a neuron with tiny
        relevance, they can exceed the range of float32 until they are multiplied by the relevance of this neuron.
        """
        dtype = self.dtype
        for value in values:
            dtype = dtype if value is None else torch.promote_types(dtype, value.dtype)
        return tuple(value if value is None else value.to(dtype) for value in values)


def _scaled(relevance: Tensor, gain: Tensor | None) -> Tensor:
    return relevance if gain is None else relevance * gain


class FunctionStep(Step):
    """Call of a function, as a node of the computation graph with a normalized kernel.

    Args:
        name: Name of the function.
        output: The output of the call, of shape ``(N, *out)``.
        normalization: The normalization of the columns.
        rule: Name of the operation.
        build: Function that constructs the kernel.

    Attributes:
        unsupported_call: The call, if the function has no kernel, or None.
    """

    def __init__(
        self, name: str, output: Tensor, build: Callable[[], Kernel], normalization: Normalization, rule: str = ""
    ) -> None:
        super().__init__(name, output, normalization, rule)
        self._build_kernel: Callable[[], Kernel] | None = build
        self.unsupported_call: Any = None

    def _build(self) -> Kernel:
        assert self._build_kernel is not None, "the kernel of a function is constructed once"
        kernel = self._build_kernel()
        if self.holder is None:
            self._build_kernel = None  # it stores the inputs of the function
        return kernel

    def empty(self) -> None:
        """Frees all tensors of the step, keeping only its structure."""
        super().empty()
        self._build_kernel = None


class Link(torch.autograd.Function):
    """Autograd function that links the output of a layer or function to its inputs; its gradient is relevance."""

    @staticmethod
    def forward(ctx: Any, step: Step, holder: list[Any], *inputs: Tensor) -> Tensor:
        # The output is passed in a list: otherwise, it would be a view, which in-place operations must not change.
        ctx.step, ctx.origin, ctx.weights = step, holder.pop(), RUNNING.weights
        output: Tensor = holder.pop()
        return output

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_propagated(ctx, relevance)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedOperationError(derivative_inside())


class LinkInPlace(torch.autograd.Function):
    """Variant of :class:`Link` that links a tensor modified in place to its previous version."""

    @staticmethod
    def forward(ctx: Any, step: Step, holder: list[Any], tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        ctx.step, ctx.origin, ctx.weights = step, holder.pop(), RUNNING.weights
        return tensor

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_propagated(ctx, relevance)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedOperationError(derivative_inside())


def link(step: Step, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Attaches a step to the autograd graph and returns ``output`` with the step as its ``grad_fn``."""
    step.is_short = step.is_short or any(is_short(tensor) for tensor in inputs)
    result: Tensor = Link.apply(step, [output, _origin_of(*inputs)], *inputs)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def link_in_place(step: Step, tensor: Tensor) -> Tensor:
    """Attaches a step to the autograd graph as the ``grad_fn`` of a tensor modified in place. Returns the tensor."""
    result: Tensor = LinkInPlace.apply(step, [_origin_of(tensor)], tensor)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def step_of(node: Any) -> Step | None:
    """Returns the step of an autograd node, or None for other nodes.

    The type is checked because a user-defined ``autograd.Function`` may have an attribute of the same name.
    """
    step = getattr(node, "step", None)
    return step if isinstance(step, Step) else None


def _propagated(ctx: Any, relevance: Tensor) -> tuple[Tensor, ...]:
    """Returns the relevance at each input. With ``create_graph=True``, it is attached to the origin of the kernel."""
    with exact():
        parts, _ = ctx.step.pull(relevance.unsqueeze(0).to(ctx.step.dtype))
    rows = tuple(part.squeeze(0) for part in parts)
    if ctx.origin is None or not torch.is_grad_enabled():  # without create_graph=True
        return rows
    origin = Origin.apply(ctx.origin, *ctx.weights)  # type: ignore[no-untyped-call]
    return tuple(row + origin.to(row.dtype) for row in rows)


def _origin_of(*inputs: Tensor) -> Tensor | None:
    """Returns the origin of a kernel computed from these inputs, or None in a measure, where no gradients exist."""
    return None if listener() is not None else Origin.apply(*inputs)  # type: ignore[no-untyped-call]


class Origin(torch.autograd.Function):
    """Autograd function that returns zero and raises an error when it is differentiated.

    A kernel depends on weights and activations, but autograd treats it as a constant. A zero that depends on the same
    tensors is therefore added to the relevance. Differentiating relevance then raises an error where the gradient would
    otherwise be zero or incomplete.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedOperationError(
            "relevance under Normalized cannot be differentiated with respect to weights or activations: its kernels "
            "are constants, so the gradient would be incomplete. For relevance in a loss, use the composite without "
            "Normalized, whose rules Zennit differentiates; detach() the relevance if it needs no gradient."
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedOperationError(derivative_inside())
