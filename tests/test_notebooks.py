"""The notebooks run from top to bottom, show what is stored in them, and stay small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from notebooks.run import as_markdown, code, execute, notebooks

KIB = 1024


def kinds(outputs: list[dict[str, object]]) -> list[object]:
    """What a cell shows, without the numbers, which differ by machine."""
    return [(output["output_type"], sorted(output.get("data", ()))) for output in outputs]


@pytest.mark.slow
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_a_notebook_runs_and_shows_what_is_stored(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cells = code(json.loads(path.read_text()))
    found = execute(cells, path.name)
    assert [kinds(outputs) for outputs in found] == [kinds(cell["outputs"]) for cell in cells]
    assert any(found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_a_notebook_is_one_of_jupyters_and_small(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    assert [cell["execution_count"] for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert path.stat().st_size < 256 * KIB


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_the_links_of_a_notebook_and_of_its_page_lead_somewhere(path: Path) -> None:
    sources = "".join("".join(cell["source"]) + "\n" for cell in json.loads(path.read_text())["cells"])
    for target in re.findall(r"\]\((?!http)([^)#]+)", sources):
        assert (path.parent / target).exists(), target
    text, pictures = as_markdown(path)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        found = path.parent / target
        assert target in pictures or found.exists() or found.with_suffix(".ipynb").exists(), target


def test_a_cell_that_fails_is_named():
    with pytest.raises(ZeroDivisionError) as caught:
        execute([{"source": ["x = 1\n"]}, {"source": ["x / 0\n"]}], "some.ipynb")
    assert "some.ipynb, cell 1" in str(caught.traceback[-1].path)
