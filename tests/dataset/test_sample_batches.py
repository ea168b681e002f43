"""Datasets and loaders: the same batches in every run, and errors of invalid data."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from nrm_plugin.dataset import Marginal, Sink, Sweep, SweepError, sweep
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net


class Stream(IterableDataset):
    def __init__(self, count=50, stop=None):
        self.data, self.stop = Data(count), stop

    def __iter__(self):
        for index in range(len(self.data)):
            if index == self.stop:
                raise RuntimeError("the connection is lost")
            yield self.data[index]


@pytest.mark.slow
def test_a_loader_gives_the_rows_of_its_data_set(tmp_path, uninterrupted):
    loaders = {
        "plain": DataLoader(Data(), 4),
        "shuffled, with workers": DataLoader(Data(), 4, shuffle=True, num_workers=1),
        "distributed": DataLoader(Data(), 4, sampler=DistributedSampler(Data(), num_replicas=3, rank=1)),
        "iterable": DataLoader(Stream(), 4),
    }
    options = {key: value for key, value in OPTIONS.items() if key != "batch_size"}
    for name, loader in loaders.items():
        sweep(net(), loader, QUERIES, tmp_path / name, **options)
        assert contents(tmp_path / name) == uninterrupted


@pytest.mark.slow
def test_an_iterable_data_set_is_read_again_and_resumes(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="connection is lost"):
        sweep(net(), Stream(stop=30), QUERIES, tmp_path, **OPTIONS)
    assert Sweep.open(tmp_path).samples()["sample"].to_pylist() == list(range(24))
    with pytest.raises(SweepError, match="must yield the same samples in the same order"):
        sweep(net(), Stream(22), QUERIES, tmp_path, **OPTIONS)
    stored = sweep(net(), Stream(), QUERIES, tmp_path, **OPTIONS)
    assert stored.manifest.samples == 50
    assert contents(tmp_path) == uninterrupted
    assert sweep(net(), Stream(), QUERIES, tmp_path, **OPTIONS).is_complete
    with pytest.raises(SweepError, match="the dataset now ends after 24 samples"):
        sweep(net(), Stream(24), QUERIES, tmp_path, **OPTIONS)


@pytest.mark.slow
def test_random_transforms_are_the_same_in_every_run(tmp_path):
    plain = sweep(net(), Data(is_noisy=True), [Sink("4"), Marginal("4")], tmp_path / "plain", **OPTIONS)
    read = sweep(net(), Data(is_noisy=True), [Sink("4"), Marginal("4")], tmp_path / "read", num_workers=1, **OPTIONS)
    other = sweep(net(), Data(is_noisy=True), [Sink("4"), Marginal("4")], tmp_path / "other", seed=1, **OPTIONS)
    assert plain.rows("marginal(4)").equals(read.rows("marginal(4)"))
    assert not plain.rows("marginal(4)").equals(other.rows("marginal(4)"))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DataLoader(Data(), sampler=WeightedRandomSampler([1.0] * 50, 9)), {}, "Subset"),
        (iter([1]), {}, "with a length"),
        (Subset(Data(), []), {}, "no samples"),
        (Stream(), {"num_workers": 2}, "several times"),
        (Data(), {"batch_size": 0}, "at least 1"),
        (Data(), {"shard": 0}, "positive number of samples"),
        (Data(), {"target": "class"}, "choose 'prediction'"),
        (Data().x, {"target": "label"}, "the data have no labels"),
        ([(x, 1, 2) for x in Data(3).x], {}, "unpack="),
    ],
)
def test_invalid_data_raise(data, options, message, tmp_path):
    with pytest.raises(SweepError, match=message):
        sweep(net(), data, [Sink("4")], tmp_path, **{**OPTIONS, **options})


def test_a_stream_is_not_split_among_processes(tmp_path, monkeypatch):
    loader = DataLoader(Stream(), batch_size=2)
    with pytest.raises(SweepError, match="the loader yields batches of 2"):
        sweep(net(), loader, Marginal("4"), tmp_path, batch_size=3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SweepError, match="iterable dataset cannot be split"):
        sweep(net(), loader, Marginal("4"), tmp_path)
