"""Samples with stored results are compared with those of the dataset; unchanged samples are not read again."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from nrm_plugin.dataset import Marginal, Sweep, SweepError, sweep
from nrm_plugin.dataset.content_check import check_samples, contents_to_compare
from nrm_plugin.dataset.sample_batches import data_source
from nrm_plugin.dataset.sweep_layout import SettingsError
from tests.dataset.sweep_nets import OPTIONS, Data, net

QUERIES = [Marginal("4")]


class Stamped(Data):
    """Dataset whose stamps count the changes of each sample, and which records the samples that are read."""

    def __init__(self, count=12, **options):
        super().__init__(count, **options)
        self.stamps, self.read = [0] * count, []

    def stamp(self, index):
        return self.stamps[index]

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.medium
def test_samples_with_the_same_stamp_are_not_read(tmp_path):
    data = Stamped()
    sweep(net(), data, QUERIES, tmp_path, **OPTIONS)
    data.read.clear()
    assert sweep(net(), data, QUERIES, tmp_path, **OPTIONS).is_complete
    assert data.read == []
    data.stamps[5] = 1  # copied, with the same content
    assert sweep(net(), data, QUERIES, tmp_path, **OPTIONS).is_complete
    assert data.read == [5]
    data.x[5] += 1
    with pytest.raises(SettingsError, match="the data changed: sample 5 differs"):
        sweep(net(), data, QUERIES, tmp_path, **OPTIONS)


def test_a_fingerprint_is_compared_instead_of_samples(tmp_path):
    class Known(Data):
        fingerprint = "first"

    sweep(net(), Known(8), QUERIES, tmp_path, **OPTIONS)
    data = Known(8)
    data.x += 1
    assert sweep(net(), data, QUERIES, tmp_path, **OPTIONS).is_complete
    data.fingerprint = "second"
    with pytest.raises(SettingsError, match=r'data \(was "first", now "second"\)'):
        sweep(net(), data, QUERIES, tmp_path, **OPTIONS)


@pytest.mark.medium
def test_samples_that_failed_or_cannot_be_read_any_more(tmp_path):
    sweep(net(), Data(8, bad=[2]), QUERIES, tmp_path, on_error="skip", **OPTIONS)
    assert sweep(net(), Data(8), QUERIES, tmp_path, **OPTIONS).is_complete  # sample 2 has no results to compare
    with pytest.raises(SweepError, match=r"sample 6, of which .* contains results, can no longer be read: OSError"):
        sweep(net(), Data(8, bad=[2, 6]), QUERIES, tmp_path, **OPTIONS)
    assert sweep(net(), Data(8, bad=[2, 6]), QUERIES, tmp_path, on_error="skip", **OPTIONS).is_complete


@pytest.mark.medium
def test_random_transforms_are_no_change(tmp_path):
    sweep(net(), Data(8, is_noisy=True), QUERIES, tmp_path, **OPTIONS)
    assert sweep(net(), Data(8, is_noisy=True), QUERIES, tmp_path, **OPTIONS).is_complete
    with pytest.raises(SettingsError, match="the data changed: sample 0 and 7 more"):
        sweep(net(), Data(8), QUERIES, tmp_path, **OPTIONS)


@pytest.mark.slow
def test_workers_compare_too(tmp_path):
    sweep(net(), Data(8), QUERIES, tmp_path, **OPTIONS)
    data = Data(8)
    data.x[7, 0, 0, 0] += 1
    with pytest.raises(SettingsError, match="sample 7 differs"):
        sweep(net(), DataLoader(data, 4, num_workers=2), QUERIES, tmp_path, shard=8, progress=False)


def test_chosen_samples_are_compared(tmp_path, capsys):
    stored = sweep(net(), Data(8), QUERIES, tmp_path, **OPTIONS)
    data = Data(8)
    data.x[3] += 1
    source = data_source(data, None, None)
    contents = contents_to_compare(source, Sweep.open(tmp_path).shards)
    assert sorted(contents) == list(range(8))
    seed = stored.manifest.settings["seed"]
    check_samples(tmp_path, source, {key: contents[key] for key in (0, 7)}, seed, progress=True)
    assert "comparing stored samples" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="sample 3"):
        check_samples(tmp_path, source, contents, seed)
