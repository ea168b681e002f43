"""Reading a rule on one call of an affine layer in the form in which Zennit writes rules: as branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import BasicHook, ParamMod
from zennit.rules import Gamma, NoMod, ZBox

from ..model.affine import WEIGHTED, Call, Image, broadcast, is_affine, is_known_linear, twin_of
from ..model.autocast import current, lowered
from ..model.copies import shell_of
from ..model.linear_maps import Maps, blocked_maps, explicit_maps, recorded_maps
from ..rules import EvenMod
from .base import Block, Branch, Branches, BranchKernel, Scale, blocks
from .closed_forms import mapper_of

LARGE = 1 << 22
"""Entries of a linear layer from which on its modified weight is made block by block."""


def branches_of(
    hook: BasicHook,
    module: nn.Module,
    call: Call,
    inputs: Tensor,
    output: Tensor,
    seen: Image | None,
    is_output_known: bool,
    scale: Scale | None,
) -> BranchKernel | None:
    """The rule in branch form, or None when the module is not affine or the rule is written another way."""
    if not is_affine(module):
        return None
    sources = _modified_inputs(hook, inputs)
    signs = _KNOWN_SIGNS.get(type(hook))
    if signs is None:
        signs = _signs(hook, sources)
        if signs is not None and is_known_linear(hook):
            _KNOWN_SIGNS[type(hook)] = signs
    if signs is None:
        return None
    reader = _BranchReader(hook, module, call, inputs, output, seen, is_output_known, scale, sources, signs)
    first, *later = _INDEPENDENT.get(type(hook), [tuple(range(len(sources)))])
    ready = reader.read(first)
    if ready is None:
        return None
    waiting = (lambda: reader.certain(later[0])) if later else None
    if not isinstance(module, WEIGHTED):
        return BranchKernel(ready, scale is not None, waiting, inputs)
    weight = module._parameters["weight"]
    assert weight is not None
    injective = getattr(module, "padding_mode", "zeros") == "zeros"
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) or getattr(module, "is_transposed", False)
    groups = int(getattr(module, "groups", 1))
    rerun = _rerun(module, call)
    return BranchKernel(
        ready, scale is not None, waiting, inputs, rerun, weight.detach(), injective, groups, transposed
    )


_KNOWN_SIGNS: dict[type, list[float]] = {}
"""Signs of the branches of known rules, which no instance changes."""


_INDEPENDENT: dict[type, list[tuple[int, ...]]] = {Gamma: [(0, 1), (2, 3)]}
"""Branches of built-in rules that share outputs only among themselves: γ has a pair for outputs of either sign."""


@dataclass
class _BranchReader:
    """Reads some branches of a rule at one call."""

    hook: BasicHook
    module: nn.Module
    call: Call
    inputs: Tensor
    output: Tensor
    seen: Image | None
    is_output_known: bool
    scale: Scale | None
    sources: list[Tensor]
    signs: list[float]
    precision: torch.dtype | None = field(default_factory=current)

    def certain(self, chosen: tuple[int, ...]) -> Branches:
        """Branches of a rule of which others were read already."""
        found = self.read(chosen)
        assert found is not None
        return found

    @torch.no_grad()
    def read(self, chosen: tuple[int, ...]) -> Branches | None:
        """The branches of these numbers, or None when they are written another way."""
        runs = []
        for number, (source, param_mod, out_mod) in enumerate(
            zip(self.sources, self.hook.param_modifiers, self.hook.output_modifiers, strict=True)
        ):
            probe = self.output.new_ones(1)
            if out_mod(probe) is not probe:
                return None
            if number not in chosen and self.signs[number] != 0:
                runs.append(_Run(self.output.new_ones(())))
                continue
            modify = ParamMod.ensure(param_mod)
            run = self._run_blocked(modify, source)
            if run is None:
                with modify(self.module) as modified:
                    run = self._run(modified, source, self.signs[number])
            runs.append(run)
        kept = [number for number in chosen if runs[number].maps is not None and self.signs[number] != 0]
        columns = self._columns(runs, kept)
        if columns is None:
            return None
        factors, rest = columns
        branches = []
        for number, factor in zip(kept, factors, strict=True):
            run = runs[number]
            assert run.maps is not None
            branches.append(Branch(self.sources[number], factor, self.signs[number], run.maps, run.modified))
        return branches, rest

    def _columns(self, runs: list[_Run], kept: list[int]) -> tuple[list[Tensor], Tensor | None] | None:
        """``m_k(1)`` of the kept branches and the column sums; None where the mapper is not elementwise.

        With a scale the factors hold the gain, and instead of the sums comes the deficit, None for zero.

        A zero stands where a denominator is zero: that column is dead. A rule divides, adds signs and compares in a
        dozen steps, so they are taken block by block, in the cache, and written where nothing is needed any more.
        """
        shape, whole = self.output.shape, [tuple(slice(None) for _ in self.output.shape)]
        mapper = mapper_of(self.hook)
        if mapper is None:
            first = next(iter(blocks(self.output)))
            tried = self._mapped(runs, first)
            if any(factor.shape != self.output[first].shape for factor in tried):
                return None
            if not is_known_linear(self.hook) and not self._is_elementwise(runs):
                return None
            local = self._is_local(runs, first, tried)
            leaders = {number: next(other for other in kept if tried[other] is tried[number]) for number in kept}
        else:
            local = True
            alike = mapper.leaders
            leaders = {number: next(other for other in kept if alike[other] == alike[number]) for number in kept}
        factors = {number: runs[number].memory(self.output) for number in dict.fromkeys(leaders.values())}
        rest: Tensor | None = None
        for at in blocks(self.output) if local and self.output.device.type == "cpu" else whole:
            if mapper is None:
                mapped = dict(enumerate(self._mapped(runs, at)))
            else:
                asked = {number: mapper.leaders[number] for number in factors}
                given = mapper.factors([run.output(at, shape) for run in runs], tuple(asked.values()))
                mapped = {number: given[leader] for number, leader in asked.items()}
            parts = {number: torch.nan_to_num(mapped[number], 0, 0, 0) for number in factors}
            column: Tensor | None = None
            for number in kept:
                part, image = parts[leaders[number]], runs[number].image[at]
                column = _added(column, part, image, self.signs[number])
            column = torch.zeros_like(self.output[at]) if column is None else column
            gained, lost = (None, column) if self.scale is None else self.scale(column)
            for number, factor in factors.items():
                factor[at] = parts[number] if gained is None else parts[number].mul_(gained)
            if lost is not None:
                rest = torch.zeros_like(self.output) if rest is None else rest
                rest[at] = lost
        return [factors[leaders[number]] for number in kept], rest

    def _mapped(self, runs: list[_Run], at: Block, relevance: Tensor | None = None) -> list[Tensor]:
        """What the rule makes of relevance, by default ones, at one block of its outputs."""
        outputs = [run.output(at, self.output.shape) for run in runs]
        ones = torch.ones_like(self.output[at]) if relevance is None else relevance
        mapped = self.hook.gradient_mapper(ones, outputs)
        return [mapped] if isinstance(mapped, Tensor) else list(mapped)

    def _corner(self) -> Block:
        return tuple(slice(0, 1 if dim < 2 < self.output.ndim else 4) for dim in range(self.output.ndim))

    def _is_local(self, runs: list[_Run], first: Block, tried: list[Tensor]) -> bool:
        """Whether an entry depends on no other; a stabilizer scaled by the layer does."""
        corner = self._corner()
        return all(
            torch.allclose(here, there[corner], rtol=1e-6, atol=0, equal_nan=True)
            for here, there in zip(self._mapped(runs, corner), tried, strict=True)
        )

    def _is_elementwise(self, runs: list[_Run]) -> bool:
        """Whether the mapper multiplies by a factor for each entry."""
        corner = self._corner()
        size = self.output[corner].shape
        probe = torch.linspace(-1, 2, size.numel(), dtype=self.output.dtype, device=self.output.device).reshape(size)
        for factor, mapped in zip(self._mapped(runs, corner), self._mapped(runs, corner, probe), strict=True):
            difference = (mapped - factor * probe).abs()
            if bool((difference > 1e-3 * factor.abs() + 1e-30).logical_and(factor.isfinite()).any()):
                return False
        return True

    def _run(self, modified: nn.Module, source: Tensor, sign: float) -> _Run:
        """One modified module at its modified input; without its bias, since output minus bias cancels."""
        bias, weight = modified._parameters.get("bias"), modified._parameters.get("weight")
        own = _share_memory(modified._parameters, self.module._parameters)
        if sign == 0 and source is self.inputs and self.is_output_known and own:
            return _Run(self.output)
        added = None if bias is None else broadcast(bias.detach(), modified, self.output)
        if added is not None and added.device.type == "cpu" and not bool(added.any()):
            added = None
        if _is_zero(source):
            return _Run(self.output.new_zeros(()), added)
        if weight is None:
            maps, image = recorded_maps(lambda values: self.call(self.module, values), source)
            return _Run(image, added, maps)
        matrix = weight.detach()
        explicit = self._explicit(modified, matrix, source)
        if explicit is None:
            rerun = _rerun(self.module, self.call)
            maps, image = recorded_maps(lambda values: rerun(values, matrix), source)
        else:
            maps = explicit
            known = self.seen is not None and source is self.inputs and matrix.data_ptr() == self.seen[1].data_ptr()
            if known and self.seen is not None:
                # Without a bias the image is what the layer returned, which others read.
                return _Run(self.seen[0], added, maps, lambda: matrix, is_own=bias is not None)
            image = maps.up(source.unsqueeze(0)).squeeze(0)
        return _Run(image, added, maps, lambda: matrix, is_own=True)

    def _short(self, source: Tensor) -> torch.dtype | None:
        """The format in which the layer multiplies, where it is shorter than that of the inputs."""
        return self.precision if source.dtype == torch.float32 else None

    def _explicit(self, modified: nn.Module, matrix: Tensor, source: Tensor) -> Maps | None:
        short = self._short(source)
        if short is None:
            return explicit_maps(twin_of(modified), matrix, source)
        maps = explicit_maps(twin_of(modified), matrix.to(short), source)
        return None if maps is None else lowered(maps, short)

    def _run_blocked(self, modify: ParamMod, source: Tensor) -> _Run | None:
        """The same for a large linear layer and a rule of Zennit that changes its weight; None for all others."""
        weight = self.module._parameters.get("weight")
        if weight is None or weight.numel() < LARGE or type(twin_of(self.module)).forward is not nn.Linear.forward:
            return None
        if (
            not is_known_linear(self.hook)
            or isinstance(modify, (NoMod, EvenMod))
            or "weight" in (modify.zero_params or ())
        ):
            return None
        if modify.param_keys is not None and "weight" not in modify.param_keys:
            return None
        small = shell_of(self.module)
        small._parameters["weight"] = nn.Parameter(weight.detach()[:1], requires_grad=False)
        with modify(small) as modified:
            bias = modified._parameters.get("bias")
            added = None if bias is None else bias.detach()
        if _is_zero(source):
            return _Run(self.output.new_zeros(()), added)

        def modifier(rows: Tensor) -> Tensor:
            return modify.modifier(rows, "weight")  # type: ignore[no-any-return]

        short = self._short(source)
        if short is None:
            maps = blocked_maps(weight.detach(), modifier)
        else:
            maps = lowered(blocked_maps(weight.detach(), lambda rows: modifier(rows).to(short)), short)
        image = maps.up(source.unsqueeze(0)).squeeze(0)
        return _Run(image, added, maps, lambda: modifier(weight.detach()))


@dataclass
class _Run:
    """One modified module at its modified input.

    Attributes:
        image: What it returned, without bias; a scalar where it is the same everywhere.
        bias: Its bias, in a shape that broadcasts.
        maps: The linear map; None where the input is zero or the output is all that is needed.
        modified: Makes the modified weight.
        is_own: Whether nobody else reads the image.
    """

    image: Tensor
    bias: Tensor | None = None
    maps: Maps | None = None
    modified: Callable[[], Tensor] | None = None
    is_own: bool = False

    def output(self, at: Block, shape: torch.Size) -> Tensor:
        """Image and bias at one block."""
        image = self.image.expand(shape)[at]
        if self.bias is None:
            return image
        bias = self.bias.expand(shape)[at]
        return image + bias if self.image.ndim or bool(self.image) else bias

    def memory(self, like: Tensor) -> Tensor:
        """Where a factor of this shape can be written, once the image was read."""
        if not all(self.image.stride()) or self.image.shape != like.shape:
            return torch.empty_like(like)
        return self.image if self.is_own else torch.empty_like(self.image)


def _added(total: Tensor | None, factor: Tensor, values: Tensor, sign: float) -> Tensor:
    if total is not None:
        return total.addcmul_(factor, values, value=sign)
    product = factor * values
    return product if sign == 1 else product.mul_(sign)


def _modified_inputs(hook: BasicHook, inputs: Tensor) -> list[Tensor]:
    """The modified inputs, those that are equal in the same memory: after a ReLU its positive part is the input."""
    known, sources = [inputs], []
    # The box of ZBox may have the shape of an image, which fits no probe, and is no part of the input.
    positive = is_known_linear(hook) and not isinstance(hook, ZBox) and _is_positive(inputs)
    for modifier in hook.input_modifiers:
        part = _part(modifier, inputs) if positive else ""
        if part:
            sources.append(inputs if part == "positive" else inputs.new_zeros(()).expand(inputs.shape))
            continue
        source = modifier(inputs).detach()
        same = next((other for other in known if other.shape == source.shape and torch.equal(other, source)), source)
        known.append(same)
        sources.append(same)
    return sources


def _part(modifier: Callable[[Tensor], Tensor], inputs: Tensor) -> str:
    """Whether a modifier of a built-in rule takes the positive part of its input, or the negative one, or neither."""
    probe = inputs.new_tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    modified = modifier(probe)
    if modified.shape != probe.shape:
        return ""
    return (
        "positive" if modified.equal(probe.clamp(min=0)) else "negative" if modified.equal(probe.clamp(max=0)) else ""
    )


def _is_zero(source: Tensor) -> bool:
    """Whether all entries are zero; most tensors tell by a few of them."""
    few = source[(slice(0, 1),) * source.ndim] if not any(source.stride()) else source.flatten()[:4096]
    return not bool(few.any()) and (few.numel() == source.numel() or not any(source.stride()) or not bool(source.any()))


def _is_positive(source: Tensor) -> bool:
    """Whether no entry is negative; the smallest one is found faster than all are compared."""
    return source.numel() == 0 or bool(source.amin() >= 0)


def _share_memory(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return all(
        one is None if other is None else one is not None and one.data_ptr() == other.data_ptr()
        for one, other in zip(some.values(), others.values(), strict=True)
    )


def _signs(hook: BasicHook, sources: Sequence[Tensor]) -> list[float] | None:
    """ρ of every branch, when the reducer is ``Σ ρ_k in_k g_k`` or (on inputs of ones) ``Σ ρ_k g_k``."""
    count = len(sources)
    shape = (2,) * max(sources[0].ndim, 1)
    # Numbers without a pattern, but not drawn: batched gradients may ask for a kernel, and there nothing can be drawn.
    numbers = torch.arange(1, 2 * count * 2 ** len(shape) + 1, dtype=torch.float64)
    noise = (3 * torch.sin(numbers**2)).to(sources[0]).reshape(2, count, *shape)
    inputs, gradients = list(noise[0]), list(noise[1])
    ones, zeros = torch.ones_like(noise[0, 0]), torch.zeros_like(noise[0, 0])
    try:
        units = [
            hook.reducer([ones] * count, [ones if index == unit else zeros for index in range(count)])
            for unit in range(count)
        ]
        reduced = hook.reducer(inputs, gradients)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None  # a reducer that needs the true shapes; the general form does not care
    signs = [float(unit.flatten()[0]) for unit in units]
    if any(bool((unit != unit.flatten()[0]).any()) for unit in units):
        return None
    by_product = sum(sign * source * part for sign, source, part in zip(signs, inputs, gradients, strict=True))
    by_gradient = sum(sign * part for sign, part in zip(signs, gradients, strict=True))
    if torch.allclose(reduced, by_product):
        return signs
    if torch.allclose(reduced, by_gradient) and all(bool((source == 1).all()) for source in sources):
        return signs
    return None


def _rerun(module: nn.Module, call: Call) -> Callable[[Tensor, Tensor], Tensor]:
    def rerun(source: Tensor, weight: Tensor) -> Tensor:
        own = shell_of(module)  # two threads may ask at once
        own.__dict__["_parameters"].update(weight=weight, bias=None)
        return call(own, source)

    return rerun
