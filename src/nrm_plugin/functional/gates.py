"""Gates: tensors that weigh a signal and carry none themselves, such as attention weights and squeeze factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels.layer_step import LayerStep
from ..model.routing import is_route_node, written

MAKERS = frozenset("softmax sigmoid hardsigmoid exp softmin gumbel_softmax".split())
KEEPERS = frozenset("dropout alpha_dropout feature_dropout clone contiguous to float double type_as neg rsub".split())
MAKING_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d)


class Gates:
    """Which tensors of one forward pass are gates.

    A gate is made by softmax, sigmoid, hardsigmoid and exp, and stays one under reshapes, dropout, products of gates,
    ``1 - gate`` and ``gate / anything``. A model may tag its own: ``gates.tag(tensor)``.
    """

    def __init__(self) -> None:
        # By autograd node, not by tensor: a tensor can be written over, and a view of a gate is one too.
        self._nodes: set[Any] = set()

    def tag(self, tensor: Tensor) -> None:
        """Makes a tensor a gate."""
        node, _ = written(tensor.grad_fn, 0)
        if node is not None:
            self._nodes.add(node)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a gate, or a route hands on one and nothing else."""
        node, _ = written(tensor.grad_fn, 0)
        while node is not None and node not in self._nodes:
            step = getattr(node, "step", None)
            if isinstance(step, LayerStep):
                return isinstance(step.layer_call.module, MAKING_MODULES)
            below = [edge for edge in node.next_functions if edge[0] is not None]
            if not is_route_node(node) or len(below) != 1:
                return False
            node, _ = written(*below[0])
        return node is not None

    def follow(self, name: str, inputs: list[Tensor], output: object, is_route: bool, with_constants: bool) -> None:
        """Tags the output of an operation where its inputs say so."""
        if not isinstance(output, Tensor):
            outputs = [item for item in output if isinstance(item, Tensor)] if isinstance(output, (list, tuple)) else []
        else:
            outputs = [output]
        flags = [self.holds(tensor) for tensor in inputs]
        kept = bool(flags) and (
            (is_route and all(flags))
            or (name in KEEPERS and all(flags))
            or (name in ("mul", "matmul") and all(flags))
            or (name in ("add", "sub") and all(flags) and with_constants)
            or (name == "div" and flags[0])
        )
        if name in MAKERS or kept:
            for tensor in outputs:
                self.tag(tensor)
