"""The VGG16 figures, from image files to plots. A narrow net with the layers of VGG16 replaces the slow original."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vgg16
from torchvision.models.vgg import make_layers

from benchmarks import vgg16_joint
from benchmarks.vgg16_joint import load_image, load_vgg16, main
from nrm_plugin import RelevanceMeasure, at
from tests.conftest import slow_but

WIDTHS = [4, 4, "M", 4, 4, "M", 6, 6, 6, "M", 6, 6, 6, "M", 6, 6, 6, "M"]


class Narrow(nn.Module):
    """The layers of VGG16 under their names, with few channels."""

    def __init__(self, weights: None = None, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = make_layers(WIDTHS)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        hidden = [nn.Linear(6 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(True), nn.Dropout()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(16, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vgg16_joint, "vgg16", Narrow)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Random weights under which relevance reaches the pixels."""
    draw = torch.Generator().manual_seed(0)
    net = Narrow(num_classes=1000)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, generator=draw)
                module.bias.normal_(0, 0.05, generator=draw)
    return net.state_dict()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (260, 300, 3), dtype=np.uint8)


@pytest.fixture
def image(tmp_path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def error_of(capsys: pytest.CaptureFixture[str], *argv: object, lines: int = 1) -> str:
    """The last line on stderr of a command that exits with status 2 and prints nothing on stdout."""
    try:
        code: object = main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == lines
    return printed.err.splitlines()[-1]


# -- figures ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("suffix", slow_but([".pth", ".safetensors"], ".pth"))
def test_figures_for_a_state_dict_show_the_measure(
    suffix: str, state: dict[str, Tensor], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    drawn = []
    original = vgg16_joint.joint_figure
    monkeypatch.setattr(vgg16_joint, "joint_figure", lambda *args: drawn.append(args) or original(*args))
    out = tmp_path / "figures"
    assert main([str(image), "--weights", str(file), "--out", str(out), "--channels", "2", "--marks", "2"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written == [out / "noise-2-layers.png", out / "noise-3-layers.png"]
    for path in written:
        with Image.open(path) as figure:
            assert figure.format == "PNG"
            assert 1000 < figure.width < 2500
            assert 600 < figure.height < 900
    net = Narrow()
    net.load_state_dict(state)
    net.eval()
    tensor = load_image(image).tensor
    target = int(net(tensor).argmax())
    mu = RelevanceMeasure(net, tensor, target)
    (_, _, shown, pairs, _, heading), (_, _, _, triples, _, _) = drawn
    assert f"class {target}: " in heading
    torch.testing.assert_close(shown, mu.marginal("input")[0].sum(0))
    assert triples.layers == ("features.28", "features.21", "features.14")
    for joint in (pairs, triples):
        strongest = joint.strongest(1)[0]
        event = at("features.28")[joint.channels[0][strongest[0]]]
        for layer, channels, index in zip(joint.layers[1:], joint.channels[1:], strongest[1:], strict=True):
            event = event & at(layer)[channels[index]]
        torch.testing.assert_close(joint.values[strongest], mu(event)[0], rtol=1e-4, atol=1e-8)
        assert joint.values[strongest] != 0


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_arguments_select_layers_and_class(state, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(state, tmp_path / "weights.pth")
    drawn = []
    original = vgg16_joint.joint_figure
    monkeypatch.setattr(vgg16_joint, "joint_figure", lambda *args: drawn.append(args) or original(*args))
    words = f"{image} --weights {tmp_path}/weights.pth --out {tmp_path} --layers features.19 features.24 --channels 3"
    assert main([*words.split(), "--target", "281", "--marks", "1"]) == 0
    ((mu, _, _, joint, marks, heading),) = drawn
    assert (joint.layers, marks) == (("features.24", "features.19"), 1)
    assert joint.values.shape == (3, 3)
    assert "class 281: tabby" in heading
    net = Narrow()
    net.load_state_dict(state)
    torch.testing.assert_close(mu.output[0], net.eval()(load_image(image).tensor)[0, 281].detach())


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_every_image_has_its_own_figure(image: Path, tmp_path: Path, pixels: np.ndarray, capsys):
    Image.fromarray(pixels[::-1]).save(tmp_path / "turned.png")
    options = f"--weights none --layers features.28 features.24 --channels 2 --marks 1 --out {tmp_path}/out"
    assert main([str(image), str(tmp_path / "turned.png"), *options.split()]) == 0
    written = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert written == ["noise-2-layers.png", "turned-2-layers.png"]


def test_images_of_the_same_name_raise(image: Path, tmp_path: Path, capsys):
    line = error_of(capsys, image, tmp_path / "other/noise.jpg", "--weights", "none", "--out", tmp_path / "out")
    assert "two images are named noise" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_in_the_docstring_runs(tmp_path: Path):
    words = re.search(r"``python (-m \S+) IMAGE", vgg16_joint.__doc__)
    root = Path(vgg16_joint.__file__).parents[1]
    ran = subprocess.run([sys.executable, *words[1].split(), "--help"], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "IMAGE" in ran.stdout


# -- images -------------------------------------------------------------------------------------------------------


def test_an_image_is_resized_cropped_and_normalized(image: Path):
    loaded = load_image(image)
    with Image.open(image) as file:
        resized = file.resize((295, 256), Image.Resampling.BILINEAR)
    crop = np.asarray(resized, dtype=np.float32)[16:240, 36:260] / 255
    np.testing.assert_allclose(loaded.shown.movedim(0, -1), crop, atol=0.012)
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(loaded.tensor[0].movedim(0, -1), expected, atol=0.06)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_every_mode_can_be_read(mode: str, tmp_path: Path, pixels: np.ndarray):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(pixels).convert(mode).save(path)
    assert load_image(path).tensor.shape == (1, 3, 224, 224)


def test_sixteen_bit_greyscale_is_scaled_and_not_clipped(tmp_path: Path):
    Image.fromarray(np.full((256, 256), 32896, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").shown.mean() == pytest.approx(128 / 255, abs=1e-3)


def test_the_exif_orientation_is_applied(tmp_path: Path):
    pixels = np.zeros((256, 256, 3), dtype=np.uint8)
    pixels[:128] = 255
    tag = Image.Exif()
    tag[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=tag)
    shown = load_image(tmp_path / "turned.jpg").shown
    assert shown[:, :100].mean() < 0.05
    assert shown[:, -100:].mean() > 0.95


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "empty", "folder"])
def test_an_unreadable_image_is_reported_on_one_line(kind: str, image: Path, tmp_path: Path, capsys):
    path = tmp_path / "bad.png"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"text": b"not an image", "cut": image.read_bytes()[:5000], "empty": b""}[kind])
    line = error_of(capsys, path, "--weights", "none", "--out", tmp_path / "out")
    assert str(path) in line
    assert ("does not exist" if kind == "missing" else "cannot read") in line
    assert not (tmp_path / "out").exists()


# -- weights ------------------------------------------------------------------------------------------------------


def test_the_original_network_loads_a_state_dict(tmp_path: Path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16(weights=None).state_dict().items()}
    # Every tensor is one number, expanded to its shape: a small file for 138 million weights.
    torch.save({name: torch.full((1,), 0.25).expand(shape) for name, shape in shapes.items()}, tmp_path / "vgg16.pth")
    net = load_vgg16(str(tmp_path / "vgg16.pth"))
    assert {name: value.shape for name, value in net.state_dict().items()} == shapes
    assert not net.training
    assert (net.classifier[6].weight == 0.25).all()


@pytest.mark.usefixtures("narrow")
def test_the_number_of_classes_is_read_from_the_file(tmp_path: Path):
    torch.save(Narrow(num_classes=7).half().state_dict(), tmp_path / "seven.pth")
    net = load_vgg16(str(tmp_path / "seven.pth"))
    assert net(torch.rand(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.usefixtures("narrow")
def test_random_weights_depend_on_the_seed_and_leave_the_random_state_unchanged():
    before = torch.get_rng_state()
    first, again, other = (load_vgg16("none", seed).features[0].weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_connection_the_error_suggests_a_remedy(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = error_of(capsys, image, "--weights", "IMAGENET1K_V1", "--out", tmp_path / "out", lines=2)
    assert "IMAGENET1K_V1" in line
    assert "Name or service not known" in line
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in line
    assert "--weights FILE" in line


@pytest.mark.parametrize(
    "kind", ["missing", "text.pth", "text.safetensors", "cut.pth", "a list", "a net", "other keys"]
)
def test_unreadable_weights_are_reported_on_one_line(kind: str, state, image: Path, tmp_path: Path, capsys):
    path = tmp_path / (kind if "." in kind else "weights.pth")
    if kind.startswith("text"):
        path.write_text("not weights")
    elif kind != "missing":
        torch.save(
            {"a list": [1, 2], "a net": nn.Linear(2, 2), "other keys": {"w": torch.zeros(2)}}.get(kind, state), path
        )
    if kind == "cut.pth":
        path.write_bytes(path.read_bytes()[:3000])
    line = error_of(capsys, image, "--weights", path, "--out", tmp_path / "out")
    assert str(path) in line
    words = {"missing": "does not exist", "a list": "does not contain a state dict", "other keys": "features.0.weight"}
    assert words.get(kind, "cannot read weights") in line


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers features.28", "two or more different convolutions"),
        ("--layers features.28 features.28", "two or more different convolutions"),
        ("--layers features.28 features.29", "features.29 is not one"),
        ("--target 1000", "--target 1000 is not a class"),
        ("--target -1", "--target -1 is not a class"),
        ("--channels 0", "'0' is not a positive integer"),
        ("--channels few", "'few' is not"),
        ("--marks 27", "26"),
        ("--out /dev/null/figures", "/dev/null"),
    ],
)
def test_invalid_arguments_are_reported_on_one_line(
    arguments: str, message: str, image: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, image, "--weights", "none", *arguments.split())
