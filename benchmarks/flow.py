"""Cost of a flow graph relative to the marginals of all layers.

``python -m benchmarks.flow`` computes both for VGG16 alternately, in one process on one thread, and writes the
processor seconds as JSON and the factor to ``docs/flow.md``.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torchvision.models import vgg16

from benchmarks import tables
from benchmarks.conservation import store
from nrm_plugin import RelevanceMeasure, patches

LAYERS = ["input", "features.7", "features.14", "features.21", "features.28"]


def main() -> None:
    """Writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, image = vgg16(weights=None).eval(), torch.randn(1, 3, 224, 224)
    seconds: dict[str, list[float]] = {"marginals": [], "flow": []}
    for _ in range(rounds):
        for work, times in seconds.items():
            mu = RelevanceMeasure(model, image, 3)  # a new measure, because results are cached
            started = time.process_time()
            if work == "flow":
                mu.flow(LAYERS, over={"input": patches((224, 224), 4)}, top=8)
            else:
                mu.marginal(mu.layers)
            times.append(time.process_time() - started)
        print({work: round(times[-1], 2) for work, times in seconds.items()}, flush=True)
    store("flow", {"layers": LAYERS, "seconds": seconds}, "torchvision")
    tables.write("flow")


if __name__ == "__main__":
    main()
