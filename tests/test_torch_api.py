"""Every module class of torch.nn, and every function of torch that takes a tensor: all relevance is accounted for, or
the query raises an error of this package."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import NRMError
from tests.conftest import in_turn, slow_but

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest error of mass + sink + bypass = 1, in units of the variation."""

S, SIGNAL, IMAGE, VOLUME = (2, 6), (2, 4, 6), (2, 4, 6, 6), (2, 4, 4, 4, 4)
TOKENS = (2, 5, 8)
Build = Callable[[], nn.Module]


def of_rank(name: str, build: Callable[[Any], nn.Module]) -> dict[str, tuple[Build, tuple[int, ...]]]:
    """Three modules that differ in the number of dimensions."""
    shapes = {1: SIGNAL, 2: IMAGE, 3: VOLUME}
    return {f"{name}{n}d": ((lambda n=n: build(getattr(nn, f"{name}{n}d"))), shapes[n]) for n in shapes}  # type: ignore[misc]


MODULES: dict[str, tuple[Build, tuple[int, ...]]] = {
    **{name: (getattr(nn, name), S) for name in (
        "ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Hardswish Hardtanh LeakyReLU PReLU RReLU Sigmoid Hardsigmoid "
        "LogSigmoid Tanh Softplus Softsign Tanhshrink Hardshrink Softshrink Softmin Softmax LogSoftmax Identity "
        "Dropout AlphaDropout FeatureAlphaDropout"
    ).split()},
    "Threshold": (lambda: nn.Threshold(0.1, 0.0), S),
    "GLU": (nn.GLU, S),
    "Softmax2d": (nn.Softmax2d, IMAGE),
    "Linear": (lambda: nn.Linear(6, 3), S),
    "LazyLinear": (lambda: nn.LazyLinear(3), S),
    "Flatten": (nn.Flatten, IMAGE),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), S),
    "Sequential": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), S),
    "LayerNorm": (lambda: nn.LayerNorm(6), SIGNAL),
    "RMSNorm": (lambda: nn.RMSNorm(6), SIGNAL),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), IMAGE),
    **of_rank("Dropout", lambda kind: kind()),
    **of_rank("Conv", lambda kind: kind(4, 3, 3, padding=1, stride=2)),
    **of_rank("ConvTranspose", lambda kind: kind(4, 3, 3, stride=2)),
    **of_rank("LazyConv", lambda kind: kind(3, 3)),
    **of_rank("LazyConvTranspose", lambda kind: kind(3, 3)),
    **of_rank("BatchNorm", lambda kind: kind(4)),
    **of_rank("LazyBatchNorm", lambda kind: kind()),
    **of_rank("InstanceNorm", lambda kind: kind(4)),
    **of_rank("LazyInstanceNorm", lambda kind: kind()),
    **of_rank("MaxPool", lambda kind: kind(2)),
    **of_rank("AvgPool", lambda kind: kind(2)),
    **of_rank("LPPool", lambda kind: kind(2, 2)),
    **of_rank("AdaptiveMaxPool", lambda kind: kind(2)),
    **of_rank("AdaptiveAvgPool", lambda kind: kind(2)),
    **of_rank("ReflectionPad", lambda kind: kind(1)),
    **of_rank("ReplicationPad", lambda kind: kind(1)),
    **of_rank("CircularPad", lambda kind: kind(1)),
    **of_rank("ConstantPad", lambda kind: kind(1, 0.3)),
    **of_rank("ZeroPad", lambda kind: kind(1)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), IMAGE),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=3), IMAGE),
    "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, output_size=2), VOLUME),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), IMAGE),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), IMAGE),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), IMAGE),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
    "Unfold": (lambda: nn.Unfold(2), IMAGE),
    "Fold": (lambda: nn.Fold((3, 3), 2), (2, 8, 4)),
    "RNN": (lambda: nn.RNN(8, 3, batch_first=True), TOKENS),
    "LSTM": (lambda: nn.LSTM(8, 3, batch_first=True, bidirectional=True), TOKENS),
    "GRU": (lambda: nn.GRU(8, 3, num_layers=2, batch_first=True), TOKENS),
    "RNNCell": (lambda: nn.RNNCell(6, 3), S),
    "LSTMCell": (lambda: nn.LSTMCell(6, 3), S),
    "GRUCell": (lambda: nn.GRUCell(6, 3), S),
    "MultiheadAttention": (lambda: Self(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)), TOKENS),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), TOKENS),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False), TOKENS),
    "TransformerDecoderLayer": (lambda: Self(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2), TOKENS),
    "TransformerDecoder": (
        lambda: Self(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2), 2), TOKENS,
    ),
    "Transformer": (lambda: Self(nn.Transformer(8, 2, 1, 1, 12, batch_first=True), 2), TOKENS),
    "Bilinear": (lambda: Self(nn.Bilinear(6, 6, 3), 2), S),
    "CosineSimilarity": (lambda: Self(nn.CosineSimilarity(), 2), IMAGE),
    "PairwiseDistance": (lambda: Self(nn.PairwiseDistance(), 2), S),
    "AdaptiveLogSoftmaxWithLoss": (lambda: Log(nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 6], 1.5)), S),
    **{f"MaxUnpool{n}d": (lambda n=n: Unpool(n), shape) for n, shape in ((1, SIGNAL), (2, IMAGE), (3, VOLUME))},  # type: ignore[misc]
}  # fmt: skip

LOSSES = "a loss, which compares with a target"
OMITTED = {
    "Module": "has no forward",
    "Container": "has no forward",
    "ModuleList": "has no forward",
    "ModuleDict": "has no forward",
    "ParameterList": "has no forward",
    "ParameterDict": "has no forward",
    "RNNBase": "has no forward",
    "RNNCellBase": "has no forward",
    "Embedding": "takes row numbers; tests/test_transformers.py",
    "EmbeddingBag": "takes row numbers; test_bags_of_embeddings below",
    "DataParallel": "a wrapper for several GPUs",
    "NLLLoss2d": LOSSES,
}


def layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)


class Self(nn.Module):
    """A module of several inputs on one tensor and a flipped copy."""

    def __init__(self, inner: nn.Module, inputs: int = 3) -> None:
        super().__init__()
        self.inner, self.inputs = inner, inputs

    def forward(self, x: Tensor) -> Any:
        return self.inner(*[x, x.flip(1) * 0.5 + 0.1, x][: self.inputs])


class Log(nn.Module):
    def __init__(self, inner: nn.AdaptiveLogSoftmaxWithLoss) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.log_prob(x)


class Unpool(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{rank}d")(2, return_indices=True)
        self.inner = getattr(nn, f"MaxUnpool{rank}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*self.pool(x))


class First(nn.Module):
    """A module with a computed input; returns its first tensor of real numbers."""

    def __init__(self, inner: Callable[[Tensor], Any], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(width, width, bias=False, dtype=dtype), inner
        nn.init.eye_(self.before.weight)

    def forward(self, x: Tensor) -> Tensor | None:
        return first_of(self.inner(self.before(x)))


def first_of(returned: Any) -> Tensor | None:
    for value in returned if isinstance(returned, (list, tuple)) else [returned]:
        if isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point() and value.numel():
            return value if value.requires_grad else None
        if isinstance(value, (list, tuple)):
            return first_of(value)
    return None


def violations_of(net: nn.Module, x: Tensor, **options: Any) -> Iterator[str]:
    """Violations of conservation, and a wrong output; none where the query raises."""
    torch.manual_seed(1)
    expected = net(x.clone().requires_grad_()).detach()
    start = torch.rand(expected.shape, dtype=x.dtype) + 0.5
    torch.manual_seed(1)
    try:
        mu = RelevanceMeasure(net, x, start=start, **options)
        for name in mu.layers:
            spread = mu.variation(name).clamp(min=1)
            error = float(((mu(at(name)) + mu.sink(name) + mu.bypass(name) - 1).abs() / spread).max())
            if not error <= TOLERANCES[x.dtype]:
                yield f"{name} is off by {error:.1e} of the variation"
    except NRMError:
        return
    keep = slice(None) if options.get("batched", True) else None
    weighed = start * expected
    values = weighed[keep].reshape(len(weighed), -1) if keep is not None else weighed.reshape(1, -1)
    if not torch.allclose(mu.output, values.sum(1) / start.reshape(values.shape).sum(1), rtol=1e-4, atol=1e-5):
        yield "the output changes while the model is measured"


def module_classes() -> list[str]:
    """Names of the module classes of torch.nn."""
    return [name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)]


def test_every_module_class_of_torch_is_tested_or_omitted_for_a_reason():
    losses = {name for name in module_classes() if name.endswith("Loss") and name not in MODULES}
    assert set(module_classes()) - losses - set(OMITTED) - set(MODULES) == set()


UNSUPPORTED = {"CrossMapLRN2d"}
"""Modules with an autograd function of their own."""


@pytest.mark.medium
@pytest.mark.parametrize("dtype", slow_but(TOLERANCES, torch.float64), ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "composite"), in_turn(MODULES, [NRMDefault, NRMAbsolute]))
def test_a_module_conserves_relevance_or_raises(name, composite, dtype):
    build, shape = MODULES[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    module = build().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(x)  # lazy ones make their weights
        net = First(module, shape[-1], dtype).eval()
        for parameter in net.inner.parameters():
            parameter.data.normal_(std=0.5)
        assert list(violations_of(net, x, composite=composite())) == []
        if name in UNSUPPORTED:
            with pytest.raises(NRMError):
                RelevanceMeasure(net, x, start=torch.ones_like(net(x)), composite=composite()).marginal("input")
        else:
            RelevanceMeasure(net, x, start=torch.ones_like(net(x)), composite=composite()).marginal("input")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings_conserve_relevance_or_raise(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode), nn.Linear(4, 2)).double().eval()
    ids = torch.tensor([[1, 5, 2], [3, 3, 8]])
    mu = RelevanceMeasure(net, ids, 1)
    torch.testing.assert_close(mu.marginal("0").sum(1) + mu.sink("0"), torch.ones(2).double())


# -- functions ------------------------------------------------------------------------------------------------------

SPACES = {
    "torch": torch,
    "special": torch.special,
    "linalg": torch.linalg,
    "fft": torch.fft,
    "functional": nn.functional,
    "Tensor": Tensor,
}
STATEFUL = (
    "backward register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ set_ resize_ resize_as_ "
    "share_memory_ storage untyped_storage compile manual_seed seed save load vmap cond while_loop enable_grad no_grad "
    "inference_mode init_num_threads import_ir_module empty_like rand_like randn_like"
).split()
SQUARE = torch.tensor([[0.3, 0.1, 0.9, 0.4], [0.8, 0.2, 0.5, 0.7], [0.6, 0.9, 0.1, 0.3], [0.2, 0.5, 0.4, 0.8]]).double()
ARGUMENTS: list[Callable[[Tensor], tuple[Any, ...]]] = [
    lambda h: (),
    lambda h: (1,),
    lambda h: (h * h + 1,),
    lambda h: (SQUARE,),
    lambda h: (0, 1),
    lambda h: (0, torch.tensor([2, 0])),
    lambda h: (0.5,),
]


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for space, holder in SPACES.items():
        for name in sorted(dir(holder)):
            is_private = name.startswith("_") and not name.startswith("__")
            function = getattr(holder, name, None)
            if is_private or name in STATEFUL or name.startswith("set_") or inspect.isclass(function):
                continue
            if callable(function):
                yield f"{space}.{name}", function


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", SPACES)
def test_a_function_of_torch_conserves_relevance_or_raises(space):
    """Every function that accepts a tensor, alone or with one of some further arguments."""
    x = torch.rand((4, 4), generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.1 + torch.eye(4)
    failures, ran = {}, 0
    for name, function in functions():
        if not name.startswith(f"{space}."):
            continue
        for number, further in enumerate(ARGUMENTS):
            net = First(lambda h, f=function, more=further: f(h, *more(h)), 4, torch.float64).eval()
            torch.manual_seed(1)
            try:
                output = net(x.clone().requires_grad_())
                usable = output is not None and output.dtype == x.dtype and bool(output.isfinite().all())
            except Exception:  # these arguments are not for this function
                continue
            if usable:
                ran += 1
                violations = list(violations_of(net, x, composite=NRMAbsolute(), batched=False))
                if violations:
                    failures[name, number] = violations
    assert failures == {}
    assert ran >= {"torch": 300, "Tensor": 300, "functional": 60, "special": 20, "linalg": 20, "fft": 4}[space]
