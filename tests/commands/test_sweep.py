"""The command `sweep`: input, stored results, messages and exit status.

Covers: nrm_plugin.commands.sweep_data, nrm_plugin.commands.sweep_run.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.dataset
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.commands import sweep_run
from nrm_plugin.commands.cli import main
from nrm_plugin.dataset import Manifest, Sweep
from nrm_plugin.dataset import image_folder as folders
from nrm_plugin.dataset.image_folder import PreprocessedImageFolder
from nrm_plugin.dataset.preprocessing import preprocessing
from tests.conftest import slow_but

NETS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def make():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )


def data():
    torch.manual_seed(4)
    return TensorDataset(torch.randn(7, 3, 16, 16), torch.arange(7) % 4)


def broken():
    raise OSError("no such disk")
"""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    made = torch.Generator().manual_seed(0)
    for number in range(10):
        folder = Path("photos", "cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 24, 3), generator=made, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    Path("photos/notes.txt").write_text("not an image")
    return Path("photos")


def run(*more, data="photos", layers=("3", "0"), out="swept", batch="4"):
    options = ["--model", "nets.py:make", "--size", "16", "--batch-size", batch, "--out", out]
    return main(["sweep", data, *options, "--layers", *layers, *more])


def stop_at(patch, number):
    """Ctrl-C while a sample is read."""
    plain = PreprocessedImageFolder.__getitem__

    def stopped(self, index):
        if index == number:
            raise KeyboardInterrupt
        return plain(self, index)

    patch.setattr(folders.PreprocessedImageFolder, "__getitem__", stopped)


@pytest.mark.medium
def test_a_folder_is_swept_and_the_numbers_are_those_of_the_measure(photos, capsys):
    assert run("--joint", "--activations", "--heat-maps", "--event", "3[1,2] & ~0[5]", "--target", "label") == 0
    printed = capsys.readouterr()
    assert "10 samples, 13 queries in swept" in printed.out
    assert "Traceback" not in printed.err
    stored = Sweep.open("swept")
    listed = list(csv.DictReader(Path("swept/samples.csv").read_text().splitlines()))
    assert [row["file"] for row in listed] == [f"cats/{k}.png" for k in (1, 3, 5, 7, 9)] + [
        f"dogs/{k}.png" for k in (0, 2, 4, 6, 8)
    ]
    assert stored.samples()["target"].to_pylist() == [0] * 5 + [1] * 5 == [int(row["label"]) for row in listed]
    names = {}
    exec(NETS, names)
    prepare = preprocessing(size=16)
    x = torch.cat([prepare(Image.open(photos / row["file"]).convert("RGB")) for row in listed])
    mu = RelevanceMeasure(names["make"]().eval(), x, [0] * 5 + [1] * 5)
    wanted = {
        "marginal(3)": mu.marginal("3", "channel"),
        "joint(3, 0)": mu.joint("3", "0"),
        "3[1,2] & ~0[5]": mu(at("3").channel([1, 2]) & ~at("0").channel(5)),
        "variation(0)": mu.variation("0"),
    }
    for name, values in wanted.items():
        rows = stored.rows(name).sort_by([("sample", "ascending"), ("group", "ascending"), ("lower", "ascending")])
        stored_values = torch.tensor(rows["value"].to_pylist()).reshape(values.shape)
        torch.testing.assert_close(stored_values, values, rtol=1e-4, atol=1e-6)
    maps = stored.maps("maps(input, over=position)", range(10))
    torch.testing.assert_close(maps, mu.marginal("input").sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.medium
def test_unreadable_images_are_listed_and_can_be_retried(photos, capsys):
    whole = (photos / "dogs/4.png").read_bytes()
    (photos / "dogs/4.png").write_bytes(whole[:90])
    assert run("--on-error", "raise", out="stopped") == 1
    assert "sample 7 cannot be read" in capsys.readouterr().err
    assert Sweep.open("stopped").manifest.state == "interrupted"
    assert run() == 3
    printed = capsys.readouterr()
    assert "9 samples" in printed.out
    assert "1 sample was skipped" in printed.err
    assert "sample 7" in printed.err
    assert "dogs/4.png" in printed.err
    assert run() == 3
    (photos / "dogs/4.png").write_bytes(whole)
    assert run("--retry-failed") == 0
    assert len(Sweep.open("swept").samples()) == 10


@pytest.mark.medium
def test_an_interrupt_exits_with_130_and_the_same_command_continues(photos, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert run() == 130
    assert "Run the same command to continue" in capsys.readouterr().err
    assert Sweep.open("swept").manifest.state == "interrupted"
    assert Path("swept/samples.csv").exists()
    assert run() == 0
    assert Sweep.open("swept").is_complete


BATCHES = {
    "larger": ("3", "4"),
    "none": ("32", "4"),
    "smaller": ("1", "3"),
    "one shard": ("4", "256"),
    "other": ("2", "4"),
}


@pytest.mark.medium
@pytest.mark.parametrize("sizes", slow_but(BATCHES, "larger", "one shard"))
def test_a_stopped_sweep_continues_with_another_batch_size(sizes, photos, monkeypatch):
    """Batches change float32 values by rounding only; shards keep their size, whatever the option."""
    batch, shard = BATCHES[sizes]
    assert run("--shard-size", "4", "--joint", out="whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert run("--shard-size", "4", "--joint") == 130
    kept = Path("swept/rows/part-0000-000000.parquet").read_bytes()
    assert run("--shard-size", shard, "--joint", batch=batch) == 0
    assert Path("swept/rows/part-0000-000000.parquet").read_bytes() == kept
    order = [(key, "ascending") for key in ("query", "sample", "group", "lower")]
    tables = [pyarrow.dataset.dataset(f"{out}/rows").to_table() for out in ("whole", "swept")]
    whole, resumed = (pyarrow.table(one.to_pydict()).sort_by(order) for one in tables)
    assert resumed.drop_columns(["value"]).equals(whole.drop_columns(["value"]))
    values = [torch.tensor(table["value"].to_pylist()) for table in (resumed, whole)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    names = {path.name for path in Path("whole/rows").glob("part-*")}
    assert {path.name for path in Path("swept/rows").glob("part-*")} == names


@pytest.mark.medium
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": ["nothing"]}, "no tap named 'nothing'"),
        ({"layers": ["0", "3"], "more": ["--joint"]}, "List --layers from the output to the input"),
        ({"more": ["--event", "3[1"]}, "is not an event"),
        ({"more": ["--target", "9x"]}, "are not known. Give the index, 0 to 3, or a file"),
        ({"more": ["--target", "4"]}, "--target 4 is out of range: the model has 4 classes, 0 to 3"),
        ({"more": ["--target=-1"]}, "--target -1 is out of range"),
        ({"more": ["--target", "+-1"]}, "is a name, but"),
        ({"more": ["--target", "9" * 30]}, "is out of range"),
        ({"data": "nowhere"}, "the folder nowhere does not exist"),
        ({"data": "nets.py"}, "nets.py is not a folder"),
        ({"data": ""}, "the name of the folder or dataset is empty"),
        ({"data": "nets.py:missing"}, "has no 'missing'"),
        ({"data": "nets.py:broken"}, "no such disk"),
        ({"more": ["--residual", "sink", "--gain-limit", "3"]}, "no effect"),
    ],
)
def test_options_that_do_not_fit_exit_with_2(given, says, photos, capsys):
    more = given.pop("more", [])
    assert run(*more, "--quiet", **given) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert run() == 0  # the mistake left nothing in the folder


@pytest.mark.medium
def test_a_model_without_parameters_is_swept(photos):
    edited("nets.py", "def make", "class Plain(nn.Module):\n    def forward(self, x):\n"
           "        return x.flatten(1)[:, :4] * 2\n\n\ndef make")  # fmt: skip
    assert main(["sweep", "photos", "--model", "nets.py:Plain", "--size", "16", "--layers", "input"]) == 0


@pytest.mark.medium
def test_results_of_other_queries_are_not_mixed(photos, capsys):
    assert run() == 0
    assert run("--activations") == 2
    assert "queries.activation(3) (added)" in capsys.readouterr().err
    assert run(layers=("3",)) == 2
    assert "queries.sink(0) (removed)" in capsys.readouterr().err
    (photos / "cats/1.png").rename(photos / "cats/2.png")
    assert run() == 2
    assert "data" in capsys.readouterr().err


def test_without_pyarrow_nothing_is_loaded(photos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert run("--weights", "nowhere.pth") == 2
    printed = capsys.readouterr()
    assert "this needs pyarrow: pip install 'nrm-plugin[dataset]'" in printed.err
    assert printed.out == ""


@pytest.mark.medium
def test_a_data_set_of_the_user(photos):
    assert run(data="nets.py:data") == 0
    assert len(Sweep.open("swept").samples()) == 7
    assert not Path("swept/samples.csv").exists()


def test_folders_named_as_classes_of_the_model_have_their_indices(photos):
    prepare = preprocessing(size=16)
    known = PreprocessedImageFolder(photos, prepare, ["fish", "Dogs", "cats"])
    assert known.labels == [2] * 5 + [1] * 5
    assert PreprocessedImageFolder(photos, prepare).labels == [0] * 5 + [1] * 5
    assert PreprocessedImageFolder(photos, prepare, ["class 1", "class 2"]).labels == [0] * 5 + [1] * 5
    assert PreprocessedImageFolder(photos, prepare, ["fish", "dogs"]).labels == [-1] * 5 + [1] * 5
    assert PreprocessedImageFolder(photos, prepare, ["a", "b", "c"]).labels == [-1] * 10
    assert PreprocessedImageFolder(photos / "cats", prepare).labels == [-1] * 5
    assert known[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize("options", [["--batch-size", "0"], ["--workers", "-1"], ["--workers", "two"]])
def test_invalid_numbers_are_rejected(options, capsys):
    with pytest.raises(SystemExit) as end:
        main(["sweep", "x", "--model", "vgg16", "--layers", "a", *options])
    assert end.value.code == 2
    assert "is not a number from" in capsys.readouterr().err


def test_of_many_failures_the_first_are_listed(tmp_path, capsys):
    failed = tuple({"sample": number, "why": "cut off"} for number in range(23))
    bad = ({"file": "rows/x", "why": "it was damaged"},)
    stored = Sweep(tmp_path, Manifest({}, "", (), "complete", 30, failed=failed, bad_shards=bad))
    assert sweep_run.print_skipped(stored) == sweep_run.SKIPPED
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("recomputed a damaged file: it was damaged")
    assert [line for line in lines if line.startswith("  sample")] == [f"  sample {k}: cut off" for k in range(20)]
    assert lines[-1] == f"  and 3 more, listed in {tmp_path / 'manifest.json'}"
    assert sweep_run.summary(stored) == f"7 samples, 0 queries in {tmp_path}"
    line = sweep_run.summary(Sweep(tmp_path, Manifest({}, "", (), "running")))
    assert line == f"This process has finished; others are still writing to {tmp_path}."


def edited(path, before, after):
    text = Path(path).read_text()
    assert before in text
    Path(path).write_text(text.replace(before, after))


def other_pixels(path):
    image = Image.open(path)
    image.putpixel((10, 10), (0, 0, 255))
    image.save(path)


OWN_CLASS = """class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


def make"""
PREPARED = {
    "mean": (lambda: ["--mean", "0.1,0.1,0.1"], "preparation.mean (was [0.485, 0.456, 0.406], now [0.1, 0.1, 0.1])"),
    "std": (lambda: ["--std", "0.5,0.5,0.5"], "preparation.std"),
    "size": (lambda: ["--size", "20"], "preparation.resize (was 16, now 20); preparation.size (was 16, now 20)"),
    "pixels": (lambda: other_pixels("photos/cats/3.png"), "the data changed: sample 1 differs"),
    "forward code": (lambda: edited("nets.py", "super().forward(x)", "2 * super().forward(x)"), "model.code.nets.Net"),
    "a file more": (lambda: other_copy(), "data"),
}


def other_copy():
    Path("photos/dogs/11.png").write_bytes(Path("photos/dogs/4.png").read_bytes())


@pytest.mark.medium
@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("state", ["partial", "finished"])
def test_a_change_is_rejected_by_name(name, state, photos, capsys):
    edited("nets.py", "return nn.Sequential(", "return Net(")
    edited("nets.py", "def make", OWN_CLASS)
    image, whole = Path("photos/dogs/4.png"), Path("photos/dogs/4.png").read_bytes()
    if state == "partial":
        image.write_bytes(whole[:90])
        assert run("--shard-size", "4", "--on-error", "raise") == 1
        image.write_bytes(whole)
        assert Sweep.open("swept").manifest.state == "interrupted"
    else:
        assert run("--shard-size", "4") == 0
    change, says = PREPARED[name]
    capsys.readouterr()
    options = change() or []
    sys.modules.pop("nets", None)
    assert run(*options) == 2
    assert says in capsys.readouterr().err


@pytest.mark.medium
def test_files_that_were_only_touched_are_no_change(photos):
    assert run() == 0
    os.utime("photos/cats/3.png", (1, 1))
    assert run() == 0


@pytest.mark.medium
def test_folders_that_are_not_classes_are_named_if_labels_are_explained(photos, capsys):
    Path("names.txt").write_text("dogs\ncat\nfish\nbirds\n")
    options = ("--classes", "names.txt")
    assert run(*options, "--target", "label") == 2
    printed = capsys.readouterr().err
    assert "not classes of the model: the subfolders cats (near 'cat') of photos" in printed
    assert run(*options) == 0
    assert Sweep.open("swept").manifest.samples == 10
    Path("names.txt").write_text("fish\ncats\nbirds\ndogs\n")
    assert run(*options, "--target", "label", out="labelled") == 0
    assert Sweep.open("labelled").samples()["target"].to_pylist() == [1] * 5 + [3] * 5


@pytest.mark.parametrize("data", ["photos", "nets.py:data"])
@pytest.mark.parametrize("count", [3, 5])
def test_class_names_must_be_as_many_as_outputs(count, data, photos, capsys):
    Path("names.txt").write_text("".join(f"class {number}\n" for number in range(count)))
    assert run("--classes", "names.txt", data=data) == 2
    assert f"there are {count} class names, but nets.py:make has 4 outputs" in capsys.readouterr().err
    command = ["explain", "photos/cats/1.png", "--model", "nets.py:make", "--size", "16", "--classes", "names.txt"]
    assert main([*command, "--out", "explained"]) != 0
    assert f"there are {count} class names" in capsys.readouterr().err


@pytest.mark.medium
def test_references_are_not_drawn_from_changed_images(photos, capsys):
    assert run() == 0
    command = ["references", "swept", "--query", "3", "--model", "nets.py:make", "--data", "photos", "--k", "2"]
    assert main([*command, "--size", "20"]) == 2
    assert "the preprocessing is not that of the sweep: resize (was 16, now 20)" in capsys.readouterr().err
    for path in Path("photos").rglob("*.png"):
        other_pixels(path)
    assert main([*command, "--size", "16"]) == 2
    assert "the data changed" in capsys.readouterr().err


HOSTILE = {
    "cmyk.jpg": lambda image: (image.convert("CMYK"), {}),
    "deep.png": lambda image: (Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), {}),
    "rotated.jpg": lambda image: (image, {"exif": _turned()}),
    "frames.gif": lambda image: (image, {"save_all": True, "append_images": [image.rotate(90)]}),
    "palette.png": lambda image: (image.convert("P", colors=9), {"transparency": 4}),
}


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.slow
def test_explain_and_sweep_read_hostile_files_alike(photos):
    image = Image.effect_noise((24, 18), 90).convert("RGB")
    image.paste((255, 0, 0), (0, 0, 9, 9))
    for name, make in HOSTILE.items():
        other, options = make(image)
        Path("hostile").mkdir(exist_ok=True)
        other.save(f"hostile/{name}", **options)
    assert run("--heat-maps", "--against", "rest", data="hostile") == 0
    listed = [row["file"] for row in csv.DictReader(Path("swept/samples.csv").read_text().splitlines())]
    assert sorted(listed) == sorted(HOSTILE)
    maps = Sweep.open("swept").maps("maps(input, over=position)", range(len(listed)))
    model = ["--model", "nets.py:make", "--size", "16", "--out", "explained"]
    assert main(["explain", *(f"hostile/{name}" for name in listed), *model]) == 0
    for name, swept in zip(listed, maps, strict=True):
        explained = load_file(f"explained/{Path(name).stem}-relevance.safetensors")["relevance"].sum(0)
        torch.testing.assert_close(swept, explained, rtol=1e-4, atol=1e-6)
        assert swept.abs().max() > 0
    assert len({tuple(one.flatten().tolist()) for one in maps}) == len(listed)
