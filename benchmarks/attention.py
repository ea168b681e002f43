"""Conservation check of attention models, without model-specific code.

``python -m benchmarks.attention`` measures torchvision's attention models with random weights and biases, writes the
results as JSON, and renders the first table of ``docs/attention.md``; ``--small`` skips the models at their original
size.
"""

import argparse
import json
import platform
import re
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d
from zennit.composites import EpsilonPlusFlat

from benchmarks import tables
from nrm_plugin import Normalized, NRMDefault, RelevanceMeasure, at

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/attention.json"
LIMITS = {"conservation": 1e-4, "residual": 0.05}
WINDOWS: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 10}
VIDEO: dict[str, Any] = {"spatial_size": (32, 32), "temporal_size": 4, "num_classes": 10}
Builder = Callable[[], nn.Module]


def blocks(first_pools: bool) -> list[MSBlockConfig]:
    """Returns two blocks; the second one pools its queries."""
    kernel = [3, 3, 3]
    return [
        MSBlockConfig(1, 16, 16, kernel if first_pools else [], kernel, [1, 2, 2] if first_pools else [], [1, 2, 2]),
        MSBlockConfig(2, 16, 32, kernel, kernel, [1, 1, 1], [1, 2, 2]),
    ]


SMALL: dict[str, tuple[Builder, tuple[int, ...]]] = {
    "ViT": (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), (3, 32, 32)),
    "Swin": (lambda: SwinTransformer([4, 4], window_size=[4, 4], **WINDOWS), (3, 36, 36)),
    "Swin v2": (
        lambda: SwinTransformer(
            [4, 4], window_size=[4, 4], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **WINDOWS
        ),
        (3, 36, 36),
    ),
    "MaxViT": (lambda: MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=10), (3, 64, 64)),
    "MViT": (lambda: MViT(block_setting=blocks(False), residual_pool=False, **VIDEO_V1), (3, 4, 32, 32)),
    "MViT v2": (lambda: MViT(block_setting=blocks(True), residual_pool=True, **VIDEO_V2), (3, 4, 32, 32)),
    "Swin3D": (lambda: SwinTransformer3d([2, 4, 4], window_size=[2, 4, 4], **WINDOWS), (3, 4, 36, 36)),
}
VIDEO_V1: dict[str, Any] = {**VIDEO, "residual_with_cls_embed": True, "rel_pos_embed": False, "proj_after_attn": False}
VIDEO_V2: dict[str, Any] = {**VIDEO, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
OWN_SIZE: dict[str, tuple[int, ...]] = {"vit_b_16": (3, 224, 224), "swin_v2_t": (3, 256, 256)}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Returns a model with random biases and random values for zero-initialized weights, and one input."""
    torch.manual_seed(0)
    make, shape = SMALL[name] if name in SMALL else (lambda: models.get_model(name, weights=None), OWN_SIZE[name])
    model = make().eval()
    for key, parameter in model.named_parameters():
        if (parameter.ndim == 1 and "bias" in key) or not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(1, *shape)


def measured(model: nn.Module, x: Tensor, attention: Any = "value") -> dict[str, Any]:
    """Returns the results of the conservation check of one model."""
    start = time.perf_counter()
    with torch.no_grad():
        plain = model(x)
    target = int(plain[0].argmax())
    mu = RelevanceMeasure(model, x, target, composite=Normalized(NRMDefault(), attention=attention))
    mu.marginal("input")
    seconds = time.perf_counter() - start
    mu._check_fresh = lambda: None  # type: ignore[method-assign]  # the weights do not change here
    containers = {name for name, module in model.named_modules() if module._modules}
    layers = [name for name in mu.layers if re.split(r"[:\[]", name)[0] in containers or name in ("input", "output")]
    variation = {name: float(mu.variation(name)) for name in layers}
    total = {name: float(mu(at(name)) + mu.sink(name) + mu.bypass(name)) for name in layers}
    return {
        "blocks": len(layers),
        "error": max(abs(total[name] - 1) / max(1.0, variation[name]) for name in layers),
        "residual": float(mu.sink("input", kind="residual")),
        "constants": float(mu.sink("input", kind="constants")),
        "variation": variation["input"],
        "output": float((mu.output - plain[0, target]).abs()),
        "seconds": round(seconds, 2),
    }


def signed(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns the variation at the input under rules with both signs."""
    with torch.no_grad():
        target = int(model(x)[0].argmax())
    mu = RelevanceMeasure(model, x, target, composite=EpsilonPlusFlat())
    return {"variation, EpsilonPlusFlat": float(mu.variation("input"))}


def main() -> None:
    """Writes the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="skip models at their original size")
    warnings.simplefilter("ignore")
    names = [*SMALL, *(() if parser.parse_args().small else OWN_SIZE)]
    rows = [{"model": name, **measured(*build(name)), **signed(*build(name))} for name in names]
    versions = {name: version(name) for name in ("torch", "torchvision", "zennit")}
    environment = {"python": platform.python_version(), **versions}
    RESULTS.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    tables.write("attention")


if __name__ == "__main__":
    main()
