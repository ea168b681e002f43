"""A changed byte anywhere in a sweep is detected when it is read, and repaired when the sweep is resumed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nrm_plugin.dataset import Manifest, Sweep, SweepError, sweep
from nrm_plugin.dataset.checksums import Segments
from nrm_plugin.dataset.sweep_layout import MANIFEST, ManifestError, ShardError
from tests.conftest import in_turn
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net

KINDS = {
    "rows": "rows/part-0000-000002.parquet",
    "maps": "maps/part-0000-000002.safetensors",
    "index": "by-query/0000.parquet",
    "manifest": MANIFEST,
    "checksums of rows": "rows/_part-0000-000002.json",
    "checksums of the index": "by-query/_sums.json",
}


ASKED: dict[str, Callable[[Sweep], object]] = {
    "rows": lambda stored: stored.rows().to_pylist(),
    "a group": lambda stored: stored.rows("joint(4, 2)", 5, ["sample", "lower", "value"]).to_pylist(),
    "top": lambda stored: [stored.top("marginal(4)", group).to_pylist() for group in range(8)],
    "maps": lambda stored: stored.maps("maps(input, over=position)", range(50)).tolist(),
    "samples": lambda stored: stored.samples().to_pylist(),
    "queries": lambda stored: {name: query.groups for name, query in stored.queries.items()},
}


def readings(folder: Path) -> dict[str, object]:
    """Returns the results read from a sweep, with SweepError in place of those that raise it."""
    answers: dict[str, object] = {}
    for name, ask in ASKED.items():
        try:
            answers[name] = ask(Sweep.open(folder))
        except SweepError:
            answers[name] = SweepError
    return answers


@pytest.fixture(scope="module")
def right(begun):
    return readings(begun)


def flipped(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(content))


@pytest.mark.medium
@pytest.mark.parametrize(("kind", "seed"), in_turn(KINDS, range(4)))
def test_a_flipped_bit_is_never_read_as_right_and_heals(kind, seed, begun, right, tmp_path, uninterrupted):
    folder, draw = shutil.copytree(begun, tmp_path / "swept"), random.Random(f"{kind} {seed}")
    place, bit = draw.randrange(1 << 30), draw.randrange(8)
    flipped(folder / KINDS[kind], place, bit)
    read = readings(folder)
    assert all(read[name] in (SweepError, right[name]) for name in right)
    assert read != right or "index" in kind  # only the index of one query is asked
    assert sweep(net(), Data(), QUERIES, folder, on_error="skip", **OPTIONS).is_complete
    assert readings(folder) == right
    for path in folder.glob("rows/bad-*"):
        path.unlink()
    assert contents(folder) == uninterrupted


@pytest.mark.slow
def test_every_byte_of_a_file_of_rows_counts(begun, right, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    path = folder / KINDS["rows"]
    whole = path.read_bytes()
    for place in range(0, len(whole), 31):
        flipped(path, place, place % 8)
        with pytest.raises(ShardError, match="part-0000-000002"):
            Sweep.open(folder).rows()
        path.write_bytes(whole)
    assert readings(folder) == right


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["rows", "maps"])
def test_damage_raises_unless_it_is_to_be_evaluated_again(kind, begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    flipped(folder / KINDS[kind], 1000, 3)
    with pytest.raises(ShardError, match=r"part-0000-000002.*checksum.*on_error='skip'"):
        sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    repaired = sweep(net(), Data(), QUERIES, folder, on_error="skip", **OPTIONS)
    assert [entry["file"] for entry in repaired.manifest.bad_shards] == ["rows/part-0000-000002.parquet"]


@pytest.mark.parametrize(
    ("before", "after"), [('"complete"', '"interrupted"'), ('"samples": 50', '"samples": 49'), ("marginal(4)", "mass")]
)
def test_an_edited_manifest_raises_and_is_written_again(before, after, begun, right, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    text = (folder / MANIFEST).read_text()
    assert before in text
    (folder / MANIFEST).write_text(text.replace(before, after))
    for use in (Sweep.open, lambda path: sweep(net(), Data(), QUERIES, path, **OPTIONS)):
        with pytest.raises(ManifestError, match=r"was edited: its checksum differs.*on_error='skip' writes it again"):
            use(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("rows/part-*")}
    assert sweep(net(), Data(), QUERIES, folder, on_error="skip", **OPTIONS).is_complete
    assert {path: path.stat().st_mtime_ns for path in folder.glob("rows/part-*")} == times
    assert readings(folder) == right


def test_a_lost_manifest_is_not_replaced_by_that_of_another_sweep(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    (folder / MANIFEST).unlink()
    with pytest.raises(SweepError, match="its shards belong to a sweep with other settings"):
        sweep(net(), Data(), QUERIES, folder, target=2, on_error="skip", **OPTIONS)
    assert sweep(net(), Data(), QUERIES, folder, on_error="skip", **OPTIONS).is_complete
    assert len(Manifest.read(folder).queries) == 5


@pytest.mark.medium
@pytest.mark.parametrize("name", ["part-0000-000007", "part-0001-000009", "part-0002-000002"])
def test_a_surplus_shard_is_not_read_as_more_rows(name, begun, right, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    for end in ("rows/{}.parquet", "rows/_{}.json", "maps/{}.safetensors"):
        shutil.copy(folder / end.format("part-0000-000002"), folder / end.format(name))
    assert all(read in (SweepError, right[key]) for key, read in readings(folder).items())
    sweep(net(), Data(), QUERIES, folder, on_error="skip", **OPTIONS)
    assert readings(folder) == right


@pytest.mark.medium
def test_a_lost_shard_is_reported_and_evaluated_again(begun, right, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    (folder / KINDS["rows"]).unlink()
    with pytest.raises(ShardError, match="samples 16 to 23 are missing"):
        Sweep.open(folder).rows()
    rest = Sweep.open(folder, on_error="skip")
    assert len(set(rest.rows("sink(4)")["sample"].to_pylist())) == 42
    assert "samples 16 to 23 are missing" in rest.bad_shards[0]["why"]
    sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    assert readings(folder) == right


def test_an_edited_list_of_groups_hides_no_rows(begun, right, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    path = folder / KINDS["checksums of the index"]
    text = path.read_text()
    assert '"groups": [[0, 7]]' in text
    path.write_text(text.replace('"groups": [[0, 7]]', '"groups": [[0, 3]]'))
    assert readings(folder)["top"] is SweepError


def test_lost_checksums_are_damage(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "swept")
    (folder / KINDS["checksums of rows"]).unlink()
    with pytest.raises(ShardError, match=r"its checksums _part-0000-000002\.json are missing"):
        Sweep.open(folder).rows()


def test_segments_cover_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    segments = Segments.of(path, [10, 60])
    assert segments.ends == (10, 60, 100)
    assert Segments.from_json(segments.to_json()) == segments
    flipped(path, 30, 0)
    segments.check(path, [0, 2])
    with pytest.raises(ShardError, match="its bytes 10 to 60 differ"):
        segments.check(path)
    path.write_bytes(bytes(range(99)))
    with pytest.raises(ShardError, match="it has 99 bytes, and had 100"):
        segments.check(path, [0])
    with pytest.raises(ValueError, match="incomplete"):
        Segments.from_json({"ends": [1, 2], "hashes": ["x"]})
