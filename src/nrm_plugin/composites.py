"""``Normalized``, a wrapper for Zennit composites, and the composites of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal
from weakref import WeakSet

from torch import nn
from zennit.canonizers import AttributeCanonizer
from zennit.composites import (
    COMPOSITES,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    ExcitationBackprop,
    LayerMapComposite,
    SpecialFirstLayerMapComposite,
    register_composite,
)
from zennit.core import Composite, Hook
from zennit.layer import Sum
from zennit.rules import Flat, Pass
from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

from .canonizers import FuseBatchNorm
from .errors import NRMError, brief
from .functional import Interception
from .functional.attention import Attention
from .kernels.batch_norm_fusion import fuse
from .kernels.module_hook import StepHook
from .kernels.normalization import Normalization, Residual
from .kernels.rule_reader import PlainGradient
from .model.affine_layers import layer_like
from .model.checks import Uncompiled, check_hookable, check_unhooked, check_unpatched
from .model.quantized import is_quantized
from .model.zero_one_routes import is_route
from .rules import Absolute, ConservingEpsilon, Relative

Uncovered = Literal["error", "gradient"]
Sums = Literal["absolute", "ratio", "signed"]


_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
"""Recurrent modules. Their rules apply to the linear maps of every time step."""


class Normalized(Composite):
    """Zennit composite with normalized rules, which account for all relevance as either propagated or absorbed.

    It is used like any Zennit composite: as a context, in an attributor, or inside a ``MixedComposite``. Within its
    context, the gradient of an output is the relevance of that output under the normalized kernels. With
    ``create_graph=True``, this relevance can be differentiated with respect to the start vector. Differentiating it
    with respect to inputs or weights raises ``UnsupportedOperationError``, as does relevance that reaches an operation
    without a kernel.

    In a measure, only the inputs receive relevance, and all other tensors are constants. In a context, relevance also
    reaches other leaf tensors that require a gradient and were created before the forward pass, except parameters. Leaf
    tensors created by the model are constants if an input requires a gradient. A context does not separate samples: if
    the samples of a batch depend on each other, the result is the relevance of the whole batch, as in a measure with
    ``batched=False``.

    Args:
        composite: The composite that maps modules to rules; its canonizers are applied as well.
        residual: Treatment of the relevance that a rule does not propagate: ``"redistribute"`` or ``"sink"``.
        gain_limit: Upper bound ``G``, at least 1, on the factor by which a column of a rule is rescaled.
        sums: How the sum ``a + b`` distributes relevance: ``"absolute"`` (alias ``"ratio"``) or ``"signed"``.
        uncovered: Treatment of layers without a rule: ``"error"`` raises an error when a measure is constructed;
            ``"gradient"`` propagates relevance by the gradient, as Zennit does.
        attention: ``"value"`` treats attention weights as constants and propagates all relevance to the values;
            ``"halves"`` propagates half of it to the weights, and through the softmax to queries and keys, as in
            AttnLRP.

    Raises:
        TypeError: If ``composite`` is not a composite or is already normalized.

    Examples:
        >>> from zennit.composites import EpsilonPlus
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3, requires_grad=True)
        >>> with Normalized(EpsilonPlus(), gain_limit=float("inf")).context(net) as modified:
        ...     relevance, = torch.autograd.grad(modified(x)[:, 1].sum(), x)
        >>> relevance.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        composite: Composite,
        residual: Residual = "redistribute",
        gain_limit: float = 2.0,
        uncovered: Uncovered = "error",
        sums: Sums = "absolute",
        attention: Attention = "value",
    ) -> None:
        check_composite(composite)
        if isinstance(composite, Normalized):
            raise TypeError(
                "the composite is already Normalized; normalizing it twice would give it two sets of settings. Pass "
                "the composite that it wraps, with the intended settings: Normalized(composite.composite, …)."
            )
        if uncovered not in ("error", "gradient"):
            raise ValueError(f"uncovered={brief(uncovered)} is unknown; choose 'error' or 'gradient'.")
        self.composite = composite
        self.normalization = Normalization(residual, gain_limit)
        self.uncovered = uncovered
        self._checked: WeakSet[Hook] = WeakSet()
        self.sums = sums
        self.attention = attention
        kept = [canonizer for canonizer in composite.canonizers if not isinstance(canonizer, FuseBatchNorm)]
        self._fuse = fuse if len(kept) < len(composite.canonizers) else None
        functions = Interception(composite, self.normalization, sums, uncovered, self._fuse, attention, audited=True)
        super().__init__(module_map=self.mapping, canonizers=[*kept, functions])

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> StepHook | None:
        """Returns the hook for a module, or None if the module is not a step.

        Examples:
            >>> from zennit.composites import EpsilonPlus
            >>> hook = Normalized(EpsilonPlus()).mapping({}, "fc", nn.Linear(3, 2))
            >>> type(hook.rule).__name__
            'Epsilon'
        """
        if isinstance(module, _RECURRENT):
            return None
        rule = None if isinstance(module, self._made_of_functions()) else self.composite.module_map(ctx, name, module)
        if rule is None and is_quantized(module) and not isinstance(module, nn.Linear):
            rule = self.composite.module_map(ctx, name, layer_like("linear"))
        if rule is None and self.uncovered == "gradient" and is_leaf(module) and not is_route(module):
            rule = PlainGradient()
        if rule is None or (type(rule) is Pass and _is_compound_norm(module)):
            return None
        return StepHook(rule, self.normalization, name, self._checked, self._fuse)

    def _made_of_functions(self) -> tuple[type[nn.Module], ...]:
        """Returns the module types that are decomposed into functions although Zennit treats them as activations."""
        return (nn.MultiheadAttention, nn.Softmax) if self.attention == "halves" else (nn.MultiheadAttention,)

    def register(self, module: nn.Module) -> None:
        """Registers the hooks of the composite on a module and its submodules.

        Raises:
            ModelStateError: If the module has hooks of another composite. One of the two would silently have no effect.
            UnsupportedRuleError: If another package has patched Zennit.
        """
        self.remove()
        check_unpatched()
        modules = dict(module.named_modules())
        check_hookable(modules)
        check_unhooked(modules, "Leave the context of that composite first, or call its remove().")
        try:
            super().register(module)
            self.handles.append(Uncompiled(module))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Removes hooks and canonizers in reverse order of registration. Each of them restores the previous state."""
        self.handles.reverse()
        set_once: set[tuple[nn.Module, str]] = set()
        for handle in self.handles:
            if isinstance(handle, AttributeCanonizer):  # it deletes attributes, which is possible only once
                keys = [key for key in handle.attribute_keys if (handle.module, key) not in set_once]
                set_once.update((handle.module, key) for key in keys)
                handle.attribute_keys = keys
        super().remove()

    @contextmanager
    def inactive(self) -> Iterator[Normalized]:
        """Context manager that restores the original forward and backward passes of the model.

        Unlike in Zennit, outputs computed before entering the context still propagate relevance: a step never runs the
        backward pass of its module.

        Examples:
            >>> rules, net, x = Normalized(NRMDefault()), nn.Linear(3, 1), torch.randn(5, 3, requires_grad=True)
            >>> with rules.context(net), rules.inactive():
            ...     gradient, = torch.autograd.grad(net(x).sum(), x)
            >>> torch.equal(gradient, net.weight.expand(5, 3))
            True
        """
        functions = [handle for handle in self.handles if isinstance(handle, Interception)]
        for handle in functions:
            handle.active = False
        try:
            with super().inactive():
                yield self
        finally:
            for handle in functions:
                handle.active = True


def check_composite(composite: Any) -> None:
    """Raises :class:`TypeError` unless ``composite`` is an instance of a Zennit composite."""
    if isinstance(composite, Composite):
        return
    what, remedy = type(composite).__name__, "Pass an instance, such as EpsilonPlusFlat()."
    if isinstance(composite, type):
        what, remedy = f"the class {composite.__name__}", f"Pass an instance: {composite.__name__}()."
    elif isinstance(composite, str):
        what = f"the name {brief(composite)}"
        remedy = f"Pass an instance: zennit.composites.COMPOSITES[{brief(composite)}]()."
    elif isinstance(composite, Hook):
        what = f"the rule {what}"
        remedy = f"Map it to layers: LayerMapComposite([(torch.nn.Linear, {type(composite).__name__}())])."
    raise TypeError(f"expected a Zennit composite, which maps layers to rules, got {what}. {remedy}")


def is_leaf(module: nn.Module) -> bool:
    """Returns True if a module has no child modules."""
    return not module._modules


def _is_compound_norm(module: nn.Module) -> bool:
    """Returns True if a batch-norm module also performs other operations, such as an activation."""
    norm = nn.modules.batchnorm._BatchNorm
    return isinstance(module, norm) and type(module).forward is not norm.forward


def register(name: str) -> Any:
    """Decorator that registers a composite class with Zennit and raises an error if the name is taken."""

    def decorate(composite: type[Composite]) -> type[Composite]:
        known = COMPOSITES.get(name)
        if known is not None and known.__qualname__ != composite.__qualname__:
            raise NRMError(f"Zennit already has a composite named {name!r} ({known.__module__}.{known.__qualname__}).")
        return register_composite(name)(composite)  # type: ignore[no-any-return]

    return decorate


def _layer_map() -> list[tuple[Any, Hook]]:
    return [(Activation, Pass()), (BatchNorm, Pass()), (Sum, Absolute()), (AvgPool, Absolute())]


class _Depthwise(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, Convolution) and module.groups == module.in_channels > 1


class Depthwise(metaclass=_Depthwise):
    """Virtual base class of depthwise convolutions, for use in layer maps."""


@register("nrm_default")
class NRMDefault(SpecialFirstLayerMapComposite):
    """Default composite: Flat in the first convolution, ConservingEpsilon in all other convolutions and linear layers.

    Depthwise convolutions, sums and average pooling use :class:`~nrm_plugin.rules.Absolute`. Every column sums to one,
    so only constants absorb relevance.

    Args:
        epsilon: The parameter ε of :class:`~nrm_plugin.rules.ConservingEpsilon`.
        layer_map: Rules that take precedence over the composite's own, as in Zennit.
        first_map: Rules for the first layer that take precedence over the composite's own, as in Zennit.
        zero_params: Parameters to set to zero, as in Zennit.
        canonizers: As in Zennit, or None for batch-norm fusion.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=NRMDefault(epsilon=0.1))
        >>> bool(mu(ABSORBED).abs().max() < 1e-5)
        True

    Source: new in this package; docs/default-composite.md compares it with other composites.
    """

    def __init__(
        self,
        epsilon: float = 0.2,
        layer_map: list[Any] | None = None,
        first_map: list[Any] | None = None,
        zero_params: Any = None,
        canonizers: list[Any] | None = None,
    ) -> None:
        rules = [
            (Depthwise, Absolute(zero_params=zero_params)),
            (Linear, ConservingEpsilon(epsilon, zero_params=zero_params)),
        ]
        super().__init__(
            layer_map=[*(layer_map or []), *_layer_map(), *rules],
            first_map=[*(first_map or []), (Convolution, Flat(zero_params=zero_params))],
            canonizers=[FuseBatchNorm()] if canonizers is None else canonizers,
        )


@register("nrm_absolute")
class NRMAbsolute(LayerMapComposite):
    """Composite with the rule Absolute in all layers. No walk has negative mass, so the variation is 1 in every layer.

    Args:
        layer_map: Rules that take precedence over the composite's own, as in Zennit.
        zero_params: Parameters to set to zero, as in Zennit.
        canonizers: As in Zennit, or None for batch-norm fusion.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, composite=NRMAbsolute())
        >>> torch.allclose(mu.walk_variation(), torch.ones(5), atol=1e-5)
        True
    """

    def __init__(
        self,
        layer_map: list[Any] | None = None,
        zero_params: Any = None,
        canonizers: list[Any] | None = None,
    ) -> None:
        rule = Absolute(zero_params=zero_params)
        super().__init__(layer_map=[*(layer_map or []), *_layer_map(), (Linear, rule)], canonizers=canonizers)


class Named(Normalized):
    """Base class of the normalized variants of Zennit's composites.

    Args:
        **rules: Keyword arguments of the wrapped Zennit composite. The remaining arguments are those of
            :class:`~nrm_plugin.Normalized`.

    Examples:
        >>> from zennit.composites import COMPOSITES
        >>> COMPOSITES["nrm_epsilon_plus"](residual="sink", epsilon=0.1).normalization.residual
        'sink'
    """

    _wrapped: ClassVar[type[Composite]]

    def __init__(
        self,
        residual: Residual = "redistribute",
        gain_limit: float = 2.0,
        uncovered: Uncovered = "error",
        sums: Sums = "absolute",
        **rules: Any,
    ) -> None:
        super().__init__(self._wrapped(**rules), residual, gain_limit, uncovered, sums)


@register("nrm_epsilon_plus")
class NRMEpsilonPlus(Named):
    """Normalized variant of Zennit's ``EpsilonPlus``; see :class:`Named` for the arguments."""

    _wrapped = EpsilonPlus


@register("nrm_epsilon_plus_flat")
class NRMEpsilonPlusFlat(Named):
    """Normalized variant of Zennit's ``EpsilonPlusFlat``; see :class:`Named` for the arguments."""

    _wrapped = EpsilonPlusFlat


@register("nrm_epsilon_alpha2_beta1")
class NRMEpsilonAlpha2Beta1(Named):
    """Normalized variant of Zennit's ``EpsilonAlpha2Beta1``; see :class:`Named` for the arguments."""

    _wrapped = EpsilonAlpha2Beta1


@register("nrm_epsilon_alpha2_beta1_flat")
class NRMEpsilonAlpha2Beta1Flat(Named):
    """Normalized variant of Zennit's ``EpsilonAlpha2Beta1Flat``; see :class:`Named` for the arguments."""

    _wrapped = EpsilonAlpha2Beta1Flat


@register("nrm_epsilon_gamma_box")
class NRMEpsilonGammaBox(Named):
    """Normalized variant of Zennit's ``EpsilonGammaBox``; see :class:`Named` for the arguments."""

    _wrapped = EpsilonGammaBox


@register("nrm_excitation_backprop")
class NRMExcitationBackprop(Named):
    """Normalized variant of Zennit's ``ExcitationBackprop``; see :class:`Named` for the arguments."""

    _wrapped = ExcitationBackprop


@register("nrm_relative")
class NRMRelative(Normalized):
    """Composite with the rule Relative in layers with weights and average pooling, and Absolute in sums.

    Relevance is conserved only up to a factor. Condition queries on survival: ``given=~ABSORBED``.

    Args:
        layer_map: Rules that take precedence over the composite's own, as in Zennit.
        canonizers: As in Zennit, or None for batch-norm fusion.
        uncovered: As in :class:`~nrm_plugin.Normalized`.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(5, 3), 1, composite=NRMRelative())
        >>> (mu.marginal("input").sum(1) + mu.sink("input")).round(decimals=3)
        tensor([1., 1., 1., 1., 1.])
        >>> mu.walk_variation(surviving=True).shape
        torch.Size([5])

    Source: our interpretation of the abstract of arXiv 2501.14322; see docs/relative.md.
    """

    def __init__(
        self,
        layer_map: list[Any] | None = None,
        canonizers: list[Any] | None = None,
        uncovered: Uncovered = "error",
    ) -> None:
        rules = [
            (Activation, Pass()),
            (BatchNorm, Pass()),
            (Sum, Absolute()),
            (AvgPool, Relative()),
            (Linear, Relative()),
        ]
        chosen = [FuseBatchNorm()] if canonizers is None else canonizers
        composite = LayerMapComposite([*(layer_map or []), *rules], canonizers=chosen)
        super().__init__(composite, residual="sink", uncovered=uncovered)


def normalize(
    composite: Composite | None, residual: Residual | None, gain_limit: float | None, uncovered: Uncovered | None
) -> Normalized:
    """Wraps a composite, by default :class:`NRMDefault`, in :class:`Normalized` with the given settings.

    Raises:
        TypeError: If ``composite`` is not a composite, or if settings are given for a composite that is already
            normalized.
    """
    settings = {"residual": residual, "gain_limit": gain_limit, "uncovered": uncovered}
    given = {key: value for key, value in settings.items() if value is not None}
    if isinstance(composite, Normalized):
        if given:
            raise TypeError(
                f"the composite is Normalized and has its own settings, but {', '.join(given)} "
                f"{'is' if len(given) == 1 else 'are'} given as well. Specify them in one place: "
                f"Normalized(composite, {', '.join(f'{key}={brief(value)}' for key, value in given.items())})."
            )
        return composite
    if composite is not None:
        check_composite(composite)
    return Normalized(NRMDefault() if composite is None else composite, **given)  # type: ignore[arg-type]
