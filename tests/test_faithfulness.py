"""The faithfulness benchmark: metrics against slow definitions, the planted net, and the page against the results."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from captum.attr import InternalInfluence, LayerConductance
from PIL import Image
from torch import nn

from benchmarks.default_composite import Net, resamples
from benchmarks.faithfulness import __main__ as command
from benchmarks.faithfulness import latent, page, pixels, planted, quantus_metrics, tasks
from benchmarks.faithfulness import nets as problems
from benchmarks.faithfulness.__main__ import RESULTS, main
from benchmarks.faithfulness.metrics import (
    Comparison,
    area,
    at_once,
    average_precision,
    precision_at,
    rank_correlation,
    ranks,
    same_noise,
    verdict,
)
from benchmarks.train_demo import reproducible


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw():
    return torch.Generator().manual_seed(0)


def convolutions():
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).eval().requires_grad_(False)


def small_net(samples=3):
    images = torch.rand(samples, 2, 16, 16)
    return Net("small", convolutions(), images, torch.arange(samples), torch.zeros(1, 2, 1, 1), 1.0)


# -- metrics --------------------------------------------------------------------------------------------------------


def test_ranks_give_the_order_of_removal():
    scores = torch.tensor([[0.5, -1.0, 2.0]])
    assert ranks(scores, most_first=True).tolist() == [[1, 2, 0]]
    assert ranks(scores, most_first=False).tolist() == [[1, 0, 2]]
    with pytest.raises(ValueError, match="not finite"):
        ranks(torch.tensor([[0.0, math.nan]]), most_first=True)


def test_the_area_is_the_mean_height():
    shares = [0.0, 0.1, 0.5, 1.0]
    curve = torch.rand(4, 2, dtype=torch.float64)
    for sample in range(2):
        heights = [float(v) for v in curve[:, sample]]
        pieces = [(x2 - x1) * (y1 + y2) / 2 for (x1, x2), (y1, y2) in
                  zip(itertools.pairwise(shares), itertools.pairwise(heights), strict=True)]  # fmt: skip
        assert float(area(curve, shares)[sample]) == pytest.approx(sum(pieces))
    torch.testing.assert_close(area(torch.full((2, 1), 3.0), [1, 5]), torch.tensor([3.0]))


@pytest.mark.medium
def test_average_precision_equals_that_of_scikit_learn():
    scores, truth = torch.randn(20, 30), torch.rand(20, 30) < 0.3
    truth[:, 0] = True
    from sklearn.metrics import average_precision_score  # takes long to import

    expected = [average_precision_score(t, s) for t, s in zip(truth.numpy(), scores.numpy(), strict=True)]
    torch.testing.assert_close(average_precision(scores, truth, draw()), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.medium
def test_ties_do_not_favour_the_first_entries():
    truth, generator = torch.tensor([[True, True, False, False, False]]), draw()
    precisions = torch.cat([average_precision(torch.zeros(1, 5), truth, generator) for _ in range(4000)])
    orders = list(itertools.permutations(range(5)))
    expected = 0.0
    for order in orders:
        first, second = sorted(order.index(entry) + 1 for entry in (0, 1))
        expected += (1 / first + 2 / second) / 2 / len(orders)
    assert float(precisions.mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_precision_is_that_of_the_largest_scores(share):
    scores, truth = torch.randn(10, 12), torch.rand(10, 12) < 0.4
    truth[:, 0] = True
    for row, precision in enumerate(precision_at(scores, truth, share, draw())):
        count = math.ceil(share * int(truth[row].sum()))
        largest = sorted(range(12), key=lambda k: -float(scores[row, k]))[:count]
        assert float(precision) == pytest.approx(sum(bool(truth[row, k]) for k in largest) / count)


def test_rank_correlation_equals_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")  # a dependency of scikit-learn
    tied, other = torch.randint(5, (6, 40)).float(), torch.randn(6, 40)
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(tied.numpy(), other.numpy(), strict=True)]
    torch.testing.assert_close(rank_correlation(tied, other), torch.tensor(expected))
    assert float(rank_correlation(torch.ones(1, 4), torch.randn(1, 4))) == 0


def test_same_noise_repeats_random_numbers_and_restores_the_state():
    def drawn():
        return [*torch.rand(2).tolist(), *np.random.rand(2).tolist()]

    torch.manual_seed(7)
    np.random.seed(7)
    expected = drawn()
    torch.manual_seed(7)
    np.random.seed(7)
    with same_noise():
        first = drawn()
    with same_noise():
        assert drawn() == first
    assert drawn() == expected != first


def test_the_batch_size_decreases_with_the_size_of_images():
    assert at_once(torch.zeros(1, 3, 16, 16)) == 128
    assert at_once(torch.zeros(1, 3, 224, 224)) == 3
    assert at_once(torch.zeros(1, 3, 2000, 2000)) == 1


def test_a_comparison_is_with_the_best_other_method_and_positive_if_ours_is_better():
    values = {"ours": [0.2, 0.4], "one": [0.5, 0.5], "two": [0.1, 0.7], "chance": [9.0, -9.0]}
    scores = {name: {"low": torch.tensor(v), "high": torch.tensor(v)} for name, v in values.items()}
    comparison = Comparison(ours=("ours",), better={"low": -1, "high": 1}, pairs={"ours": "one"})
    result = comparison.results(scores, resamples(torch.arange(2)))
    assert result["methods"]["one"]["low"] == [0.5, 0.5, 0.5]
    assert result["best"]["low"]["other"] == "two"
    assert result["best"]["low"]["ahead"]["ours"][0] == pytest.approx(0.1)  # 0.4 - 0.3
    assert result["best"]["low"]["ahead"]["ours"][1:] == pytest.approx([-0.1, 0.3])
    assert result["pairs"]["ours : one"]["high"][0] == pytest.approx(-0.2)
    for values in scores.values():
        del values["high"]  # as for a metric of a package that is not installed
    assert set(comparison.results(scores, resamples(torch.arange(2)))["methods"]["one"]) == {"low"}
    assert [verdict(v) for v in ([1, 0.5, 2], [1, -1, 2], [-1, -2, -0.1])] == ["better", "tied", "worse"]


# -- flipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_first", [True, False])
def test_pixels_are_removed_patch_by_patch(most_first):
    net, heat, other = small_net(), torch.randn(3, 1, 16, 16), torch.rand(1, 2, 1, 1)
    logits, outputs = pixels.flipped(net, heat, most_first, other)
    for n in range(3):
        patches = [(y, x) for y in range(0, 16, 2) for x in range(0, 16, 2)]
        patches.sort(key=lambda p: float(heat[n, 0, p[0] : p[0] + 2, p[1] : p[1] + 2].sum()), reverse=most_first)
        image = net.images[n].clone()
        for step in range(len(logits)):
            output = net.model(image[None])[0]
            torch.testing.assert_close(logits[step, n], output[net.target[n]])
            torch.testing.assert_close(outputs[step, n], output.softmax(0)[net.target[n]])
            for y, x in patches[step * pixels.AT_ONCE : (step + 1) * pixels.AT_ONCE]:
                image[:, y : y + 2, x : x + 2] = other[0]
    assert bool((image == other[0]).all())


@pytest.mark.parametrize("fill", latent.FILLS)
def test_channels_of_all_layers_are_removed_by_one_ranking(fill):
    net = small_net()
    assert net.layers == ["1", "3"]
    scores, means = torch.randn(3, 9), latent.mean_activations(net)
    logits, same = latent.flipped(net, scores, True, fill, means)
    for n in range(3):
        order = sorted(range(9), key=lambda k: -float(scores[n, k]))
        for step, share in enumerate(latent.SHARES):
            removed = set(order[: round(share * 9)])
            x = net.images[n : n + 1]
            for number, module in enumerate(net.model):
                x = module(x)
                for k in range(x.shape[1]) if number in (1, 3) else ():
                    if k + (4 if number == 3 else 0) in removed:
                        x[:, k] = means[str(number)][0, k] if fill == "mean" else 0
            torch.testing.assert_close(logits[step, n], x[0, net.target[n]])
            assert bool(same[step, n]) == (int(x.argmax()) == int(net.target[n]))


@pytest.mark.medium
def test_every_method_scores_every_channel_and_gradients_match_finite_differences():
    net = small_net()
    net.model.double()
    net.images = net.images.double()
    by_method = latent.channel_scores(net)
    assert {name: [part.shape[1] for part in parts] for name, parts in by_method.items()} == {
        name: [4, 5] for name in by_method
    }
    assert set(latent.OURS) < set(by_method)
    scores = latent.all_scores(net)
    rescaled = scores["activation, layers rescaled"].split([4, 5], 1)
    torch.testing.assert_close([part.abs().sum(1) for part in rescaled], [torch.ones(3).double()] * 2)
    step, factor = 1e-6, torch.full((3, 4), 1 - 1e-6).double()
    handle = net.model[1].register_forward_hook(lambda module, args, output: output * factor[:, :, None, None])
    for k in range(4):
        factor.fill_(1)[:, k] = 1 - step
        slope = (net.logit(net.images) - small_logit(net, handle)) / -step
        torch.testing.assert_close(by_method["gradient × activation"][0][:, k], slope, rtol=1e-4, atol=1e-6)
    handle.remove()


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_layers_that_share_passes_have_the_scores_that_captum_gives_each_alone():
    net = small_net()
    net.images.mul_(3)
    for scores, method in zip(
        latent.along_path(net.model, net.layers, net.images, net.target),
        (LayerConductance, InternalInfluence),
        strict=True,
    ):
        for layer, part in zip(net.layers, scores, strict=True):
            alone = method(net.model, net.model.get_submodule(layer))
            expected = alone.attribute(net.images, target=net.target, n_steps=latent.STEPS)
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks for module in net.model.modules())


def test_the_measure_under_lrp_0_equals_gradient_times_activation():
    net = small_net()
    scores, output = latent.channel_scores(net), net.logit(net.images)[:, None]
    for ours, other in zip(scores["μ, LRP-0"], scores["gradient × activation"], strict=True):
        torch.testing.assert_close(ours * output, other, rtol=1e-3, atol=1e-5)


def small_logit(net, handle):
    hooks = net.model[1]._forward_hooks
    hook = hooks.pop(handle.id)
    before = net.logit(net.images)
    hooks[handle.id] = hook
    return before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_every_explainer_returns_a_heat_map_and_leaves_the_net_unchanged():
    net = small_net()
    before = {key: value.clone() for key, value in net.model.state_dict().items()}
    scores, curves, differences = pixels.measured(net)
    assert set(scores) == set(pixels.explainers(pixels.Setting.of(net)))
    absent = set() if quantus_metrics.IS_INSTALLED else set(quantus_metrics.METRICS)
    assert all(set(values) == set(pixels.COMPARISON.better) - absent for values in scores.values())
    assert set(curves) == (set(scores) if quantus_metrics.IS_INSTALLED else set())
    assert bool(differences) == quantus_metrics.IS_INSTALLED
    assert all(bool(value.isfinite().all()) for values in scores.values() for value in values.values())
    assert all(torch.equal(value, before[key]) for key, value in net.model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in net.model.modules())


# -- planted paths --------------------------------------------------------------------------------------------------


def dense_net(cross):
    body, weight, bias = planted.streams_net(), torch.randn(3, 4, 8), torch.randn(3, 4)
    with reproducible(0):
        return body, weight, bias, *planted.plant(body, weight, bias, cross)


def test_the_planted_net_sums_the_red_and_green_streams_and_blue_cancels():
    body, weight, bias, dense, streams = dense_net(0.0)
    x = torch.rand(3, 3, 16, 16)
    features = body(x).unflatten(1, (3, 8))
    expected = sum(features[:, s] @ weight[s].T + bias[s] for s in (0, 1))
    torch.testing.assert_close(dense(x), expected)
    blue = x.clone()
    blue[:, 2] = torch.rand(3, 16, 16)
    torch.testing.assert_close(dense(blue), expected)
    active = nn.Sequential(*list(dense)[:-1])(x)[:, streams[-1] == 2]
    head = dense[-1].weight[:, streams[-1] == 2]
    assert bool((active > 0).any())
    assert bool((head != 0).any())
    assert [sorted(stream.tolist()) for stream in streams] == [[0] * 8 + [1] * 8 + [2] * 8] * 4
    assert not torch.equal(streams[0], streams[1])


def test_edges_carry_relevance_between_active_channels_of_a_visible_stream():
    *_, dense, streams = dense_net(0.05)
    with reproducible(0):
        images, labels, shown = planted.draw_cues(6)
    assert torch.equal(labels[:, 0], labels[:, 1])
    assert bool((images[~shown] == 0).all())
    net = Net("planted", dense, images, torch.arange(6), torch.zeros(1, 3, 1, 1), 1.0)
    carries = shown.clone()
    carries[:, 2] = False
    truth, compared = planted.planted_edges(net, streams, carries, [(3, 1), (1, 0)])
    values = [nn.Sequential(*list(dense)[: int(layer) + 1])(images).amax((2, 3)) for layer in planted.LAYERS]
    row = 0
    for upper, lower in [(3, 1), (1, 0)]:
        for j, i in itertools.product(range(24), repeat=2):
            stream = int(streams[upper][j])
            for n in range(6):
                expected = stream == int(streams[lower][i]) and stream != 2 and bool(shown[n, stream])
                expected = expected and float(values[upper][n, j]) > 0 and float(values[lower][n, i]) > 0
                assert bool(truth[n, row]) == expected
            assert bool(compared[row]) == (
                float(values[upper][:, j].max()) > 0 and float(values[lower][:, i].max()) > 0
            )
            row += 1
    before = dense[2].weight.clone()
    planted.severed(net, streams, within=True)
    assert torch.equal(dense[2].weight, before)


@pytest.mark.medium
def test_products_and_joints_have_the_same_layout():
    *_, dense, streams = dense_net(0.0)
    images = torch.rand(2, 3, 16, 16)
    target = dense(images).argmax(1)
    net = Net("planted", dense, images, torch.arange(2), torch.zeros(1, 3, 1, 1), 1.0)
    pairs = [(2, 1), (3, 0)]
    scores = planted.edge_scores(net, images, target, pairs)
    assert {values.shape for values in scores.values()} == {(2, 2 * 24 * 24)}
    across = torch.cat([(streams[u][:, None] != streams[low][None]).flatten() for u, low in pairs])
    alone = [f"μ(A & B), {name}" for name in planted.JOINTS if name != "NRMDefault"]  # it redistributes to all
    for name in (*alone, "norm of the weights"):
        assert float(scores[name][:, across].max()) < 1e-6 < float(scores[name].max())  # no weight, no relevance
    assert float(scores["μ(A) μ(B), NRMDefault"][:, across].max()) > 1e-3


# -- weights from a file, and the page ------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (230, 240, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def narrow(name, weights=None, num_classes=1000):
    layers = [nn.Conv2d(3, 3, 7, stride=4), nn.ReLU(True), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.mark.slow
def test_weights_from_a_file_are_evaluated_in_the_same_way(monkeypatch, tmp_path, image_folder, capsys):
    monkeypatch.setattr(problems.torchvision.models, "get_model", narrow)
    model = narrow("vgg16", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    net = problems.own_net("vgg16", tmp_path / "weights.pth", image_folder, 5)
    assert net.images.shape == (2, 3, 224, 224)
    assert torch.equal(net.target, model(net.images).argmax(1))
    command = ["--weights", str(tmp_path / "weights.pth"), "--images", str(image_folder), "--only", "latent"]
    main(command)
    results = json.loads(capsys.readouterr().out)["latent"]
    assert results["samples"] == 2
    assert results["layers"] == ["1", "3"]
    assert set(results["methods"]["μ, NRMDefault"]) == set(latent.COMPARISON.better)


def test_mismatching_weights_and_an_empty_folder_raise(monkeypatch, tmp_path, image_folder):
    monkeypatch.setattr(problems.torchvision.models, "get_model", narrow)
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not hold a state dict of torchvision's vgg16"):
        problems.own_net("vgg16", tmp_path / "other.pth", image_folder, 5)
    torch.save(narrow("vgg16").state_dict(), tmp_path / "weights.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        problems.own_net("vgg16", tmp_path / "weights.pth", tmp_path / "empty", 5)


class Bottleneck(nn.Module):
    """A block that reuses one ReLU, as those of torchvision's ResNet do."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.second(self.relu(self.first(x)))
        out += x
        return self.relu(out)


def test_a_block_replaces_a_relu_that_it_calls_more_than_once():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Sequential(Bottleneck(), Bottleneck()), nn.ReLU())
    assert problems.activation_layers(model, torch.rand(1, 2, 4, 4)) == ["1", "2.0", "2.1", "3"]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_a_method_that_fails_on_a_net_is_omitted_with_a_message(monkeypatch, capsys):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), Bottleneck(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    net = Net("blocks", model, torch.rand(2, 2, 16, 16), torch.arange(2), torch.zeros(1, 2, 1, 1), 1.0)
    net.layers = problems.activation_layers(model, net.images[:1])
    monkeypatch.setattr(quantus_metrics, "IS_INSTALLED", False)
    scores, *_ = pixels.measured(net, ["Saliency", "DeepLift"])
    assert list(scores) == ["Saliency"]
    assert "blocks: omitted DeepLift, which does not run" in capsys.readouterr().err
    monkeypatch.setattr(pixels, "explainers", lambda setting: {
        "endless": lambda model, x, target: x / 0, "NRMDefault": lambda model, x, target: x
    })  # fmt: skip
    scores, *_ = pixels.measured(net)
    assert list(scores) == ["NRMDefault"]
    assert "blocks: omitted endless" in capsys.readouterr().err
    scores["another"] = {key: values + 1 for key, values in scores["NRMDefault"].items()}
    assert pixels.COMPARISON.results(scores, resamples(net.group))["best"]["deletion"]["ahead"]["NRMDefault"][0] == 1


# -- the command ----------------------------------------------------------------------------------------------------


def hide_packages(monkeypatch):
    monkeypatch.setattr(quantus_metrics, "IS_INSTALLED", False)
    monkeypatch.setattr(latent, "HAS_CRP", False)


def test_without_the_packages_the_command_names_their_installation_and_keeps_the_results(monkeypatch, tmp_path, capsys):
    hide_packages(monkeypatch)
    out = tmp_path / "results.json"
    out.write_text('{"latent": {}}')
    with pytest.raises(SystemExit):
        main(["--out", str(out)])
    message = capsys.readouterr().err
    assert all(word in message for word in ("Quantus and zennit-crp", "make faithfulness", "--render"))
    assert out.read_text() == '{"latent": {}}'


def test_the_makefile_has_the_target_with_both_packages():
    rule = re.search(r"^faithfulness:(.*)\n\t(.*)", (command.ROOT / "Makefile").read_text(), re.M)
    assert {".venv/hosts/crp.stamp", ".venv/hosts/quantus.stamp"} <= set(rule[1].split())
    assert "PYTHONPATH=.venv/hosts/crp:.venv/hosts/quantus" in rule[2]
    assert rule[2].endswith("-m benchmarks.faithfulness $(ARGS)")


@pytest.mark.slow
def test_without_the_packages_a_net_of_the_user_is_evaluated(monkeypatch, tmp_path, image_folder, capsys):
    hide_packages(monkeypatch)
    monkeypatch.setattr(problems.torchvision.models, "get_model", narrow)
    torch.save(narrow("vgg16", num_classes=7).state_dict(), tmp_path / "weights.pth")
    main(["--weights", str(tmp_path / "weights.pth"), "--images", str(image_folder), "--only", "input"])
    printed = capsys.readouterr()
    assert "Quantus is not installed; results that need it are omitted." in printed.err
    results = json.loads(printed.out)["input"]
    assert set(results["methods"]["NRMDefault"]) == set(pixels.COMPARISON.better) - set(quantus_metrics.METRICS)


def test_results_of_one_part_are_added_to_the_previous_results(monkeypatch, tmp_path):
    """Results of nets arrive in any order and are stored in the order of the code."""
    finished = [
        ("shapes, residual", {"latent": {"new": 1}}, {"latent, shapes, residual": [2, 1]}),
        ("digits", {"latent": {"new": 2}}, {"latent, digits": [3, 2]}),
    ]
    monkeypatch.setattr(command, "run", lambda *arguments: iter(finished))
    monkeypatch.setattr(command, "version", lambda name: "0")
    out = tmp_path / "results.json"
    out.write_text(
        json.dumps({"planted": {"old": 0}, "latent": {"shapes, transformer": {"old": 1}}, "time": {"old": 2}})
    )
    command.measure(["latent"], ["digits", "shapes, residual"], 512, 2, out)
    results = json.loads(out.read_text())
    assert list(results["latent"].items()) == [
        ("digits", {"new": 2}), ("shapes, residual", {"new": 1}), ("shapes, transformer", {"old": 1})
    ]  # fmt: skip
    assert results["planted"] == {"old": 0}
    assert results["time"] == {"old": 2}  # the time of a complete run
    command.measure(command.PARTS, list(problems.NETS), 512, 2, out)
    assert json.loads(out.read_text())["time"]["seconds of processors"] == 3


@pytest.mark.slow
def test_a_net_has_the_same_results_in_another_process(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    ((name, results, seconds),) = tasks.run(["latent"], ["digits"], 4, processes=1)
    assert (name, set(results), set(seconds)) == ("digits", {"latent"}, {"training, digits", "latent, digits"})
    with same_noise():
        local = tasks.latent_results(problems.digits_net(4))
    here, there = (part["methods"]["μ, NRMDefault"] for part in (local, results["latent"]))
    for key, values in here.items():
        assert values == pytest.approx(there[key], abs=1e-4)


def test_the_pages_are_generated_from_the_committed_results():
    results = json.loads(RESULTS.read_text())
    for path in (page.PAGE, page.DETAILS):
        assert page.rendered(path, results) == path.read_text()
    assert all(part["samples"] >= 500 for key in ("latent", "input") for part in results[key].values())
    assert results["planted"]["samples"] >= 500
    for name, net in results["input"].items():
        omitted = {"Captum LRP"} if "transformer" in name else set()  # it has no rule for a norm
        assert set(net["methods"]) | omitted == set(pixels.explainers(pixels.Setting.of(small_net()))), name
        assert set(net["best"]) == set(pixels.COMPARISON.better)


@pytest.mark.parametrize(("logit", "words"), [(0.0, "curves are identical"), (2e-7, "2e-07 in logits")])
def test_the_curves_are_identical_only_without_any_difference(logit: float, words: str):
    differences = [{"logit": value, "softmax": 0.0} for value in (0.0, logit)]
    nets = {str(number): {"differences to Quantus": row} for number, row in enumerate(differences)}
    assert words in page.agreement({"input": nets})
