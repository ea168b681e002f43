"""The command `explain`: numbers, files, messages, and what unusual files and options lead to.

Covers: nrm_plugin.commands.explanation, nrm_plugin.commands.explanation_files, nrm_plugin.commands.messages,
nrm_plugin.commands.options, nrm_plugin.commands.image_loop, nrm_plugin.commands.resolved_options.
"""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat

from nrm_plugin import NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.commands.cli import main, parser
from tests.commands.shell import (
    MEAN,
    NETS,
    OWN,
    PHOTO,
    SIZE,
    STD,
    explain,
    fails,
    own_net,
    photograph,
    prepared,
    result,
)
from tests.conftest import slow_but

# -- numbers --------------------------------------------------------------------------------------------------------

COMPOSITE = {
    "nrm_default": NRMDefault,
    "nrm_absolute": NRMAbsolute,
    "epsilon_plus_flat": EpsilonPlusFlat,
    "epsilon_gamma_box": lambda: EpsilonGammaBox(
        low=-torch.tensor(MEAN).view(1, 3, 1, 1) / torch.tensor(STD).view(1, 3, 1, 1),
        high=(1 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1),
    ),
}


@pytest.mark.medium
@pytest.mark.parametrize("residual", slow_but(["redistribute", "sink"], "redistribute"))
@pytest.mark.parametrize("name", COMPOSITE)
def test_numbers_are_those_of_the_measure(name: str, residual: str, fast: Path):
    requested = ["--target", "2", "--composite", name, "--residual", residual]
    requested += ["--gain-limit", "3"] if residual == "redistribute" else []
    explain(
        "china.png", *OWN, *requested, "--layer", "3", "--layer", "input", "--given", "3[1, 4:6]", "--given", "~0[2]"
    )
    tensors, metadata = result("nrm-explained/china-relevance.safetensors")
    net, inputs = own_net(), prepared(PHOTO)
    limit = {"gain_limit": 3.0} if residual == "redistribute" else {}
    mu = RelevanceMeasure(net, inputs, 2, against="rest", composite=COMPOSITE[name](), residual=residual, **limit)
    sign = float(mu.sign)
    close = {"rtol": 1e-3, "atol": 1e-6}  # Pillow resizes bytes, so inputs differ by rounding
    torch.testing.assert_close(tensors["outputs"], net(inputs)[0], rtol=1e-3, atol=2e-3)
    scale = float(mu.marginal("input").abs().max())
    assert float((tensors["relevance"] - sign * mu.marginal("input")[0]).abs().max()) < 0.02 * scale
    for key, expected in {
        "sink": mu.sink("input")[0],
        "layer/3/sink": mu.sink("3")[0],
        "layer/3/channels": mu.marginal("3", over="channel")[0],
        "given/1/mass": mu(at("3").channel([1, 4, 5]))[0],
        "given/2/mass": mu(~at("0")[2])[0],
    }.items():
        torch.testing.assert_close(
            tensors[key], sign * expected, rtol=2e-2, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}"
        )
    conditional = mu.marginal("input", given=at("3").channel([1, 4, 5]))[0] * tensors["given/1/mass"].sign()
    assert float((tensors["given/1/relevance"] - conditional).abs().max()) < 0.02 * float(conditional.abs().max())
    torch.testing.assert_close(tensors["relevance"].sum() + tensors["sink"], torch.tensor(sign), **close)
    torch.testing.assert_close(tensors["difference"], mu.output[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(tensors["layer/3/relevance"].sum((1, 2)), tensors["layer/3/channels"], **close)
    assert (metadata["composite"], metadata["residual"], metadata["target"]) == (name, residual, "2")


@pytest.mark.medium
def test_numbers_are_exact_without_resizing(fast: Path):
    """An image of the input size is the input without resizing, so all digits agree."""
    small = photograph(1, SIZE).crop((0, 0, SIZE, SIZE))
    small.save("small.png")
    explain("small.png", *OWN, "--layer", "3", "--given", "3[2]")
    tensors, _ = result("nrm-explained/small-relevance.safetensors")
    inputs = torchvision.transforms.functional.normalize(
        torch.from_numpy(np.array(small)).movedim(-1, 0).float() / 255, MEAN, STD
    )[None]
    net = own_net()
    target = int(net(inputs).argmax())
    mu = RelevanceMeasure(net, inputs, target, against="rest")
    assert mu.sign == 1
    torch.testing.assert_close(tensors["relevance"], mu.marginal("input")[0])
    torch.testing.assert_close(tensors["layer/3/relevance"], mu.marginal("3")[0])
    conditional = mu(at("3")[2]).sign() * mu.marginal("input", given=at("3")[2])[0]
    torch.testing.assert_close(tensors["given/1/relevance"], conditional)
    assert (
        tensors["layer/3/top"].tolist()
        == mu.marginal("3", over="channel")[0].abs().argsort(descending=True)[:7].tolist()
    )
    joint = [mu.marginal("input", joint=at("3")[channel])[0].sum(0) for channel in tensors["layer/3/top"].tolist()]
    torch.testing.assert_close(tensors["layer/3/maps"], torch.stack(joint))
    torch.testing.assert_close(tensors["image"] * 255, torch.from_numpy(np.array(small)).movedim(-1, 0).float())


@pytest.mark.slow
def test_layer_table_and_figures(here: Path, capsys: pytest.CaptureFixture[str]):
    explain("china.png", *OWN, "--layer", "3", "--channels", "2", "--given", "3[2] | 0[1]")
    tensors, _ = result("nrm-explained/china-relevance.safetensors")
    mass = tensors["layer/3/channels"]
    with Path("nrm-explained/china-3.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = mass.abs().argsort(descending=True, stable=True).tolist()
    assert [int(row["channel"]) for row in rows] == order
    np.testing.assert_allclose([float(row["mass"]) for row in rows], mass[order], rtol=1e-6)
    printed = capsys.readouterr().out
    for channel in order[:2]:
        assert f"channel {channel}" in printed
        assert f"{100 * float(mass[channel]):.2f}%" in printed
    assert f"channel {order[2]} " not in printed
    for name in ("relevance", "3", "given"):
        with Image.open(f"nrm-explained/china-{name}.png") as figure:
            assert min(figure.size) > 300
            assert str(Path(f"nrm-explained/china-{name}.png")) in printed


@pytest.mark.medium
def test_metadata_have_every_setting(fast: Path):
    argv = ["--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4", "--given", "3[2]", "--layer", "3", "--gain-limit", "inf"]
    explain("china.png", *OWN, *argv)
    _, metadata = result("nrm-explained/china-relevance.safetensors")
    prepare = json.loads(metadata["preparation"])
    assert (prepare["mean"], prepare["std"], prepare["size"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], SIZE)
    assert json.loads(metadata["given"]) == ["3[2]"]
    assert json.loads(metadata["layers"]) == ["3"]
    assert json.loads(metadata["versions"])["torch"] == torch.__version__.partition("+")[0]
    expected = {
        "image": "china.png",
        "model": "own_nets:make",
        "weights": "its own",
        "gain_limit": "inf",
        "device": "cpu",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert len(metadata["image_sha256"]) == 64


def test_greyscale_model_gets_greyscale_images(fast: Path):
    explain("china.png", "--model", "own_nets:grey", "--size", SIZE, "--mean", "0.5", "--std", "0.25")
    tensors, _ = result("nrm-explained/china-relevance.safetensors")
    assert tensors["relevance"].shape == (1, SIZE, SIZE)
    assert tensors["image"].shape == (3, SIZE, SIZE)
    assert torch.equal(tensors["image"][0], tensors["image"][2])


def test_default_preprocessing_is_that_of_imagenet(fast: Path):
    explain("china.png", "--model", "own_nets:make")
    tensors, _ = result("nrm-explained/china-relevance.safetensors")
    expected = prepared(PHOTO, 224, 256)[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert float((tensors["image"] - expected).abs().max()) < 0.02


@pytest.mark.medium
def test_one_bad_image_does_not_stop_the_others(here: Path, capsys: pytest.CaptureFixture[str]):
    photograph(1).save("flower.jpg")
    Path("text.png").write_text("not an image")
    Path("cut.png").write_bytes(Path("china.png").read_bytes()[:900])
    explain(
        "text.png", "china.png", "gone.png", "cut.png", here, "flower.jpg", "https://example.org/a.png", *OWN, code=1
    )
    printed = capsys.readouterr()
    assert printed.out.count("<- explained") == 2
    assert sorted(path.name for path in Path("nrm-explained").glob("*.png")) == [
        "china-relevance.png",
        "flower-relevance.png",
    ]
    head, *lines = [line for line in printed.err.splitlines() if line]
    assert "5" in head
    for words in ("text.png is not", "the file gone.png does not exist", "cut.png cannot", "is a folder", "is a URL"):
        assert sum(words in line for line in lines) == 1, words


def test_no_model_is_loaded_for_missing_images(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("nrm_plugin.commands.resolved_options.load", lambda *_, **__: pytest.fail("loaded"))
    explain("gone.png", *OWN, code=1)
    assert "the file gone.png does not exist" in capsys.readouterr().err


NAMES = ["$\\frac{$ 50% {0}.png", "中文.png", "new\nline.png", "b\udcffad.png", "-dash.png", "n" * 240 + ".png"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=["formula", "chinese", "line break", "undecodable", "dash", "long"])
def test_unusual_file_names(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    PHOTO.save(name)
    code = 1 if len(name) > 200 else 0
    explain(*OWN, "--", name, code=code)
    printed = capsys.readouterr()
    if code:
        assert "File name too long" in printed.err
        return
    assert printed.err == "" or "no installed font has" in printed.err
    written = (Path("nrm-explained") / f"{Path(name).stem}-relevance.safetensors").read_bytes()
    metadata = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["__metadata__"]
    assert metadata["image"].isprintable()
    explain(*OWN, "--", name)
    assert len(list(Path("nrm-explained").iterdir())) == 2


# -- files that are written -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_of_one_name_do_not_overwrite_each_other(fast: Path):
    for folder, number in (("a", 0), ("b", 1)):
        Path(folder).mkdir()
        photograph(number).save(f"{folder}/cat.png")
    PHOTO.save("cat.jpg")
    argv = ("a/cat.png", "b/cat.png", "cat.jpg", "a/cat.png", *OWN)
    explain(*argv)
    names = sorted(path.name for path in Path("nrm-explained").iterdir())
    assert names == sorted(
        f"cat{number}-relevance.{kind}" for number in ("", "-2", "-3") for kind in ("png", "safetensors")
    )
    images = [result(f"nrm-explained/cat{number}-relevance.safetensors")[0]["image"] for number in ("", "-2", "-3")]
    assert float((images[0] - images[1]).abs().mean()) > 0.05
    assert float((images[0] - images[2]).abs().mean()) < 0.05
    Path("b/cat.png").write_bytes(Path("a/cat.png").read_bytes())
    for _ in range(2):
        explain(*argv, "--out", "copies")
        assert len(list(Path("copies").iterdir())) == 6


@pytest.mark.medium
def test_the_same_query_replaces_its_results_and_another_one_does_not(fast: Path):
    explain("china.png", *OWN)
    out = Path("nrm-explained")
    tensors, metadata = result(out / "china-relevance.safetensors")
    explain("china.png", *OWN)
    assert len(list(out.iterdir())) == 2
    again, metadata_again = result(out / "china-relevance.safetensors")
    assert metadata_again == metadata
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    before = (out / "china-relevance.safetensors").read_bytes()
    other = int(result(out / "china-relevance.safetensors")[1]["target"]) ^ 1
    explain("china.png", *OWN, "--target", other)
    assert (out / "china-relevance.safetensors").read_bytes() == before
    assert result(out / "china-2-relevance.safetensors")[1]["target"] == str(other)
    photograph(1).save("china.png")
    explain("china.png", *OWN)
    assert (out / "china-relevance.safetensors").read_bytes() == before
    assert (out / "china-3-relevance.safetensors").exists()


@pytest.mark.medium
@pytest.mark.parametrize("mine", ["china-relevance.png", "china-relevance.safetensors", "china-3.csv"])
def test_other_files_are_not_overwritten(mine: str, fast: Path):
    Path(mine).write_text("mine")
    before = Path("china.png").read_bytes()
    explain("china.png", *OWN, "--layer", "3", "--out", ".")
    assert Path(mine).read_text() == "mine"
    assert Path("china.png").read_bytes() == before
    assert Path("china-2-relevance.safetensors").exists()


@pytest.mark.parametrize("inside", ["", "deeper"], ids=["is a file", "below a file"])
def test_an_unwritable_folder_is_reported_before_a_model_is_loaded(
    inside: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("nrm_plugin.commands.resolved_options.load", lambda *_, **__: pytest.fail("loaded"))
    Path("taken").write_text("mine")
    line = fails(capsys, "explain", "china.png", *OWN, "--out", Path("taken") / inside)
    assert "taken" in line
    assert "--out DIR" in line


def test_a_full_disk_stops_the_command_and_leaves_no_file(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(figure, path, *_):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device", str(path))

    Image.new("RGB", (8, 8)).save("second.png")
    monkeypatch.setattr("nrm_plugin.commands.output_files.save", full)
    explain("china.png", "second.png", *OWN, code=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot write nrm-explained/china-relevance.png: No space left on device. Free some space" in error
    assert list(Path("nrm-explained").iterdir()) == []


GREY_NET = ("--model", "own_nets:Cancelling", "--size", "4", "--mean", "0", "--std", "1", "--composite", "epsilon_plus")


@pytest.mark.medium
def test_a_condition_that_cancels_omits_only_its_own_heat_map(here: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("L", (8, 8), 200).save("even.png")
    conditions = ["--given", "conv[0]", "--given", "conv[2]", "--given", "conv[1]"]
    explain("even.png", *GREY_NET, "--against", "none", *conditions, code=1)
    printed = capsys.readouterr()
    tensors, _ = result("nrm-explained/even-relevance.safetensors")
    assert {key for key in tensors if key.startswith("given")} == {
        *(f"given/{n}/mass" for n in (1, 2, 3)),
        "given/3/relevance",
    }
    torch.testing.assert_close(tensors["given/3/relevance"], torch.full((1, 4, 4), 1 / 16))
    torch.testing.assert_close(tensors["given/1/mass"], torch.tensor(0.0), rtol=0, atol=1e-6)
    assert Path("nrm-explained/even-given.png").exists()
    assert printed.out.count("no heat map") == 2
    problems = [line for line in printed.err.splitlines() if "even.png, --given" in line]
    assert len(problems) == 2
    assert "'conv[0]': positive and negative relevance of these walks cancel" in problems[0]
    assert "'conv[2]': no relevance passes through these walks" in problems[1]


RANDOM = ("--model", "squeezenet1_1", "--weights", "none", "--size", "48")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model"),
        (["--model", "vgg61"], "Similar names: vgg"),
        (["--model", "VGG-16"], "vgg16"),
        (["--model", "fcn_resnet50"], "a model for segmentation"),
        (["--model", "fasterrcnn_resnet50_fpn"], "a model for object detection"),
        (["--model", "r3d_18"], "a model for video"),
        (["--model", "quantized_resnet18"], "is quantized"),
        (["--model", ""], "no classification model ''"),
        (["--model", "vgg16", "--weights", "IMAGENET1K_V2"], "It has IMAGENET1K_V1, IMAGENET1K_FEATURES"),
        (["--model", "vgg16", "--weights", "imagenet1k_v1"], "neither a file nor weights of vgg16"),
        (["--model", "no_such_module:make"], "no module named 'no_such_module'"),
        (["--model", "own_nets:mak"], "Similar names: make"),
        (["--model", "own_nets:"], "has no ''"),
        (["--model", ":make"], "has no module"),
        (["--model", "gone.py:make"], "the file gone.py does not exist"),
        (["--model", "own_nets:broken"], "RuntimeError: no data here (own_nets.py, line"),
        (["--model", "own_nets:needs"], "cannot be called without arguments: missing a required argument: 'size'. W"),
        (["--model", "own_nets:needs(3)"], "give a function that passes them"),
        (["--model", "own_nets.py"], "own_nets.py:NAME"),
        (["--model", "own_nets:number"], "returned int"),
        (["--model", "own_nets:word"], "is str, neither"),
        (["--model", "own_nets:Map", "--size", "8"], "a classifier is needed"),
        (["--model", "own_nets:grey", "--size", "32"], "fails on an input of shape 1×3×32×32"),
        ([*RANDOM, "--size", "0"], "--size"),
        ([*RANDOM, "--size", "big"], "--size"),
        ([*RANDOM, "--size", "5"], "fails on an input of shape 1×3×5×5"),
        ([*RANDOM, "--mean", "1,2"], "--mean"),
        ([*RANDOM, "--mean", "a,b,c"], "--mean"),
        ([*RANDOM, "--mean", "0.5"], "--mean and --std take three numbers"),
        ([*RANDOM, "--mean", "0.5", "--std", "1,1,1"], "--mean and --std take three numbers"),
        ([*RANDOM, "--std", "1,0,1"], "must be positive"),
        ([*RANDOM, "--target", "1000"], "has 1000 classes, 0 to 999"),
        ([*RANDOM, "--target", "-1"], "0 to 999"),
        ([*RANDOM, "--target", "tabby"], "--classes FILE"),
        ([*RANDOM, "--target", ""], "--classes FILE"),
        ([*RANDOM, "--layer", "features.77"], "Similar names: features."),
        ([*RANDOM, "--layer", "feature.12"], "Similar names: features.12,"),
        ([*RANDOM, "--layer", ""], "no layer ''"),
        ([*RANDOM, "--given", "features.77[1]"], "Similar names: features."),
        ([*RANDOM, "--given", "features.0[64]"], "index 64 is out of bounds"),
        ([*RANDOM, "--given", "features.0["], "is not an event"),
        ([*RANDOM, "--channels", "0"], "--channels"),
        ([*RANDOM, "--composite", "epsilon_plus_flag"], "Did you mean epsilon_plus_flat"),
        ([*RANDOM, "--residual", "drop"], "--residual"),
        ([*RANDOM, "--gain-limit", "0.5"], "--gain-limit"),
        ([*RANDOM, "--gain-limit", "nan"], "--gain-limit"),
        ([*RANDOM, "--gain-limit", "2", "--residual", "sink"], "no effect"),
        ([*RANDOM, "--device", "gpu"], "--device gpu cannot be used"),
        ([*RANDOM, "--classes", "gone.txt"], "cannot read --classes gone.txt"),
        ([*RANDOM, "--classes", "china.png"], "not text in UTF-8"),
        ([*RANDOM, "--out"], "--out"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_options_take_one_line(argv: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert words in fails(capsys, "explain", "china.png", *argv)


@pytest.mark.medium
def test_the_calls_of_a_layer_are_listed(fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("own_nets.py").write_text(NETS + (
        "\nclass Twice(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.act = nn.Linear(4, 4), nn.ReLU()\n        self.b = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n        x = self.act(self.a(x.mean(1).flatten(1)))\n"
        "        return self.b(self.act(self.a(x)))\n"
    ))  # fmt: skip
    argv = ["explain", "china.png", "--model", "own_nets:Twice", "--size", "2"]
    assert "called 2 times. Give one of the calls: act:0, act:1" in fails(capsys, *argv, "--layer", "act")
    assert main([*argv, "--layer", "act:1", "--given", "a:0"]) == 0


def explained(*requested: str) -> dict[str, torch.Tensor]:
    """The numbers of a call, in a folder of its own."""
    out = f"out-{'-'.join(requested)}".replace("--", "")
    explain("china.png", *OWN, *requested, "--layer", "3", "--given", "3[4]", "--out", out)
    return result(f"{out}/china-relevance.safetensors")[0]


@pytest.mark.medium
def test_the_opposite_comparison_has_the_opposite_colours(fast: Path, capsys: pytest.CaptureFixture[str]):
    """All maps that are drawn, and all masses that are printed."""
    one, other = explained("--target", "1", "--against", "3"), explained("--target", "3", "--against", "1")
    for key in ("relevance", "difference", "sink", "layer/3/relevance", "layer/3/channels", "layer/3/maps",
                "given/1/mass", "given/1/relevance"):  # fmt: skip
        torch.testing.assert_close(one[key], -other[key])
    ahead = 1 if float(one["outputs"][1] - one["outputs"][3]) > 0 else -1
    torch.testing.assert_close((one["relevance"].sum() + one["sink"]).sign(), torch.tensor(float(ahead)))
    text = capsys.readouterr().out
    behind = "class 3" if ahead > 0 else "class 1"
    assert text.count(f"as {behind} is behind; positive relevance is evidence for {behind} all the same") == 1
    assert "explained: class 1 rather than class 3, a difference of " in text
    assert text.count("<- compared with") == 2


@pytest.mark.medium
def test_the_class_alone_is_explained_on_request(fast: Path, capsys: pytest.CaptureFixture[str]):
    net, inputs = own_net(), prepared(PHOTO)
    alone = explained("--target", "2", "--against", "none")
    wanted = RelevanceMeasure(net, inputs, 2).marginal("input")[0]
    assert float((alone["relevance"] - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    assert "difference" not in alone
    assert "rather than" not in capsys.readouterr().out


@pytest.mark.medium
def test_comparisons_are_settings(fast: Path):
    """Results of another comparison are not overwritten."""
    for against in ("rest", "none", "3", "rest"):
        explain("china.png", *OWN, "--target", "1", "--against", against)
    stored = {name: result(f"nrm-explained/china{name}-relevance.safetensors")[1] for name in ("", "-2", "-3")}
    assert [metadata.get("against") for metadata in stored.values()] == ["rest", "none", "3"]
    assert not Path("nrm-explained/china-4-relevance.safetensors").exists()


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        (["--target", "1", "--against", "1"], "--against 1: this is the explained class"),
        (["--against", "4"], "--against 4 is out of range: the model has 4 classes, 0 to 3"),
        (["--against", "cat"], "--against 'cat' is a name"),
        (["--layer", "7"], "the output of '7' is fused with the contrast"),
    ],
)
def test_an_invalid_comparison_is_an_error(fast: Path, capsys, requested: list[str], words: str):
    assert words in fails(capsys, "explain", "china.png", *OWN, *requested)


def test_equal_outputs_name_the_remedy(here: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("L", (8, 8), 200).save("even.png")
    explain("even.png", *GREY_NET, code=1)
    assert "--against none explains the output of the class alone" in capsys.readouterr().err


def test_the_examples_of_the_help_parse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["explain", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.startswith("  nrm-plugin ")]
    assert len(examples) == 9
    for line in examples:
        parser().parse_args(shlex.split(line)[1:])


@pytest.mark.medium
def test_an_image_that_the_model_rejects_does_not_stop_the_others(fast: Path, capsys: pytest.CaptureFixture[str]):
    with Path("own_nets.py").open("a") as file:
        file.write("\n\nclass Bright(Net):\n    def forward(self, x):\n        assert x.mean() > -1.5, 'dark'\n"
                   "        return super().forward(x)\n")  # fmt: skip
    Image.new("RGB", (40, 40)).save("dark.png")
    Image.new("RGB", (40, 40), "white").save("white.png")
    explain("china.png", "dark.png", "white.png", "--model", "own_nets:Bright", "--size", "32", code=1)
    error = capsys.readouterr().err
    assert "1 failed" in error
    assert "dark.png: own_nets:Bright fails on an input" in error
    assert Path("nrm-explained/white-relevance.png").exists()
