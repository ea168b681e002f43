"""Check that the measure against a reference sums to one with an empty sink, at every tap of every architecture.

``python -m benchmarks.differences`` measures all classification models of torchvision, further models of Hugging Face,
and recurrent and graph networks, all with random weights, and writes the results as JSON and the table of
``docs/differences.md``. Families whose package is missing keep their results; ``--families`` selects some, and
``--models`` measures only these models.

The weights of the tiny models of Hugging Face are drawn with the standard deviation that preserves the size of
activations: with the default, 0.02, their outputs hardly depend on the inputs. In float64, the float32 operations that
a model requests are computed in float64 as well (:class:`Widened`).
``--variation`` measures only the variation on trained networks, and leaves the other results unchanged.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from benchmarks import tables, variation
from benchmarks.conservation import conservation_check, random_biases, store
from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import DifferenceError, NRMError

Row = dict[str, Any]
Make = Callable[[torch.dtype], RelevanceMeasure]
FIXED = {"inception_v3": 299, "googlenet": 96}
"""Image sizes of models that reject small images, or images of any other size."""


def torchvision_models() -> Iterator[tuple[str, Make]]:
    """Yields all classification models of torchvision, on small images where the model accepts them."""
    for name in models.list_models(module=models):
        yield name, functools.partial(of_image_model, name)


def of_image_model(name: str, dtype: torch.dtype) -> RelevanceMeasure:
    """Returns the measure of the largest output, against an image whose lower half differs."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = random_biases(models.get_model(name, weights=None, **options))
    size = FIXED.get(name, 224 if name.startswith(("vit", "maxvit")) else 64)
    size = getattr(model, "image_size", size)
    settle(model, torch.randn(4, 3, size, size))
    model, image = model.to(dtype), torch.randn(1, 3, size, size).to(dtype)
    reference = image.clone()
    reference[:, :, size // 2 :] = torch.randn_like(reference[:, :, size // 2 :]) / 4
    return RelevanceMeasure(model, image, target_of(model, image, reference), reference=reference)


def target_of(run: Callable[[Any], Tensor], inputs: Any, reference: Any) -> Any:
    """Returns the output of each sample that differs most from that at the reference."""
    with torch.no_grad():
        difference = (run(inputs) - run(reference)).abs()
    places = torch.unravel_index(difference.flatten(1).argmax(1), difference.shape[1:])
    targets = list(zip(*(place.tolist() for place in places), strict=True))
    return [target[0] for target in targets] if difference.ndim == 2 else targets


def settle(model: nn.Module, images: Tensor) -> None:
    """Sets the statistics of batch normalization from one batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(images)
    model.eval()


def hugging_face_models() -> Iterator[tuple[str, Make]]:
    """Yields the tiny models of the table of ``docs/attention.md``."""
    from tests.hosts.further_models import FURTHER

    for name in sorted(FURTHER, key=str.casefold):
        yield name, functools.partial(of_transformer, name)


class Widened(TorchFunctionMode):
    """Mode in which operations that request float32 use float64.

    Some models convert to float32 in any precision. Their rounding would otherwise hide errors of the measure.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return Tensor.double(*args)
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        return function(*wide, **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def rescale(model: nn.Module) -> None:
    """Draws all matrices and convolution kernels such that they preserve the size of activations."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def of_transformer(name: str, dtype: torch.dtype) -> RelevanceMeasure:
    """Returns the measure against the ids in opposite order, or against another image or signal.

    For a mixture of experts, which requires the same experts for both inputs, a single id is replaced instead.
    """
    import transformers

    from tests.hosts.further_models import FURTHER, INPUTS

    row = FURTHER[name]
    torch.manual_seed(0)
    model = random_biases(getattr(transformers, row.kind)(getattr(transformers, row.config)(**row.options)))
    given = INPUTS[row.inputs]
    rescale(model)
    if isinstance(given, Tensor):
        settle(model, torch.randn(4, *given.shape[1:], generator=torch.Generator().manual_seed(2)))
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products reject float64
    model = model.to(dtype)
    named = given if isinstance(given, dict) else {"": given.to(dtype)}
    named = {key: value.to(dtype) if value.is_floating_point() else value for key, value in named.items()}
    with Widened() if dtype == torch.float64 else contextlib.nullcontext():
        for other in references(named):
            inputs, reference = (named, other) if isinstance(given, dict) else (named[""], other[""])
            target = target_of(lambda x: run(model, x, row.output), inputs, reference)
            try:
                return RelevanceMeasure(model, inputs, target, output=row.output, reference=reference)
            except DifferenceError as error:
                if "topk" not in str(error):
                    raise
    raise DifferenceError("no reference selects the same experts")


def references(named: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields a reference that differs from the inputs everywhere, then references that differ in the last id."""
    yield {key: changed(value) for key, value in named.items()}
    for key, value in named.items():
        if value.is_floating_point():
            continue
        for number in range(3, 50):
            other = value.clone()
            other[:, -1] = number
            if not torch.equal(other, value):
                yield {**named, key: other}


def run(model: nn.Module, inputs: Any, output: str) -> Tensor:
    """Returns the explained output of a model of Hugging Face."""
    returned = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    chosen: Tensor = returned[output]
    return chosen


def changed(value: Tensor) -> Tensor:
    """Returns ids in reverse order, or noise."""
    if not value.is_floating_point():
        return value.flip(1)
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype) / 4


def recurrent_networks() -> Iterator[tuple[str, Make]]:
    """Yields LSTM, GRU and Elman network, and graph convolutions as products with the adjacency matrix."""
    for name, kind in {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}.items():
        yield name, functools.partial(of_recurrent, kind)
    yield "GCN", of_graph


class Last(nn.Module):
    """A recurrent layer and a linear layer on its last output."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(x)[0][:, -1])
        return scores


def of_recurrent(kind: type[nn.RNNBase], dtype: torch.dtype) -> RelevanceMeasure:
    """Returns the measure of two layers over ten time steps."""
    torch.manual_seed(0)
    model = Last(kind(6, 8, 2, batch_first=True)).eval().to(dtype)
    x = torch.randn(3, 10, 6).to(dtype)
    return RelevanceMeasure(model, x, target_of(model, x, -2 * x), reference=-2 * x)


class Graph(nn.Module):
    """Two graph convolutions with a constant adjacency matrix, and a mean over nodes."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.adjacency @ self.first(x))
        return (self.adjacency @ self.second(hidden)).mean(0, keepdim=True)


def of_graph(dtype: torch.dtype) -> RelevanceMeasure:
    """Returns the measure of a graph of fifty nodes, against the same graph with other features."""
    torch.manual_seed(0)
    adjacency = (torch.rand(50, 50) < 0.1).float() + torch.eye(50)
    model = Graph(adjacency / adjacency.sum(1, keepdim=True)).eval().to(dtype)
    x = torch.randn(50, 6).to(dtype)
    return RelevanceMeasure(model, x, (0, 1), reference=-x, batched=False)


FAMILIES: dict[str, tuple[Callable[[], Iterator[tuple[str, Make]]], str]] = {
    "torchvision": (torchvision_models, "torchvision"),
    "Hugging Face": (hugging_face_models, "transformers"),
    "recurrent and graph": (recurrent_networks, "torch"),
}
"""The models of each family, and the package that they need."""


def measured(make: Make) -> Row:
    """Returns the results of the conservation check of one model in both formats, or the message of its error."""
    try:
        mu = make(torch.float32)
        row = {**conservation_check(mu), "rounding": rounding(mu)}
    except NRMError as error:
        return {"failed": re.sub(r"/\S*?/(?=transformers/)", "", str(error))[:200]}
    try:
        return {**row, "error, float64": conservation_check(make(torch.float64))["error"]}
    except RuntimeError:  # grouped products of torch reject float64
        return row


def rounding(mu: RelevanceMeasure) -> float:
    r"""Returns the relative error :math:`\varepsilon |f| / |\Delta f|` of the explained difference of outputs.

    The outputs are rounded to the format, so no measure of their difference is more accurate than this.
    """
    explained = mu._start.ne(0)
    size = torch.where(explained, mu.outputs.abs().to(mu._start).reshape(mu._start.shape), 0.0)
    by_sample = size.flatten(1).sum(1) if mu._is_batched else size.sum()
    return float((torch.finfo(mu.outputs.dtype).eps * by_sample / mu.output.abs()).max())


def main() -> None:
    """Writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--models", nargs="+", help="measure only these models")
    parser.add_argument("--variation", action="store_true", help="only the variation on trained networks")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    stored = tables.stored("differences")
    if options.variation:
        text = json.dumps(stored | {"variation": variation.measured()}, indent=1, ensure_ascii=False)
        (tables.RESULTS / "differences.json").write_text(text + "\n")
        tables.write("differences")
        return
    for family in options.families:
        models_of, package = FAMILIES[family]
        if importlib.util.find_spec(package) is None:
            print(f"{family}: {package} is not installed")
            continue
        before = {row["model"]: row for row in stored.get("families", {}).get(family, [])}
        rows = []
        for name, make in models_of():
            if not options.models or name in options.models:
                before[name] = {"model": name, **measured(make)}
                print(before[name], flush=True)
            if name in before:
                rows.append(before[name])
        stored["families"] = {**stored.get("families", {}), family: rows}
    kept = {key: stored[key] for key in ("families", "variation") if key in stored}
    store("differences", kept, "torchvision")
    tables.write("differences")


if __name__ == "__main__":
    main()
