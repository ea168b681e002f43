"""The commands that read a sweep, `references` and `flow --from`: output, files, errors.

Covers: nrm_plugin.commands.reference_files, nrm_plugin.commands.damaged_sweeps, nrm_plugin.commands.sweep_flow.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from nrm_plugin.commands.cli import main
from nrm_plugin.dataset import Sweep
from nrm_plugin.dataset.examples import references
from nrm_plugin.dataset.glocal import difference, flow_of_sweep
from nrm_plugin.demo import load_digits
from nrm_plugin.measure.flow_graph import FlowGraph

MODEL = ["--model", "nrm_plugin.demo.model:load_model", "--size", "16", "--mean", "0", "--std", "1"]
LAYERS = ["output", "features.12", "features.7"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder with images of digits, and their sweep by the command."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits()
    for number, (image, label) in enumerate(zip(images[:24], labels[:24], strict=True)):
        path = folder / "digits" / str(int(label)) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().byte().numpy()).convert("RGB").save(path)
    command = ["sweep", str(folder / "digits"), *MODEL, "--layers", *LAYERS, "--joint", "--activations", "--quiet"]
    assert main([*command, "--target", "label", "--out", str(folder / "swept")]) == 0
    (folder / "names.txt").write_text("zero\none\n")
    return folder


@pytest.fixture(autouse=True)
def here(swept, monkeypatch, capsys):
    monkeypatch.chdir(swept)
    capsys.readouterr()


def fails(capsys, *argv, code=2):
    """The line on stderr of a command that exits with a status and prints nothing else."""
    try:
        status: object = main(argv)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (code, "")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.medium
def test_references_are_printed_and_written(capsys, tmp_path):
    command = ["references", "swept", "--query", "features.12", "--rows", "3", "--k", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    output = capsys.readouterr()
    assert output.err == "nrm-plugin: note: no figure: it requires --model and --data\n"
    printed = output.out.splitlines()
    expected = references("swept", "features.12", k=4)
    best = expected.values.mean(1).argsort(descending=True, stable=True)[:3].tolist()
    written = json.loads((tmp_path / "features.12-references.json").read_text())
    assert [entry["group"] for entry in written["references"]] == best
    files = sorted(path.relative_to("digits").as_posix() for path in Path("digits").rglob("*.png"))
    for line, entry in zip(printed[1:4], written["references"], strict=True):
        assert entry["samples"] == expected.of(entry["group"])
        assert entry["values"] == expected.values[entry["group"]].tolist()
        assert entry["files"] == [files[sample] for sample in entry["samples"]]
        assert re.findall(r"(\S+\.png) \(", line) == entry["files"]
    assert main(command) == 0  # the same query again
    assert main([*command, "--target", "3", "--by", "activation", "--groups", "7"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.12-2-references.json",
        "features.12-references.json",
    ]
    written = json.loads((tmp_path / "features.12-2-references.json").read_text())
    (entry,) = written["references"]
    assert set(entry["targets"]) == {3}
    assert entry["samples"] == references("swept", "features.12", 7, 4, "activation", 3).of(7)


@pytest.mark.slow
def test_with_the_model_they_are_plotted(capsys, tmp_path):
    command = ["references", "swept", "--query", "features.7", *MODEL, "--data", "digits", "--rows", "2", "--k", "3"]
    assert main([*command, "--style", "both", "--dark", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "features.7-references.png") as figure:
        assert min(figure.size) > 300
    line = fails(capsys_cleared(capsys), *command, "--residual", "sink", "--out", str(tmp_path))
    assert "Normalized(NRMDefault), residual redistribute, gain limit 2" in line
    Path("other").mkdir()
    Image.new("RGB", (16, 16)).save("other/a.png")
    other = [*command[:-6], "--data", "other", "--out", str(tmp_path)]
    assert "not those of the sweep" in fails(capsys, *other)
    own = tmp_path / "nets.py"
    own.write_text("from nrm_plugin.demo.model import DigitsVGG\ndef make():\n    return DigitsVGG().eval()\n")
    other = ["references", "swept", "--query", "features.7", "--model", f"{own}:make", *MODEL[2:], "--data", "digits"]
    assert "is not the model of the sweep" in fails(capsys, *other, "--out", str(tmp_path))


def capsys_cleared(capsys):
    capsys.readouterr()
    return capsys


@pytest.mark.slow
def test_the_mean_flow_is_plotted(capsys, tmp_path):
    command = ["flow", "--from", "swept", "--out", str(tmp_path), "--top", "4"]
    assert main([*command, "--layers", *LAYERS[::-1], "--target", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("swept: mean flow of class 3\n")
    assert "output: 100.00% in 1 of 10 groups" in printed
    graph = FlowGraph.from_json(tmp_path / "swept-flow.json")
    assert graph == flow_of_sweep("swept", LAYERS, 3, top=4)
    for layer in graph.layers:
        assert sum(layer.masses) + layer.rest + layer.sink + layer.bypass == pytest.approx(1, abs=1e-5)
    assert " · NRMDefault · no reference</p>" in (tmp_path / "swept-flow.html").read_text()
    Path("digits.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    named = ["--classes", "digits.txt", "--target", "digit 3", "--minus", "8"]
    assert main([*command, "--layers", *LAYERS, *named]) == 0
    assert "class digit 3 minus class digit 8" in capsys.readouterr().out
    graph = FlowGraph.from_json(tmp_path / "swept-2-flow.json")
    three, eight = (flow_of_sweep("swept", LAYERS, target, top=None) for target in (3, 8))
    expected = difference(three, eight).smaller(top=4)
    assert [layer.masses for layer in graph.layers] == [layer.masses for layer in expected.layers]
    assert graph.layers[0].labels == ("digit 3", "digit 8")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".html"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["references", "swept", "--query", "nope"], "no query 'nope'"),
        (["references", "gone", "--query", "features.7"], "no sweep in gone"),
        (["references", "swept", "--query", "features.7", "--groups", "99"], "no group 99"),
        (["references", "swept", "--query", "features.7", "--groups", "x"], "not a channel from 0"),
        (["references", "swept", "--query", "features.7", "--k", "0"], "from 1 to 16"),
        (["references", "swept", "--query", "features.7", "--target", "three"], "without --model, give the index"),
        (["references", "swept", "--query", "features.7", "--target", "77"], "no values of samples with target 77"),
        (["references", "swept", "--query", "features.7", "--data", "digits"], "requires both --model and --data"),
        (["references", "swept"], "--query"),
        (
            ["references", "swept", "--query", "sink(features.7)", *MODEL, "--data", "digits"],
            "not a query of the channels",
        ),
        (["references", "swept", "--query", "features.7", "--target", "9" * 20], "is out of range"),
        (["flow", "--from", "swept", "--layers", "output", "features.12", "--classes", "names.txt"], "has 10 outputs"),
        (["flow", "--layers", "output"], "required: IMAGE, --model"),
        (["flow", "--from", "swept", "a.png", "--layers", "output"], "takes no IMAGE"),
        (
            ["flow", "--from", "swept", "--layers", "output", "features.12", "--minus", "3"],
            "the other one with --target",
        ),
        (["flow", "--from", "swept", "--layers", "output", "features.7"], "no Joint('output', 'features.7')"),
        (["flow", "--from", "swept", "--layers", "output", "input"], "nrm-plugin sweep --joint --layers output input"),
    ],
)
def test_options_that_do_not_fit_take_one_line(capsys, argv, words):
    assert words in fails(capsys, *argv)


def test_a_damaged_file_has_another_exit_status(capsys, swept, tmp_path, monkeypatch):
    shard = next(Path("swept/rows").glob("*.parquet"))
    content = shard.read_bytes()
    index = {path: path.read_bytes() for path in Path("swept/by-query").glob("*")}
    try:
        shard.write_bytes(content[: len(content) // 2])
        for path in index:
            path.unlink()
        for argv in (["references", "swept", "--query", "features.7"],
                     ["flow", "--from", "swept", "--layers", *LAYERS]):  # fmt: skip
            assert "is damaged" in fails(capsys, *argv, "--out", str(tmp_path), code=1)
    finally:
        shard.write_bytes(content)
        for path, rows in index.items():
            path.write_bytes(rows)
    assert Sweep.open("swept").is_complete
    assert references("swept", "features.7").values.shape == (32, 9)
