"""Routes against matrices of zeros and ones, and functions without a kernel.

Covers: nrm_plugin.model.zero_one_routes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import A, B, K, Op, check, columns, draw, measure, routed

DATA = draw(4, 4, 6)
FLAT = draw(6)
PICK = torch.tensor([2, 0, 0])
MASK = torch.tensor([[True, False, True], [False, False, True]])
ROUTES: dict[str, tuple[Op, list[Tensor]]] = {
    "reshape": (lambda a: a.reshape(len(a), -1, 3), [DATA]),
    "view": (lambda a: a.view(len(a), 8, 12), [DATA]),
    "flatten": (lambda a: torch.flatten(a, 1), [DATA]),
    "unflatten": (lambda a: a.unflatten(1, (2, 2)), [DATA]),
    "permute": (lambda a: a.permute(0, 3, 1, 2), [DATA]),
    "transpose": (lambda a: a.transpose(1, 3), [DATA]),
    "movedim": (lambda a: a.movedim(1, -1), [DATA]),
    "squeeze": (lambda a: a.unsqueeze(2).squeeze(2), [DATA]),
    "chunk": (lambda a: a.chunk(2, 1)[1], [DATA]),
    "split": (lambda a: torch.split(a, [1, 3], 1)[1], [DATA]),
    "unbind": (lambda a: a.unbind(2)[3], [DATA]),
    "select": (lambda a: a[:, 2], [DATA]),
    "slice": (lambda a: a[:, 1:3, ::2, 4:], [DATA]),
    "index": (lambda a: a[:, PICK], [DATA]),
    "index_select": (lambda a: a.index_select(1, PICK), [DATA]),
    "gather": (lambda a: a.gather(1, PICK.expand(len(a), 3)), [FLAT]),
    "narrow": (lambda a: a.narrow(1, 1, 2), [DATA]),
    "roll": (lambda a: a.roll((1, -2), (2, 3)), [DATA]),
    "flip": (lambda a: a.flip(3, 1), [DATA]),
    "rot90": (lambda a: a.rot90(1, (2, 3)), [DATA]),
    "expand": (lambda a: a.unsqueeze(1).expand(-1, 3, -1), [FLAT]),
    "repeat": (lambda a: a.repeat(1, 2, 1, 1), [DATA]),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 1), [FLAT]),
    "tile": (lambda a: torch.tile(a, (1, 2)), [FLAT]),
    "broadcast_to": (lambda a: torch.broadcast_to(a.unsqueeze(1), (len(a), 2, 6)), [FLAT]),
    "contiguous": (lambda a: a.transpose(1, 2).contiguous(), [DATA]),
    "clone": (lambda a: a.clone(), [DATA]),
    "dropout": (lambda a: F.dropout(a, 0.5, training=False), [DATA]),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), [DATA]),
    "pixel_unshuffle": (lambda a: F.pixel_unshuffle(a, 2), [DATA]),
    "PixelShuffle": (nn.PixelShuffle(2), [DATA]),
    "channel_shuffle": (lambda a: F.channel_shuffle(a, 2), [DATA]),
    "ChannelShuffle": (nn.ChannelShuffle(2), [DATA]),
    "shuffle by views": (lambda a: a.view(len(a), 2, 2, 4, 6).transpose(1, 2).reshape(a.shape), [DATA]),
    "pad with zeros": (lambda a: F.pad(a, (1, 0, 2, 1)), [DATA]),
    "pad with numbers": (lambda a: F.pad(a, (1, 1), value=100.0), [FLAT]),
    "pad that crops": (lambda a: F.pad(a, (-1, 1, 0, -2)), [DATA]),
    "pad by reflection": (lambda a: F.pad(a, (1, 2, 2, 1), mode="reflect"), [DATA]),
    "pad by replication": (lambda a: F.pad(a, (1, 2, 2, 1), mode="replicate"), [DATA]),
    "pad around": (lambda a: F.pad(a, (1, 2, 2, 1), mode="circular"), [DATA]),
    "ZeroPad2d": (nn.ZeroPad2d((1, 2, 0, 1)), [DATA]),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), [DATA]),
    "ReplicationPad2d": (nn.ReplicationPad2d(2), [DATA]),
    "ConstantPad1d": (nn.ConstantPad1d(1, 7.0), [draw(2, 3)]),
    "interpolate nearest": (lambda a: F.interpolate(a, scale_factor=2), [DATA]),
    "interpolate nearest down": (lambda a: F.interpolate(a, size=(3, 4), mode="nearest"), [DATA]),
    "interpolate nearest-exact": (lambda a: F.interpolate(a, size=(3, 4), mode="nearest-exact"), [DATA]),
    "Upsample nearest": (nn.Upsample(scale_factor=2), [DATA]),
    "UpsamplingNearest2d": (nn.UpsamplingNearest2d(scale_factor=3), [DATA]),
    "max_pool1d": (lambda a: F.max_pool1d(a, 2), [draw(2, 6)]),
    "max_pool2d": (lambda a: F.max_pool2d(a, 3, 2, 1), [DATA]),
    "max_pool2d dilated": (lambda a: F.max_pool2d(a, 2, 1, dilation=2, ceil_mode=True), [DATA]),
    "max_pool3d": (lambda a: F.max_pool3d(a[:, None], 2), [DATA]),
    "MaxPool2d": (nn.MaxPool2d(2), [DATA]),
    "adaptive_max_pool2d": (lambda a: F.adaptive_max_pool2d(a, (3, 2)), [DATA]),
    "adaptive_max_pool1d": (lambda a: F.adaptive_max_pool1d(a, 4), [draw(2, 6)]),
    "amax": (lambda a: a.amax((2, 3)), [DATA]),
    "amin": (lambda a: a.amin(1), [DATA]),
    "max": (lambda a: a.max(1).values, [DATA]),
    "min": (lambda a: torch.min(a, 1)[0], [DATA]),
    "sort": (lambda a: a.sort(2, descending=True).values, [DATA]),
    "median": (lambda a: a.flatten(2).median(2).values, [DATA]),
    "nanmedian": (lambda a: a.nanmedian(1).values, [DATA]),
    "kthvalue": (lambda a: a.kthvalue(3, 3).values, [DATA]),
    "mode": (lambda a: a.mode(1).values, [DATA]),
    "cummax": (lambda a: a.cummax(3).values, [DATA]),
    "cummin": (lambda a: torch.cummin(a, 1)[0], [DATA]),
    "aminmax": (lambda a: torch.stack(torch.aminmax(a, dim=1), 1), [DATA]),
    "topk": (lambda a: a.topk(2, 1).values, [DATA]),
    "maximum": (torch.maximum, [A, B]),
    "torch.max": (torch.max, [A, B]),
    "minimum": (torch.minimum, [A, B]),
    "cat": (lambda a, b: torch.cat([a, b], 1), [A, B]),
    "cat with a constant": (lambda a: torch.cat([a, K.expand(len(a), -1, -1)], 1), [A]),
    "cat twice": (lambda a: torch.cat([a, a], 1), [A]),
    "hstack": (lambda a, b: torch.hstack([a, b]), [A, B]),
    "stack": (lambda a, b: torch.stack([a, b], 1), [A, B]),
    "stack with a constant": (lambda a: torch.stack([K.expand_as(a), a], 2), [A]),
    "where": (lambda a, b: torch.where(MASK, a, b), [A, B]),
    "where by value": (lambda a, b: torch.where(a > 0, a, b), [A, B]),
    "where with a tensor": (lambda a: torch.where(MASK, K, a), [A]),
    "cat with a copy that is cut off": (lambda a: torch.cat([a, -a.detach()], 1), [A]),
    "where with a constant": (lambda a: torch.where(MASK, a, 5.0), [A]),
    "masked_fill": (lambda a: a.masked_fill(MASK, -9.0), [A]),
    "masked_fill_": (lambda a: a.clone().masked_fill_(MASK, -9.0), [A]),
    "tril": (lambda a: a.tril(), [DATA]),
    "triu": (lambda a: torch.triu(a, 1), [DATA]),
    "diagonal": (lambda a: a.diagonal(dim1=2, dim2=3), [DATA]),
    "unfold": (lambda a: F.unfold(a, 2, stride=2), [DATA]),
    "Tensor.unfold": (lambda a: a.unfold(1, 3, 2), [FLAT]),
    "unfold, padded": (lambda a: F.unfold(a, 3, padding=1, stride=2), [DATA]),
    "write a slice": (lambda a, b: _write_slice(a, b), [A, B]),
    "fill a slice": (lambda a: _fill_slice(a), [A]),
    "double": (lambda a: a.to(torch.float64), [A]),
}


if type(torch.aminmax(torch.ones(2, requires_grad=True)).min.grad_fn).__name__ != "AminmaxBackward0":
    del ROUTES["aminmax"]  # torch had no derivative of it at first, and so no place in the graph


def _write_slice(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, 0] = b[:, 1]
    return a


def _fill_slice(a: Tensor) -> Tensor:
    a = a.clone()
    a[:, :, 1] = 0.0
    return a


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_is_a_matrix_of_zeros_and_ones(name):
    op, inputs = ROUTES[name]
    output = op(*(value[None] for value in inputs))
    expected = [routed(output, value) for value in inputs]
    assert int(torch.stack([part.sum() for part in expected]).sum()) > 0
    for one, other in zip(columns(op, inputs), expected, strict=True):
        assert torch.equal(one, other)
    mu = measure(op, inputs)
    constant = 1 - torch.stack([part.sum(1) for part in expected]).sum(0)
    absorbed = torch.stack(list(mu.sinks("constants").values()) or [torch.zeros(mu.batch)]).sum(0)
    assert torch.equal(absorbed.double(), constant)
    assert not any(bool(value.any()) for value in mu.sinks("residual").values())


def test_an_operation_without_a_kernel_is_named_in_the_error():
    with pytest.raises(UnsupportedOperationError, match=r"'logcumsumexp'"):
        columns(lambda a: torch.logcumsumexp(a, 1), [A])
    with pytest.raises(UnsupportedOperationError, match=r"'cumprod'"):
        columns(lambda a: a.cumprod(1), [A])


def test_entries_off_the_diagonal_are_constants():
    x = draw(3)
    matrix = torch.zeros(9, 3, dtype=torch.float64)
    matrix[[0, 4, 8], [0, 1, 2]] = 1
    check(columns(lambda x: torch.diag_embed(x), [x]), [matrix])


# -- constants that the model overwrites after a function has read them -------------------------------------------

VECTOR = torch.linspace(-1, 2, 3, dtype=torch.float64)
MATRIX = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
READERS: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "product": (VECTOR, lambda h, c: h * c),
    "matrix product": (MATRIX, lambda h, c: h @ c),
    "view": (MATRIX, lambda h, c: (h[:, None] @ c.expand(len(h), 3, 3))[:, 0]),
    "layer": (MATRIX, F.linear),
    "bias": (VECTOR, lambda h, c: F.linear(h, MATRIX, c)),
    "keyword": (VECTOR, lambda h, c: F.linear(h, MATRIX, bias=c)),
    "convolution": (MATRIX[None, :1], lambda h, c: F.conv1d(h[:, None], c, padding=1)[:, 0]),
    "einsum": (MATRIX, lambda h, c: torch.einsum("ni,ij->nj", h, c)),
    "addmm": (MATRIX, lambda h, c: torch.addmm(VECTOR, h, c)),
    "index": (torch.tensor([0, 0, 1]), lambda h, c: torch.zeros_like(h).index_add(1, c, h)),
}
WRITERS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda c: c.mul_(-3).add_(1).clamp_(0),
    "set": lambda c: c.__setitem__(..., 1),
    "view": lambda c: c.view(-1)[1:].fill_(2),
    "out": lambda c: torch.add(c, 1, out=c).clamp_(0, 2),
}


class Reading(nn.Module):
    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], constant: Tensor, write: Callable[[Tensor], object]):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
        self.read, self.constant, self.write = read, constant, write

    def forward(self, x: Tensor) -> Tensor:
        constant = self.constant.clone()
        hidden = self.read(self.a(x).relu(), constant)
        self.write(constant)
        return self.b(hidden)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_constants_keep_the_values_that_a_function_has_read(reader: str, writer: str) -> None:
    constant, read = READERS[reader]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nets = [Reading(read, constant, write).eval() for write in (WRITERS[writer], lambda c: None)]
    found, expected = (RelevanceMeasure(net, x, 1).marginal(["input", "a"]) for net in nets)
    for layer, mass in expected.items():
        torch.testing.assert_close(found[layer], mass)


MASKED: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "where": (VECTOR > 0, lambda h, c: torch.where(c, h, 0.1 * h)),
    "masked_fill": (VECTOR > 0, lambda h, c: h.masked_fill(c, 0.0)),
    "gather": (torch.tensor([[0, 0, 1]]), lambda h, c: h.gather(1, c.expand(len(h), 3))),
    "index": (torch.tensor([0, 0, 1]), lambda h, c: h[:, c]),
}


@pytest.mark.parametrize("reader", MASKED)
def test_masks_that_are_overwritten_raise(reader: str) -> None:
    constant, read = MASKED[reader]
    net = Reading(read, constant, lambda c: c.logical_not_() if c.dtype is torch.bool else c.add_(1)).eval()
    with pytest.raises(UnsupportedOperationError, match=r"overwrites an index or a mask .*Write to a copy"):
        RelevanceMeasure(net, torch.rand(3, 4, dtype=torch.float64), 1).marginal("input")
