"""Trained networks for the shell: ``nrm-plugin flow cat.jpg --model benchmarks.real.shell:vgg16``."""

from __future__ import annotations

from torch import nn

from .networks import efficientnet_lite, vgg16_folders


def vgg16() -> nn.Module:
    """Returns VGG16 with seven folders of photographs as classes; ``--mean .485,.458,.408 --std 1,1,1``."""
    return vgg16_folders().model


def lite() -> nn.Module:
    """Returns EfficientNet-Lite0 with the classes of ImageNet; ``--mean .498,.498,.498 --std .502,.502,.502``."""
    return efficientnet_lite().model
