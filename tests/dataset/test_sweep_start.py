"""Resumed sweeps: with equal settings, results are bitwise equal; a changed setting is rejected by name.

Covers: nrm_plugin.dataset.model_identity.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from zennit.composites import EpsilonPlusFlat

from nrm_plugin import NRMDefault
from nrm_plugin.dataset import Joint, Maps, Marginal, Sink, Sweep, SweepError, sweep
from nrm_plugin.dataset.fingerprints import digest
from nrm_plugin.dataset.model_identity import model_fingerprint
from nrm_plugin.dataset.sweep_layout import SettingsError
from nrm_plugin.dataset.sweep_settings import SettingsWarning
from tests.dataset.edited_source import edited_module
from tests.dataset.sweep_nets import contents

SOURCE = """
import torch
from torch import nn
from torch.utils.data import Dataset

SCALE = 1.0


def squashed(x):
    return torch.relu(x) * SCALE


class Base(nn.Module):
    def head(self, x):
        return self.last(x.flatten(1))


class Net(Base):
    power = 1

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(36, 3)
        self.shift, self.act = 0.0, squashed
        self.table = [torch.ones(1)]

    def forward(self, x):
        hidden = self.act(self.first(x)) ** self.power  # a comment
        return self.head(hidden * self.table[0] + self.shift)


class Images(Dataset):
    def __init__(self):
        self.x = torch.rand(12, 1, 5, 5, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] - 0.5, index % 3


def unpack(batch):
    return batch[0].exp() - 1, batch[1]


def target(batch):
    return batch[1]
"""
QUERIES = [Marginal("first"), Joint("first", "input"), Sink("first"), Maps("input", over="position")]
OPTIONS: dict[str, Any] = {"batch_size": 2, "shard": 4, "progress": False}


def given(*edits: tuple[str, str]) -> dict[str, Any]:
    """The arguments of a sweep whose source was edited."""
    names = edited_module("users_own", SOURCE, *edits)
    torch.manual_seed(0)
    model = names.Net().eval()
    return {"model": model, "data": names.Images(), "queries": QUERIES, "target": names.target, "unpack": names.unpack}


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    arguments = given()
    change(arguments)
    return arguments


def with_state(name: str, value: Any) -> dict[str, Any]:
    return changed(lambda arguments: setattr(arguments["model"], name, value))


def with_one(place: tuple[int, ...]) -> dict[str, Any]:
    def change(arguments: dict[str, Any]) -> None:
        arguments["data"].x[place] += 1e-6

    return changed(change)


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "forward": (lambda: given(("+ self.shift", "- self.shift")), r"model\.code\.users_own\.Net"),
    "method of a base class": (lambda: given(("return self.last(", "return -self.last(")), r"users_own\.Base"),
    "function that forward calls": (lambda: given(("torch.relu(x)", "torch.sigmoid(x)")), r"users_own\.squashed"),
    "constant of the module": (lambda: given(("SCALE = 1.0", "SCALE = 1.5")), r"users_own\.squashed"),
    "constant of the class": (lambda: given(("power = 1", "power = 2")), r"users_own\.Net"),
    "attribute": (lambda: with_state("shift", 0.25), r'model\.attributes\.shift \(was "0\.0", now "0\.25"\)'),
    "tensor in a list": (lambda: with_state("table", [torch.ones(1) * 2]), r"model\.attributes\.table"),
    "function as attribute": (lambda: with_state("act", torch.tanh), r"model\.attributes\.act"),
    "hook": (
        lambda: changed(lambda arguments: arguments["model"].first.register_forward_hook(lambda *call: call[2] * 2)),
        r"model\.attributes",
    ),
    "weight": (lambda: changed(lambda arguments: arguments["model"].last.weight.data[0, 0].add_(1)), r"model\.tensors"),
    "attribute of torch's module": (
        lambda: changed(lambda arguments: setattr(arguments["model"].first, "padding_mode", "circular")), "model"
    ),
    "unpack": (lambda: given((".exp()", ".tan()")), r"unpack"),
    "target function": (lambda: given(("return batch[1]", "return 2 - batch[1]")), r"target"),
    "target": (lambda: given() | {"target": 1}, r"target"),
    "composite": (lambda: given() | {"composite": EpsilonPlusFlat()}, r"composite\.name"),
    "rule": (lambda: given() | {"composite": NRMDefault(epsilon=0.3)}, r"composite\.settings"),
    "residual": (lambda: given() | {"residual": "sink"}, r'residual \(was "redistribute", now "sink"\)'),
    "gain limit": (lambda: given() | {"gain_limit": 3.0}, r"gain_limit \(was 2\.0, now 3\.0\)"),
    "seed": (lambda: given() | {"seed": 1}, r"seed \(was 0, now 1\)"),
    "queries": (lambda: given() | {"queries": QUERIES[1:]}, r"queries\.marginal\(first\) \(removed\)"),
    "layer": (lambda: given() | {"queries": [*QUERIES, Sink("last")]}, r"queries\.sink\(last\) \(added\)"),
    "pixel of a stored sample": (lambda: with_one((3, 0, 2, 2)), r"the data changed: sample 3 differs"),
    "code of the dataset": (lambda: given(("- 0.5", "- 0.4")), r"the data changed: sample 0 and \d+ more differs"),
    "labels": (lambda: given(("index % 3", "(index + 1) % 3")), r"the data changed: sample 0"),
    "length": (lambda: given(("rand(12", "rand(13")), r"samples \(was 12, now 13\)"),
    "precision": (lambda: changed(lambda arguments: arguments["model"].double()), r"dtype"),
}  # fmt: skip
SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": given,
    "comments and lines": lambda: given(("  # a comment", "  # another\n"), ("class Net", "\n\nclass Net")),
    "docstring": lambda: given(("def forward(self, x):", 'def forward(self, x):\n        """Runs."""')),
    "a function that is not called": lambda: given(("def unpack", "def unused():\n    return 1\n\n\ndef unpack")),
    "another loader of the same data": lambda: given() | {"num_workers": 0},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    sweep(out=folder, **given(), **OPTIONS)
    return folder


@pytest.fixture(params=["partial", "finished"])
def stored(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> Path:
    """A copy of a sweep; if it is partial, its second shard is missing."""
    folder = shutil.copytree(finished, tmp_path / "swept")
    if request.param == "partial":
        for path in folder.rglob("*part-0000-000001*"):
            path.unlink()
        shutil.rmtree(folder / "by-query")
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_rejected_by_name(name: str, stored: Path) -> None:
    make, message = CHANGES[name]
    before = {path: path.read_bytes() for path in stored.rglob("part-*")}
    with pytest.raises(SettingsError, match=message):
        sweep(out=stored, **OPTIONS, **make())
    assert {path: path.read_bytes() for path in stored.rglob("part-*")} == before
    sweep(out=stored, **OPTIONS, **given())  # the rejected call left nothing behind


@pytest.mark.parametrize("name", SAME)
def test_the_same_continues_bit_equal(name: str, stored: Path, finished: Path) -> None:
    assert sweep(out=stored, **OPTIONS, **SAME[name]()).is_complete
    assert contents(stored) == contents(finished)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_another_batch_size_continues_with_the_same_shards(batch_size: int, stored: Path, finished: Path) -> None:
    assert sweep(out=stored, **given(), **(OPTIONS | {"batch_size": batch_size, "shard": 100})).is_complete
    (rows, maps), (wanted, wanted_maps) = contents(stored), contents(finished)
    assert rows.keys() == wanted.keys()
    assert [row[2] for row in rows.values()] == pytest.approx([wanted[key][2] for key in rows], abs=1e-6)
    assert torch.allclose(*(torch.tensor([one[key] for key in maps]) for one in (maps, wanted_maps)), atol=1e-6)
    assert len(list(stored.glob("rows/*.parquet"))) == 3


def test_a_pixel_of_a_sample_without_results_is_no_change(stored: Path) -> None:
    is_partial = len(list(stored.glob("rows/part-*"))) == 2
    with nullcontext() if is_partial else pytest.raises(SettingsError, match="sample 5"):
        assert sweep(out=stored, **OPTIONS, **with_one((5, 0, 0, 0))).is_complete


@pytest.mark.medium
def test_pixels_of_tensors_in_memory_are_compared(tmp_path: Path) -> None:
    x, model = torch.rand(6, 1, 5, 5), given()["model"]
    sweep(model, TensorDataset(x), QUERIES, tmp_path, **OPTIONS)
    assert sweep(model, TensorDataset(x.clone()), QUERIES, tmp_path, **OPTIONS).is_complete
    x[4, 0, 1, 1] = 0.9
    with pytest.raises(SettingsError, match=r"sample 4 differs from the one whose results are in"):
        sweep(model, TensorDataset(x), QUERIES, tmp_path, **OPTIONS)


@pytest.mark.medium
def test_a_sweep_of_a_former_version_is_continued_with_a_warning(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "former"
    sweep(out=folder, **given(), **OPTIONS)
    manifest = Sweep.open(folder).manifest
    settings = {key: value for key, value in manifest.settings.items() if key not in ("recorded", "preparation")}
    settings["model"] = {key: settings["model"][key] for key in ("class", "structure", "tensors")}
    settings["versions"] = {key: settings["versions"][key] for key in ("nrm-plugin", "torch", "zennit", "python")}
    for path in folder.rglob("*part-*"):
        path.unlink()
    shutil.rmtree(folder / "by-query")
    replace(manifest, settings=settings, fingerprint=digest(settings), state="running").write(folder)
    (folder / "rows/part-0000-000009.txt").touch()  # so that the manifest is not that of an attempt without results
    with pytest.warns(SettingsWarning, match="which did not record the code of the model"):
        sweep(out=folder, **given(), **OPTIONS)
    assert contents(folder) == contents(finished)
    with pytest.warns(SettingsWarning), pytest.raises(SettingsError, match="gain_limit"):
        sweep(out=folder, gain_limit=5.0, **given(), **OPTIONS)


def test_a_folder_that_is_a_link_to_elsewhere_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept/locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SweepError, match="is a link to a file outside of"):
        sweep(out=tmp_path / "swept", **given(), **OPTIONS)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_modules_of_torch_have_no_code_of_their_own() -> None:
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert model_fingerprint(first) == model_fingerprint(second)
    assert model_fingerprint(first)["code"] == {}
    assert list(model_fingerprint(first)["attributes"]) == ["(of installed modules)"]
    second[1].inplace = True
    assert model_fingerprint(first) != model_fingerprint(second)
