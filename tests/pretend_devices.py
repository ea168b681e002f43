"""Devices that only pretend: tensors that say they are on ``pretend:0`` or ``pretend:1`` and are stored on the CPU.

``import tests.pretend_devices`` registers the devices with torch for the whole process, so it is imported only by the
process that tests/test_several_devices.py starts, before nrm_plugin. ``model.to("pretend:0")``, autograd and
``torch.zeros(3, device="pretend:1")`` then work as on a GPU. Operations compute on the CPU, and raise an error if a GPU
would raise one because of the devices of their arguments. Which devices an operation accepts is read from the table of
operations that torch is compiled from.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from nrm_plugin.model import shapes_without_values

assert "nrm_plugin.kernels" not in sys.modules, "import tests.pretend_devices before nrm_plugin"

CPU = torch.device("cpu")
COUNT = 2
"""Number of pretended devices."""


class Pretend(Tensor):
    """Tensor that says it is on a device and holds a tensor with its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Pretend:
        form = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self = Tensor._make_wrapper_subclass(cls, held.size(), **form, dtype=held.dtype, device=device)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return call(func, *args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Pretend) -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = copy = Pretend(self.held.clone(), self.device).requires_grad_(self.requires_grad)
            copy.__dict__.update({**self.__dict__, "held": copy.held})
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"


TABLE = Path(find_spec("torchgen").origin).parent / "packaged/ATen/native/native_functions.yaml"
FUNCTIONS = dict(re.findall(r"^- func: ([\w.]+)\((.*?)(?=^- func|\Z)", TABLE.read_text(), re.M | re.S))
LENIENT = {name for name, text in FUNCTIONS.items() if "device_check: NoCheck" in text}
"""Operations that accept numbers on the CPU, that is tensors without dimensions, next to tensors on another device."""
INDEXING = {"index.Tensor", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index.Tensor"}
"""Operations that accept indices on the CPU."""
MOVING = {"copy_", "_to_copy", "is_set_to", "fill_.Tensor", "fill.Tensor", "set_.source_Tensor"}
"""Operations that accept tensors on any devices."""
ELEMENTWISE = LENIENT - INDEXING - MOVING
"""Operations that compute on the device of any argument, if other arguments are numbers on the CPU."""
LENGTHS_ON_CPU = {"_pack_padded_sequence", "_pack_padded_sequence_backward"}
"""Operations of which one tensor is always on the CPU."""


@dataclass(frozen=True)
class Operation:
    """An operation of torch and the devices that it accepts."""

    name: str
    written: tuple[int, ...]
    draws: bool

    @classmethod
    @functools.cache
    def of(cls, func: Any) -> Operation:
        schema = func._schema
        name = f"{schema.name.removeprefix('aten::')}.{schema.overload_name}".removesuffix(".")
        written = [at for at, one in enumerate(schema.arguments) if one.alias_info and one.alias_info.is_write]
        return cls(name, tuple(written), torch.Tag.nondeterministic_seeded in func.tags)

    def accepts(self, tensor: Tensor, home: torch.device, is_written: bool) -> bool:
        """Returns True if a GPU computes the operation with this argument, given the device of the others."""
        if tensor.device == home or self.name in MOVING or self.name in LENGTHS_ON_CPU:
            return True
        is_number = tensor.dim() == 0 and self.name in LENIENT and not is_written
        is_index = self.name in INDEXING and not tensor.is_floating_point()
        return tensor.device.type == "cpu" and (is_number or is_index)

    def device(self, tensors: list[Tensor], written: list[Any]) -> torch.device:
        """Device of the results. Raises an error where a GPU would."""
        devices = [tensor.device for tensor in tensors]
        home = devices[0] if devices else CPU
        if self.name in ELEMENTWISE:
            home = next((device for device in devices if device.type != "cpu"), CPU)
        for tensor in tensors:
            if not self.accepts(tensor, home, any(tensor is one for one in written)):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"{home} and {tensor.device}! (in {self.name})"
                )
        return home


def call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation on the CPU, if a GPU would run it."""
    operation = Operation.of(func)
    if operation.name == "_has_compatible_shallow_copy_type":  # asked by ``tensor.data = other``
        return args[0].device.type == args[1].device.type
    values = [item for value in (*args, *kwargs.values()) for item in (value if type(value) in NESTED else (value,))]
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = operation.device(tensors, [args[at] for at in operation.written if at < len(args)])
    device = indexed(next((value for value in values if isinstance(value, torch.device)), device))
    check_generator(kwargs.get("generator"), device)
    with drawing(device) if operation.draws and device.type != "cpu" else NOTHING:
        results = func(*on_cpu(args), **{key: on_cpu(value) for key, value in kwargs.items()})
    given = {id(value.held): value for value in tensors if type(value) is Pretend}
    for value in given.values():
        if (value.shape, value.stride()) != (value.held.shape, value.held.stride()):  # changed in place
            value.data = Pretend(value.held, value.device)
    return results if device.type == "cpu" else on_device(results, device, given)


NESTED = (list, tuple)
NOTHING = contextlib.nullcontext()


def on_cpu(value: Any) -> Any:
    if type(value) is Pretend:
        return value.held
    if type(value) in NESTED:
        return type(value)(map(on_cpu, value))
    return CPU if isinstance(value, torch.device) else value


def on_device(result: Any, device: torch.device, given: dict[int, Pretend]) -> Any:
    if type(result) in NESTED:
        return type(result)(on_device(item, device, given) for item in result)
    if not isinstance(result, Tensor):
        return result
    return given[id(result)] if id(result) in given else Pretend(result, device)


def indexed(device: torch.device) -> torch.device:
    return torch.device(device.type, 0) if device.type == "pretend" and device.index is None else device


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")


@contextmanager
def drawing(device: torch.device) -> Iterator[None]:
    """Context manager in which random numbers are those of the device."""
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(torch.pretend.get_rng_state(device))
        yield
        torch.pretend.set_rng_state(torch.get_rng_state(), device)


def number_of(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


class Module(backend_registration._DummyBackendModule):
    """The module ``torch.pretend``."""

    def __init__(self) -> None:
        self.manual_seed_all(0)

    def device_count(self) -> int:
        return COUNT

    def manual_seed_all(self, seed: int) -> None:
        self.states = [torch.Generator().manual_seed(seed + number).get_state() for number in range(COUNT)]

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return self.states[number_of(device)]

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        self.states[number_of(device)] = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


RUN_BACKWARD = torch.autograd._engine_run_backward


def backward(*args: Any, **kwargs: Any) -> Any:
    """Runs autograd in this thread. Otherwise, it has one thread only for all devices of a Python backend."""
    with torch.autograd.set_multithreading_enabled(False):
        return RUN_BACKWARD(*args, **kwargs)


torch.autograd._engine_run_backward = backward
shapes_without_values.PLAIN += (Pretend,)
backend_registration._setup_privateuseone_for_python_backend("pretend", Module())
KERNELS = torch.library.Library("aten", "IMPL")
for maker in ("empty.memory_format", "empty_strided", "tril_indices", "triu_indices"):
    name, _, overload = maker.partition(".")
    function = getattr(getattr(torch.ops.aten, name), overload or "default")
    KERNELS.impl(maker, functools.partial(call, function), "PrivateUse1")
for copy in ("_copy_from", "_copy_from_and_resize"):  # called by ``torch.tensor`` and others
    KERNELS.impl(copy, lambda source, target, *_: call(torch.ops.aten.copy_.default, target, source), "PrivateUse1")
AUTOCAST = torch.library.Library("_", "IMPL")
AUTOCAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
