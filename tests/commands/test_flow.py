"""The command `flow` for images.

Covers: nrm_plugin.commands.image_flow, nrm_plugin.commands.flow_groups, nrm_plugin.commands.photos.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image
from zennit.composites import EpsilonPlus

from nrm_plugin import FlowGraph, RelevanceMeasure, patches
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.model_loading import load
from nrm_plugin.dataset.images import load_image
from nrm_plugin.plots.ribbons import percent

slowly = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])

NETS = """
import torch
from torch import nn


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((torch.relu(self.a(x)) + torch.relu(self.b(x))).mean((2, 3)))
"""
OWN = ("--model", "flow_nets:Branches", "--size", "16", "--top", "3")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an image and a model; the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow_nets.py").write_text(NETS)
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\nfish\n")
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    yield tmp_path
    sys.modules.pop("flow_nets", None)


def run(*argv: str) -> int:
    return main(["flow", *argv])


@pytest.mark.slow
def test_the_files_have_the_values_of_the_measure(here, capsys):
    layers = ["--layers", "output", "a", "stem", "input"]
    options = ["noise.png", *OWN, *layers, "--classes", "names.txt", "--patches", "2", "--composite", "epsilon_plus"]
    assert run(*options) == 0
    printed = capsys.readouterr().out
    written = sorted(path.name for path in Path("nrm-flow").iterdir())
    assert written == ["noise-flow.html", "noise-flow.json", "noise-flow.png", "noise-layers.png"]
    assert all(f"-> nrm-flow/{name}" in printed for name in written)
    graph = FlowGraph.from_json(Path("nrm-flow/noise-flow.json"))
    assert [layer.name for layer in graph.layers] == ["output", "a", "stem", "input"]
    assert graph.layers[0].labels[0] in ("cat", "dog", "bird", "fish")
    assert graph.layers[3].labels[0] in ("A1", "B1", "A2", "B2")
    loaded = load("flow_nets:Branches", size=16)
    inputs = loaded.preprocessing(load_image(Path("noise.png")).image)
    target = int(loaded.model(inputs).argmax())
    mu = RelevanceMeasure(loaded.model, inputs, target, against="rest", composite=EpsilonPlus())
    expected = mu.flow(["output", "a", "stem", "input"], over={"input": patches((16, 16), 2)}, top=3)
    assert [layer.groups for layer in graph.layers] == [layer.groups for layer in expected.layers]
    for one, other in zip(graph.joints, expected.joints, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert f"a: {100 * sum(expected.layers[1].masses):.2f}% in 3 of 6 groups" in " ".join(printed.split())
    assert f"{100 * expected.layers[1].bypass:.2f}% around it" in printed
    stored = json.loads(Path("nrm-flow/noise-flow.json").read_text())
    assert (stored["settings"]["target"], stored["settings"]["composite"]) == (target, "epsilon_plus")
    leaky = RelevanceMeasure(loaded.model, inputs, target, against="rest", composite=EpsilonPlus(), residual="sink")
    plain = {row["layer"]: row["plain"] for row in stored["profile"]}
    assert plain == {name: pytest.approx(float(leaky.marginal(name).sum()), abs=1e-6) for name in plain}
    # The same query replaces its files; another one has its own.
    assert run(*options) == 0
    assert len(list(Path("nrm-flow").iterdir())) == len(written)
    assert run(*options, "--dark", "--target", "fish") == 0
    assert {"noise-2-flow.png", "noise-2-flow.json"} <= {path.name for path in Path("nrm-flow").iterdir()}


@pytest.mark.medium
def test_the_opposite_comparison_has_the_opposite_colours(here, capsys, monkeypatch):
    """Nodes, ribbons and heat maps of the nodes."""
    drawn = []
    monkeypatch.setattr(
        "nrm_plugin.commands.image_flow.flow_figure",
        lambda graph, heading, dark, maps, **_: drawn.append((heading, maps)),
    )
    monkeypatch.setattr("nrm_plugin.commands.image_flow.save_figure", lambda *_: None)
    graphs = []
    for target, other in (("cat", "fish"), ("fish", "cat")):
        options = ["--classes", "names.txt", "--target", target, "--against", other, "--out", target]
        assert run("noise.png", *OWN, "--layers", "output", "a", "input", *options) == 0
        graphs.append(FlowGraph.from_json(Path(target, "noise-flow.json")))
    assert [graph.layers[0].labels for graph in graphs] == [("cat",), ("fish",)]
    assert sorted(graph.layers[0].masses[0] for graph in graphs) == [-1, 1]
    for one, other in zip(*(graph.joints for graph in graphs), strict=True):
        np.testing.assert_allclose(one, -other, atol=1e-6)
    assert [heading.partition("for ")[2] for heading, _ in drawn] == [
        "“cat” rather than “fish”",
        "“fish” rather than “cat”",
    ]
    first, second = (maps for _, maps in drawn)
    for key, values in first.items():
        np.testing.assert_allclose(values, -second[key], atol=1e-6)
    assert "the output of 'head' is fused" not in capsys.readouterr().err
    assert run("noise.png", *OWN, "--layers", "head", "a") == 2
    assert "the output of 'head' is fused" in capsys.readouterr().err


@pytest.mark.medium
def test_the_class_alone_has_a_node_for_each_class(here):
    assert run("noise.png", *OWN, "--layers", "output", "a", "--against", "none") == 0
    graph = FlowGraph.from_json(Path("nrm-flow/noise-flow.json"))
    assert len(graph.layers[0].groups) + graph.layers[0].others == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "input", "conv9"], "has no layer 'conv9'"),
        (["--layers", "a", "b"], "--layers a b: "),
        (["--layers", "input", "output", "--top", "41"], "'41' is not a number from 1 to 40"),
        (["--layers", "input", "output", "--coverage", "90"], "'90' is not a fraction above 0"),
        (["--layers", "input", "output", "--width", "1"], "'1' is not a width from 2 to 40 inches"),
        (["--layers", "input", "output", "--groups", "1"], "'1' is not a number from 2 to 40"),
        (
            ["--layers", "input", "output", "--reference", "dark"],
            "--reference dark is neither blur, mean, black, white",
        ),
        (
            ["--layers", "input", "output", "--reference", "blur", "--residual", "sink"],
            "slopes to a reference absorb",
        ),
        (["--layers", "input", "output", "--target", "1", "--minus", "1"], "--minus 1: this is the explained class"),
        (["--layers", "input", "output", "--patches", "17"], "--patches 17 exceeds the 16×16 pixels"),
        ([], "--layers"),
    ],
)
def test_bad_options_are_reported_in_one_line(here, capsys, options, words):
    try:
        code = run("noise.png", *OWN, *options)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err.splitlines()
    assert (code, len(err)) == (2, 1)
    assert words in err[0]


@pytest.mark.medium
def test_a_bad_image_does_not_stop_the_others(here, capsys):
    Path("broken.png").write_bytes(b"not an image")
    assert run("broken.png", "noise.png", *OWN, "--layers", "input", "output") == 1
    printed = capsys.readouterr()
    assert "broken.png is not an image" in printed.err
    assert Path("nrm-flow/noise-flow.png").exists()


@pytest.mark.medium
def test_captions_say_what_the_model_predicts_and_what_the_whole_is(here):
    layers = ("--layers", "a", "input", "--classes", "names.txt")
    assert run("noise.png", *OWN, *layers) == 0
    said = json.loads(Path("nrm-flow/noise-flow.json").read_text())["caption"]
    assert said.startswith("The model predicts this class, with a softmax of 30%; the next is “bird” with 27%. ")
    assert "100% is a difference of 0.225 between its score and the softmax-weighted mean of the other scores." in said
    assert run("noise.png", *OWN, *layers, "--against", "dog") == 0
    said = json.loads(Path("nrm-flow/noise-2-flow.json").read_text())["caption"]
    assert re.search(r" 100% is a difference of 0\.\d+ between its score and that of “dog”\. ", said)
    assert run("noise.png", *OWN, *layers, "--target", "dog", "--against", "none") == 0
    said = json.loads(Path("nrm-flow/noise-3-flow.json").read_text())["caption"]
    start = "The model does not predict this class: its softmax of 25% has rank 3; the first is “cat” with 30%. "
    assert re.match(f"{start}100% is its score of 0\\.\\d+\\. Of “dog”", said)


@pytest.mark.medium
def test_flows_against_a_class_are_titled_by_the_evidence_against_it(here, capsys):
    layers = ("--layers", "input", "a", "output", "--classes", "names.txt", "--groups", "3")
    assert run("noise.png", *OWN, *layers, "--target", "fish") == 0
    said = capsys.readouterr().out
    assert "  Evidence against “fish” prevails: it is divided among the parts like the area; " in said
    stored = json.loads(Path("nrm-flow/noise-flow.json").read_text())
    assert sum(node["mass"] for node in stored["layers"][0]["nodes"]) == pytest.approx(-1, abs=1e-4)
    said = float(stored["caption"].split("−100% is a difference of −")[1].split(" ")[0])
    loaded = load("flow_nets:Branches", size=16)
    outputs = loaded.model(loaded.preprocessing(load_image(Path("noise.png")).image))[0].detach().double()
    shares = outputs[:3].softmax(0)
    assert said == pytest.approx(float((shares * outputs[:3]).sum() - outputs[3]), rel=1e-2)


@pytest.mark.medium
def test_a_negative_score_is_said_to_be_lowered_by_positive_relevance(here):
    Path("flow_nets.py").write_text(NETS.replace("mean((2, 3)))", "mean((2, 3))) - 5"))
    assert run("noise.png", *OWN, "--layers", "input", "a", "--classes", "names.txt", "--against", "none") == 0
    stored = json.loads(Path("nrm-flow/noise-flow.json").read_text())
    assert re.search(r" 100% is its score of −4\.\d+, which red lowers and blue raises\. ", stored["caption"])
    assert "of the negative score of “cat”" in stored["finding"]
    assert "red is what lowers the score" in Path("nrm-flow/noise-flow.html").read_text()


@pytest.mark.medium
def test_walks_to_a_single_output_without_contrast_are_listed(here):
    layers = ("--layers", "input", "a", "output", "--groups", "2", "--against", "none")
    assert run("noise.png", *OWN, *layers) == 0
    assert "data-walk" in Path("nrm-flow/noise-flow.html").read_text().split("<svg id")[0]


@pytest.mark.medium
def test_an_infinite_gain_limit_is_stored(here):
    assert run("noise.png", *OWN, "--layers", "a", "input", "--gain-limit", "inf") == 0
    assert json.loads(Path("nrm-flow/noise-flow.json").read_text())["settings"]["gain_limit"] == "inf"


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_figures_for_papers(here, kind):
    assert run("noise.png", *OWN, "--layers", "a", "input", "--width", "3.3", "--format", kind) == 0
    start = Path(f"nrm-flow/noise-flow.{kind}").read_bytes()[:400]
    assert (b"237.6pt" in start) if kind == "svg" else start.startswith(b"%PDF")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "made"),
    [
        (["--composite", "nrm_absolute"], "flow_nets:Branches · NRMAbsolute · no reference"),
        (["--composite", "epsilon_plus"], "flow_nets:Branches · EpsilonPlus · no reference"),
        (["--reference", "black"], "flow_nets:Branches · secant slopes · compared with a black image"),
        (["--target", "1", "--minus", "2"], "flow_nets:Branches · NRMDefault · no reference"),
    ],
)
def test_figures_and_pages_say_how_they_were_made(here, options, made):
    assert run("noise.png", *OWN, "--layers", "a", "input", "--format", "svg", *options) == 0
    (page,), (figure,) = Path("nrm-flow").glob("*.html"), Path("nrm-flow").glob("noise-[fd]*.svg")
    text = page.read_text()
    assert f'<p class="heading">{made}</p>' in text
    assert f'aria-label="flow: {made}"' in text
    assert made in figure.read_text()


@pytest.mark.medium
def test_margins_are_no_area_and_their_relevance_is_said(here):
    Image.open("noise.png").resize((60, 20)).save("wide.png")
    options = ["--layers", "a", "input", "--fit", "pad", "--composite", "epsilon_plus", "--target", "1"]
    assert run("wide.png", *OWN, *options, "--patches", "4") == 0
    said = json.loads(Path("nrm-flow/wide-flow.json").read_text())["caption"]
    loaded = load("flow_nets:Branches", size=16, fit="pad")
    inputs = loaded.preprocessing(load_image(Path("wide.png")).image)
    mu = RelevanceMeasure(loaded.model, inputs, 1, against="rest", composite=EpsilonPlus())
    rows = float(mu.sign) * mu.marginal("input")[0].sum((0, 2))
    margins = float(rows[:5].sum() + rows[11:].sum())  # a third of 16 rows shows the image
    assert abs(margins) > 0.02
    assert f"Areas do not count them. {percent(margins)} of the relevance comes from them." in said
    areas = {int(value) for value in re.findall(r"(\d+)% of the area", said)}
    assert areas <= {12}  # 8 of the 16 patches show the image, each 1/8 of it


@pytest.mark.medium
def test_what_the_model_did_not_see_is_said_and_fit_shows_it(here, capsys):
    Image.open("noise.png").resize((60, 20)).save("wide.png")
    assert run("wide.png", *OWN, "--layers", "a", "input") == 0
    said = "saw only the framed part, 33% of the image"
    assert said in capsys.readouterr().out
    assert said in json.loads(Path("nrm-flow/wide-flow.json").read_text())["caption"]
    for fit in ("pad", "squeeze"):
        assert run("wide.png", *OWN, "--layers", "a", "input", "--fit", fit, "--out", fit) == 0
        note = "The margins, 67% of the model's input, only make the image square." if fit == "pad" else "only make"
        assert (note in json.loads(Path(fit, "wide-flow.json").read_text())["caption"]) == (fit == "pad")
        assert "saw only" not in capsys.readouterr().out
        stored = json.loads(Path(fit, "wide-flow.json").read_text())
        assert stored["settings"]["preparation"]["fit"] == fit
