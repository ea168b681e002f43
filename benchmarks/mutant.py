"""One mutant: a single change of a module by an operator of cosmic-ray, applied to the imported package."""

from __future__ import annotations

import ast
import difflib
import gc
import importlib
import random
import sys
import types
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODULES = ("kernels", "events", "measure")
OPERATORS = [
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul",
        "LShift_RShift", "RShift_LShift", "BitOr_BitAnd", "BitAnd_BitOr",
    )),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE",
        "GtE_Gt", "GtE_Lt",
    )),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_Invert",
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer",
    "RemoveDecorator", "ZeroIterationForLoop",
]  # fmt: skip
"""Operators of cosmic-ray. Its other replacements change the same places in ways that are easier to detect."""
LEFT_OUT = {
    "annotations": "types are not evaluated at run time",
    "messages": "the arguments of `raise` are the text or the type of an error, which other tests check",
    "assertions": "they inform the type checker and never fail",
    "decorators": "all except that of a query: without the others a class cannot be created, or nothing changes",
    "aliases": "type aliases",
    "strict=True": "an assertion on lengths",
    "the star of a signature": "marks keyword-only arguments",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    function: str
    operator: str
    line: int
    before: str
    after: str
    lines: range
    code: str

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies a mutant, independent of its line number."""
        return self.module, self.function, self.operator, self.before, self.after

    @property
    def is_formal(self) -> bool:
        """Whether only the form of a call changes: keyword-only arguments, or the check of lengths."""
        return self.before == "*," or self.before.replace("strict=True", "strict=False") == self.after

    @property
    def row(self) -> dict[str, str | int]:
        """The entry in the results."""
        names = ("module", "function", "operator", "line", "before", "after")
        return {name: getattr(self, name) for name in names}


# -- creation -------------------------------------------------------------------------------------------------------


def source_of(module: str) -> Path:
    return ROOT / f"src/nrm_plugin/{module}.py"


class Places:
    """Locations in the source of a module."""

    def __init__(self, code: str) -> None:
        self.text = code.splitlines()
        self.tree = ast.parse(code)
        self.skipped = [self._span(node) for node in self._left_out()]

    def _span(self, node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        return (node.lineno, self._column(node.lineno, node.col_offset)), (
            node.end_lineno,
            self._column(node.end_lineno, node.end_col_offset),
        )

    def _column(self, line: int, offset: int) -> int:
        return len(self.text[line - 1].encode()[:offset].decode())  # ast counts bytes

    def _left_out(self) -> Iterator[ast.AST]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Raise | ast.Assert):
                yield node
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
                yield node.annotation
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                yield node.returns
        for statement in self.tree.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp | ast.Subscript):
                yield statement

    def are_left_out(self, place: tuple[int, int]) -> bool:
        return any(start <= place < end for start, end in self.skipped)

    def function(self, line: int) -> str:
        """Qualified name of the function or class that contains a line."""
        names, nodes = [], self.tree.body
        while True:
            kinds = ast.FunctionDef | ast.ClassDef
            inner = [n for n in nodes if isinstance(n, kinds) and self._first(n) <= line <= (n.end_lineno or 0)]
            if not inner:
                return ".".join(names) or "<module>"
            names.append(inner[0].name)
            nodes = inner[0].body

    @staticmethod
    def _first(node: ast.FunctionDef | ast.ClassDef) -> int:
        return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])

    def statement(self, line: int) -> range:
        """Lines of the innermost statement at a line; of a compound statement only its header."""
        found = range(line, line + 1)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
                body = getattr(node, "body", None)
                end = body[0].lineno if body else (node.end_lineno or line) + 1
                if line < end and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found = range(node.lineno, end)
        return found


class _Plain(ast.NodeTransformer):
    """Normalizes equivalent code, so that no mutant is created twice."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        inverse = {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
        inner = node.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.Compare) and type(inner.ops[0]) in inverse:
            return ast.Compare(inner.left, [inverse[type(inner.ops[0])]()], inner.comparators)
        return node


def mutants_of(module: str, only: Collection[tuple[str, str]] | None = None) -> list[Mutant]:
    """All mutants of a module, each once; optionally only some pairs of function and operator."""
    try:
        from cosmic_ray.ast import ast_nodes, get_ast
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.operators.provider import OperatorProvider
    except ImportError as error:
        raise SystemExit(f"mutants are created by cosmic-ray: pip install 'nrm-plugin[mutation]' ({error})") from error
    code = source_of(module).read_text()
    nodes, places = list(ast_nodes(get_ast(code))), Places(code)
    seen = {ast.dump(_Plain().visit(ast.parse(code)))}
    found = []
    for name in OPERATORS:
        operator = OperatorProvider()[name]()
        for occurrence, (start, _) in enumerate(p for node in nodes for p in operator.mutation_positions(node)):
            if places.are_left_out(start):
                continue
            if name == "RemoveDecorator" and places.text[start[0] - 1].strip() != "@query":
                continue
            if only is not None and (places.function(start[0]), name) not in only:
                continue
            mutated = mutate_code(code, operator, occurrence)
            meaning = ast.dump(_Plain().visit(ast.parse(mutated)))
            if meaning in seen:
                continue
            seen.add(meaning)
            found.append(_mutant(module, name, start[0], code, mutated, places))
    return found


def _mutant(module: str, operator: str, line: int, code: str, mutated: str, places: Places) -> Mutant:
    difference = list(difflib.ndiff(code.splitlines(), mutated.splitlines()))
    before, after = (
        " ".join(text[2:].strip() for text in difference if text.startswith(sign)) for sign in ("- ", "+ ")
    )
    lines = places.statement(line)
    return Mutant(module, places.function(line), operator, line, before, after, lines, mutated)


def sampled(mutants: list[Mutant], size: int | None, seed: int) -> list[Mutant]:
    """A random order, cut to ``size``; every prefix contains the same share of mutants of each module."""
    draw, order = random.Random(seed), []
    for module in MODULES:
        own = [mutant for mutant in mutants if mutant.module == module]
        draw.shuffle(own)
        order += [((number + 0.5) / len(own), mutant) for number, mutant in enumerate(own)]
    ordered = [mutant for _, mutant in sorted(order, key=lambda pair: pair[0])]
    return [mutant for mutant in ordered if not mutant.is_formal][:size]


# -- application ------------------------------------------------------------------------------------------------------


def apply(mutant: Mutant) -> None:
    """Replaces the code of imported functions by that of a mutant. Irreversible: run it in a forked process."""
    module = importlib.import_module(f"nrm_plugin.{mutant.module}")
    source = source_of(mutant.module)
    new = compile(mutant.code, str(source), "exec")
    codes = dict(_paired(compile(source.read_text(), str(source), "exec"), new))
    for function in [item for item in gc.get_objects() if type(item) is types.FunctionType]:
        if function.__code__.co_filename == str(source) and function.__code__ in codes:
            function.__code__ = codes[function.__code__]
    scratch = types.ModuleType(module.__name__)
    scratch.__package__ = module.__package__
    sys.modules[module.__name__] = scratch  # dataclasses look up the module there
    exec(new, vars(scratch))
    sys.modules[module.__name__] = module
    _put_values(module, scratch)


def _paired(old: types.CodeType, new: types.CodeType) -> Iterator[tuple[types.CodeType, types.CodeType]]:
    """Pairs of differing code objects, old and new."""
    if old != new:
        yield old, new
    inner: dict[str, list[list[types.CodeType]]] = defaultdict(lambda: [[], []])
    for side, code in enumerate((old, new)):
        for item in code.co_consts:
            if isinstance(item, types.CodeType):
                inner[item.co_name][side].append(item)
    for before, after in inner.values():
        for pair in zip(before, after, strict=False):
            yield from _paired(*pair)


PLAIN = bool | int | float | str | tuple


def _put_values(old: Any, new: Any) -> None:
    """Replaces constants, class attributes, default arguments and the results of decorators."""
    for name, value in list(vars(new).items()):
        known = vars(old).get(name)
        if isinstance(value, type) and value is not known:
            if value.__module__ == getattr(known, "__module__", None) and isinstance(known, type):
                _put_values(known, value)
        elif isinstance(value, types.FunctionType) and isinstance(known, types.FunctionType):
            if hasattr(known, "__wrapped__") and not hasattr(value, "__wrapped__"):
                setattr(old, name, known.__wrapped__)
            if (known.__defaults__, known.__kwdefaults__) != (value.__defaults__, value.__kwdefaults__):
                known.__defaults__, known.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
        elif isinstance(value, PLAIN) and type(value) is type(known) and value != known and not name.startswith("__"):
            importers = [item for key, item in sys.modules.items() if key.startswith(("nrm_plugin", "tests", "test_"))]
            for owner in [old, *importers] if isinstance(old, types.ModuleType) else [old]:
                if vars(owner).get(name) is known:
                    setattr(owner, name, value)
    if isinstance(old, type):  # methods that dataclasses generate
        methods = (types.FunctionType, types.NoneType)
        for name in {*vars(old), *vars(new)}:
            known, value = vars(old).get(name), vars(new).get(name)
            if isinstance(known, methods) and isinstance(value, methods) and type(known) is not type(value):
                if name in vars(new):
                    setattr(old, name, value)
                else:
                    delattr(old, name)
