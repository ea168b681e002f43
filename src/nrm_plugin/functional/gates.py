"""Gates: factors of a product that weight a signal and receive no relevance, such as attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..kernels.layer_step import LayerStep
from ..kernels.step import step_of
from ..model.affine_layers import is_torch_class
from ..model.zero_one_routes import is_route_node, written

GATE_FUNCTIONS = frozenset("softmax sigmoid hardsigmoid exp softmin".split())
GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d)
PRESERVING = frozenset(
    "dropout alpha_dropout feature_dropout clone contiguous to float double type_as neg rsub mul matmul".split()
)
"""Functions that return a gate if all their arguments are gates."""


class Gates:
    """Gates of a forward pass.

    Gates are the outputs of softmax, sigmoid, hardsigmoid and exp, as well as reshaped gates, gates after dropout,
    products of gates, ``1 - gate`` and ``gate / anything``.
    """

    def __init__(self) -> None:
        # Gates are stored by autograd node, since a tensor may be overwritten, and a view of a gate is also a gate.
        self._nodes: set[Any] = set()

    def tag(self, tensor: Tensor) -> None:
        """Marks a tensor as a gate."""
        node, _ = written(tensor.grad_fn, 0)
        if node is not None:
            self._nodes.add(node)

    def holds(self, tensor: Tensor) -> bool:
        """Returns True if a tensor is a gate or was routed from one."""
        node, _ = written(tensor.grad_fn, 0)
        while node is not None and node not in self._nodes:
            step = step_of(node)
            if isinstance(step, LayerStep):
                return is_torch_class(step.layer_call.module, *GATE_MODULES)
            below = [edge for edge in node.next_functions if edge[0] is not None]
            if not is_route_node(node) or len(below) != 1:
                return False
            node, _ = written(*below[0])
        return node is not None

    def tag_route(self, inputs: Sequence[Tensor], output: object) -> None:
        """Marks the output of a route as a gate if all of its inputs are gates."""
        if inputs and all(self.holds(tensor) for tensor in inputs):
            self._tag_all(output)

    def tag_result(self, name: str, inputs: Sequence[Tensor], output: object, with_constants: bool) -> None:
        """Marks the output of a function as a gate if the function and its arguments make it one.

        Args:
            name: Name of the function.
            inputs: The arguments that receive relevance.
            output: Return value of the function.
            with_constants: Whether the arguments also include numbers, or tensors without relevance.
        """
        flags = [self.holds(tensor) for tensor in inputs]
        is_shifted = name in ("add", "sub") and with_constants
        if (
            name in GATE_FUNCTIONS
            or ((name in PRESERVING or is_shifted) and bool(flags) and all(flags))
            or (name == "div" and bool(flags) and flags[0])
        ):
            self._tag_all(output)

    def _tag_all(self, output: object) -> None:
        for item in output if isinstance(output, (list, tuple)) else (output,):
            if isinstance(item, Tensor):
                self.tag(item)
