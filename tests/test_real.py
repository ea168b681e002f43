"""The benchmark on real networks: names of packages, metrics and methods against slow definitions."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn

from benchmarks.real import methods, metrics, onnx_weights, packages, run, scenes
from benchmarks.real.networks import Network
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
    for stored in found.values():
        torch.testing.assert_close(stored, values)
    file.write_bytes(field(7, field(5, field(1, 5) + field(2, 1) + field(8, b"bad") + raw)))
    with pytest.raises(ValueError, match="600 values"):
        onnx_weights.weights(file)


# -- metrics --------------------------------------------------------------------------------------------------------


def toy_net(classes=4):
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
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


def test_both_explanations_of_an_image_are_resampled_together():
    assert run.groups("own", 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert run.groups("SRG, plain", 3).tolist() == [0, 1, 2]


def test_a_pair_counts_if_each_class_depends_on_its_own_object():
    logits = torch.tensor([[5.0, 4.0], [1.0, 3.5], [4.5, 0.0]])  # nothing, the left, the right object covered
    assert scenes._depends(logits, target=0, side=0)
    assert scenes._depends(logits, target=1, side=1)
    assert not scenes._depends(logits, target=0, side=1)


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
    heat = methods.heat_map(methods.METHODS["reference grey, against the rest"], asked)
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


def test_results_of_another_section_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SIZES", {"toy": run.Size(1, 1, ("plain",))})
    monkeypatch.setattr(run, "measured", lambda net, size, names: iter([(name, values(size)) for name in names]))
    out = tmp_path / "results.json"
    out.write_text('{"nets": {"older": 1}}')

    def values(size):
        return {"own": torch.tensor([0.5, 1.0]), "seconds": torch.tensor([0.1 * len(size.fills)])}

    run.run(["toy"], out, False, ["one", "two"], "averaged", ("plain", "blur"))
    stored = json.loads(out.read_text())
    assert stored["nets"] == {"older": 1}
    assert list(stored["averaged"]["toy"]["methods"]) == ["one", "two"]
    assert stored["averaged"]["toy"]["methods"]["one"]["seconds"] == 0.2


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
