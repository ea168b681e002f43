"""Exported plans: loaded without this package, equal to a recorded measure, with a flag for samples that do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import Plan, RelevanceMeasure, at
from nrm_plugin.errors import InputError, MissingExtraError, UnknownLayerError, UnsupportedOperationError

LOADER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nrm_plugin", "zennit", "captum"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(*call) for call in torch.load(sys.argv[2])], sys.argv[3])
"""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)).relu()
        h = h + self.body(h)
        return self.head(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.position = nn.Parameter(torch.randn(1, 10, 8) / 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.block(tokens))[:, 0])


def convolutions() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


def pointwise(width: int = 8) -> nn.Module:
    layers = nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1, stride=2), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "batch norm": (convolutions, ["input", "1"]),
    "residual": (Residual, ["input", "body.0"]),
    "kernels of one pixel": (pointwise, ["input", "2"]),
    "attention": (Attention, ["input", "block.linear1"]),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    net = make().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return net


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Answers of exported programs, from processes in which this package cannot be imported."""
    folder = tmp_path_factory.mktemp("export")
    found, processes = {}, []
    for name, (make, layers) in NETS.items():
        Plan(net := built(make), images(0)).export(folder / f"{name}.pt2", images(0), layers)
        calls = [(images(seed), torch.tensor(target)) for seed, target in ((1, [2, 0]), (2, [-1, 1]), (3, [3, 1]))]
        torch.save(calls, folder / f"{name}.calls")
        paths = [str(folder / f"{name}{suffix}") for suffix in (".pt2", ".calls", ".answers")]
        processes.append(subprocess.Popen([sys.executable, "-c", LOADER, *paths], env={"OMP_NUM_THREADS": "1"}))
        found[name] = (net, calls, paths[2])
    assert [process.wait() for process in processes] == [0] * len(NETS)
    return {name: (net, calls, torch.load(path)) for name, (net, calls, path) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_an_exported_program_equals_a_recorded_measure_without_this_package(name, answers):
    net, calls, results = answers[name]
    for (x, target), result in zip(calls[:2], results[:2], strict=True):
        chosen = torch.where(target < 0, net(x).argmax(1), target)
        torch.testing.assert_close(result["outputs"], net(x).detach(), rtol=1e-9, atol=1e-12)
        assert torch.equal(result["target"], chosen)
        assert result["is_valid"].all()
        for layer, relevance in result["relevance"].items():
            each = [RelevanceMeasure(net, x[n : n + 1], int(chosen[n])).marginal(layer) for n in range(2)]
            torch.testing.assert_close(relevance, torch.cat(each), rtol=1e-6, atol=1e-9)
    assert list(results[0]["relevance"]) == NETS[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_target_that_is_not_a_class_is_marked(name, answers):
    result = answers[name][2][2]
    assert result["is_valid"].tolist() == [False, True]


@pytest.mark.slow
def test_only_minus_one_stands_for_the_largest_output(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4).double(), torch.randn(4, 3).double()
    result = exported(net, x, tmp_path / "linear.pt2")(x, torch.tensor([-1, -2, 3, 4]))
    assert result["is_valid"].tolist() == [True, False, True, False]
    assert result["target"][0] == net(x)[0].argmax()
    with pytest.raises(FileNotFoundError, match=r"the folder .*absent' does not exist"):
        Plan(net, x).export(tmp_path / "absent" / "linear.pt2", x, ["input"])


def exported(net: nn.Module, x: Tensor, path: Path, layers: tuple = ("input",)) -> nn.Module:
    Plan(net, x).export(path, x, layers)
    return torch.export.load(path).module()


@pytest.mark.slow
def test_values_on_which_a_rule_branches_do_not_matter(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    x = torch.rand(3, 4, dtype=torch.float64)  # without negative inputs, for which rules take a shortcut
    program = exported(net, x, tmp_path / "rules.pt2", (at("0"), "input"))
    y = torch.randn(3, 4, dtype=torch.float64)
    result = program(y, torch.ones(3, dtype=torch.long))
    assert result["is_valid"].all()
    for layer, relevance in zip(("0", "input"), result["relevance"].values(), strict=True):
        torch.testing.assert_close(relevance, RelevanceMeasure(net, y, 1).marginal(layer), rtol=1e-9, atol=1e-12)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) if x.shape[1] == 3 and bool((x > 0).all()) else self.small(x)


@pytest.mark.slow
def test_another_branch_of_the_model_is_marked(tmp_path):
    program = exported(Branching().eval(), torch.ones(1, 3), tmp_path / "branch.pt2")
    target = torch.zeros(1, dtype=torch.long)
    assert program(torch.rand(1, 3) + 0.1, target)["is_valid"].all()
    assert not program(-torch.rand(1, 3) - 0.1, target)["is_valid"].any()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * len(torch.nonzero(x[0] > 0))


class Noisy(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand(2)


@pytest.mark.parametrize("make", [Counting, Noisy])
def test_a_model_that_a_program_cannot_repeat_is_rejected(make, tmp_path):
    with pytest.raises(UnsupportedOperationError, match="the plan cannot be exported"):
        Plan(make().eval(), torch.ones(2, 3)).export(tmp_path / "none.pt2", torch.ones(2, 3))
    assert not (tmp_path / "none.pt2").exists()


def test_wrong_arguments_are_rejected(tmp_path):
    x = torch.rand(2, 5, 3)
    with pytest.raises(InputError, match=r"shape \(2, 5, 4\)"):
        Plan(nn.Linear(3, 4), x).export(tmp_path / "none.pt2", x)
    with pytest.raises(UnknownLayerError):
        Plan(nn.Linear(3, 4), x[0]).export(tmp_path / "none.pt2", x[0], ["conv"])
    assert not list(tmp_path.iterdir())


def test_onnx_names_the_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(MissingExtraError, match="pip install onnx onnxscript"):
        Plan(nn.Linear(3, 4), torch.rand(2, 3)).export(tmp_path / "none.onnx", torch.rand(2, 3))


def test_onnx_is_written(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    Plan(nn.Linear(3, 4), torch.rand(2, 3)).export(tmp_path / "linear.onnx", torch.rand(2, 3))
    assert (tmp_path / "linear.onnx").exists()


def test_random_numbers_that_do_not_depend_on_inputs_are_no_constants():
    plan = Plan(Noisy().eval(), torch.ones(2, 3))
    for seed in range(3):
        torch.manual_seed(seed)
        mu = plan(torch.ones(2, 3), 1)
        mu.marginal("input")
        torch.manual_seed(seed)
        torch.testing.assert_close(mu.outputs, RelevanceMeasure(plan.model, torch.ones(2, 3), 1).outputs)
    assert "random" in plan.explain()


def test_matrices_of_weights_are_stored_once(tmp_path: Path) -> None:
    net, x = pointwise(512).eval(), torch.rand(8, 3, 6, 6)
    plan = Plan(net, x)
    plan.export(tmp_path / "relevance.pt2", x, ["input"])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    assert (tmp_path / "relevance.pt2").stat().st_size < 2 * weights, "8 samples would take 8 more copies"
