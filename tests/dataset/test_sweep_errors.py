"""Sweeps of what cannot be swept, stored or read: each ends with an error that says why, and what there was is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from nrm_plugin import at
from nrm_plugin.dataset import Activation, Maps, Marginal, Sweep, SweepError, sweep
from nrm_plugin.dataset import runner as running
from nrm_plugin.dataset.crops import crops
from nrm_plugin.dataset.examples import FoundReferences, ReferencesError
from nrm_plugin.dataset.image_folder import PictureFolder
from nrm_plugin.dataset.maximization import find_references
from nrm_plugin.dataset.preprocessing import STANDARD, preparation
from nrm_plugin.dataset.settings import described
from nrm_plugin.dataset.sweep_layout import ShardError
from nrm_plugin.errors import InputError, NRMError, UnknownLayerError
from tests.dataset.sweep_nets import OPTIONS, Data, net


class Shaped(nn.Module):
    """A linear net whose outputs are given another form."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.linear, self.form = nn.Flatten(), nn.Linear(3 * 12 * 12, 4), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.linear(self.flat(x)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(3, 12, 12), 0)] * 4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "engine": ({"engine": "spark"}, ValueError, "engine='spark' is unknown; choose 'local' or 'ray'"),
    "on_error": ({"on_error": "ignore"}, ValueError, "on_error='ignore' is unknown"),
    "target of another number": ({"target": lambda batch: [0, 1, 2]}, NRMError, "3 targets|target"),
    "inputs of other samples": ({"unpack": lambda batch: (batch[0][:2], None)}, SweepError, "inputs of 2"),
    "an unknown layer": ({"queries": Activation("nope")}, UnknownLayerError, "'nope'"),
    "activation at an input": ({"queries": Activation(at("4", side="input"))}, SweepError, "that a module returns"),
    "activation of no such call": ({"queries": Activation(at("4", call=3))}, SweepError, "is called 1 times"),
    "a name of two lines": ({"queries": lambda: Marginal("4", name="a\nb")}, SweepError, "one line of text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused(name: str, tmp_path):
    changed, error, said = REFUSED[name]
    options = {**OPTIONS, **changed}
    queries = options.pop("queries", Marginal("4"))
    with pytest.raises(error, match=said):
        sweep(net(), Data(4), queries() if callable(queries) else queries, tmp_path, **options)


def test_outputs_that_no_prediction_can_be_made_of(tmp_path):
    with pytest.raises(SweepError, match=r"needs outputs \(N, classes\), got \(4, 2, 2\)"):
        sweep(Shaped(lambda y: y.unflatten(1, (2, 2))).eval(), Data(4), Marginal("linear"), tmp_path, **OPTIONS)
    with pytest.raises(SweepError, match="output has nan or inf entries"):
        sweep(Shaped(lambda y: y / 0).eval(), Data(4), Marginal("linear"), tmp_path / "b", **OPTIONS)


def test_an_output_of_one_number_is_one_group(tmp_path):
    """All relevance is there."""
    model = Shaped(lambda y: y.sum(1)).eval()
    queries = [Marginal("output"), Maps("output"), Activation("output")]
    stored = sweep(model, Data(4), queries, tmp_path, target=lambda b: None, **OPTIONS)
    seen = stored.rows(Activation("output").name)["value"].to_pylist()
    assert seen == pytest.approx(model(Data(4).x).tolist(), rel=1e-5)
    assert stored.rows(Marginal("output").name)["value"].to_pylist() == pytest.approx([1] * 4)
    torch.testing.assert_close(stored.maps(Maps("output").name, range(4)).reshape(-1), torch.ones(4))
    assert set(stored.rows()["prediction"].to_pylist()) == {-1}


def test_a_stream_is_not_shared_out(tmp_path, monkeypatch):
    loader = DataLoader(Stream(), batch_size=2)
    with pytest.raises(SweepError, match="the loader hands out batches of 2"):
        sweep(net(), loader, Marginal("4"), tmp_path, batch_size=3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SweepError, match="iterable data set cannot be shared out"):
        sweep(net(), loader, Marginal("4"), tmp_path)


def test_a_place_that_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match=r"cannot write to .*file.*Name another folder"):
        sweep(net(), Data(4), Marginal("4"), tmp_path / "file" / "swept", **OPTIONS)


def test_rows_are_kept_where_they_cannot_be_sorted(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_index", full)
        with pytest.raises(SweepError, match=r"cannot be sorted there: No space left.*index=False"):
            sweep(net(), Data(4), Marginal("4"), tmp_path, **OPTIONS)
    assert len(Sweep.open(tmp_path).rows()) == 4 * 8
    assert sweep(net(), Data(4), Marginal("4"), tmp_path, **OPTIONS).is_complete


# -- samples that fail -------------------------------------------------------------------------------------------------


def test_an_error_of_a_batch_that_no_sample_has_alone_is_raised_as_it_is(tmp_path):
    def together(batch):
        if len(batch[0]) > 1:
            raise InputError("too many at once")
        return batch

    with pytest.raises(InputError, match="too many at once"):
        sweep(net(), Data(8), Marginal("4"), tmp_path, unpack=together, on_error="skip", **OPTIONS)


def test_a_batch_of_which_every_sample_fails_is_left_out(tmp_path):
    def wrong(batch):
        if float(batch[0].sum()) in wanted:
            raise InputError("not these")
        return batch

    data = Data(8)
    wanted = {float(data.x[k : k + 1].sum()) for k in range(4)} | {float(data.x[:4].sum())}
    stored = sweep(net(), data, Marginal("4"), tmp_path, unpack=wrong, on_error="skip", **OPTIONS)
    assert [entry["sample"] for entry in stored.manifest.failed] == [0, 1, 2, 3]
    assert set(stored.rows()["sample"].to_pylist()) == {4, 5, 6, 7}


def test_samples_that_no_batch_can_be_made_of_are_left_out(tmp_path):
    def collate(samples):
        raise ValueError("no batch today")

    loader = DataLoader(Data(4), batch_size=4, collate_fn=collate)
    stored = sweep(net(), loader, Marginal("4"), tmp_path, on_error="skip", shard=8, progress=False)
    assert [entry["sample"] for entry in stored.manifest.failed] == [0, 1, 2, 3]
    assert "no batch today" in stored.manifest.failed[0]["why"]
    assert len(stored.rows()) == 0


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "swept"
    sweep(net(), Data(16), [Marginal("4"), Maps("input", over="position")], folder, **OPTIONS)
    return folder


@pytest.fixture
def swept(made, tmp_path):
    return shutil.copytree(made, tmp_path / "swept")


def again(folder):
    return sweep(net(), Data(16), [Marginal("4"), Maps("input", over="position")], folder, **OPTIONS)


def test_a_shard_under_the_number_of_another_is_told(swept):
    shutil.copy(swept / "rows/part-0000-000000.parquet", swept / "rows/part-0000-000001.parquet")
    with pytest.raises(ShardError, match=r"holds samples 0 to 7, expected \(8, 15\)"):
        again(swept)


def test_maps_of_fewer_samples_than_rows_are_told(swept):
    path = swept / "maps/part-0000-000001.safetensors"
    save_file({name: tensor[:5].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ShardError, match=r"holds 5 samples, and not those of part-0000-000001\.parquet"):
        again(swept)


def test_a_shard_with_other_parts_than_it_lists_is_told(swept):
    path = swept / "rows/part-0000-000000.parquet"
    table, said = parquet.read_table(path), json.loads(parquet.read_metadata(path).metadata[b"nrm-plugin"])
    with parquet.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"nrm-plugin": json.dumps({**said, "chunks": [*said["chunks"], ["x", 0, 0]]})})
    with pytest.raises(ShardError, match="its parts are not those that it lists"):
        Sweep.open(swept).rows()


def test_a_manifest_of_another_format_is_told(swept):
    said = json.loads((swept / "manifest.json").read_text())
    (swept / "manifest.json").write_text(json.dumps(said | {"format": "nrm-plugin sweep 99"}))
    with pytest.raises(SweepError, match="is of another format than 'nrm-plugin sweep 1'"):
        Sweep.open(swept)


def test_a_sweep_says_what_it_is_and_what_it_cannot(swept):
    stored = Sweep.open(swept)
    assert repr(stored) == f"Sweep({str(swept)!r}, complete, 2 queries)"
    with pytest.raises(SweepError, match=r"has maps and no rows; read them with maps\(\)"):
        stored.top(Maps("input", over="position").name)
    with pytest.raises(ValueError, match="on_error='ignore' is unknown"):
        Sweep.open(swept, on_error="ignore")


# -- references --------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that are called twice, never, and return two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair, self.head = nn.ReLU(), nn.ReLU(), nn.LSTM(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(x) + 1) + self.pair(x[None])[0][0])


BATCH = [(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)]


@pytest.mark.parametrize(
    ("layer", "said"),
    [("twice", "is called more than once"), ("never", "was not called"), ("pair", "returns no tensor")],
)
def test_a_layer_without_one_activation_is_refused(layer, said):
    with pytest.raises(InputError, match=f"'{layer}' {said}"):
        find_references(Odd().eval(), BATCH, [layer], by=["activation"])


def test_what_cannot_be_ranked_is_told():
    three = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).eval()
    with pytest.raises(InputError, match=r"classifiers with an output \(N, classes\), got \(6, 2, 2\)"):
        find_references(three, BATCH, ["0"])

    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(len(x))[:, None] == 2, torch.inf, x)

    broken = nn.Sequential(nn.Linear(3, 4), Infinite(), nn.Hardtanh(), nn.Linear(4, 2)).eval()
    with pytest.raises(ReferencesError, match="activation of '1' is not finite in sample 2"):
        find_references(broken, BATCH, ["1"], by=["activation"])


def test_references_say_what_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    found = find_references(model, BATCH, ["0"], k=2)
    assert repr(found.of("0")) == "References('0' by relevance, 4 groups × 2)"
    assert repr(found.of("0", target=1)) == "References('0' by relevance, 4 groups × 2, target 1)"
    save_file({"x": torch.zeros(1)}, tmp_path / "x", {"nrm-plugin": '{"format": "another"}'})
    with pytest.raises(ReferencesError, match="its format is 'another'"):
        FoundReferences.load(tmp_path / "x")


def test_a_group_without_references_has_no_crops():
    model = net()
    data = Data(4)
    found = find_references(model, [(data.x, torch.zeros(4, dtype=torch.long))], ["4"], k=2, target="label")
    none = found.of("4", target=0)
    none.samples[3] = -1
    made = crops(model, data, none, [3, 2], 1)
    assert made[3] == []
    assert len(made[2]) == 1


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_folder_without_pictures_is_told(tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(SweepError, match=r"there is no picture in .*looked for \.bmp, \.gif"):
        PictureFolder(tmp_path, preparation(STANDARD))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_tell_objects_that_do_something_else():
    assert described({"a", "b", "c"}) == described({"c", "b", "a"}) != described({"a", "b"})
    assert described({"x": torch.arange(3)}) == described({"x": torch.arange(3)})
    assert described(torch.arange(3)) != described(torch.arange(3).float())
    assert described(torch.arange(3)) != described(torch.arange(3) + 1)
    assert described(torch.arange(4)) != described(torch.arange(4).reshape(2, 2))

    def closing_over(value):
        def recursive(x):
            return recursive if x else value

        return recursive

    assert described(closing_over(1)) == described(closing_over(1)) != described(closing_over(2))
