"""The benchmark on real networks: names of packages, metrics and methods against slow definitions."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from benchmarks.real import methods, metrics, onnx_weights, packages, pages, run, scenes
from benchmarks.real.networks import Network
from benchmarks.real.stored import stored
from nrm_plugin import RelevanceMeasure
from nrm_plugin.measure.layer_averages import layer_average


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("NRM_CACHE", str(tmp_path / "cache"))


def test_packages_are_named(monkeypatch):
    toy = packages.Package("toy", "1.0", "toy-1.0-py3-none-any.whl", "0", 0.1, "MIT", "toy weights")
    monkeypatch.setitem(packages.PACKAGES, "toy", toy)
    folder = packages.cache() / "toy-1.0"
    folder.mkdir()
    (folder / "a_toy_module.py").write_text("ANSWER = 42")
    assert packages.fetched("toy") == packages.fetched(toy) == folder
    assert packages.module("toy", "a_toy_module").ANSWER == 42


# -- packages -------------------------------------------------------------------------------------------------------


def test_every_package_has_a_digest_and_a_license():
    for name, entry in packages.PACKAGES.items():
        assert name == entry.name
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.license
        assert entry.holds


def varint(value):
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_weights_of_an_onnx_file_are_read(tmp_path):
    values = torch.randn(200, 3)
    raw = field(9, values.numpy().tobytes())
    unpacked = field(1, 200) + field(1, 3) + field(2, 1) + field(8, b"one") + raw
    packed = field(1, varint(200) + varint(3)) + field(2, 1) + field(8, b"two") + raw
    integers = field(1, 2) + field(2, 7) + field(8, b"shape") + field(9, bytes(16))
    fixed = varint(9 << 3 | 5) + bytes(4) + varint(9 << 3 | 1) + bytes(8)
    graph = b"".join(field(5, one) for one in (unpacked, packed, integers)) + field(2, b"name")
    file = tmp_path / "toy.onnx"
    file.write_bytes(field(1, 8) + fixed + field(7, graph))
    found = onnx_weights.weights(file)
    assert list(found) == ["one", "two"]
    for weights in found.values():
        torch.testing.assert_close(weights, values)
    file.write_bytes(field(7, field(5, field(1, 5) + field(2, 1) + field(8, b"bad") + raw)))
    with pytest.raises(ValueError, match="600 values"):
        onnx_weights.weights(file)


# -- metrics --------------------------------------------------------------------------------------------------------


def toy_net(classes=4):
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    model.eval().requires_grad_(False)
    half = torch.full((3, 1, 1), 0.5)
    return Network("toy", model, half, half, (28, 28), tuple("abcd"), "3")


def test_removal_is_that_of_a_loop_over_patches():
    net = toy_net()
    inputs, targets, heat = torch.randn(2, 3, 28, 28), torch.tensor([1, 3]), torch.randn(2, 28, 28)
    plain = torch.full((3, 1, 1), 0.25)
    curves = metrics.removal(net.logits, inputs, targets, heat, metrics.fills(plain)["plain"])
    for sample, (name, sign) in itertools.product(range(2), (("most first", -1), ("least first", 1))):
        patches = list(itertools.product(range(14), range(14)))
        scores = {(r, c): float(heat[sample, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean()) for r, c in patches}
        order = sorted(patches, key=lambda patch: sign * scores[patch])
        for step, count in enumerate(metrics.STEPS):
            image = inputs[sample].clone()
            for r, c in order[:count]:
                image[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = 0.25
            logits = net.model(image[None])[0]
            assert float(curves[f"{name}, logit"][step, sample]) == pytest.approx(
                float(logits[targets[sample]]), abs=1e-5
            )
            share = float(logits.exp()[targets[sample]] / logits.exp().sum())
            assert float(curves[f"{name}, softmax"][step, sample]) == pytest.approx(share, abs=1e-5)


def test_the_gain_in_area_is_the_mean_height_between_both_orders():
    count = len(metrics.STEPS)
    curves = {
        f"{order} first, {kind}": torch.rand(count, 3) for order in ("most", "least") for kind in ("logit", "softmax")
    }
    found = metrics.areas(curves, "plain")
    for sample in range(3):
        total = 0.0
        for step in range(count - 1):
            width = (metrics.STEPS[step + 1] - metrics.STEPS[step]) / 196
            for place in (step, step + 1):
                least, most = (float(curves[f"{order} first, logit"][place, sample]) for order in ("least", "most"))
                total += width * (least - most) / 2
        assert float(found["SRG, plain"][sample]) == pytest.approx(total, abs=1e-5)
    assert set(found) == {"SRG, plain", "deletion"}
    assert set(metrics.areas(curves, "blur")) == {"SRG, blur", "insertion"}


@pytest.mark.parametrize("name", ["plain", "blur", "noise", "neighbours"])
def test_fills_change_removed_pixels_only(name):
    inputs, removed = torch.randn(2, 3, 28, 28), torch.rand(2, 1, 28, 28) < 0.3
    filled = metrics.fills(torch.zeros(3, 1, 1))[name](inputs, removed)
    changed = (filled != inputs).any(1, keepdim=True)
    torch.testing.assert_close(changed, removed)


def test_inpainting_takes_the_mean_of_the_smallest_square_with_known_pixels():
    inputs, removed = torch.rand(1, 1, 7, 6), torch.rand(1, 1, 7, 6) < 0.7
    filled = metrics.inpainted(inputs, removed)
    for row, column in itertools.product(range(7), range(6)):
        expected, side = float(inputs[0, 0, row, column]), 1
        square = [] if removed[0, 0, row, column] else [expected]
        while not square:
            side *= 2
            top, left = row // side * side, column // side * side
            inside = itertools.product(range(top, min(top + side, 7)), range(left, min(left + side, 6)))
            square = [float(inputs[0, 0, r, c]) for r, c in inside if not removed[0, 0, r, c]]
        assert float(filled[0, 0, row, column]) == pytest.approx(sum(square) / len(square), abs=1e-5)
    assert not bool(metrics.inpainted(inputs, torch.ones_like(removed)).any())


def test_own_share_wins_and_mass_inside_are_those_of_loops():
    heat, masks = torch.randn(5, 6, 8), torch.rand(5, 6, 8) < 0.3
    others = (torch.rand(5, 6, 8) < 0.3) & ~masks
    found = metrics.own(heat, masks, others) | metrics.inside(heat, masks)
    for n in range(5):
        pixels = list(itertools.product(range(6), range(8)))
        value = {pixel: float(heat[n][pixel]) for pixel in pixels}
        own, other = ([pixel for pixel in pixels if bool(area[n][pixel])] for area in (masks, others))
        positive = [sum(max(value[pixel], 0) for pixel in area) for area in (own, other, pixels)]
        assert float(found["own"][n]) == pytest.approx(positive[0] / (positive[0] + positive[1]), abs=1e-5)
        assert bool(found["wins"][n]) == (sum(value[p] for p in own) > sum(value[p] for p in other))
        assert float(found["inside"][n]) == pytest.approx(positive[0] / positive[2] / (len(own) / 48), abs=1e-5)
        assert bool(found["pointing"][n]) == (max(pixels, key=value.__getitem__) in own)
    assert float(metrics.own(-heat.abs(), masks, others)["own"][0]) == 0.5


def test_blurring_along_both_axes_is_a_gaussian_blur():
    inputs = torch.rand(2, 3, 32, 40)
    torch.testing.assert_close(metrics.blurred(inputs), gaussian_blur(inputs, [17, 17], [4.0]))


def test_both_explanations_of_an_image_are_resampled_together():
    assert run.groups("own", 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert run.groups("SRG, plain", 3).tolist() == [0, 1, 2]


def test_a_pair_counts_if_each_class_depends_on_its_own_object():
    logits = torch.tensor([[5.0, 4.0], [1.0, 3.5], [4.5, 0.0]])  # nothing, the left, the right object covered
    assert scenes._depends(logits, target=0, side=0)
    assert scenes._depends(logits, target=1, side=1)
    assert not scenes._depends(logits, target=0, side=1)


# -- images ---------------------------------------------------------------------------------------------------------


def test_arrays_are_computed_once_and_not_stored_if_that_fails():
    calls = []

    def compute():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"a": np.arange(3)}

    with pytest.raises(KeyboardInterrupt):
        stored("toy net/one", "0123456789abcdef", compute)
    for _ in range(2):
        assert stored("toy net/one", "0123456789abcdef", compute)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2
    assert stored("toy net/one", "another", compute)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 3


def test_forward_passes_with_fused_batch_norms_give_the_outputs_of_the_model():
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(8)]
    for norm in norms:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    layers = [nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Sequential(nn.Conv2d(6, 8, 3), norms[1]), nn.Flatten()]
    model = nn.Sequential(*layers, nn.LazyLinear(4)).eval()
    inputs = torch.randn(7, 3, 9, 9)
    expected = model(inputs)
    net = dataclasses.replace(toy_net(), model=model)
    torch.testing.assert_close(net.logits(inputs), expected.detach())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.fast.modules())
    # also its gradients, although it was first needed in inference mode
    inputs.requires_grad_()
    expected_gradient, gradient = (torch.autograd.grad(one(inputs)[:, 2].sum(), inputs)[0] for one in (model, net.fast))
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(model(inputs), expected)


def toy_scenes(count):
    inputs = torch.randn(count, 3, 28, 28)
    names = tuple("abcdefghijklmnopqrst"[:count])
    return scenes.Scenes(inputs, inputs[:, 0] > 0, torch.arange(count) % 4, names)


def test_parts_of_scenes_are_all_of_them_in_order():
    found = list(toy_scenes(7).parts(3))
    assert [len(part) for part in found] == [3, 3, 1]
    assert "".join(name for part in found for name in part.names) == "abcdefg"
    assert len({part.digest for part in found}) == 3


def toy_things(net, monkeypatch, brightness):
    """Objects as wide as the image; the class that the network says is the brightness of the image in tenths."""
    things = [scenes._Thing(name, None, None, target) for name, target, _ in brightness]
    shades = {name: shade for name, _, shade in brightness}

    def drawn(net, thing, height, width, ground):
        image = torch.full((3, height, width), shades[thing.name].get(ground, 0.0))
        return image, image[0] > 0

    monkeypatch.setattr(scenes, "recognized", lambda net, count: things[:count])
    monkeypatch.setattr(scenes, "_drawn", drawn)
    monkeypatch.setattr(
        Network, "logits", lambda self, x: nn.functional.one_hot((x.mean((1, 2, 3)) * 10).round().long(), 11)
    )
    return dataclasses.replace(net, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))


def test_an_object_is_tried_on_the_other_landscape_and_left_out_if_that_fails(monkeypatch):
    rows = [
        ("first", 3, {"flower": 0.3, "china": 0.3}),
        ("second", 4, {"flower": 0.4, "china": 0.5}),
        ("neither", 4, {"flower": 0.5, "china": 0.6}),
        ("turn", 2, {"flower": 0.2, "china": 0.2}),
    ]
    net = toy_things(toy_net(), monkeypatch, rows)
    found = scenes.single(net, 4)
    assert found.names == ("first", "second", "turn")
    assert found.targets.tolist() == [3, 4, 2]


def test_pairs_are_distinct_images_of_different_classes_and_chosen_once(monkeypatch):
    classes = [0, 0, 1, 2]
    things = [scenes._Thing(f"{k}", None, None, target) for k, target in enumerate(classes)]
    monkeypatch.setattr(scenes, "recognized", lambda net, count: things)
    monkeypatch.setattr(scenes, "_depends", lambda logits, target, side: True)
    monkeypatch.setattr(
        scenes, "_drawn", lambda net, thing, h, w, ground: (torch.full((3, h, w), 0.5), torch.ones(h, w) > 0)
    )
    net = toy_net()
    found = scenes.pairs(net, 20)
    images = [frozenset(found.scenes.names[k : k + 2]) for k in range(0, len(found.scenes), 2)]
    assert sorted(map(sorted, images)) == [["0", "2"], ["0", "3"], ["1", "2"], ["1", "3"], ["2", "3"]]
    assert bool((found.scenes.masks ^ found.others).all())
    monkeypatch.setattr(scenes, "_chosen", None)
    assert scenes.pairs(net, 20).scenes.names == found.scenes.names


def task(monkeypatch, count):
    """A task on random images, whose masks do not matter."""
    found = toy_scenes(count)
    monkeypatch.setattr(run, "single", lambda net, photos: found)
    monkeypatch.setattr(run, "pairs", lambda net, count: scenes.Pairs(found.first(4), ~found.first(4).masks))
    return run.Task(toy_net(), run.Size(count, 2, ("plain",)))


def test_metrics_do_not_depend_on_the_parts_that_are_stored(monkeypatch):
    asked = task(monkeypatch, 5)
    whole = asked.values("GradCAM")
    monkeypatch.setattr(run, "CHUNK", 2)
    for key, values in asked.values("GradCAM").items():
        if key != "seconds":
            torch.testing.assert_close(values, whole[key])


@pytest.mark.medium
def test_expensive_methods_explain_few_images(monkeypatch):
    monkeypatch.setattr(run, "FEW", 3)
    asked = task(monkeypatch, 5)
    for name in ("expected gradients", "IntegratedGradients, 20 steps"):
        assert len(asked.values(name)["SRG, plain"]) == 3
    for name in ("DeepLift", "reference blur, against the rest"):
        assert len(asked.maps(name, "single", asked.single)[0]) == 5


def test_an_image_is_no_baseline_of_itself(monkeypatch):
    asked = task(monkeypatch, 5)
    others = asked.others(asked.single.inputs[1:2])
    assert torch.equal(others, asked.single.inputs[[0, 2, 3, 4]])


# -- methods --------------------------------------------------------------------------------------------------------


def question(against=None):
    net = toy_net()
    others = torch.randn(2, 3, 28, 28)
    return methods.Question(net, torch.randn(2, 3, 28, 28), torch.tensor([1, 3]), torch.zeros(3, 1, 1), others, against)


def test_weights_of_outputs_are_a_class_or_a_class_against_the_rest():
    asked = question("rest")
    logits = asked.net.model(asked.inputs)
    for row, target in enumerate([1, 3]):
        others = [k for k in range(4) if k != target]
        total = sum(float(logits[row, k].exp()) for k in others)
        for k in range(4):
            expected = 1.0 if k == target else -float(logits[row, k].exp()) / total
            assert float(asked.weights[row, k]) == pytest.approx(expected, abs=1e-5)
    assert question().weights.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.medium
@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if name != "Captum LRP"])
def test_every_method_gives_a_finite_heat_map_of_each_image(name):
    method = methods.METHODS[name]
    heat = methods.heat_map(method, question(method.against))
    assert heat.shape == (2, 28, 28)
    assert bool(heat.isfinite().all())
    assert float(heat.abs().amax((1, 2)).min()) > 0


def test_relevance_of_a_negative_contrast_supports_the_class():
    """The sum of the measure is 1, so that its sign is that of the contrast."""
    asked = question("rest")
    contrast = (asked.net.model(asked.inputs) * asked.weights).sum(1)
    assert bool((contrast < 0).any())
    heat = methods.heat_map(methods.METHODS["reference gray, against the rest"], asked)
    reference = (asked.net.model(asked.gray) * asked.weights).sum(1)
    torch.testing.assert_close(heat.sum((1, 2)).sign(), (contrast - reference).sign())


def test_a_method_that_averages_resolutions_reads_the_last_layers_of_the_coarsest_grids():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    asked = dataclasses.replace(question("rest"), net=dataclasses.replace(toy_net(), name="pooling", model=model))
    heat = methods.heat_map(methods.METHODS["default, last two resolutions, against the rest"], asked)
    mu = RelevanceMeasure(model, asked.inputs, target=asked.targets.tolist(), against="rest")
    torch.testing.assert_close(heat, layer_average(mu, ["7", "4"]), rtol=1e-4, atol=1e-7)


def test_results_of_other_networks_and_sections_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SIZES", {"toy": run.Size(1, 1, ("plain",))})
    monkeypatch.setattr(run, "measured", lambda net, size, names: iter([(name, values()) for name in names]))
    out = tmp_path / "results.json"
    out.write_text('{"nets": {"older": 1}, "tried": 2}')

    def values():
        return {"own": torch.tensor([0.5, 1.0]), "inside": torch.ones(3), "seconds": torch.tensor([0.1])}

    run.run(["toy"], out, False, ["one", "two"])
    found = json.loads(out.read_text())
    assert found["nets"]["older"] == 1
    assert found["tried"] == 2
    assert list(found["nets"]["toy"]["methods"]) == ["one", "two"]
    assert found["nets"]["toy"]["photos"] == 3
    assert found["nets"]["toy"]["explanations of pairs"] == 2


def test_expensive_methods_explain_all_images_of_networks_for_small_images(monkeypatch):
    asked = task(monkeypatch, 5)
    monkeypatch.setattr(run, "FEW", 2)
    name = "IntegratedGradients, 20 steps"
    assert len(asked.maps(name, "single", asked.single)[0]) == 2
    asked.size = dataclasses.replace(asked.size, few=False)
    assert len(asked.maps(name, "single", asked.single)[0]) == 5


def test_comparisons_in_which_the_first_method_is_first_or_level_are_counted():
    def net(*behind, **foreign):
        others = {f"{n}": {"own": {"behind": one}, "inside": {"behind": [2, 1, 3]}} for n, one in enumerate(behind)}
        others |= {name: {"own": {"behind": one}, "inside": {"behind": [2, 1, 3]}} for name, one in foreign.items()}
        return {"methods": {"ours": {"own": {}, "inside": {}}, **others}}

    nets = {
        "VGG16": net([-2, -3, -1], [2, 1, 3]),
        "EfficientNet-Lite1": net([-0.5, -1, 1], [2, 1, 3]),
        "EfficientNet-Lite2": net([3, 2, 4], DeepLift=[-2, -3, -1]),
    }
    shown = pages._counts(nets)
    assert "First or level in 3 of 4 comparisons on the held-out networks**, and in 4 of 6 on all networks" in shown
    assert "methods of other packages, it is first or level in 3 and 5 comparisons." in shown
    assert "| VGG16 | one | 2 | 1 | 0 | 1 | 0 |" in shown
    assert "| EfficientNet-Lite1 | none, held out | 2 | 1 | 1 | 0 | 0 |" in shown
    assert "| EfficientNet-Lite2 | none, held out | 2 | 1 | 0 | 1 | 1 |" in shown
    assert "| *held out* |  | 4 | 2 | 1 | 1 | 1 |" in shown


def test_the_summary_compares_with_methods_of_other_packages_on_the_same_images():
    def method(srg, own, behind, samples=9):
        row = {key: {"mean": [own, 0, 1], "behind": behind, "samples": samples} for key in pages.SHOWN}
        return row | {"SRG, plain": {"mean": [srg, 0, 1], "behind": behind, "samples": samples}}

    foreign = {
        "GradCAM": method(2, 0.5, [2, 1, 3]),
        "GradCAM, signed, against the rest": method(1, 0.7, [1, -1, 2]),
        "expected gradients": method(9, 0.9, [2, 1, 3], samples=2),
    }
    found = {"ours": method(3, 0.6, [0, 0, 0]), "another of ours": method(5, 0.8, [-2, -3, -1]), **foreign}
    table = pages.real_summary({"nets": {"VGG16": {"methods": found}}})["summary"].splitlines()
    assert (
        table[2] == "| VGG16 | 9 | no | 3.00 | 2.00 | 2.00, GradCAM | 0.60 | 0.50 | 0.70, signed GradCAM | 0 / 6 / 0 |"
    )


def test_methods_of_the_comparison_exist():
    for net in run.SIZES:
        names = run.methods_of(net)
        assert set(names) <= set(methods.METHODS)
        assert len(set(names)) == len(names)
        assert names[0] == (methods.FIRST if net.startswith("Fashion-MNIST") else run.DRAWN[0])
        assert "GradCAM" in names


@pytest.mark.parametrize("name", ["GradCAM", "HiResCAM", "LayerCAM"])
def test_class_activation_maps_are_those_of_pytorch_grad_cam(name):
    cams = pytest.importorskip("pytorch_grad_cam", reason="`make test-hosts` installs it")
    asked = question()
    targets = [cams.utils.model_targets.ClassifierOutputTarget(k) for k in asked.targets.tolist()]
    with getattr(cams, name)(model=asked.net.model, target_layers=[asked.net.model[3]]) as theirs:
        expected = torch.from_numpy(theirs(input_tensor=asked.inputs.requires_grad_(), targets=targets))
    ours = methods.heat_map(methods.METHODS[name], asked)
    ours = (ours - ours.amin((1, 2), keepdim=True)) / (
        ours.amax((1, 2), keepdim=True) - ours.amin((1, 2), keepdim=True)
    )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_calls_of_one_module_are_separated():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.act = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.other(self.act(self.one(x))))

    model, x = Twice().eval(), torch.randn(2, 3)
    separate = methods._separated(model)
    calls = [node.target for node in separate.graph.nodes if node.op == "call_module"]
    assert len(set(calls)) == 4
    torch.testing.assert_close(separate(x), model(x))
