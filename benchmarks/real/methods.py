"""Methods that explain an output by a heat map, each with the settings that its authors recommend.

Every method explains the weighted outputs ``s · f``. For a class, ``s`` is one-hot; for a class against the rest, the
softmax of the other classes, held constant, is subtracted. Every method can therefore explain the contrast.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.attr import LRP, DeepLift, GradientShap, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, fx, nn
from zennit.canonizers import NamedMergeBatchNorm
from zennit.composites import EpsilonAlpha2Beta1Flat, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite

from nrm_plugin import ConservingEpsilon, FuseBatchNorm, NRMAbsolute, NRMDefault, Plan, RelevanceMeasure
from nrm_plugin.composites import Normalized
from nrm_plugin.measure.layer_averages import blurred, late_layers, layer_average, layer_map
from nrm_plugin.measure.pixel_maps import is_fine_grained, pixel_map
from nrm_plugin.measure.plain_ground import plain_ground
from nrm_plugin.model.contrast import contrast_vector

from .networks import Network, batch_norms

BATCH = 4
"""Batch size for methods that compute many gradients per image."""


@dataclass(frozen=True)
class Question:
    """The explained outputs of a network and their inputs.

    Args:
        net: The network.
        inputs: ``(N, C, H, W)``.
        targets: The class, ``(N,)``.
        against: None for the output of the class, ``"rest"`` for the class against the others.
        plain: The plain color of references and baselines, in the units of the inputs, ``(C, 1, 1)``.
        others: Other images, as baselines of expected gradients, ``(M, C, H, W)``.
    """

    net: Network
    inputs: Tensor
    targets: Tensor
    plain: Tensor
    others: Tensor
    against: str | None = None

    @property
    def weights(self) -> Tensor:
        """Weights of the outputs, ``(N, K)``."""
        logits = self.net.logits(self.inputs)
        if self.against is None:
            return nn.functional.one_hot(self.targets, logits.shape[1]).to(logits.dtype)
        return contrast_vector(logits, self.targets, self.against)

    @property
    def gray(self) -> Tensor:
        """A plain image for each input."""
        return self.plain.expand_as(self.inputs).contiguous()

    @property
    def blurred(self) -> Tensor:
        """The inputs, blurred."""
        return blurred(self.inputs)


Explainer = Callable[[Question], Tensor]
"""Returns relevance of the inputs, ``(N, C, H, W)`` or ``(N, H, W)``."""


@dataclass(frozen=True)
class Method:
    """A method in a table.

    Args:
        explain: The method.
        against: As in :class:`Question`.
        is_ours: Whether it is a measure of this package.
        gradients: Number of gradients that it computes; for expensive methods, which explain fewer images.
    """

    explain: Explainer
    against: str | None = None
    is_ours: bool = False
    gradients: int = 1


def heat_map(method: Method, question: Question) -> Tensor:
    """Returns heat maps ``(N, H, W)``, summed over colors."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum warns whenever it sets hooks
        torch.manual_seed(0)
        relevance = method.explain(question).detach()
    return relevance.sum(1) if relevance.ndim == 4 else relevance


# -- measures of this package ---------------------------------------------------------------------------------------


@dataclass
class Measured:
    """The measure with a composite; a plan serves all batches of one network.

    Args:
        composite: Function that returns the composite for a network, or None for the measure against a reference.
        reference: None, ``"grey"`` or ``"blur"``.
        is_averaged: Whether the relevance of the late layers is averaged, in place of the relevance of the input.
    """

    composite: Callable[[Network], Composite] | None
    reference: str | None = None
    is_averaged: bool = False
    _plans: dict[str, Plan] = field(default_factory=dict)
    _layers: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, question: Question) -> Tensor:
        reference = {None: None, "grey": question.gray, "blur": question.blurred}[self.reference]
        further = {} if reference is None else {"reference": reference}
        if question.net.name not in self._plans:
            model, composite = question.net.model, None if self.composite is None else self.composite(question.net)
            self._plans = {question.net.name: Plan(model, question.inputs, composite=composite, **further)}
            if self.is_averaged:
                mu = RelevanceMeasure(model, question.inputs[:1], 0, composite=composite,
                                      **{key: value[:1] for key, value in further.items()})  # fmt: skip
                self._layers = {question.net.name: late_layers(mu)}
        mu = self._plans[question.net.name](
            question.inputs, question.targets.tolist(), against=question.against, **further
        )
        if self.is_averaged:
            return layer_average(mu, self._layers[question.net.name])
        sign = mu.sign.reshape(-1, 1, 1, 1)  # positive relevance is evidence for the class
        return mu.marginal("input") * sign


def explain_first(question: Question) -> Tensor:
    """Returns the heat map that ``nrm-plugin explain`` shows first by default, image by image."""
    maps = []
    for image, target in zip(question.inputs.split(1), question.targets.tolist(), strict=True):
        model, ground = question.net.model, plain_ground(question.net.image(image[0]))
        if ground is not None:
            plain = question.net.normalized(ground.reshape(-1, 1, 1)).expand_as(image).contiguous()
            if is_fine_grained(RelevanceMeasure(model, image, target, reference=plain)):
                maps.append(pixel_map(model, image, target, reference=plain))
                continue
        maps.append(layer_map(model, image, target))
    return torch.cat(maps)


def gamma_box(net: Network, **settings: Any) -> EpsilonGammaBox:
    """Returns Zennit's EpsilonGammaBox for images in [0, 1]."""
    low, high = net.normalized(torch.zeros_like(net.mean)), net.normalized(torch.ones_like(net.mean))
    shape = (1, len(net.mean), 1, 1)
    return EpsilonGammaBox(low.reshape(shape), high.reshape(shape), **settings)


# -- other packages -------------------------------------------------------------------------------------------------


def zennit(composite: Callable[..., Composite]) -> Explainer:
    """Returns Zennit's relevance of the weighted outputs under a composite, with fused batch norms.

    Args:
        composite: Function of canonizers, and of the network if the composite needs the range of the inputs.
    """

    def explain(question: Question) -> Tensor:
        x = question.inputs.clone().requires_grad_()
        start = question.weights * question.net.logits(question.inputs)  # before hooks are registered
        canonizers = [NamedMergeBatchNorm(batch_norms(question.net.model))]
        given = [question.net] if composite is gamma_box else []
        start = question.weights * question.net.logits(question.inputs)
        with composite(*given, canonizers=canonizers).context(question.net.model) as model:
            (relevance,) = torch.autograd.grad(model(x), x, start)
        return relevance

    return explain


class Weighted(nn.Module):
    """The weighted outputs ``(N,)`` of a network, for inputs and weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """``(N, C, H, W)`` and ``(N, K)``."""
        total: Tensor = (self.model(x) * weights).sum(1)
        return total


def captum(
    method: Callable[[nn.Module], Any], separate: bool = False, fused: bool = False, **settings: Any
) -> Explainer:
    """Returns a method of Captum on the weighted outputs.

    Args:
        method: Function that returns the method for a model.
        separate: Whether to replace every call of a module by a call of its own copy, as DeepLift and LRP require.
        fused: Whether to fuse batch norms, which leaves gradients unchanged and takes less time.
        settings: Arguments of ``attribute``; functions are called with the question.
    """

    def explain(question: Question) -> Tensor:
        model = question.net.fast if fused else question.net.model
        model = _separated(model) if separate else model
        arguments = {key: value(question) if callable(value) else value for key, value in settings.items()}
        weights = question.weights
        result: Tensor = method(Weighted(model)).attribute(
            question.inputs, additional_forward_args=weights, **arguments
        )
        return result

    return explain


def captum_lrp(question: Question) -> Tensor:
    """Returns Captum's LRP, which explains one output and requires a separate module for every call."""
    result: Tensor = LRP(_separated(question.net.model)).attribute(question.inputs, target=question.targets)
    return result


def _separated(model: nn.Module) -> nn.Module:
    """Returns a copy in which every call has its own module, without in-place operations."""
    traced = fx.symbolic_trace(copy.deepcopy(model))
    seen: set[str] = set()
    for number, node in enumerate(traced.graph.nodes):
        if node.op == "call_module":
            name = f"{node.target}".replace(".", "_") + f"_call{number}"
            if node.target in seen:
                traced.add_submodule(name, copy.deepcopy(traced.get_submodule(node.target)))
                node.target = name
            seen.add(node.target)
    for module in traced.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    traced.recompile()
    return traced


def cam(weigh: Callable[[Tensor, Tensor], Tensor], is_signed: bool = False) -> Explainer:
    """Returns a class activation map of the last convolution, interpolated to the size of the input.

    Args:
        weigh: The map ``(N, H, W)`` from activations and gradients, ``(N, K, H, W)`` each.
        is_signed: Whether negative values are kept; the authors set them to 0.
    """

    def explain(question: Question) -> Tensor:
        stored: list[Tensor] = []
        module = question.net.model.get_submodule(question.net.last)
        handle = module.register_forward_hook(lambda module, args, output: stored.append(output))
        try:
            outputs = question.net.model(question.inputs.clone().requires_grad_())
        finally:
            handle.remove()
        (gradients,) = torch.autograd.grad((outputs * question.weights).sum(), stored[0])
        coarse = weigh(stored[0].detach(), gradients)[:, None]
        coarse = coarse if is_signed else coarse.clamp(min=0)
        return nn.functional.interpolate(coarse, question.inputs.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    return explain


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Returns the activations weighted by the mean gradient of their channel (arXiv 1610.02391)."""
    return (activations * gradients.mean((2, 3), keepdim=True)).sum(1)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Returns the activations times gradients (arXiv 2011.08891); GradCAM if a mean and a linear layer follow."""
    return (activations * gradients).sum(1)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Returns the activations times positive gradients (doi 10.1109/TIP.2021.3089943)."""
    return (activations * gradients.clamp(min=0)).sum(1)


def smooth_grad(model: nn.Module) -> NoiseTunnel:
    """Returns the mean gradient of noisy inputs (arXiv 1706.03825)."""
    return NoiseTunnel(Saliency(model))


def _noise(question: Question) -> float:
    """Returns 15% of the range of the inputs."""
    return 0.15 * float(question.inputs.max() - question.inputs.min())


def chance(question: Question) -> Tensor:
    """Returns random numbers."""
    return torch.rand(len(question.inputs), *question.inputs.shape[2:])


def _ours(
    composite: Callable[[Network], Composite] | None,
    against: str | None,
    reference: str | None = None,
    is_averaged: bool = False,
) -> Method:
    return Method(Measured(composite, reference, is_averaged), against, is_ours=True)


FIRST = "explain, first map"
"""The heat map that ``nrm-plugin explain`` shows first by default."""
OURS = {
    "default": lambda net: NRMDefault(),
    "default, ε = 0 in the classifier": lambda net: NRMDefault(layer_map=[(nn.Linear, ConservingEpsilon(0.0))]),
    "EpsilonPlusFlat": lambda net: Normalized(EpsilonPlusFlat(canonizers=[FuseBatchNorm()])),
    "EpsilonGammaBox": lambda net: Normalized(gamma_box(net, canonizers=[FuseBatchNorm()])),
    "NRMAbsolute": lambda net: NRMAbsolute(),
}
METHODS: dict[str, Method] = {
    "default, against the rest": _ours(OURS["default"], "rest"),
    "default, ε = 0 in the classifier, against the rest": _ours(OURS["default, ε = 0 in the classifier"], "rest"),
    "EpsilonPlusFlat, against the rest": _ours(OURS["EpsilonPlusFlat"], "rest"),
    "EpsilonGammaBox, against the rest": _ours(OURS["EpsilonGammaBox"], "rest"),
    "default, last two resolutions, against the rest": _ours(OURS["default"], "rest", is_averaged=True),
    "EpsilonPlusFlat, last two resolutions, against the rest": _ours(
        OURS["EpsilonPlusFlat"], "rest", is_averaged=True
    ),
    "reference blur, last two resolutions, against the rest": _ours(None, "rest", "blur", True),
    FIRST: Method(explain_first, "rest", is_ours=True, gradients=9),
    "reference gray, last two resolutions, against the rest": _ours(None, "rest", "grey", True),
    "reference gray, against the rest": _ours(None, "rest", "grey"),
    "reference blur, against the rest": _ours(None, "rest", "blur"),
    "default": _ours(OURS["default"], None),
    "EpsilonPlusFlat": _ours(OURS["EpsilonPlusFlat"], None),
    "EpsilonGammaBox": _ours(OURS["EpsilonGammaBox"], None),
    "NRMAbsolute": _ours(OURS["NRMAbsolute"], None),
    "reference gray": _ours(None, None, "grey"),
    "reference blur": _ours(None, None, "blur"),
    "GradCAM": Method(cam(grad_cam)),
    "GradCAM, against the rest": Method(cam(grad_cam), "rest"),
    "GradCAM, signed, against the rest": Method(cam(grad_cam, is_signed=True), "rest"),
    "HiResCAM": Method(cam(hires_cam)),
    "LayerCAM": Method(cam(layer_cam)),
    "Zennit EpsilonPlus": Method(zennit(EpsilonPlus)),
    "Zennit EpsilonPlusFlat": Method(zennit(EpsilonPlusFlat)),
    "Zennit EpsilonPlusFlat, against the rest": Method(zennit(EpsilonPlusFlat), "rest"),
    "Zennit EpsilonGammaBox": Method(zennit(gamma_box)),
    "Zennit EpsilonAlpha2Beta1Flat": Method(zennit(EpsilonAlpha2Beta1Flat)),
    "Captum LRP": Method(captum_lrp),
    "DeepLift": Method(captum(DeepLift, separate=True, baselines=lambda question: question.gray), gradients=2),
    "InputXGradient": Method(captum(InputXGradient)),
    "InputXGradient, against the rest": Method(captum(InputXGradient), "rest"),
    "SmoothGrad": Method(captum(smooth_grad, nt_samples=50, nt_samples_batch_size=2, stdevs=_noise), gradients=50),
    "IntegratedGradients, 20 steps": Method(captum(
        IntegratedGradients, fused=True, n_steps=20, internal_batch_size=BATCH,
        baselines=lambda question: question.gray,
    ), gradients=20),
    "IntegratedGradients, 20 steps, against the rest": Method(captum(
        IntegratedGradients, fused=True, n_steps=20, internal_batch_size=BATCH,
        baselines=lambda question: question.gray,
    ), "rest", gradients=20),
    "IntegratedGradients, 200 steps": Method(captum(
        IntegratedGradients, fused=True, n_steps=200, internal_batch_size=BATCH,
        baselines=lambda question: question.gray,
    ), gradients=200),
    "expected gradients": Method(captum(
        GradientShap, fused=True, n_samples=50, stdevs=0.0, baselines=lambda question: question.others,
    ), gradients=50),
    "chance": Method(chance),
}  # fmt: skip
