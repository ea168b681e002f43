"""Quantized linear layers. Rules are applied to the dequantized weight.

In torchao, the weight is a tensor subclass; in bitsandbytes, an integer tensor in a special format; in torch.ao, a
packed object that is not a parameter. In all cases, the dequantized weight is obtained by running the layer: its
columns are the outputs at unit vectors minus the output at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import UnsupportedOperationError

TOLERANCE = 0.1
"""Largest accepted relative error of the dequantized layer. It arises if the layer rounds its input."""
ROWS = 256
"""Number of unit vectors passed to a layer at once."""
PLAIN_TYPES = (Tensor, nn.Parameter)
"""Types of tensors that wrap no other tensors."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_quantized(module: nn.Module) -> bool:
    """Returns True if a module is a linear layer whose weight is not a plain floating-point tensor."""
    sizes = module.__dict__.get("in_features"), module.__dict__.get("out_features")
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return callable(weight)  # a packed weight
    if type(weight) not in (Tensor, nn.Parameter):
        return not is_lazy(weight)
    with torch._C.DisableTorchFunction():  # must not be observed by the recording
        return weight.dtype not in _FLOATS


def dequantized(module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], source: Tensor, name: str) -> nn.Linear:
    """Returns a linear layer with the bias and the dequantized weight of a quantized layer.

    Args:
        module: The quantized layer.
        run: Function that runs the layer on an input.
        source: The input of the layer, of shape ``(…, in)``.
        name: Name of the layer, for error messages.

    Raises:
        UnsupportedOperationError: If the layer is not linear up to rounding of its input.
    """
    count = source.shape[-1]
    with torch.no_grad():
        bias = run(module, source.new_zeros(1, count))[0]
        units = torch.eye(count, dtype=source.dtype, device=source.device)
        columns = torch.cat([run(module, units[at : at + ROWS]) - bias for at in range(0, count, ROWS)])
        row = source.reshape(-1, count)[:1]
        given, own = run(module, row), row @ columns + bias
        error, size = (given - own).abs().max(), torch.maximum(given.abs().max(), bias.abs().max())
        if bool(error > TOLERANCE * size):
            raise UnsupportedOperationError(
                f"layer {name!r} ({type(module).__module__}.{type(module).__name__}) is quantized, and is not linear: "
                f"its output differs by {float(error / size):.0%} from that of its dequantized weight. Explain the "
                "model before it is quantized, or dequantize this layer."
            )
    linear = nn.Linear(count, len(bias), device="meta")
    linear.weight = nn.Parameter(columns.T.contiguous(), requires_grad=False)
    linear.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if bool(bias.any()) else None)
    return linear


def packed_tensors(module: nn.Module) -> list[Tensor]:
    """Returns the parameters and buffers of a quantized layer that are in a quantized format."""
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    return [tensor for tensor in own if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _FLOATS]


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensor itself if it is a plain tensor, or the plain tensors wrapped by a tensor subclass."""
    if type(tensor) in PLAIN_TYPES or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


__all__ = ["dequantized", "is_quantized", "packed_tensors", "plain_tensors"]
