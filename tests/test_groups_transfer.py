"""Transfer of groups between halves of the inputs, in the benchmark of groups."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from benchmarks.groups import partitions, transfer
from benchmarks.tables import groups
from nrm_plugin import find_groups
from tests.oracles import brute_kappa

LAYERS = ("upper", "middle", "lower")


@pytest.fixture
def short(monkeypatch):
    """Restarts the search less often, and draws one split."""
    monkeypatch.setattr(transfer, "find_groups", functools.partial(find_groups, restarts=2))
    monkeypatch.setattr(transfer, "SPLITS", 1)


def inputs(count, seed, planted):
    """Joint relevance of inputs whose channels are in planted groups, with noise."""
    random = np.random.default_rng(seed)
    block = np.eye(8) + 0.05
    parts = []
    for _ in range(count):
        part = {}
        for pair, (above, below) in enumerate(itertools.pairwise(planted)):
            joint = block[above][:, below] * random.uniform(0.5, 1.5, (len(above), len(below)))
            part[f"joint {pair}"] = (joint / joint.sum()).astype(np.float32)
        for place, own in enumerate(planted):
            part[f"activation {place}"] = random.random((len(own), 9)).astype(np.float16)
        parts.append(part)
    return parts


def planted_groups(seed=0):
    random = np.random.default_rng(seed)
    return [random.permutation(np.arange(size) % 8) for size in (24, 32, 40)]


def test_kappa_is_that_of_the_mean_of_the_joint_relevance():
    planted = planted_groups()
    parts = inputs(3, 0, planted)
    random = np.random.default_rng(1)
    labels = [random.integers(8, size=len(own)) for own in planted]
    wanted = np.mean([
        brute_kappa(sum(part[f"joint {pair}"].astype(float) for part in parts) / 3, *labels[pair : pair + 2])
        for pair in range(2)
    ])  # fmt: skip
    assert transfer.mean_kappa(transfer.mean_of(parts, LAYERS), labels) == pytest.approx(wanted, rel=1e-9)


def test_groups_that_two_halves_share_transfer_and_those_of_one_half_do_not(short):
    planted, others = planted_groups(), planted_groups(5)
    shared = transfer.both_directions([inputs(4, 0, planted), inputs(4, 1, planted)], LAYERS)
    assert min(shared["other"]) > 0.95 * max(shared["own"])
    apart = transfer.both_directions([inputs(4, 0, planted), inputs(4, 1, others)], LAYERS)
    assert max(apart["other"]) < 0.5 * min(apart["own"])


@pytest.mark.slow  # imports scikit-learn
def test_partitions_without_the_dependence_are_those_of_the_other_half(short):
    planted = planted_groups()
    sides = [inputs(4, 0, planted), inputs(4, 1, planted)]
    for place, own in enumerate(planted):  # the activations of the second half tell its groups
        for part in sides[1]:
            part[f"activation {place}"] = np.eye(8)[own].astype(np.float16)
    found = transfer.both_directions(sides, LAYERS, seed=0)
    assert set(found) == {"own", "other", *partitions.OTHERS}
    assert found["k-means of activations"][0] > 0.95 * found["own"][0]  # evaluated on the first half
    assert found["k-means of activations"][1] < 0.5 * found["own"][1]
    assert max(found["random"]) < 0.5 * min(found["own"])


def test_sizes_and_folders_with_too_few_inputs_are_left_out(short):
    parts = inputs(26, 0, planted_groups())
    assert [row["inputs"] for row in transfer.of_sizes(parts, LAYERS, (3, 13, 14))] == [3, 13]
    found = transfer.of_folders(parts, LAYERS, ["many"] * 24 + ["few"] * 2)
    assert list(found) == ["many"]
    assert found["many"]["inputs"] == 12


def test_a_summary_has_the_means_and_the_range_of_the_ratio():
    splits = [{"own": [1.0, 0.5], "other": [0.9, 0.3], "random": [0.2, 0.1]}, {"own": [1.0, 1.0], "other": [0.8, 0.7]}]
    row = transfer.summary(splits, 7)
    assert (row["inputs"], row["least"], row["most"]) == (7, pytest.approx(0.6), pytest.approx(0.9))
    assert (row["own"], row["other"]) == (pytest.approx(0.875), pytest.approx(0.675))
    assert row["kept"] == pytest.approx(0.675 / 0.875)
    assert row["random"] == pytest.approx(0.15)


def test_a_network_measured_with_several_sizes_has_a_row_for_each():
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6, "inputs": 24}
    kappa = dict.fromkeys(("groups", "strongest and rest", "k-means of activations", "random"), figure)
    sets = {name: {"correlation": figure, "difference": figure} for name in ("groups", "alone", "random")}
    old = {"own": 0.3, "other": 0.1, "kept": 0.33}
    plain = {"default": {"kappa": kappa, "times the best other": figure, "ablation": sets, "halves": old}}
    row = {"own": 0.4, "other": 0.36, "kept": 0.9, "least": 0.8, "most": 0.95}
    sizes = [{**row, "inputs": 12}, {**row, **dict.fromkeys(partitions.OTHERS, 0.07), "inputs": 48}]
    found = {"sizes": sizes, "folders": {"animals/birds": {**row, "inputs": 17}}}
    tables = groups({"nets": {"A": plain, "B": plain}, "transfer": {"A": {"default": found}}})
    ending = "0.40 | 0.36 | 0.90 (0.80–0.95) |"
    assert tables["halves"].splitlines()[2:] == [
        f"| A, default | 12 | {ending}", f"| A, default | 48 | {ending}", "| B, default | 12 | 0.30 | 0.10 | 0.33 |",
    ]  # fmt: skip
    assert tables["folders"].splitlines()[2:] == [f"| A, default | animals/birds | 17 | {ending}"]
    assert tables["others"].splitlines()[2:] == ["| A, default | 48 | 0.36 | 0.07 | 0.07 | 0.07 |"]
