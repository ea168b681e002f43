"""Check that the measure against a reference sums to one with an empty sink, at every tap of every architecture.

``python -m benchmarks.differences`` measures all classification models of torchvision, further models of Hugging Face,
and recurrent and graph networks, all with random weights, and writes the results as JSON and the table of
``docs/differences.md``. Families whose package is missing keep their results; ``--families`` selects some.
``--variation`` measures only the variation on trained networks, and leaves the other results unchanged.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks import tables, variation
from benchmarks.conservation import conservation_check, random_biases, store
from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import NRMError

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


def of_transformer(name: str, dtype: torch.dtype) -> RelevanceMeasure:
    """Returns the measure against the ids in opposite order, or against another image or signal."""
    import transformers

    from tests.hosts.further_models import FURTHER, INPUTS

    row = FURTHER[name]
    torch.manual_seed(0)
    model = random_biases(getattr(transformers, row.kind)(getattr(transformers, row.config)(**row.options))).to(dtype)
    given = INPUTS[row.inputs]
    named = given if isinstance(given, dict) else {"": given.to(dtype)}
    named = {key: value.to(dtype) if value.is_floating_point() else value for key, value in named.items()}
    other = {key: changed(value) for key, value in named.items()}
    inputs, reference = (named, other) if isinstance(given, dict) else (named[""], other[""])
    target = target_of(lambda x: run(model, x, row.output), inputs, reference)
    return RelevanceMeasure(model, inputs, target, output=row.output, reference=reference)


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
        row = conservation_check(make(torch.float32))
    except NRMError as error:
        return {"failed": re.sub(r"/\S*?/(?=transformers/)", "", str(error))[:200]}
    try:
        return {**row, "error, float64": conservation_check(make(torch.float64))["error"]}
    except RuntimeError:  # grouped products of torch reject float64
        return row


def main() -> None:
    """Writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--models", nargs="+", help="measure these models and print the rows, without storing them")
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
        rows = []
        for name, make in models_of():
            if options.models and name not in options.models:
                continue
            rows.append({"model": name, **measured(make)})
            print(rows[-1], flush=True)
        stored["families"] = {**stored.get("families", {}), family: rows}
    if not options.models:
        kept = {key: stored[key] for key in ("families", "variation") if key in stored}
        store("differences", kept, "torchvision")
        tables.write("differences")


if __name__ == "__main__":
    main()
