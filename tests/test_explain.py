"""Pictures and models from the shell: what is computed, written and said, and what odd files and options meet."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import sys
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights, resnet18, squeezenet1_1
from zennit.composites import COMPOSITES, EpsilonGammaBox, EpsilonPlusFlat

from nrm_plugin import ABSORBED, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.commands import model_loading as models
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.event_syntax import ConditionError, parse
from nrm_plugin.commands.output_files import wrapped
from nrm_plugin.dataset import images as pictures
from nrm_plugin.dataset.images import ImageError, load_image
from tests.conftest import slow_but

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32

NETS = '''
import torch
from torch import nn


class Net(nn.Sequential):
    """Two convolutions; classes 0 to 3."""

    def __init__(self, channels=3):
        super().__init__(
            nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
        )


def make():
    torch.manual_seed(3)
    return Net()


def grey():
    torch.manual_seed(4)
    return Net(1)


class Cancelling(nn.Module):
    """Channel 0 speaks for the left half as much as against the right one; channel 1 for all; channel 2 is dead."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1, bias=False)
        self.head = nn.Linear(3 * 16, 2)
        sign = torch.ones(4, 4)
        sign[:, 2:] = -1
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1))
            self.head.weight.copy_(torch.stack([sign, torch.ones(4, 4), torch.ones(4, 4)]).flatten().expand(2, -1))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class Map(nn.Module):
    def forward(self, x):
        return x * 2


def broken():
    raise RuntimeError("no data\\nhere")


def number():
    return 7


def needs(size):
    return size


ready = make()
word = "text"
'''


def photograph(number: int = 0, side: int = 90) -> Image.Image:
    """A photograph that scikit-learn brings along, china or flower, made small."""
    return Image.fromarray(load_sample_images().images[number]).resize((side * 3 // 2, side))


PHOTO = photograph()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture and some nets of the user's own; commands are called in it."""
    monkeypatch.chdir(tmp_path)
    PHOTO.save("china.png")
    Path("own_nets.py").write_text(NETS)
    Path("wrong.py").write_text("def make(:\n")
    yield tmp_path
    for name in ("own_nets", "other_nets", "wrong"):
        sys.modules.pop(name, None)


@pytest.fixture
def fast(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder; heat maps are made, but not written, which takes longer than all else."""
    monkeypatch.setattr("nrm_plugin.commands.output_files.save", lambda figure, path: path.touch())
    return here


OWN = ("--model", "own_nets:make", "--size", str(SIZE))


def explain(*argv: str | Path, code: int = 0) -> None:
    assert main(["explain", *map(str, argv)]) == code


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line on stderr of a command that ends with 2 and prints nothing else."""
    try:
        code: object = main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    lines = [
        line for line in printed.err.splitlines() if not line.startswith(("nrm-plugin: warning: ", "Downloading: "))
    ]
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def result(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118  (no mapping)


def prepared(image: Image.Image, size: int = SIZE, resize: int | None = None) -> Tensor:
    """The input that torchvision's functions make of a picture, ``(1, 3, size, size)``."""
    functional = torchvision.transforms.functional
    tensor = functional.to_tensor(
        image.convert("RGB").resize(_scaled(image, resize or size), Image.Resampling.BILINEAR)
    )
    return functional.normalize(functional.center_crop(tensor, [size, size]), MEAN, STD)[None]


def _scaled(image: Image.Image, short: int) -> tuple[int, int]:
    width, height = image.size
    return (short, int(short * height / width)) if width < height else (int(short * width / height), short)


def own_net() -> nn.Module:
    scope: dict = {}
    exec(NETS, scope)
    return scope["make"]().eval()


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


@pytest.mark.parametrize("residual", slow_but(["redistribute", "sink"], "redistribute"))
@pytest.mark.parametrize("name", COMPOSITE)
def test_numbers_are_those_of_the_measure(name: str, residual: str, fast: Path):
    asked = ["--target", "2", "--composite", name, "--residual", residual]
    asked += ["--gain-limit", "3"] if residual == "redistribute" else []
    explain("china.png", *OWN, *asked, "--layer", "3", "--layer", "input", "--given", "3[1, 4:6]", "--given", "~0[2]")
    found, about = result("nrm-explained/china-relevance.safetensors")
    net, inputs = own_net(), prepared(PHOTO)
    limit = {"gain_limit": 3.0} if residual == "redistribute" else {}
    mu = RelevanceMeasure(net, inputs, 2, composite=COMPOSITE[name](), residual=residual, **limit)
    close = {"rtol": 1e-3, "atol": 1e-6}  # Pillow resizes bytes, so inputs differ by rounding
    torch.testing.assert_close(found["outputs"], net(inputs)[0], rtol=1e-3, atol=2e-3)
    scale = float(mu.marginal("input").abs().max())
    assert float((found["relevance"] - mu.marginal("input")[0]).abs().max()) < 0.02 * scale
    for key, expected in {
        "sink": mu.sink("input")[0],
        "layer/3/sink": mu.sink("3")[0],
        "layer/3/channels": mu.marginal("3", over="channel")[0],
        "given/1/mass": mu(at("3").channel([1, 4, 5]))[0],
        "given/2/mass": mu(~at("0")[2])[0],
    }.items():
        torch.testing.assert_close(
            found[key], expected, rtol=2e-2, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}"
        )
    conditional = mu.marginal("input", given=at("3").channel([1, 4, 5]))[0]
    assert float((found["given/1/relevance"] - conditional).abs().max()) < 0.02 * float(conditional.abs().max())
    torch.testing.assert_close(found["relevance"].sum() + found["sink"], torch.tensor(1.0), **close)
    torch.testing.assert_close(found["layer/3/relevance"].sum((1, 2)), found["layer/3/channels"], **close)
    assert (about["composite"], about["residual"], about["target"]) == (name, residual, "2")


def test_numbers_are_exact_where_nothing_is_resized(fast: Path):
    """A picture of the size of the model is its input without a detour, so all digits agree."""
    small = photograph(1, SIZE).crop((0, 0, SIZE, SIZE))
    small.save("small.png")
    explain("small.png", *OWN, "--layer", "3", "--given", "3[2]")
    found, _ = result("nrm-explained/small-relevance.safetensors")
    inputs = torchvision.transforms.functional.normalize(
        torch.from_numpy(np.array(small)).movedim(-1, 0).float() / 255, MEAN, STD
    )[None]
    net = own_net()
    target = int(net(inputs).argmax())
    mu = RelevanceMeasure(net, inputs, target)
    torch.testing.assert_close(found["relevance"], mu.marginal("input")[0])
    torch.testing.assert_close(found["layer/3/relevance"], mu.marginal("3")[0])
    torch.testing.assert_close(found["given/1/relevance"], mu.marginal("input", given=at("3")[2])[0])
    assert (
        found["layer/3/top"].tolist() == mu.marginal("3", over="channel")[0].abs().argsort(descending=True)[:7].tolist()
    )
    joint = [mu.marginal("input", joint=at("3")[channel])[0].sum(0) for channel in found["layer/3/top"].tolist()]
    torch.testing.assert_close(found["layer/3/maps"], torch.stack(joint))
    torch.testing.assert_close(found["image"] * 255, torch.from_numpy(np.array(small)).movedim(-1, 0).float())


@pytest.mark.parametrize(
    "form", slow_but(["state dict", "safetensors", "checkpoint", "data parallel", "half"], "state dict")
)
def test_weights_of_a_file_are_those_of_the_model(form: str, fast: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(1)
    net = squeezenet1_1(weights=None, num_classes=7).eval()
    state = {key: value.half().float() for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    file = "mine.safetensors" if form == "safetensors" else "mine.pth"
    if form == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        wrapped_state = {f"module.{key}": value for key, value in state.items()}
        torch.save(
            {
                "state dict": state,
                "checkpoint": {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
                "data parallel": {"model": {f"_orig_mod.{key}": value for key, value in wrapped_state.items()}},
                "half": {key: value.half() for key, value in state.items()},
            }[form],
            file,
        )
    explain("china.png", "--model", "squeezenet1_1", "--weights", file, "--target", "3")
    found, about = result("nrm-explained/china-relevance.safetensors")
    inputs = get_model_weights("squeezenet1_1").DEFAULT.transforms()(PHOTO)[None]
    torch.testing.assert_close(found["outputs"], net(inputs)[0], rtol=1e-4, atol=1e-4)
    mu = RelevanceMeasure(net, inputs, 3)
    torch.testing.assert_close(found["relevance"], mu.marginal("input")[0], rtol=1e-3, atol=1e-7)
    assert about["weights"] == file
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", slow_but(["mnasnet0_5", "densenet121", "regnet_y_400mf", "googlenet"], "mnasnet0_5"))
def test_architectures_that_want_something_special_take_files(name: str, tmp_path: Path):
    """Versions of layers, names with dots, numbers read while the model is built, inputs that are scaled again."""
    weights = get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    arguments = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    net = get_model_builder(name)(weights=None, **arguments).eval()
    state = net.state_dict()
    if name == "densenet121":  # as in torchvision's own file
        state = {re.sub(r"(denselayer\d+\.\w+?)([12]\.)", r"\1.\2", key): value for key, value in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(dict(state), tmp_path / weights.url.rpartition("/")[2])
    subject = models.load(name, str(tmp_path / weights.url.rpartition("/")[2]))
    inputs = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(subject.model(inputs), net(inputs))
    assert len(subject.categories) == 1000
    assert subject.prepare.settings["resize"] == weights.transforms().resize_size[0]


def test_file_with_the_name_of_torchvisions_brings_its_classes(here: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(2)
    weights = get_model_weights("squeezenet1_1").IMAGENET1K_V1
    file = weights.url.rpartition("/")[2]
    torch.save(squeezenet1_1(weights=None).state_dict(), file)
    explain("china.png", "--model", "squeezenet1_1", "--weights", file, "--target", "TABBY", "--size", "64")
    found, about = result("nrm-explained/china-relevance.safetensors")
    assert (about["target"], about["target_name"]) == ("281", "tabby")
    printed = capsys.readouterr().out
    best = int(found["outputs"].argmax())
    assert f"{best:4} {weights.meta['categories'][best]}" in printed
    assert " 281 tabby" in printed
    assert printed.count("<- explained") == 1


def test_default_weights_are_asked_of_torchvision(fast: Path, monkeypatch: pytest.MonkeyPatch):
    """Downloaded weights go through torchvision's own builder; here a stand-in for the download."""
    torch.manual_seed(5)
    state = resnet18(weights=None).state_dict()
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, *_, **__: asked.append(url) or state
    )
    explain("china.png", "--model", "resnet18", "--size", "64")
    assert asked == [get_model_weights("resnet18").DEFAULT.url]
    found, about = result("nrm-explained/china-relevance.safetensors")
    assert about["weights"] == "IMAGENET1K_V1"
    assert about["target_name"] == get_model_weights("resnet18").DEFAULT.meta["categories"][int(about["target"])]
    assert int(found["outputs"].argmax()) == int(about["target"])


@pytest.mark.slow
def test_layer_table_and_pictures(here: Path, capsys: pytest.CaptureFixture[str]):
    explain("china.png", *OWN, "--layer", "3", "--channels", "2", "--given", "3[2] | 0[1]")
    found, _ = result("nrm-explained/china-relevance.safetensors")
    mass = found["layer/3/channels"]
    with Path("nrm-explained/china-3.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = mass.abs().argsort(descending=True, stable=True).tolist()
    assert [int(row["channel"]) for row in rows] == order
    np.testing.assert_allclose([float(row["mass"]) for row in rows], mass[order], rtol=1e-6)
    printed = capsys.readouterr().out
    for channel in order[:2]:
        assert f"channel {channel}" in printed
        assert f"{100 * float(mass[channel]):.2f} %" in printed
    assert f"channel {order[2]} " not in printed
    for name in ("relevance", "3", "given"):
        with Image.open(f"nrm-explained/china-{name}.png") as picture:
            assert min(picture.size) > 300
            assert str(Path(f"nrm-explained/china-{name}.png")) in printed


def test_metadata_hold_every_setting(fast: Path):
    argv = ["--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4", "--given", "3[2]", "--layer", "3", "--gain-limit", "inf"]
    explain("china.png", *OWN, *argv)
    _, about = result("nrm-explained/china-relevance.safetensors")
    prepare = json.loads(about["preparation"])
    assert (prepare["mean"], prepare["std"], prepare["size"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], SIZE)
    assert json.loads(about["given"]) == ["3[2]"]
    assert json.loads(about["layers"]) == ["3"]
    assert json.loads(about["versions"])["torch"] == torch.__version__.partition("+")[0]
    expected = {
        "image": "china.png",
        "model": "own_nets:make",
        "weights": "its own",
        "gain_limit": "inf",
        "device": "cpu",
    }
    assert {key: about[key] for key in expected} == expected
    assert len(about["image_sha256"]) == 64


def test_grey_model_gets_grey_pictures(fast: Path):
    explain("china.png", "--model", "own_nets:grey", "--size", SIZE, "--mean", "0.5", "--std", "0.25")
    found, _ = result("nrm-explained/china-relevance.safetensors")
    assert found["relevance"].shape == (1, SIZE, SIZE)
    assert found["image"].shape == (3, SIZE, SIZE)
    assert torch.equal(found["image"][0], found["image"][2])


def test_standard_preparation_is_that_of_imagenet(fast: Path):
    explain("china.png", "--model", "own_nets:make")
    found, _ = result("nrm-explained/china-relevance.safetensors")
    expected = prepared(PHOTO, 224, 256)[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert float((found["image"] - expected).abs().max()) < 0.02


# -- pictures -------------------------------------------------------------------------------------------------------


def _array(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image.convert(mode)).astype(float)


GREY = np.asarray(PHOTO.convert("L"))


def _half_transparent() -> Image.Image:
    image = PHOTO.convert("RGBA")
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, : GREY.shape[1] // 2] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def _on_white() -> np.ndarray:
    pixels = _array(PHOTO).copy()
    pixels[:, : GREY.shape[1] // 2] = 255
    return pixels


def _exif(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


GREYS = _array(PHOTO.convert("L"))
KINDS: dict[str, tuple[str, Callable[[str], object], np.ndarray, float]] = {
    "grey": ("a.png", lambda path: PHOTO.convert("L").save(path), GREYS, 0),
    "grey and alpha": ("a.png", lambda path: PHOTO.convert("LA").save(path), GREYS, 0),
    "black and white": ("a.png", lambda path: PHOTO.convert("1").save(path), _array(PHOTO.convert("1")), 0),
    "transparent": ("a.png", lambda path: _half_transparent().save(path), _on_white(), 0),
    "transparent webp": ("a.webp", lambda path: _half_transparent().save(path, lossless=True), _on_white(), 0),
    "palette": ("a.png", lambda path: PHOTO.quantize(200).save(path), _array(PHOTO.quantize(200)), 0),
    "16 bits": ("a.png", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), GREYS, 0),
    "16 bits tiff": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), GREYS, 0),
    "32 bits tiff": ("a.tif", lambda path: Image.fromarray(GREY.astype(np.int32) * 257).save(path), GREYS, 0),
    "floats": ("a.tif", lambda path: Image.fromarray((GREY / 255).astype(np.float32)).save(path), GREYS, 0),
    "cmyk": ("a.tif", lambda path: PHOTO.convert("CMYK").save(path), _array(PHOTO), 0),
    "cmyk jpeg": ("a.jpg", lambda path: PHOTO.convert("CMYK").save(path, quality=98), _array(PHOTO), 12),
    "turned": ("a.jpg", lambda path: PHOTO.save(path, quality=98, exif=_exif(6)),
               _array(PHOTO.rotate(-90, expand=True)), 12),
    "mirrored": ("a.png", lambda path: PHOTO.save(path, exif=_exif(2)), _array(PHOTO)[:, ::-1], 0),
    "broken exif": ("a.jpg", lambda path: PHOTO.save(path, quality=98, exif=b"Exif\0\0rubbish!"), _array(PHOTO), 12),
    "gif": ("a.gif", lambda path: PHOTO.quantize(200).save(path, save_all=True, append_images=[PHOTO.rotate(90)]),
            _array(PHOTO.quantize(200)), 0),
    "pages": ("a.tif", lambda path: PHOTO.save(path, save_all=True, append_images=[PHOTO.rotate(90)]),
              _array(PHOTO), 0),
    "wrong suffix": ("a.jpg", lambda path: PHOTO.save(path, format="PNG"), _array(PHOTO), 0),
    "no suffix": ("a", lambda path: PHOTO.save(path, format="PNG"), _array(PHOTO), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_are_the_same_photograph(kind: str, tmp_path: Path):
    name, save, expected, tolerance = KINDS[kind]
    save(str(tmp_path / name))
    picture = load_image(tmp_path / name)
    pixels = _array(picture.image)
    assert picture.image.mode == "RGB"
    assert pixels.shape[:2] == expected.shape[:2]
    difference = np.abs(pixels - (expected if expected.ndim == 3 else expected[..., None]))
    assert difference.max() <= max(tolerance * 6, 1e-9)
    assert difference.mean() <= max(tolerance / 4, 1e-9)
    several = [note for note in picture.notes if "several images" in note]
    assert bool(several) == (kind in ("gif", "pages"))


@pytest.mark.parametrize("limit", [0.4, 0.9], ids=["far above", "above"])
def test_huge_jpeg_is_read_smaller(limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "huge.jpg"
    photograph(0, 400).save(path, quality=95)
    pixels = 400 * 600
    monkeypatch.setattr(pictures, "LARGE", int(limit * pixels))
    monkeypatch.setattr(pictures, "LIMIT", int(limit * 2 * pixels))
    monkeypatch.setattr(pictures, "REDUCED", 100)
    picture = load_image(path)
    assert picture.image.size == (150, 100)
    assert picture.notes == ("has 600 × 400 pixels, and was read at 150 × 100",)
    difference = np.abs(_array(picture.image) - _array(photograph(0, 400).resize((150, 100), Image.Resampling.BOX)))
    assert difference.mean() < 4


def test_announced_size_beyond_pillows_limit_is_no_warning(tmp_path: Path):
    Image.new("RGB", (16000, 6000), "red").save(tmp_path / "red.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_image(tmp_path / "red.jpg")
    assert picture.image.size == (8000, 3000)
    assert Image.MAX_IMAGE_PIXELS == pictures.LARGE


def test_16_bits_that_are_12_are_told(tmp_path: Path):
    Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / "scan.png")
    (note,) = load_image(tmp_path / "scan.png").notes
    assert f"no value above {int(GREY.max()) * 16} of 65535" in note


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.png": (lambda path: None, "there is no file"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "there is no file"),
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "empty.jpg": (Path.touch, "is empty"),
    "text.png": (lambda path: path.write_text("no picture"), "is not an image"),
    "phone.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "saved as JPEG first"),
    "thin.png": (lambda path: Image.new("RGB", (5000, 4)).save(path), "5000 × 4 pixels"),
    "wide.png": (lambda path: Image.new("1", (40000, 5000)).save(path), "more than the limit of 178 million"),
    "float.tif": (lambda path: Image.fromarray(GREY.astype(np.float32)).save(path), "without a defined range"),
    "nan.tif": (
        lambda path: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path),
        "without a defined range",
    ),
    "int.tif": (lambda path: Image.fromarray(GREY.astype(np.int32) * 999).save(path), "without a defined range"),
}
CUT = ["jpg", "png", "gif", "webp", "tif", "bmp"]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_told(name: str, tmp_path: Path):
    make, words = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ImageError, match=words) as told:
        load_image(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("suffix", CUT)
def test_truncated_pictures_are_told(suffix: str, share: float, tmp_path: Path):
    path = tmp_path / f"whole.{suffix}"
    PHOTO.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(ImageError, match=r"damaged|is not an image"):
        load_image(path)


@pytest.mark.parametrize("suffix", CUT)
def test_scrambled_pictures_are_read_or_told(suffix: str, tmp_path: Path):
    """Whatever bytes a file holds, it is a picture or a ImageError."""
    draw = np.random.default_rng(0)
    path = tmp_path / f"scrambled.{suffix}"
    PHOTO.resize((30, 20)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(40):
        bytes_ = whole.copy()
        bytes_[draw.integers(0, len(whole), 6)] = draw.integers(0, 256, 6)
        path.write_bytes(bytes_.tobytes())
        try:
            picture = load_image(path)
        except ImageError:
            continue
        assert picture.image.mode == "RGB"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_told(tmp_path: Path):
    PHOTO.save(tmp_path / "mine.png")
    (tmp_path / "mine.png").chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        load_image(tmp_path / "mine.png")


def test_one_bad_picture_does_not_lose_the_others(here: Path, capsys: pytest.CaptureFixture[str]):
    photograph(1).save("flower.jpg")
    Path("text.png").write_text("no picture")
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
    for words in ("text.png is not", "no file gone.png", "cut.png cannot", "is a folder", "is a URL"):
        assert sum(words in line for line in lines) == 1, words


def test_no_model_is_made_for_pictures_that_are_not_there(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("nrm_plugin.commands.explain.load", lambda *_, **__: pytest.fail("loaded"))
    explain("gone.png", *OWN, code=1)
    assert "no file gone.png" in capsys.readouterr().err


NAMES = ["$\\frac{$ 50% {0}.png", "中文.png", "new\nline.png", "b\udcffad.png", "-dash.png", "n" * 240 + ".png"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=["formula", "chinese", "line break", "no text", "dash", "long"])
def test_odd_names_of_files(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    PHOTO.save(name)
    code = 1 if len(name) > 200 else 0
    explain(*OWN, "--", name, code=code)
    printed = capsys.readouterr()
    if code:
        assert "File name too long" in printed.err
        return
    assert printed.err == ""
    written = (Path("nrm-explained") / f"{Path(name).stem}-relevance.safetensors").read_bytes()
    about = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["__metadata__"]
    assert about["image"].isprintable()
    explain(*OWN, "--", name)
    assert len(list(Path("nrm-explained").iterdir())) == 2


# -- files that are written -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_of_one_name_do_not_overwrite_each_other(fast: Path):
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


def test_the_same_question_replaces_its_answer_and_another_one_does_not(fast: Path):
    explain("china.png", *OWN)
    out = Path("nrm-explained")
    found, about = result(out / "china-relevance.safetensors")
    explain("china.png", *OWN)
    assert len(list(out.iterdir())) == 2
    again, about_again = result(out / "china-relevance.safetensors")
    assert about_again == about
    assert all(torch.equal(again[key], found[key]) for key in found)
    before = (out / "china-relevance.safetensors").read_bytes()
    other = int(result(out / "china-relevance.safetensors")[1]["target"]) ^ 1
    explain("china.png", *OWN, "--target", other)
    assert (out / "china-relevance.safetensors").read_bytes() == before
    assert result(out / "china-2-relevance.safetensors")[1]["target"] == str(other)
    photograph(1).save("china.png")
    explain("china.png", *OWN)
    assert (out / "china-relevance.safetensors").read_bytes() == before
    assert (out / "china-3-relevance.safetensors").exists()


@pytest.mark.parametrize("mine", ["china-relevance.png", "china-relevance.safetensors", "china-3.csv"])
def test_files_of_others_are_left_alone(mine: str, fast: Path):
    Path(mine).write_text("mine")
    before = Path("china.png").read_bytes()
    explain("china.png", *OWN, "--layer", "3", "--out", ".")
    assert Path(mine).read_text() == "mine"
    assert Path("china.png").read_bytes() == before
    assert Path("china-2-relevance.safetensors").exists()


@pytest.mark.parametrize("inside", ["", "deeper"], ids=["is a file", "below a file"])
def test_folder_that_cannot_be_written_is_known_before_a_model_is_made(
    inside: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("nrm_plugin.commands.explain.load", lambda *_, **__: pytest.fail("loaded"))
    Path("taken").write_text("mine")
    line = fails(capsys, "explain", "china.png", *OWN, "--out", Path("taken") / inside)
    assert "taken" in line
    assert "--out DIR" in line


def test_disk_that_fills_up_is_told_for_each_picture(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(figure, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("nrm_plugin.commands.output_files.save", full)
    explain("china.png", *OWN, code=1)
    assert "china.png: No space left on device" in capsys.readouterr().err


# -- conditions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("features.28[3,7]", at("features.28").channel([3, 7])),
        ("a[ 3 , 5:8,5 ]", at("a").channel([3, 5, 6, 7])),
        ("a", at("a")),
        ("relu:1[2]", at("relu:1").channel([2])),
        ("my-layer_2.x[0]", at("my-layer_2.x").channel([0])),
        ("~a[1]", ~at("a").channel([1])),
        ("~~a", at("a")),
        ("a&b|c", (at("a") & at("b")) | at("c")),
        ("a|b&c", at("a") | (at("b") & at("c"))),
        ("(a | b) & ~c[1]", (at("a") | at("b")) & ~at("c").channel([1])),
        ("~(a&b)", ~(at("a") & at("b"))),
        ("~a&b", ~at("a") & at("b")),
        ("~ABSORBED & a", ~ABSORBED & at("a")),
    ],
)  # fmt: skip
def test_conditions_mean_what_they_mean_in_python(text: str, event):
    assert parse(text).event == event


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the name of a layer at character 1, got the end"),
        ("  ", "got the end"),
        ("a[3", "expected ']' after the channels at character 4, got the end"),
        ("a[]", "expected channels such as 3,7 or 10:20 in the brackets at character 2"),
        ("a[3,]", "got ''"),
        ("a[x]", "got 'x'"),
        ("a[-1]", "got '-1'"),
        ("a[1.5]", "got '1.5'"),
        ("a[9:3]", "a range that ends after its beginning"),
        ("a[99999999999]", "got '99999999999'"),
        ("a & ", "expected the name of a layer at character 5, got the end"),
        ("a & | b", "at character 5, got |"),
        ("a b", "expected '&' or '|' between two parts at character 3, got b"),
        ("(a", "expected ')'"),
        ("a)", "got )"),
        ("[3]", "expected the name of a layer at character 1, got ["),
        ("a[3][4]", "got ["),
        ("~" * 500 + "a", "inside each other"),
        ("(" * 500 + "a", "inside each other"),
        ("__import__('os')", "at character 11, got ("),
    ],
)  # fmt: skip
def test_what_is_no_condition_is_told_with_its_place(text: str, words: str):
    with pytest.raises(ConditionError) as told:
        parse(text)
    assert words in str(told.value)


GREY_NET = ("--model", "own_nets:Cancelling", "--size", "4", "--mean", "0", "--std", "1", "--composite", "epsilon_plus")


def test_condition_that_cancels_loses_only_its_own_map(here: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("L", (8, 8), 200).save("even.png")
    explain("even.png", *GREY_NET, "--given", "conv[0]", "--given", "conv[2]", "--given", "conv[1]", code=1)
    printed = capsys.readouterr()
    found, _ = result("nrm-explained/even-relevance.safetensors")
    assert {key for key in found if key.startswith("given")} == {
        *(f"given/{n}/mass" for n in (1, 2, 3)),
        "given/3/relevance",
    }
    torch.testing.assert_close(found["given/3/relevance"], torch.full((1, 4, 4), 1 / 16))
    torch.testing.assert_close(found["given/1/mass"], torch.tensor(0.0), rtol=0, atol=1e-6)
    assert Path("nrm-explained/even-given.png").exists()
    assert printed.out.count("not drawn") == 2
    problems = [line for line in printed.err.splitlines() if "even.png, --given" in line]
    assert len(problems) == 2
    assert "'conv[0]': positive and negative relevance cancel" in problems[0]
    assert "'conv[2]': no relevance goes this way" in problems[1]


def test_long_conditions_fit_above_a_picture():
    text = " & ".join(f"features.{number}[{','.join(map(str, range(9)))}]" for number in range(20))
    lines = wrapped(text).split("\n")
    assert len(lines) == 4
    assert max(map(len, lines)) <= 30


# -- models and options ---------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_measure(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["layers", "--model", "own_nets:make", "--size", "32"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    mu = RelevanceMeasure(own_net(), torch.randn(1, 3, SIZE, SIZE), 0)
    assert [line[0] for line in lines[1:]] == mu.layers
    by_name = {line[0]: line[1:] for line in lines}
    assert by_name["0"] == ["6×32×32", "Conv2d", "Flat"]
    assert by_name["3"] == ["8×14×14", "Conv2d", "ConservingEpsilon"]
    assert by_name["7"][0] == "4"


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_gamma_box", "beta_smooth", "guided_backprop"])
def test_layers_of_torchvisions_models_need_no_weights(composite: str, fast: Path, capsys):
    assert main(["layers", "--model", "resnet18", "--size", "33", "--composite", composite]) == 0
    printed = capsys.readouterr()
    assert "layer1.0.conv1" in printed.out
    assert "layer2.0.relu:0" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("name", sorted(COMPOSITES))
def test_every_composite_of_the_registry_is_taken_or_refused_in_one_line(name: str, fast: Path, capsys):
    argv = ["explain", "china.png", *OWN, "--composite", name]
    if name in ("beta_smooth", "deconvnet", "guided_backprop"):
        assert f"--composite {name} has no rule for" in fails(capsys, *argv)
    else:
        assert main(argv) == 0


def test_composite_that_needs_what_a_shell_cannot_give(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    class Needy(EpsilonPlusFlat):
        def __init__(self, low, wishes):
            super().__init__()

    monkeypatch.setitem(COMPOSITES, "needy", Needy)
    assert "needs wishes, which" in fails(capsys, "explain", "china.png", *OWN, "--composite", "needy")


@pytest.mark.parametrize(
    "spec", ["own_nets:ready", "own_nets:Net", "own_nets.py:make", "sub/other_nets.py:make", "sub.inner:make"]
)
def test_own_models_are_found(spec: str, fast: Path):
    Path("sub").mkdir()
    for name in ("other_nets.py", "inner.py"):
        Path("sub", name).write_text(NETS)
    before = list(sys.path)
    explain("china.png", "--model", spec, "--size", SIZE)
    assert sys.path == before
    found, about = result("nrm-explained/china-relevance.safetensors")
    assert about["model"] == spec
    if spec != "own_nets:Net":
        torch.testing.assert_close(found["outputs"], own_net()(prepared(PHOTO))[0], rtol=1e-2, atol=2e-3)
    for name in ("sub", "sub.inner"):
        sys.modules.pop(name, None)


def test_own_model_takes_weights_of_a_file(fast: Path):
    state = {key: value * 2 for key, value in own_net().state_dict().items()}
    safetensors.torch.save_file({f"model.{key}": value for key, value in state.items()}, "mine.safetensors")
    explain("china.png", *OWN, "--weights", "mine.safetensors")
    net = own_net()
    net.load_state_dict(state)
    found, _ = result("nrm-explained/china-relevance.safetensors")
    torch.testing.assert_close(found["outputs"], net(prepared(PHOTO))[0], rtol=1e-2, atol=2e-2)


def test_classes_of_a_file_name_targets(fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("names.txt").write_text("temple\nred  flower\ncat\ncat\n\n")
    explain("china.png", *OWN, "--classes", "names.txt", "--target", "Red Flower")
    assert result("nrm-explained/china-relevance.safetensors")[1]["target"] == "1"
    assert "1 red flower" in capsys.readouterr().out
    assert "[2, 3]" in fails(capsys, "explain", "china.png", *OWN, "--classes", "names.txt", "--target", "cat")
    line = fails(capsys, "explain", "china.png", *OWN, "--classes", "names.txt", "--target", "tempel")
    assert "Near names: temple (0)" in line


def test_random_weights_are_told_and_repeatable(fast: Path, capsys: pytest.CaptureFixture[str]):
    argv = ("china.png", "--model", "squeezenet1_1", "--weights", "none", "--size", "48")
    state = torch.get_rng_state()
    explain(*argv)
    assert torch.equal(torch.get_rng_state(), state)
    assert "warning: squeezenet1_1 has random weights" in capsys.readouterr().err
    first, _ = result("nrm-explained/china-relevance.safetensors")
    explain(*argv)
    again, _ = result("nrm-explained/china-relevance.safetensors")
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_without_a_connection_the_way_out_is_told(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(here))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    line = fails(capsys, "explain", "china.png", "--model", "squeezenet1_1")
    url = get_model_weights("squeezenet1_1").DEFAULT.url
    assert f"Download {url}" in line
    assert f"--weights {url.rpartition('/')[2]}" in line
    assert "--weights none" in line
    folder = here / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / url.rpartition("/")[2]).write_text("half a file")
    assert "Delete it" in fails(capsys, "explain", "china.png", "--model", "squeezenet1_1")


def _pickled(path: str) -> None:
    torch.save(nn.Linear(1, 1), path)


FILES: dict[str, tuple[Callable[[str], object], str]] = {
    "gone.pth": (lambda path: None, "no file gone.pth"),
    "folder": (os.mkdir, "folder is a folder"),
    "model.pth": (_pickled, "torch.save(model.state_dict(), FILE)"),
    "text.pth": (lambda path: Path(path).write_text("text"), "cannot be read as weights"),
    "empty.pt": (lambda path: Path(path).touch(), "cannot be read as weights"),
    "text.safetensors": (lambda path: Path(path).write_text("text" * 9), "cannot be read as weights"),
    "list.pth": (lambda path: torch.save([1, 2], path), "holds a list"),
    "other.pth": (lambda path: torch.save({"epoch": 1, "lr": 2}, path), "its keys are epoch, lr"),
    "resnet.pth": (lambda path: torch.save(resnet18().state_dict(), path),
                   "52 entries of squeezenet1_1 are missing (features.0.weight, features.0.bias"),
    "part.pth": (lambda path: torch.save({"features.0.weight": torch.zeros(1)}, path),
                 "51 entries of squeezenet1_1 are"),
    "plain.pkl": (lambda path: Path(path).write_bytes(pickle.dumps({"a": 1})), "no file of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_hold_no_weights_of_the_model(name: str, fast: Path, capsys: pytest.CaptureFixture[str]):
    make, words = FILES[name]
    make(name)
    assert words in fails(capsys, "explain", "china.png", "--model", "squeezenet1_1", "--weights", name)


RANDOM = ("--model", "squeezenet1_1", "--weights", "none", "--size", "48")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model"),
        (["--model", "vgg61"], "Near names: vgg"),
        (["--model", "VGG-16"], "vgg16"),
        (["--model", "fcn_resnet50"], "made for segmentation"),
        (["--model", "fasterrcnn_resnet50_fpn"], "made for object detection"),
        (["--model", "r3d_18"], "made for video"),
        (["--model", "quantized_resnet18"], "is quantized"),
        (["--model", ""], "no classification model ''"),
        (["--model", "vgg16", "--weights", "IMAGENET1K_V2"], "It has IMAGENET1K_V1, IMAGENET1K_FEATURES"),
        (["--model", "vgg16", "--weights", "imagenet1k_v1"], "neither a file nor weights of vgg16"),
        (["--model", "no_such_module:make"], "no module 'no_such_module'"),
        (["--model", "own_nets:mak"], "Near names: make"),
        (["--model", "own_nets:"], "has no ''"),
        (["--model", ":make"], "lacks the module"),
        (["--model", "gone.py:make"], "no file gone.py"),
        (["--model", "own_nets:broken"], "RuntimeError: no data here (own_nets.py, line"),
        (["--model", "own_nets:needs"], "cannot be called without arguments: missing a required argument: 'size'. W"),
        (["--model", "own_nets:needs(3)"], "write a function that passes them"),
        (["--model", "own_nets.py"], "own_nets.py:NAME"),
        (["--model", "own_nets:number"], "returned int"),
        (["--model", "own_nets:word"], "is str, neither"),
        (["--model", "own_nets:Map", "--size", "8"], "Explained are classifiers"),
        (["--model", "own_nets:grey", "--size", "32"], "fails on an input of 1×3×32×32"),
        ([*RANDOM, "--size", "0"], "--size"),
        ([*RANDOM, "--size", "big"], "--size"),
        ([*RANDOM, "--size", "5"], "fails on an input of 1×3×5×5"),
        ([*RANDOM, "--mean", "1,2"], "--mean"),
        ([*RANDOM, "--mean", "a,b,c"], "--mean"),
        ([*RANDOM, "--mean", "0.5"], "--mean and --std take three numbers"),
        ([*RANDOM, "--mean", "0.5", "--std", "1,1,1"], "--mean and --std take three numbers"),
        ([*RANDOM, "--std", "1,0,1"], "must be positive"),
        ([*RANDOM, "--target", "1000"], "has 1000 classes, 0 to 999"),
        ([*RANDOM, "--target", "-1"], "0 to 999"),
        ([*RANDOM, "--target", "tabby"], "--classes FILE"),
        ([*RANDOM, "--target", ""], "--classes FILE"),
        ([*RANDOM, "--layer", "features.77"], "Near names: features."),
        ([*RANDOM, "--layer", "feature.12"], "Near names: features.12,"),
        ([*RANDOM, "--layer", ""], "no layer ''"),
        ([*RANDOM, "--given", "features.77[1]"], "Near names: features."),
        ([*RANDOM, "--given", "features.0[64]"], "index 64 is out of bounds"),
        ([*RANDOM, "--given", "features.0["], "is no condition"),
        ([*RANDOM, "--channels", "0"], "--channels"),
        ([*RANDOM, "--composite", "epsilon_plus_flag"], "Did you mean epsilon_plus_flat"),
        ([*RANDOM, "--residual", "drop"], "--residual"),
        ([*RANDOM, "--gain-limit", "0.5"], "--gain-limit"),
        ([*RANDOM, "--gain-limit", "nan"], "--gain-limit"),
        ([*RANDOM, "--gain-limit", "2", "--residual", "sink"], "no meaning"),
        ([*RANDOM, "--device", "gpu"], "--device gpu cannot be used"),
        ([*RANDOM, "--classes", "gone.txt"], "cannot read --classes gone.txt"),
        ([*RANDOM, "--classes", "china.png"], "no text in UTF-8"),
        ([*RANDOM, "--out"], "--out"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_options_take_one_line(argv: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert words in fails(capsys, "explain", "china.png", *argv)


def test_a_syntax_error_tells_its_place_once(here: Path, capsys: pytest.CaptureFixture[str]):
    line = fails(capsys, "explain", "china.png", "--model", "wrong.py:make")
    assert line.endswith("importing wrong.py failed: SyntaxError: invalid syntax (wrong.py, line 1)")


def test_module_that_misses_another_is_not_taken_for_missing(here: Path, capsys: pytest.CaptureFixture[str]):
    Path("other_nets.py").write_text("import no_such_module_either\n")
    line = fails(capsys, "explain", "china.png", "--model", "other_nets:make")
    assert "importing other_nets failed" in line
    assert "no_such_module_either" in line


def test_calls_of_a_layer_are_listed(fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("own_nets.py").write_text(NETS + (
        "\nclass Twice(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.act = nn.Linear(4, 4), nn.ReLU()\n        self.b = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n        x = self.act(self.a(x.mean(1).flatten(1)))\n"
        "        return self.b(self.act(self.a(x)))\n"
    ))  # fmt: skip
    argv = ["explain", "china.png", "--model", "own_nets:Twice", "--size", "2"]
    assert "called 2 times. Say which call: act:0, act:1" in fails(capsys, *argv, "--layer", "act")
    assert main([*argv, "--layer", "act:1", "--given", "a:0"]) == 0


def test_help_shows_commands_that_parse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["explain", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    import shlex

    from nrm_plugin.commands.cli import _parser

    shown = [line.strip() for line in text.splitlines() if line.startswith("  nrm-plugin ")]
    assert len(shown) == 7
    for line in shown:
        _parser().parse_args(shlex.split(line)[1:])


def test_subjects_are_left_in_evaluation_mode_and_float32(here: Path):
    subject = models.load("own_nets:make")
    assert not subject.model.training
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float32}
