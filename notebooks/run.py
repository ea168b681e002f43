"""Runs the notebooks: ``python -m notebooks.run`` executes their cells and stores the outputs.

Neither this nor the tests need Jupyter, because the cells are plain Python. Outputs are printed text, the value of the
last expression and open figures, as in Jupyter, with small figures.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
Cell = dict[str, Any]


def notebooks() -> list[Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(cells: Iterable[Cell], name: str) -> list[list[Cell]]:
    """Outputs of all code cells, executed in order in one namespace."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    space: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    try:
        for number, cell in enumerate(cells):
            outputs.append(_run("".join(cell["source"]), f"{name}, cell {number}", space) + _figures())
    finally:
        pyplot.close("all")
    return outputs


def _run(source: str, name: str, space: dict[str, Any]) -> list[Cell]:
    *body, last = ast.parse(source, name).body or [ast.Pass()]
    is_value = isinstance(last, ast.Expr) and not source.rstrip().endswith(";")
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module([*body] if is_value else [*body, last], []), name, "exec"), space)
        if is_value:
            value = eval(compile(ast.Expression(last.value), name, "eval"), space)  # type: ignore[attr-defined]
    from matplotlib.figure import Figure

    outputs: list[Cell] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if isinstance(value, Figure):
        outputs.append(image(value))
    elif value is not None:
        data = {"text/plain": lines(repr(value))}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def _figures() -> list[Cell]:
    """Open figures as small PNGs; closes them."""
    from matplotlib import pyplot

    outputs = [image(pyplot.figure(number)) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return outputs


def image(figure: Figure) -> Cell:
    """A figure as a small PNG with 256 colours."""
    from PIL import Image

    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(256).save(file, format="png", optimize=True)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "metadata": {}, "data": data}


def lines(text: str) -> list[str]:
    """Lines with line ends, as stored in notebooks."""
    return text.splitlines(keepends=True)


def code(notebook: Cell) -> list[Cell]:
    """Code cells."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def as_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as a page with its outputs, and its figures by file name."""
    notebook = json.loads(path.read_text())
    parts, images = [], dict[str, bytes]()
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(images) + 1}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure drawn by the code above]({name})")
            else:
                shown = "".join(output.get("text") or data["text/plain"]).rstrip()
                parts.append(f"```text\n{shown}\n```")
    where = f"This page is the notebook `notebooks/{path.name}` of the repository with its outputs."
    return "\n\n".join([*parts, where]) + "\n", images


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all)")
    for path in parser.parse_args().paths or notebooks():
        notebook = json.loads(path.read_text())
        cells = code(notebook)
        for number, (cell, outputs) in enumerate(zip(cells, execute(cells, path.name), strict=True), 1):
            cell["outputs"], cell["execution_count"] = outputs, number
            for output in outputs:
                if "execution_count" in output:
                    output["execution_count"] = number
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"{path.name}: {len(cells)} cells, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
