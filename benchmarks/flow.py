"""Cost of a flow graph, relative to a plain gradient and to the marginals of all layers.

``python -m benchmarks.flow`` computes all of them for VGG16 alternately, in one process on one thread, and writes the
processor seconds as JSON and the factors to ``docs/flow.md``. A flow with heat maps includes the measure itself.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from benchmarks import tables
from benchmarks.conservation import RESULTS, store
from nrm_plugin import NRMDefault, RelevanceMeasure, find_groups, patches
from nrm_plugin.measure.flow_heat_maps import MappedFlow, mapped_flow
from nrm_plugin.plots.flow import flow_figure
from nrm_plugin.plots.flow_html import sankey

LAYERS = ["input", "features.7", "features.14", "features.21", "features.28"]
FOUR = ["input", "features.14", "features.21", "features.28"]
WORKS = ["plain gradient", "marginals", "flow", "channels with pictures", "groups with pictures", "figure", "page"]
SIDE, TARGET, K = 224, 3, 8
PARTS = patches((SIDE, SIDE), 8)
"""Parts of the image that are grouped."""


class Works:
    """The timed computations, for one network and one image.

    Attributes:
        drawn: The last flow with heat maps.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model, self.image = model, image
        self.drawn: MappedFlow | None = None

    def measure(self) -> RelevanceMeasure:
        """Returns a new measure because results are cached."""
        return RelevanceMeasure(self.model, self.image, TARGET, composite=NRMDefault())

    def plain_gradient(self) -> Any:
        """Computes the gradient of the output with respect to the image."""
        image = self.image.clone().requires_grad_()
        return torch.autograd.grad(self.model(image)[0, TARGET], image)

    def marginals(self) -> Any:
        """Returns the computation of the relevance of all layers, for an existing measure."""
        mu = self.measure()
        return lambda: mu.marginal(mu.layers)

    def flow(self) -> Any:
        """Returns the computation of a flow of five layers, for an existing measure."""
        mu = self.measure()
        return lambda: mu.flow(LAYERS, over={"input": patches((SIDE, SIDE), 4)}, top=8)

    def channels_with_pictures(self) -> Any:
        """Computes a flow with heat maps of the eight strongest channels of four layers."""
        over = {"input": patches((SIDE, SIDE), 4)}
        self.drawn = mapped_flow(self.measure(), FOUR, over, top=K)

    def groups_with_pictures(self) -> Any:
        """Computes a flow with heat maps of eight groups of four layers, which are found first."""
        mu = self.measure()
        groups = find_groups(mu, FOUR[::-1], K, {"input": PARTS})
        self.drawn = mapped_flow(mu, FOUR, groups=groups)

    def figure(self) -> Any:
        """Draws the figure as a PNG file."""
        assert self.drawn is not None
        flow_figure(self.drawn.graph, maps=self.drawn.maps, image=self.image[0].sigmoid()).savefig(io.BytesIO())

    def page(self) -> Any:
        """Generates the HTML page."""
        assert self.drawn is not None
        sankey(self.drawn.graph, maps=self.drawn.maps, image=self.image[0].sigmoid(), pairs=self.drawn.pairs)


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns the processor time of a computation, or, if it returns another computation, of the returned one."""
    started = time.process_time()
    inner = work()
    if callable(inner):
        started = time.process_time()
        inner()
    return time.process_time() - started


def main() -> None:
    """Writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, help="computations to repeat; others stay")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    works = Works(vgg16(weights=None).eval().requires_grad_(False), torch.randn(1, 3, SIDE, SIDE))
    seconds: dict[str, list[float]] = json.loads((RESULTS / "flow.json").read_text())["seconds"]
    seconds |= {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            seconds[name].append(seconds_of(getattr(works, name.replace(" ", "_"))))
        print({work: round(times[-1], 2) for work, times in seconds.items()}, flush=True)
        store("flow", {"layers": LAYERS, "with pictures": FOUR, "seconds": seconds}, "torchvision")
    if set(seconds) == set(WORKS):
        tables.write("flow")


if __name__ == "__main__":
    main()
