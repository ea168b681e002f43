"""A torch dispatch mode in which tensors only have shapes, and which counts the memory that they would take.

Weights and floating-point inputs become fake tensors, and so does everything computed from them. Small tensors that
depend on neither, such as masks and positions, are computed, so that conditions on them have the same outcome as in a
run with values. A tensor counts from the operation that allocates its storage until the storage is released.
"""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.nested_tensors import tensors_in

SMALL = 1 << 12
"""Largest number of entries of a tensor without inputs that is computed."""
NONNEGATIVE = frozenset("relu sigmoid _softmax abs exp softplus hardsigmoid square ones ones_like new_ones".split())
"""Operations whose results are nonnegative."""
KEEPS_SIGN = frozenset(
    """
    clone amin amax cat add mul mean sum avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices sqrt stack _to_copy
    maximum div reciprocal clamp convolution mm bmm addmm _unsafe_view copy index_select index
    select_scatter slice_scatter
    """.split()
)
"""Operations whose results are nonnegative if all of their inputs are, not counting views."""
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


class ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Torch dispatch mode that runs operations without values.

    Args:
        weights: The parameters and buffers of the model.
        device: The device on which the computation would run.

    Attributes:
        peak: Largest total size of tensors in bytes, not counting weights and inputs.
        bytes_at_peak: Sizes at the peak, keyed by the operation that allocated the tensors.
        operations: Number of operations.
        moved: Total size of all results in bytes.
        answers: Whether code that reads a single value, as in a condition, gets a representative one; otherwise, an
            error is raised.
    """

    def __init__(self, weights: Iterable[Tensor], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._device = device
        self._weights = {weight.untyped_storage()._cdata: weight for weight in weights}
        self._on_meta: dict[int, FakeTensor] = {}
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._nonnegative: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._now: Counter[str] = Counter()
        self._size = 0
        self.peak = self.operations = self.moved = 0
        self.bytes_at_peak: Counter[str] = Counter()
        self.answers = False

    def shapes(self, tensor: Tensor) -> Tensor:
        """Returns a tensor with the shape of a floating-point tensor; other tensors keep their values."""
        return self._shadow(tensor) if tensor.is_floating_point() else tensor

    def _shadow(self, tensor: Tensor) -> Tensor:
        """Returns a tensor without values, whose memory is not counted again."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.device.type == "meta":
            if id(tensor) not in self._on_meta:
                self._on_meta[id(tensor)] = FakeTensor(self._fake, tensor, self._device)
            return self._on_meta[id(tensor)]
        shadow: Tensor = self._fake.from_tensor(tensor)
        self._counted.add(shadow.untyped_storage())
        return shadow

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        name = function._schema.name.partition("::")[2]
        aliases = [item.alias_info for item in function._schema.returns if item.alias_info is not None]
        is_view = any(not alias.is_write for alias in aliases)
        if not self._is_shapes_only(tensors, is_view):
            result = self._computed(function, args, kwargs, tensors)
        elif name in _READS:
            return self._read(name, function, args)
        else:
            result = self._run(name, function, args, kwargs)
            if aliases and not is_view and isinstance(result, Tensor):
                result = kwargs.get("out", args[0] if args else result)  # a tensor with values stays itself
        if not is_view:
            self.operations += 1
            for tensor in tensors_in(result):
                self._count(tensor, name)
        self._note_sign(name.rstrip("_"), args, result, is_view)
        return result

    def _is_shapes_only(self, tensors: list[Tensor], is_view: bool) -> bool:
        """Returns True if an operation runs without values: if an input has none, or is a weight that is not small."""
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return True
        if is_view or not tensors:
            return False
        large = [tensor for tensor in tensors if tensor.numel() > SMALL]
        is_weight = any(tensor.untyped_storage()._cdata in self._weights for tensor in large)
        return is_weight or any(tensor.device.type == "meta" for tensor in tensors)

    def _computed(self, function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Runs an operation on values; large tensors that are created without inputs have no values."""
        if not tensors:
            with self._fake:
                shape = function(*args, **kwargs)
            if isinstance(shape, Tensor) and shape.numel() > SMALL:
                return shape
        return function(*args, **kwargs)

    def _run(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        args = tuple(_mapped(value, self._shadow) for value in _with_known_indices(name, args))
        kwargs = {key: _mapped(value, self._shadow) for key, value in kwargs.items()}
        if name == "_grouped_mm" and args[1].ndim == 3:
            # Without values, the operation only accepts bfloat16. The product with one weight has the same size.
            function, args, kwargs = torch.ops.aten.mm.default, (args[0], args[1][0]), {}
        with self._fake:
            return function(*args, **kwargs)

    def _read(self, name: str, function: Any, args: Any) -> Any:
        if not self.answers:
            raise DataDependentOutputException(function)
        return self._representative(args[0]) if name == "_local_scalar_dense" else args[0].shape == args[1].shape

    def _count(self, tensor: Tensor, name: str) -> None:
        """Counts the storage of a result until it is released, unless it is that of an input."""
        storage = tensor.untyped_storage()
        if storage in self._counted or storage._cdata in self._weights:
            return
        self._counted.add(storage)
        size = storage.nbytes()
        self._size += size
        self._now[name] += size
        self.moved += size
        if self._size > self.peak:
            self.peak, self.bytes_at_peak = self._size, self._now.copy()
        weakref.finalize(storage, self._release, name, size)

    def _release(self, name: str, size: int) -> None:
        self._size -= size
        self._now[name] -= size

    def _note_sign(self, name: str, args: Any, result: Any, is_view: bool) -> None:
        """Records whether the entries of results are nonnegative, or whether a condition holds."""
        signs = [self._is_nonnegative(source) for source in tensors_in(args)] if name in KEEPS_SIGN else [False]
        keeps = any(signs) if name == "maximum" else all(signs)
        for tensor in tensors_in(result):
            if tensor.dtype == torch.bool and isinstance(tensor, FakeTensor):
                tensor.__dict__["is_true"] = self._truth(name, args)
            elif name in NONNEGATIVE or keeps:
                self._nonnegative.add(tensor.untyped_storage())
            elif not is_view:
                self._nonnegative.discard(tensor.untyped_storage())

    def _is_nonnegative(self, tensor: Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.untyped_storage() in self._nonnegative:
            return True
        has_values = not isinstance(tensor, FakeTensor) and tensor.device.type != "meta" and tensor.numel() <= SMALL
        return has_values and bool((tensor >= 0).all())

    def _truth(self, name: str, args: Any) -> bool:
        """Returns the outcome of a condition for representative values."""
        values = [self._representative(value) for value in args[:2] if isinstance(value, (Tensor, int, float))]
        if name in COMPARISONS and len(values) == 2:
            return bool(COMPARISONS[name](*values))
        if name in ("bitwise_not", "logical_not"):
            return not values[0]
        if name in ("isnan", "isinf"):
            return False
        return all(values) if name.endswith(("and", "mul")) else any(values)

    def _representative(self, value: Any) -> Any:
        """Returns a value in place of the entries of a tensor: -1 if they may be negative, and otherwise 1."""
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.bool:
            return bool(value.__dict__.get("is_true", False))
        if not value.is_floating_point():
            return 0
        return 1.0 if self._is_nonnegative(value) else -1.0


_READS = ("_local_scalar_dense", "equal", "allclose")
"""Operations that return values instead of tensors."""


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(item, change) for item in value) if type(value) in (tuple, list) else value


def _with_known_indices(name: str, args: Any) -> Any:
    """Replaces masks with values among indices by numbers, whose count is known."""
    if name.lstrip("_") not in ("index", "index_put", "index_put_", "index_put_impl_"):
        return args
    known: list[Tensor | None] = []
    for index in args[1]:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        known += index.nonzero().unbind(1) if is_mask else [index]
    return (args[0], known, *args[2:])


__all__ = ["ShapesOnly"]
