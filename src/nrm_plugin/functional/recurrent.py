"""Decompositions of recurrent layers into loops over operations that have kernels.

torch runs an entire LSTM, GRU or RNN as one fused function. While a measure is recorded, this function is replaced by a
loop over time. The linear maps in the loop use the rule that the composite assigns to the layer or, if there is none,
the rule for linear layers; sigmoids are gates. Inputs and states have shape ``(N, features)`` at each time step.
Hidden and cell states are taps (hook points).

Source: docs/recurrent-and-graphs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import PackedSequence

from ..kernels.forward_state import RUNNING, listener

Weights = Sequence[Tensor]
State = tuple[Tensor | None, ...]
"""Hidden state and, in an LSTM, cell state. None stands for an initial state of zeros."""


@dataclass
class Context:
    """What a call of a recurrent function needs besides its arguments.

    Attributes:
        path: Path of the module that called the function.
        packs: Batch sizes and the rank of each sample by length, for each packed sequence passed to a module.
    """

    path: str
    packs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def tap(self, name: str, time: int, tensor: Tensor) -> None:
        """Records a state at one time step as a tap."""
        listening = listener()
        if listening is not None and tensor.requires_grad:
            listening.on_function(f"{self.path}.{name}" if self.path else name, time, tensor, -1)

    def order(self, batch_sizes: Tensor) -> Tensor:
        """Returns the rank of each sample of a packed sequence, ordered by length."""
        known = next((order for sizes, order in self.packs if sizes is batch_sizes), None)
        return torch.arange(int(batch_sizes[0])) if known is None else known


def packs_in(args: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Returns the batch sizes and sample ranks of each packed sequence among the arguments of a module."""
    packed = [value for value in args if isinstance(value, PackedSequence)]
    return [(pack.batch_sizes, pack.unsorted_indices) for pack in packed if pack.unsorted_indices is not None]


Recurrence = Callable[..., Any]
RECURRENCES: dict[str, Recurrence] = {}
"""Loops that replace recurrent functions, keyed by function name. Their first argument is the :class:`Context`."""


def recurrence_of(name: str) -> Callable[[Recurrence], Recurrence]:
    """Decorator that registers a loop as the replacement of the recurrent function with the given name."""

    def decorate(body: Recurrence) -> Recurrence:
        RECURRENCES[name] = body
        return body

    return decorate


# -- one step of time -------------------------------------------------------------------------------------------------


def _from_hidden(h: Tensor | None, is_given: bool, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """Returns the contribution of the hidden state and the bias if it must be a separate summand.

    The bias is separate if the user passes an initial state. It then absorbs no relevance in samples whose state is
    zero.
    """
    w_hh, b_hh = weights[1], weights[3] if len(weights) > 3 else None
    if h is None:
        return None, b_hh
    return (F.linear(h, w_hh), b_hh) if is_given else (F.linear(h, w_hh, b_hh), None)


def _from_input(x: Tensor, weights: Weights) -> Tensor:
    return F.linear(x, weights[0], weights[2] if len(weights) > 3 else None)


def _sum(first: Tensor, *rest: Tensor | None) -> Tensor:
    for part in rest:
        first = first if part is None else first + part
    return first


def lstm_step(x: Tensor, state: State, is_given: bool, weights: Weights) -> State:
    r"""Computes one time step of an LSTM, in which the three sigmoids are gates.

    .. math:: c' = \sigma(f) \odot c + \sigma(i) \odot \tanh g, \qquad h' = W_{hr}\,(\sigma(o) \odot \tanh c')

    with :math:`(i, f, g, o) = W_{ih} x + b_{ih} + W_{hh} h + b_{hh}`.
    """
    h, c = state
    projection = weights[-1] if len(weights) in (3, 5) else None
    plain = weights[:-1] if projection is not None else weights
    i, f, g, o = _sum(_from_input(x, plain), *_from_hidden(h, is_given, plain)).chunk(4, -1)
    signal = i.sigmoid() * g.tanh()
    c = signal if c is None else f.sigmoid() * c + signal
    h = o.sigmoid() * c.tanh()
    return (h if projection is None else F.linear(h, projection)), c


def gru_step(x: Tensor, state: State, is_given: bool, weights: Weights) -> State:
    r"""Computes one time step of a GRU, in which :math:`\sigma(r)` and :math:`\sigma(z)` are gates.

    .. math:: h' = (1 - \sigma(z)) \odot \tanh(n_x + \sigma(r) \odot n_h) + \sigma(z) \odot h

    A gate times a constant is treated as a constant, so :math:`\sigma(r) \odot b_{hn}` is a bias if there is no hidden
    state. In a measure with a reference, however, it differs between input and reference.
    """
    (h,) = state
    r_x, z_x, n_x = _from_input(x, weights).chunk(3, -1)
    hidden, bias = _from_hidden(h, is_given, weights)
    r_h, z_h, n_h = (None, None, None) if hidden is None else hidden.chunk(3, -1)
    r_b, z_b, n_b = (None, None, None) if bias is None else bias.chunk(3, -1)
    r, z = _sum(r_x, r_h, r_b).sigmoid(), _sum(z_x, z_h, z_b).sigmoid()
    n = n_x if n_h is None else n_x + r * n_h
    gate = r.detach() if RUNNING.reference is None else r
    n = (n if n_b is None else n + gate * n_b).tanh()
    signal = (1 - z) * n
    return (signal if h is None else signal + z * h,)


def rnn_step(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, State, bool, Weights], State]:
    r"""Returns the time step of an Elman network.

    .. math:: h' = \phi(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})
    """

    def step(x: Tensor, state: State, is_given: bool, weights: Weights) -> State:
        return (activation(_sum(_from_input(x, weights), *_from_hidden(state[0], is_given, weights))),)

    return step


Cell = Callable[[Tensor, State, bool, Weights], State]
CELLS: dict[str, Cell] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_step(torch.tanh),
    "rnn_relu": rnn_step(torch.relu),
}


def _started(x: Tensor, state: Sequence[Tensor]) -> tuple[State, bool]:
    """Returns the initial states, with None for zeros, and whether the user passed a nonzero constant state."""
    states: list[Tensor | None] = []
    for value in state:
        if value.requires_grad:
            states.append(value)
        elif not bool(value.any()) or not x.requires_grad:
            states.append(None if not bool(value.any()) else value)
        else:
            never = torch.zeros((), dtype=torch.bool, device=value.device)
            states.append(torch.where(never, x[:, :1], value))
    return tuple(states), any(
        value is not None and not old.requires_grad for value, old in zip(states, state, strict=True)
    )


def _filled(state: State, initial: Sequence[Tensor]) -> list[Tensor]:
    return [old if value is None else value for value, old in zip(state, initial, strict=True)]


# -- cells ------------------------------------------------------------------------------------------------------------


def _cell(kind: str) -> Recurrence:
    def run(
        context: Context, x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
    ) -> Any:
        initial = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        state, is_given = _started(x, initial)
        weights = (w_ih, w_hh) if b_ih is None else (w_ih, w_hh, b_ih, b_hh)
        states = CELLS[kind](x, state, is_given, weights)
        return states if kind == "lstm" else states[0]

    return run


for _kind in CELLS:
    RECURRENCES[f"{_kind}_cell"] = _cell(_kind)


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layers:
    """Weights and options of a recurrent layer, as torch passes them to the fused function."""

    kind: str
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def weights(self, number: int) -> Weights:
        """Returns the weights of the layer and direction with index ``number``."""
        size = len(self.params) // (self.num_layers * self.directions)
        return self.params[number * size : (number + 1) * size]

    def run(
        self, context: Context, xs: list[Tensor], initial: Sequence[Tensor], lengths: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs all layers. Returns the output at each time step and the final states in the shape of ``initial``.

        Args:
            context: The context of the call.
            xs: Input at each time step, of shape ``(N, features)``.
            initial: Initial states, of shape ``(layers · directions, N, features)`` each.
            lengths: Length of each sample, or None if all samples have the full length.
        """
        finals: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                number = layer * self.directions + direction
                name = f"l{layer}{'_reverse' if direction else ''}"
                own = [state[number] for state in initial]
                hidden, final = self._direction(context, name, xs, own, self.weights(number), lengths, direction == 1)
                outputs.append(hidden)
                finals.append(final)
            xs = outputs[0] if len(outputs) == 1 else [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
            if self.dropout > 0 and self.training and layer + 1 < self.num_layers:
                xs = [F.dropout(x, self.dropout, True) for x in xs]
        return xs, [torch.stack(states) for states in zip(*finals, strict=True)]

    def _direction(
        self,
        context: Context,
        name: str,
        xs: list[Tensor],
        initial: list[Tensor],
        weights: Weights,
        lengths: Tensor | None,
        is_reverse: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        xs = _reversed(xs, lengths) if is_reverse else xs
        state, is_given = _started(xs[0], initial)
        outputs = []
        for number, x in enumerate(xs):
            before = state
            state = CELLS[self.kind](x, state, is_given and number == 0, weights)
            if lengths is not None and number > 0:
                state = _of_running(number < lengths, state, before)
            time = len(xs) - 1 - number if is_reverse else number
            for label, value in zip(("hidden", "cell"), state, strict=False):
                if value is not None:
                    context.tap(f"{label}_{name}", time, value)
            assert state[0] is not None
            outputs.append(state[0])
        return (_reversed(outputs, lengths) if is_reverse else outputs), _filled(state, initial)


def _of_running(is_running: Tensor, state: State, before: State) -> State:
    """Returns the new state of sequences that are still active and the previous state of finished ones."""
    mask = is_running.unsqueeze(1)
    pairs = zip(state, before, strict=True)
    return tuple(new if new is None or old is None else torch.where(mask, new, old) for new, old in pairs)


def _reversed(xs: list[Tensor], lengths: Tensor | None) -> list[Tensor]:
    """Reverses each sample in time, up to its length."""
    if lengths is None or bool((lengths == len(xs)).all()):
        return xs[::-1]
    stacked, samples = torch.stack(xs), torch.arange(len(lengths), device=lengths.device)
    return [stacked[(lengths - 1 - time).clamp(min=0), samples] for time in range(len(xs))]


def _layer(kind: str) -> Recurrence:
    def run(context: Context, *args: Any) -> Any:
        is_packed = isinstance(args[3], (tuple, list))
        if is_packed:
            data, batch_sizes, hx, params, *rest = args
        else:
            data, hx, params, *rest, batch_first = args
        layers = _Layers(kind, params, *rest)
        initial = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        if not is_packed:
            outputs, states = layers.run(context, list(data.unbind(1 if batch_first else 0)), initial, None)
            return torch.stack(outputs, 1 if batch_first else 0), *states
        packing = _Packing(batch_sizes, context.order(batch_sizes).to(data.device))
        initial = [state.index_select(1, packing.order) for state in initial]
        outputs, states = layers.run(context, packing.rows(data), initial, packing.lengths)
        return packing.packed(outputs), *(state.index_select(1, packing.inverse) for state in states)

    return run


for _kind in CELLS:
    RECURRENCES[_kind] = _layer(_kind)


# -- packed sequences -------------------------------------------------------------------------------------------------


class _Packing:
    """Positions of the samples in a packed sequence.

    Rows are ordered by time and, within a time step, by sample, longest first. The loop runs on all samples at each
    time step, in the order of the batch. Relevance can then be absorbed separately for each sample.

    Args:
        batch_sizes: Number of sequences still active at each time step.
        order: Rank of each sample by length.
    """

    def __init__(self, batch_sizes: Tensor, order: Tensor) -> None:
        sizes = batch_sizes.to(order.device)
        self.order, self.inverse = order, order.argsort()
        self.offsets = sizes.cumsum(0) - sizes
        self.lengths = (sizes.unsqueeze(0) > order.unsqueeze(1)).sum(1)

    def rows(self, data: Tensor) -> list[Tensor]:
        """Unpacks packed rows to shape ``(N, …)`` for each time step. Finished sequences repeat their last row."""
        times = [torch.minimum(self.lengths - 1, torch.full_like(self.lengths, t)) for t in range(len(self.offsets))]
        return [data.index_select(0, self.offsets[time] + self.order) for time in times]

    def packed(self, rows: list[Tensor]) -> Tensor:
        """Inverts :meth:`rows`."""
        parts = [row.index_select(0, self._running(time)) for time, row in enumerate(rows)]
        return torch.cat(parts)

    def _running(self, time: int) -> Tensor:
        """Returns the indices of the sequences still active at a time step, longest first."""
        return self.inverse[: int((self.lengths > time).sum())]


@recurrence_of("_pack_padded_sequence")
def _pack(context: Context, padded: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Packs a padded batch of shape ``(T, N, …)`` with samples sorted by length."""
    by_time = padded.transpose(0, 1) if batch_first else padded
    ends = lengths.tolist()
    sizes = [sum(end > time for end in ends) for time in range(max(ends))]
    data = torch.cat([by_time[time, :size] for time, size in enumerate(sizes)])
    return data, torch.tensor(sizes)


@recurrence_of("_pad_packed_sequence")
def _pad(
    context: Context, data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, total: int
) -> tuple[Tensor, Tensor]:
    """Unpacks a packed sequence to a padded batch. The padding is a constant that belongs to its sample."""
    packing = _Packing(batch_sizes, context.order(batch_sizes).to(data.device))
    rows = packing.rows(data)
    rows += [rows[-1]] * (total - len(rows))
    padded = torch.stack(rows, 1)  # (N, T, …)
    is_running = torch.arange(len(rows), device=data.device).unsqueeze(0) < packing.lengths.unsqueeze(1)
    if not bool(is_running.all()):
        filler = padded.new_full((), value)
        padded = torch.where(is_running.reshape(*is_running.shape, *(1,) * (padded.ndim - 2)), padded, filler)
    sorted_ = padded.index_select(0, packing.inverse)
    return (sorted_ if batch_first else sorted_.transpose(0, 1)), packing.lengths[packing.inverse].cpu()


__all__ = ["RECURRENCES", "Context", "packs_in"]
