"""Targets, predictions, inputs and outputs of the batches of a sweep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin.dataset import (
    Activation,
    Maps,
    Marginal,
    Sink,
    SweepError,
    sweep,
)
from tests.conftest import untouched
from tests.dataset.sweep_nets import OPTIONS, Data, net


class Shaped(nn.Module):
    """A linear net with a function of its outputs."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.linear, self.form = nn.Flatten(), nn.Linear(3 * 12 * 12, 4), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.linear(self.flat(x)))


def test_outputs_without_a_prediction_raise(tmp_path):
    with pytest.raises(SweepError, match=r"needs outputs \(N, classes\), got \(4, 2, 2\)"):
        sweep(Shaped(lambda y: y.unflatten(1, (2, 2))).eval(), Data(4), Marginal("linear"), tmp_path, **OPTIONS)
    with pytest.raises(SweepError, match="output has nan or inf entries"):
        sweep(Shaped(lambda y: y / 0).eval(), Data(4), Marginal("linear"), tmp_path / "b", **OPTIONS)


def test_an_output_of_one_number_is_one_group(tmp_path):
    """It carries all relevance."""
    model = Shaped(lambda y: y.sum(1)).eval()
    queries = [Marginal("output"), Maps("output"), Activation("output")]
    stored = sweep(model, Data(4), queries, tmp_path, target=lambda b: None, **OPTIONS)
    seen = stored.rows(Activation("output").name)["value"].to_pylist()
    assert seen == pytest.approx(model(Data(4).x).tolist(), rel=1e-5)
    assert stored.rows(Marginal("output").name)["value"].to_pylist() == pytest.approx([1] * 4)
    torch.testing.assert_close(stored.maps(Maps("output").name, range(4)).reshape(-1), torch.ones(4))
    assert set(stored.rows()["prediction"].to_pylist()) == {-1}


@pytest.mark.medium
def test_samples_targets_and_predictions_are_stored(tmp_path):
    model, data = net(), Data(10)
    outputs = model(data.x)
    stored = sweep(model, data, [Marginal("4")], tmp_path / "label", target="label", **OPTIONS)
    rows = stored.samples().to_pydict()
    assert rows == {
        "sample": list(range(10)),
        "target": [k % 4 for k in range(10)],
        "prediction": outputs.argmax(1).tolist(),
    }
    alone = sweep(model, data, [Maps()], tmp_path / "maps", target="label", **OPTIONS)
    assert alone.samples().to_pydict() == rows
    chosen = sweep(model, data, [Sink("4")], tmp_path / "function", target=lambda batch: 3 - batch[1], **OPTIONS)
    assert chosen.samples()["target"].to_pylist() == [3 - k % 4 for k in range(10)]
    assert set(
        sweep(model, data, [Sink("4")], tmp_path / "class", target=2, **OPTIONS).samples()["target"].to_pylist()
    ) == {2}


@pytest.mark.medium
def test_a_target_function_may_run_the_model(tmp_path):
    """Its activations are not recorded."""
    model, data, queries = net(), Data(10), [Activation("4")]
    stored = sweep(model, data, queries, tmp_path / "a", target=lambda batch: model(batch[0]).argmin(1), **OPTIONS)
    plain = sweep(model, data, queries, tmp_path / "b", **OPTIONS)
    assert stored.samples()["target"].to_pylist() == model(data.x).argmin(1).tolist()
    assert stored.rows("activation(4)")["value"].equals(plain.rows("activation(4)")["value"])


@pytest.mark.medium
def test_inputs_may_be_mappings_and_the_model_is_unchanged(tmp_path):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, pixels):
            return {"logits": self.net(pixels)}

    data, model = Data(10), Keyword().eval()
    listed = [{"pixels": x, "label": label} for x, label in data]
    state = torch.get_rng_state()
    with untouched(model):
        stored = sweep(
            model, listed, [Marginal("net.4"), Activation("net.4")], tmp_path / "a", target="label", **OPTIONS
        )
    assert torch.equal(torch.get_rng_state(), state)
    plain = sweep(net(), data, [Marginal("4"), Activation("4")], tmp_path / "b", target="label", **OPTIONS)
    for name in ("marginal", "activation"):
        assert stored.rows(f"{name}(net.4)")["value"].equals(plain.rows(f"{name}(4)")["value"])
