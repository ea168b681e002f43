"""Reconstruction of the input patterns that activate selected neurons, or walks through several layers.

Deconvolution (Zeiler and Fergus, 2014) and guided backpropagation (Springenberg et al., 2015) are run by Zennit's
rules. They do not conserve relevance and therefore do not define measures. They show the pattern that activates a
neuron rather than its contribution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from zennit.composites import DeconvNet, GuidedBackprop
from zennit.core import Composite

from ..errors import EventError, brief
from ..events.event import All, Atom, Event
from ..imports import warn_deprecated
from ..recording.sample_layout import Layout
from .located_events import mask_of

Method = Literal["deconvnet", "guided_backprop"]
COMPOSITES: dict[Method, Callable[[], Composite]] = {"deconvnet": DeconvNet, "guided_backprop": GuidedBackprop}
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructions for all samples.

    Attributes:
        images: The reconstructions, of shape ``(N, C, H, W)``.
        boxes: Receptive field of the selected neurons in each sample, ``(top, left, bottom, right)``, where ``bottom``
            and ``right`` are exclusive; all zeros if no selected neuron depends on the input.

    Examples:
        >>> Reconstruction(torch.zeros(1, 3, 8, 8), [(2, 0, 5, 8)]).crops[0].shape
        torch.Size([3, 3, 8])
    """

    images: Tensor
    boxes: list[Box]

    @property
    def pictures(self) -> Tensor:
        """Deprecated name of ``images``.

        Examples:
            >>> import warnings
            >>> with warnings.catch_warnings(action="ignore"):
            ...     Reconstruction(torch.zeros(1, 1, 4, 4), [(0, 0, 4, 2)]).pictures.shape
            torch.Size([1, 1, 4, 4])
        """
        warn_deprecated("Reconstruction.pictures", "Reconstruction.images")
        return self.images

    @property
    def crops(self) -> list[Tensor]:
        """The reconstructions, cropped to their receptive fields, of shape ``(C, height, width)`` each.

        Examples:
            >>> Reconstruction(torch.zeros(1, 1, 4, 4), [(0, 0, 4, 2)]).crops[0].shape
            torch.Size([1, 4, 2])
        """
        boxes = zip(self.images, self.boxes, strict=True)
        return [image[:, top:bottom, left:right] for image, (top, left, bottom, right) in boxes]


def reconstruct(
    model: nn.Module, images: Tensor, neurons: Event, method: Method = "deconvnet", strongest: bool = True
) -> Reconstruction:
    r"""Reconstructs the input patterns that activate selected neurons, by deconvolution or guided backpropagation.

    The activations of the selected neurons are propagated back to the input: through transposed convolutions, through
    max pooling to the position of the maximum, and through ReLUs by

    .. math:: R_i = R_j^+ \quad \text{(deconvolution)}, \qquad
              R_i = R_j^+ \, 1[a_i > 0] \quad \text{(guided backpropagation)}

    Args:
        model: The network that contains the layer. Its ReLUs must be modules.
        images: Inputs of shape ``(N, C, H, W)``.
        neurons: ``at(layer)[…]`` or ``at(layer).channel(…)``, or several of these joined by ``&``. The signal then
            starts at the last of these layers and is restricted to the selected neurons in the others.
        method: ``"deconvnet"`` or ``"guided_backprop"``.
        strongest: Whether to start only from the selected neuron with the largest activation in the last layer, as
            Zeiler and Fergus do, instead of all selected neurons. Negative activations are set to zero.

    Raises:
        ValueError: If the method is unknown.
        EventError: If the event does not consist of outputs of modules joined by ``&``.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.ReLU())
        >>> reconstruction = reconstruct(net, torch.rand(2, 1, 8, 8), at("3").channel(1) & at("1").channel([0, 2]))
        >>> reconstruction.images.shape
        torch.Size([2, 1, 8, 8])

    Source: Zeiler and Fergus (ECCV 2014), Springenberg et al. (ICLR workshop 2015). The restriction to walks is new in
    this package.
    """
    if method not in COMPOSITES:
        raise ValueError(f"method={brief(method)} is unknown; choose 'deconvnet' or 'guided_backprop'.")
    atoms = _atoms(neurons)
    pixels = images.detach().clone().requires_grad_()
    recorded: list[tuple[str, Tensor, Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad(), COMPOSITES[method]().context(model):
        with _restricted(model, atoms, recorded):
            model(pixels)
        layer, output, mask = recorded[-1]
        start = output.detach().clamp(min=0) * mask
        if strongest:
            flat = start.flatten(1)
            best = torch.zeros_like(flat).scatter(1, flat.argmax(1, keepdim=True), 1.0).view_as(start)
            start = start * best
            mask = best.bool()
        (reconstructions,) = torch.autograd.grad(output, pixels, start, allow_unused=True, materialize_grads=True)
    return Reconstruction(reconstructions.detach(), receptive_fields(model, images, layer, mask))


def _atoms(neurons: Event) -> dict[str, Atom]:
    parts = neurons.parts if isinstance(neurons, All) else (neurons,)
    atoms: dict[str, Atom] = {}
    for part in parts:
        if not isinstance(part, Atom) or part.side != "output" or part.call not in (None, 0) or part.item is not None:
            raise EventError(f"{part} cannot be reconstructed: give at(layer)[…] for a module, or several joined by &.")
        if not isinstance(part.layer, str) or part.layer in atoms:
            raise EventError(f"{part}: name each layer once, by its name in model.named_modules().")
        atoms[part.layer] = part
    return atoms


@contextmanager
def _restricted(model: nn.Module, atoms: dict[str, Atom], recorded: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    """Context manager that restricts gradients to the selected neurons and records their outputs and masks."""
    with ExitStack() as stack:
        for layer, atom in atoms.items():

            def hook(module: nn.Module, args: Any, output: Tensor, layer: str = layer, atom: Atom = atom) -> Tensor:
                mask = mask_of(atom, output.shape, 1, Layout(0, len(output))).to(output.device).expand(output.shape)
                own = output.clone()  # the next activation may operate in place
                if own.requires_grad:
                    own.register_hook(lambda relevance: relevance * mask)  # type: ignore[no-untyped-call]
                recorded.append((layer, own, mask))
                return own.clone()

            stack.callback(model.get_submodule(layer).register_forward_hook(hook).remove)
        yield


def receptive_fields(model: nn.Module, images: Tensor, layer: str, mask: Tensor) -> list[Box]:
    """Computes the bounding box of the pixels on which the selected neurons might depend, for each sample.

    The rows and columns that influence the neurons are found by bisection: parts of the image are set to NaN. No
    operation removes a NaN, so the result is valid for any layers, weights and activations. A copy of the model is run
    in double precision on the CPU, where convolutions compute each output separately; faster algorithms would mix
    pixels within a tile.

    Args:
        model: The network that contains the layer.
        images: Inputs of shape ``(N, C, H, W)``.
        layer: Name of a module.
        mask: The neurons, of shape ``(N, *shape)``.

    Returns:
        The box ``(top, left, bottom, right)`` of each sample, where ``bottom`` and ``right`` are exclusive; all zeros
        if no pixel influences the neurons.
    """
    count, (height, width) = len(images), images.shape[-2:]
    sizes = torch.tensor([height, width, height, width]).expand(count, 4)
    low, high = torch.zeros_like(sizes).clone(), sizes.clone()
    model, images, mask = copy.deepcopy(model).cpu().double(), images.detach().cpu().double(), mask.cpu()
    whole = _reached(model, images, layer, mask, high)
    # Find the first edge such that NaN above it (or to the left, below, to the right) reaches the neurons.
    while bool((low < high).any()):
        middle = (low + high) // 2
        is_reached = _reached(model, images, layer, mask, middle)
        high = torch.where(is_reached, middle, high)
        low = torch.where(is_reached, low, middle + 1).minimum(high)
    boxes = []
    for (top, left, bottom, right), depends in zip(high.tolist(), whole[:, 0].tolist(), strict=True):
        box = (top - 1, left - 1, height - bottom + 1, width - right + 1)
        boxes.append(box if depends else (0, 0, 0, 0))
    return boxes


def _reached(model: nn.Module, images: Tensor, layer: str, mask: Tensor, edges: Tensor) -> Tensor:
    """Returns True where setting the image to NaN between one of its sides and an edge turns the neurons into NaN.

    The result has shape ``(N, 4)``, with the sides in the order top, left, bottom, right.
    """
    probes = images.detach().unsqueeze(1).repeat(1, 4, 1, 1, 1)
    for probe, (top, left, bottom, right) in zip(probes, edges.tolist(), strict=True):
        probe[0, :, :top] = torch.nan
        probe[1, :, :, :left] = torch.nan
        probe[2, :, probe.shape[2] - bottom :] = torch.nan
        probe[3, :, :, probe.shape[3] - right :] = torch.nan
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output.isnan().view(len(images), 4, *output.shape[1:]))

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(probes.flatten(0, 1))
    finally:
        handle.remove()
    return (outputs[0] & mask.unsqueeze(1)).flatten(2).any(2).cpu()
