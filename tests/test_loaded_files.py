"""Untrusted files: pickles do not run, names and links do not leave the folder, claimed sizes are checked."""

from __future__ import annotations

import base64
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights, squeezenet1_1

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands import torchvision_models
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.model_loading import load
from nrm_plugin.commands.output_files import json_stem
from nrm_plugin.commands.request import RequestError
from nrm_plugin.commands.resolved_options import class_names
from nrm_plugin.commands.weight_files import WeightsError, read_state
from nrm_plugin.dataset import Manifest, Maps, Marginal, Sweep, SweepError, sweep
from nrm_plugin.dataset.examples import FoundReferences, ReferencesError
from nrm_plugin.dataset.images import ImageError, load_image
from nrm_plugin.dataset.queries import from_json
from nrm_plugin.dataset.shard_writer import remove_unfinished
from nrm_plugin.dataset.sweep_layout import ShardError
from nrm_plugin.measure.flow import FlowError, FlowGraph
from nrm_plugin.measure.flow_heat_maps import flow_maps
from nrm_plugin.plots.flow_html import sankey
from tests.dataset.sweep_nets import OPTIONS, Data, net, write_sums

MAP = Maps("input", over="position")
MARGINAL = Marginal("4").name


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def write_numpy(bomb: Bomb, path: Path) -> None:
    with path.open("wb") as file:  # whatever the name ends in
        np.save(file, np.array([bomb], dtype=object), allow_pickle=True)


BOMBS: dict[str, Callable[[Bomb, Path], object]] = {
    "pickle": lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    "torch": torch.save,
    "old torch": lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
    "state dict": lambda bomb, path: torch.save({"weight": torch.zeros(1), "more": bomb}, path),
    "numpy": write_numpy,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    sweep(net(), Data(8), [Marginal("4"), MAP], folder / "swept", **OPTIONS)
    return folder


@pytest.fixture
def swept(made: Path, tmp_path: Path) -> Path:
    """A copy of the sweep in its own folder."""
    shutil.copytree(made / "swept", tmp_path / "swept")
    return tmp_path / "swept"


def from_hub(path: Path) -> None:
    """Loads weights as the command does if torch.hub has the file already."""
    url = get_model_weights("squeezenet1_1").DEFAULT.url
    there = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, there)
    load("squeezenet1_1")


def as_part_of_sweep(name: str, ask: Callable[[Sweep], object]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        folder = path.parent / "swept"
        (there,) = folder.glob(name)
        shutil.copy(path, there)
        ask(Sweep.open(folder))

    return read


def ask_maps(stored: Sweep) -> object:
    return stored.maps(MAP.name, [0])


def ask_top(stored: Sweep) -> object:
    return stored.top(MARGINAL, 0)


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "weights": (read_state, WeightsError),
    "safetensors": (lambda path: read_state(path.rename(path.with_suffix(".safetensors"))), WeightsError),
    "weights of torchvision": (from_hub, WeightsError),
    "references": (FoundReferences.load, ReferencesError),
    "flow graph": (FlowGraph.from_json, FlowError),
    "image": (load_image, ImageError),
    "names of classes": (class_names, RequestError),
    "manifest": (as_part_of_sweep("manifest.json", Sweep.rows), SweepError),
    "shard": (as_part_of_sweep("rows/*.parquet", Sweep.rows), ShardError),
    "maps": (as_part_of_sweep("maps/*.safetensors", ask_maps), ShardError),
    "index": (as_part_of_sweep("by-query/0000.parquet", ask_top), ShardError),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("name", READERS)
def test_pickles_do_not_run(name: str, kind: str, swept: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    read, error = READERS[name]
    BOMBS[kind](Bomb(tmp_path / "mark"), tmp_path / "file")
    with pytest.raises(error):
        read(tmp_path / "file")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", [*BOMBS, "a file of torch.hub"])
def test_the_pickles_would_run(kind: str, tmp_path: Path, monkeypatch):
    bomb, path = Bomb(tmp_path / "mark"), tmp_path / "file"
    BOMBS.get(kind, torch.save)(bomb, path)
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    elif kind == "numpy":
        np.load(path, allow_pickle=True)
    elif kind == "a file of torch.hub":  # what `load` would do without TORCH_FORCE_WEIGHTS_ONLY_LOAD
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torchvision_models, "FORCED", ("NO_SETTING_OF_TORCH",))
        with pytest.raises(Exception, match="state_dict"):
            from_hub(path)
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("value", [None, "1"])
def test_environment_variables_of_torch_are_restored(value: str | None, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in torchvision_models.FORCED:
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(torchvision_models.FORCED[1], value)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "file")
    from_hub(tmp_path / "file")
    assert [os.environ.get(name) for name in torchvision_models.FORCED] == [None, value]


@pytest.mark.filterwarnings("ignore:.*PyExtensionType")  # older versions of pyarrow warn that they ignore it
def test_pickles_in_parquet_metadata_do_not_run(swept: Path, tmp_path: Path):
    """pyarrow before 14.0.1 unpickled extension types from the metadata of a column."""
    (path,) = swept.glob("rows/*.parquet")
    before = Sweep.open(swept).rows().to_pylist()
    with parquet.ParquetFile(path) as file:
        groups, metadata = [file.read_row_group(at) for at in range(file.num_row_groups)], file.metadata.metadata
    schema = groups[0].schema
    extension = {"ARROW:extension:name": "arrow.py_extension_type"}
    extension["ARROW:extension:metadata"] = pickle.dumps(Bomb(tmp_path / "mark"))
    place = schema.get_field_index("value")
    schema = schema.set(place, schema.field("value").with_metadata(extension))
    with parquet.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(group.cast(schema), row_group_size=len(group))
        writer.add_key_value_metadata({"nrm-plugin": metadata[b"nrm-plugin"]})
    write_sums(path)
    assert b"arrow.py_extension_type" in base64.b64decode(parquet.read_metadata(path).metadata[b"ARROW:schema"])
    assert Sweep.open(swept).rows().to_pylist() == before
    assert not (tmp_path / "mark").exists()


def test_former_results_are_compared_and_not_run(tmp_path: Path):
    (tmp_path / "cat-flow.json").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert json_stem(tmp_path, "cat", ["flow.json"], set(), {}) == "cat-2"
    (tmp_path / "cat-flow.json").write_text("[" * 100_000)
    assert json_stem(tmp_path, "cat", ["flow.json"], set(), {}) == "cat-2"
    (tmp_path / "cat-flow.json").write_text('{"settings": {}}')
    assert json_stem(tmp_path, "cat", ["flow.json"], set(), {}) == "cat"
    assert not (tmp_path / "mark").exists()


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_compressed_file_of_weights_is_rejected(tmp_path: Path):
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert read_state(tmp_path / "plain.pth")["weight"].shape == (1000, 1000)
    with pytest.raises(WeightsError, match=r"compressed.*unpacks to 3\.8"):
        read_state(tmp_path / "small.pth")


def test_a_file_that_claims_a_billion_classes_is_rejected(tmp_path: Path):
    state = squeezenet1_1().state_dict()
    torch.save(state | {"classifier.1.weight": torch.zeros(7, 512, 1, 1), "classifier.1.bias": torch.zeros(7)},
               tmp_path / "seven.pth")  # fmt: skip
    assert load("squeezenet1_1", str(tmp_path / "seven.pth")).model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    many = {"classifier.1.weight": torch.zeros(1).expand(10**9, 512, 1, 1)}
    torch.save(state | many | {"classifier.1.bias": torch.zeros(1).expand(10**9)}, tmp_path / "many.pth")
    with pytest.raises(WeightsError, match="have other shapes"):
        load("squeezenet1_1", str(tmp_path / "many.pth"))


def test_labels_of_a_query_are_decompressed_up_to_a_size(monkeypatch):
    packed = base64.b64encode(zlib.compress(bytes(4 * 100))).decode()
    query = {"kind": "Marginal", "layer": "4", "over": {"labels": packed, "shape": [100]}, "name": "x"}
    assert from_json(query).over.tensor.shape == (100,)
    monkeypatch.setattr("nrm_plugin.dataset.queries.MAX_LABEL_BYTES", 4 * 99)
    with pytest.raises(SweepError, match="more than the limit of 99"):
        from_json(query)
    for broken in (packed[:-8], "no", 3):
        with pytest.raises(SweepError, match="not a query"):
            from_json(query | {"over": {"labels": broken, "shape": [100]}})


DEEP = "[" * 100_000 + "]" * 100_000


def test_deeply_nested_json_is_damaged(swept: Path, tmp_path: Path):
    with pytest.raises(FlowError, match="not a flow graph"):
        FlowGraph.from_json(DEEP)
    for text in (DEEP, "7", '"text"', "null", "[]", '{"format": "nrm-plugin sweep 1", "queries": [3]}'):
        (swept / "manifest.json").write_text(text)
        with pytest.raises(SweepError, match="damaged"):
            Sweep.open(swept)


def test_no_memory_is_allocated_for_rows_that_a_shard_lacks(swept: Path):
    (path,) = swept.glob("rows/*.parquet")
    with parquet.ParquetFile(path) as file:
        groups = [file.read_row_group(at) for at in range(file.num_row_groups)]
        listed = json.loads(file.metadata.metadata[b"nrm-plugin"])
    listed["groups"][MARGINAL] = [10**12]
    with parquet.ParquetWriter(path, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=len(group))
        writer.add_key_value_metadata({"nrm-plugin": json.dumps(listed)})
    write_sums(path)
    with pytest.raises(ShardError, match=r"64 rows, which differs from its footer"):
        Sweep.open(swept).rows()


# -- names and links --------------------------------------------------------------------------------------------------


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_names_in_a_sweep_are_not_paths(tmp_path: Path, capsys):
    evil = "../../../outside\x1b[2J"
    home = tmp_path / "a" / "b"
    sweep(net(), Data(4), [Marginal("4", name=evil), Maps("input", over="position", name="/etc/x")], home / "s",
          **OPTIONS)  # fmt: skip
    (home / "s" / "samples.csv").write_text("sample,file,label\n0,../../../../etc/passwd,0\n1,/etc/passwd,0\n")
    command = ["references", str(home / "s"), "--query", evil, "--k", "4", "--rows", "1", "--out", str(home / "o")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "../../../../etc/passwd" in printed  # a name, which is not opened
    assert "sample 3" in printed
    assert files_below(tmp_path) == {
        "a/b/s/manifest.json", "a/b/s/samples.csv", "a/b/s/rows/part-0000-000000.parquet",
        "a/b/s/maps/part-0000-000000.safetensors", "a/b/s/by-query/0000.parquet", "a/b/s/by-query/_sums.json",
        "a/b/s/rows/_part-0000-000000.json", "a/b/s/locks/begin", "a/b/s/locks/rank-0000",
        "a/b/o/.._.._.._outside__2J-references.json",
    }  # fmt: skip
    (entry,) = json.loads(next((home / "o").iterdir()).read_text())["references"]
    assert sorted(entry["files"], key=str) == ["../../../../etc/passwd", "/etc/passwd", None, None]


def outside(path: Path) -> Path:
    """Moves a file out of the sweep and leaves a link."""
    there = path.parents[2] / "outside" / path.name
    there.parent.mkdir(exist_ok=True)
    path.rename(there)
    path.symlink_to(there)
    return there


LINKS = {
    "rows/part-0000-000000.parquet": Sweep.rows,
    "maps/part-0000-000000.safetensors": ask_maps,
    "by-query/0000.parquet": ask_top,
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_a_sweep_is_not_followed(name: str, swept: Path):
    read = LINKS[name]
    read(Sweep.open(swept))
    outside(swept / name)
    with pytest.raises(ShardError, match="is a link to a file outside"):
        read(Sweep.open(swept))
    if not name.startswith("by-query"):
        stored = Sweep.open(swept, on_error="skip")
        if name.startswith("rows"):
            assert len(stored.rows()) == 0
        else:
            with pytest.raises(SweepError, match="no map of sample 0"):
                read(stored)
        assert "link" in stored.bad_shards[0]["why"]


@pytest.mark.parametrize("name", ["rows", "maps"])
def test_a_folder_that_is_a_link_out_of_a_sweep_is_not_written_to(name: str, swept: Path):
    there = outside(swept / "rows" if name == "rows" else swept / "maps")
    before = files_below(there)
    with pytest.raises(SweepError, match="is a link to a file outside"):
        sweep(net(), Data(8), [Marginal("4"), MAP], swept, **OPTIONS)
    assert files_below(there) == before


def test_a_sweep_in_a_folder_that_is_itself_a_link_is_read(swept: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(swept)
    assert len(Sweep.open(tmp_path / "link").rows()) == 64


def test_writing_replaces_a_link(swept: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    (swept / f".manifest.json.{platform.node()}.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    Manifest.read(swept).write(swept)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (swept / "manifest.json").is_symlink()


def test_unfinished_files_are_removed_only_inside_a_sweep(swept: Path, tmp_path: Path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    name = f".x.{platform.node()}.{done.pid}.tmp"
    (tmp_path / "mine").mkdir()
    (swept / "more").symlink_to(tmp_path / "mine")
    for folder in (swept, swept / "rows", tmp_path / "mine"):
        (folder / name).write_text("")
    remove_unfinished(swept)
    assert [(folder / name).exists() for folder in (swept, swept / "rows", tmp_path / "mine")] == [False, False, True]


# -- pages ------------------------------------------------------------------------------------------------------------

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&'


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.mark.medium
def test_names_of_layers_and_classes_are_escaped_on_the_page_of_a_flow():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    mu = RelevanceMeasure(model, torch.rand(1, 1, 4, 4), 1)
    graph = mu.flow(["output", "0", "input"], names={"output": [EVIL, EVIL], "0": [EVIL] * 3})
    maps = flow_maps(mu, graph)
    content = graph.to_dict()
    for layer in content["layers"]:
        layer["name"] += EVIL
        for node in layer["nodes"]:
            node["label"] += EVIL
    evil = FlowGraph.from_json(json.dumps(content))
    maps = {key.replace("/", EVIL + "/", 1): value for key, value in maps.items()}
    plain, page = Tags(sankey(graph, "flow")), Tags(sankey(evil, EVIL, maps, image=torch.rand(1, 4, 4)))
    allowed = {tag for tag, _ in plain.tags} | {"image", "rect", "path", "svg"}
    assert {tag for tag, _ in page.tags} <= allowed
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script"] * len(plain.scripts)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    sources = [attrs["href"] for tag, attrs in page.tags if tag == "image"]
    assert len(sources) > 4
    assert len(sources) % 2 == 1  # the photograph, and each picture for light and for dark pages
    assert all((source or "").startswith("data:image/") for source in sources)
    labels = [attrs["aria-label"] or "" for _, attrs in page.tags if attrs.get("class") == "node"]
    assert len(labels) >= 3
    assert all(EVIL in label for label in labels)
    names = [node["name"] for node in json.loads(page.scripts[0])["nodes"]]
    assert all(name.endswith(EVIL) for name in names)
