"""The notebooks run from top to bottom, reproduce the kinds of their stored outputs, and stay small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from notebooks.run import as_markdown, code, execute, notebooks
from tests.demo.toy_packages import toy_packages

KIB = 1024


def kinds(outputs: list[dict[str, object]]) -> list[object]:
    """The types of the outputs of a cell, without the numbers, which depend on the machine."""
    return [(output["output_type"], sorted(output.get("data", ()))) for output in outputs]


@pytest.mark.slow
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_a_notebook_runs_and_has_the_stored_outputs(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toy_packages(tmp_path / "cache", monkeypatch)  # in place of those that a notebook would download
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    cells = code(json.loads(path.read_text()))
    executed = execute(cells, path.name)
    assert [kinds(outputs) for outputs in executed] == [kinds(cell["outputs"]) for cell in cells]
    assert any(executed)
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_a_notebook_has_jupyters_format_and_is_small(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    assert [cell["execution_count"] for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert path.stat().st_size < 256 * KIB


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_the_links_of_a_notebook_and_of_its_page_resolve(path: Path) -> None:
    sources = "".join("".join(cell["source"]) + "\n" for cell in json.loads(path.read_text())["cells"])
    for target in re.findall(r"\]\((?!http)([^)#]+)", sources):
        assert (path.parent / target).exists(), target
    text, images = as_markdown(path)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        linked = path.parent / target
        assert target in images or linked.exists() or linked.with_suffix(".ipynb").exists(), target


def test_a_cell_that_fails_is_named():
    with pytest.raises(ZeroDivisionError) as caught:
        execute([{"source": ["x = 1\n"]}, {"source": ["x / 0\n"]}], "some.ipynb")
    assert "some.ipynb, cell 1" in str(caught.traceback[-1].path)
