"""Files are data: the package never unpickles or evaluates what it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "src/nrm_plugin").rglob("*.py"))
PICKLES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.hub.load", "yaml.load"}
READS = {"torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle"}
SAFE = {"weights_only": True, "allow_pickle": False}


def called(node: ast.Call) -> str:
    """The called function as written, such as ``torch.load``."""
    return ast.unparse(node.func)


def dangers(tree: ast.AST) -> Iterator[str]:
    """Imports and calls that could execute code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in PICKLES or (name == "pickle" and isinstance(node, ast.ImportFrom)):
                    yield f"line {node.lineno} imports {name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            if node.attr != "UnpicklingError":  # torch raises it if a file contains more than weights
                yield f"line {node.lineno} uses pickle.{node.attr}"
        elif isinstance(node, ast.Call):
            name = called(node)
            if name in CALLS:
                yield f"line {node.lineno} calls {name}"
            if any(keyword.arg == "shell" and ast.unparse(keyword.value) != "False" for keyword in node.keywords):
                yield f"line {node.lineno} starts a shell"
            if name in READS:
                value = {keyword.arg: keyword.value for keyword in node.keywords}.get(READS[name])
                if not (isinstance(value, ast.Constant) and value.value is SAFE[READS[name]]):
                    yield f"line {node.lineno} calls {name} without {READS[name]}={SAFE[READS[name]]}"


OWN = {"program.py": ("calls exec", "calls compile")}
"""Modules that execute code which they have written themselves in this process."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_module_executes_code_from_files(path):
    found = [danger for danger in dangers(ast.parse(path.read_text())) if not danger.endswith(OWN.get(path.name, ()))]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "pickle.load(file)", "from pickle import loads", "from joblib import load", "torch.load(path)", "eval(text)",
        "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)", "def f():\n    import dill",
    ],
)  # fmt: skip
def test_dangerous_code_is_detected(text):
    assert list(dangers(ast.parse(text)))


def test_safe_code_is_not_reported():
    text = "import pickle; torch.load(path, weights_only=True); ast.literal_eval(x); model.eval(); json.load(f)"
    assert not list(dangers(ast.parse(text)))
