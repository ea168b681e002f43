"""Benchmarks of many models continue where they stopped, and say which figures changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import architectures, other_packages
from benchmarks.reruns import by_size, changes, dated, is_due, moment

ROW = {"model": "a", "taps": 7, "error": 1e-7, "residual": 0.01, "variation": 1.2, "variation_tap": "x", "seconds": 2.0}
LAST_YEAR, NEXT_CENTURY = moment("2020-05-01"), moment("2100-01-01T09:30")


def test_rows_are_due_if_they_are_missing_or_older_than_the_day():
    new = dated(ROW)
    assert not is_due(new, new["date"])
    assert not is_due(new, moment(new["date"][:10]))
    assert is_due(new, NEXT_CENTURY)
    assert is_due(ROW, LAST_YEAR)  # rows of before the dates
    assert is_due(None, LAST_YEAR)
    assert is_due(new, None)
    assert "date" not in ROW


def test_small_models_come_first_and_unknown_ones_last():
    rows = [{"model": "large", "parameters": 9}, {"model": "small", "parameters": 2}, {"model": "broken"}]
    assert by_size(["broken", "large", "small"], rows) == ["small", "large", "broken"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"seconds": 50.0, "error": 9e-7, "date": "2100-01-01", "variation_tap": "y"}, []),
        ({"residual": 0.0101}, []),
        ({"variation": 1.2011}, []),
        ({"residual": 0.02}, ["residual: 0.01 → 0.02"]),
        ({"variation": math.nan}, ["variation: 1.2 → nan"]),
        ({"variation": "inf"}, ["variation: 1.2 → inf"]),
        ({"taps": 8}, ["taps: 7 → 8"]),
        ({"failed": "InputError"}, ["failed: None → InputError"]),
        ({"is_unchanged": False}, ["is_unchanged: None → False"]),
    ],
)
def test_figures_that_rounding_does_not_explain_are_changes(change: dict[str, Any], expected: list[str]):
    assert changes(ROW, {**ROW, **change}) == expected


def test_a_row_that_was_not_measured_before_has_no_changes_and_equal_infinities_are_none():
    assert changes(None, ROW) == []
    for value in ("inf", "nan"):
        assert changes({**ROW, "variation": value}, {**ROW, "variation": value}) == []


def test_a_model_that_no_longer_fails_is_a_change():
    found = changes({"model": "a", "failed": "InputError"}, ROW)
    assert found[0] == "failed: InputError → None"
    assert "taps: None → 7" in found


def measured(monkeypatch: pytest.MonkeyPatch, taps: int) -> list[tuple[str, str]]:
    """Replaces the measurement of a torchvision model; the list has the rows that are measured."""
    seen: list[tuple[str, str]] = []

    def run(name: str, composites: list[str], size: int | None) -> Any:
        for composite in composites:
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append((name, composite))
            parameters = {"resnet18": 9, "alexnet": 50}[name]
            figures = dict.fromkeys(("error", "error_taps", "residual", "constants", "variation_input"), 0.0)
            row = {"model": name, "family": "classification", "parameters": parameters, "shape": (3, 8, 8)}
            yield {**row, **figures, "composite": composite, "taps": taps, "variation_blocks": 1.0, "seconds": 0.0}

    monkeypatch.setattr(architectures, "run", run)
    return seen


@pytest.mark.medium
def test_an_interrupted_run_continues_with_the_rows_that_are_missing(tmp_path: Path, monkeypatch, capsys):
    command = ["--models", "alexnet", "resnet18", "--composite", "NRMDefault", "NRMAbsolute", "--out"]
    command.append(str(tmp_path / "rows.json"))
    seen = measured(monkeypatch, taps=5)
    with pytest.raises(KeyboardInterrupt):
        architectures.main([*command, "--before", NEXT_CENTURY])
    assert len(seen) == 3
    seen = measured(monkeypatch, taps=5)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    today = rows[0]["date"]
    architectures.main([*command, "--before", today])
    assert seen == [("resnet18", "NRMAbsolute")]
    assert "changed" not in capsys.readouterr().out
    seen = measured(monkeypatch, taps=6)
    with pytest.raises(KeyboardInterrupt):
        architectures.main([*command, "--before", NEXT_CENTURY])
    assert seen[0] == ("resnet18", "NRMDefault")  # the smaller model
    assert capsys.readouterr().out.count("changed  taps: 5 → 6") == 3


@pytest.mark.parametrize("save", [architectures.save, other_packages.save])
def test_a_write_that_is_interrupted_leaves_the_stored_rows(tmp_path: Path, monkeypatch, save):
    row = {"package": "torch", "model": "alexnet", "composite": "NRMDefault", "taps": 5}
    out = tmp_path / "folder/rows.json"
    save(out, [row])
    stored = out.read_bytes()
    write = Path.write_text

    def interrupted(path: Path, text: str, **options: str) -> int:
        write(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(out, [{**row, "taps": 6}])
    assert out.read_bytes() == stored


@pytest.mark.slow
def test_models_of_other_packages_continue_too(tmp_path: Path, monkeypatch, capsys):
    cases = {"one": (lambda: nn.Linear(3, 2), [(3,)], None), "two": (lambda: nn.Linear(2, 2), [(2,)], None)}
    monkeypatch.setattr(other_packages, "PACKAGES", {"torch": lambda: cases})
    out = tmp_path / "rows.json"
    command = ["--packages", "torch", "--out", str(out)]
    other_packages.main([*command, "--models", "one", "--composite", "NRMDefault"])
    first = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["composite"]) for row in first] == [("one", "NRMDefault")]
    capsys.readouterr()
    other_packages.main([*command, "--before", first[0]["date"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "torch/one EpsilonPlusFlat",
        "torch/two NRMDefault",
        "torch/two EpsilonPlusFlat",
    ]
