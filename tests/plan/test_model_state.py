"""Plans of models whose weights or buffers have other values while they run, and of models that change."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import mobilenet_v2, resnet18, vgg11_bn
from zennit import canonizers, torchvision
from zennit.composites import EpsilonPlusFlat
from zennit.types import BatchNorm

from nrm_plugin import NRM, NRMDefault, Plan, RelevanceMeasure
from nrm_plugin.plan.planned_measure import PlannedMeasure


def randomized(net: nn.Module) -> nn.Module:
    """The model in float64, with statistics and affine parameters of batch norms that merging must not lose."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, BatchNorm):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
    return net.double().eval()


def small_net() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    return randomized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 28 * 28, 4)))


def drawn(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 32, 32, generator=draw, dtype=torch.float64)


class Shift(canonizers.Canonizer):
    """Overwrites the bias of linear layers in one of several ways, and restores it in the same way."""

    def __init__(self, way: str) -> None:
        self.way = way

    def apply(self, root_module: nn.Module) -> list[canonizers.Canonizer]:
        made = []
        for module in root_module.modules():
            if isinstance(module, nn.Linear):
                one = Shift(self.way)
                one.module, one.before = module, module.bias.detach().clone()
                one.write(one.before + torch.linspace(-1, 1, len(one.before), dtype=one.before.dtype))
                made.append(one)
        return made

    def register(self) -> None:
        pass

    def write(self, value: Tensor) -> None:
        if self.way == "swap":
            self.module.bias.data = value
        elif self.way == "copy to data":
            self.module.bias.data.copy_(value)
        elif self.way == "copy":
            with torch.no_grad():
                self.module.bias.copy_(value)
        elif self.way == "attribute":
            self.module.bias = nn.Parameter(value, requires_grad=False)

    def remove(self) -> None:
        self.write(self.before)

    def copy(self) -> canonizers.Canonizer:
        return Shift(self.way)


def narrow_vgg() -> nn.Module:
    """VGG11 with one linear layer instead of three with 120 million weights."""
    net = vgg11_bn(num_classes=5, init_weights=False)
    net.classifier = nn.Linear(512 * 7 * 7, 5)
    return randomized(net)


NETS = {
    "sequential": (small_net, lambda: [canonizers.SequentialMergeBatchNorm()]),
    "named": (small_net, lambda: [canonizers.NamedMergeBatchNorm([(["0"], "1"), (["3"], "4")])]),
    "vgg": (narrow_vgg, lambda: [torchvision.VGGCanonizer()]),
    "resnet": (lambda: randomized(resnet18(num_classes=5)), lambda: [torchvision.ResNetCanonizer()]),
    "mobilenet": (lambda: randomized(mobilenet_v2(num_classes=5)), lambda: [canonizers.SequentialMergeBatchNorm()]),
    **{way: (small_net, lambda way=way: [Shift(way)]) for way in ("swap", "copy to data", "copy", "attribute")},
}


LARGE = {"vgg": NRMDefault, "resnet": EpsilonPlusFlat, "mobilenet": NRMDefault}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "composite"),
    [
        *((name, composite) for name in NETS if name not in LARGE for composite in (EpsilonPlusFlat, NRMDefault)),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in LARGE.items()),
    ],
)
def test_plans_of_models_with_canonizers_equal_measures(name, composite):
    torch.manual_seed(0)
    build, stack = NETS[name]
    net, rules = build(), composite(canonizers=stack())
    plan, attributor = Plan(net, drawn(0), composite=rules), NRM(net, rules)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    layers = ["input", next(key for key, module in net.named_modules() if isinstance(module, nn.Conv2d))]
    for seed in range(4):
        x = drawn(seed)
        mu = RelevanceMeasure(net, x, 1, composite=rules)
        marginals, measure = mu.marginal(layers), plan(x, 1)
        torch.testing.assert_close(measure.outputs, mu.outputs, rtol=1e-10, atol=1e-10)
        if isinstance(composite(), EpsilonPlusFlat) and not isinstance(stack()[0], Shift):
            torch.testing.assert_close(mu.outputs, net(x), rtol=1e-3, atol=1e-3)  # rules of Zennit add ``eps`` twice
        for layer, expected in marginals.items():
            scale = float(expected.abs().amax())
            torch.testing.assert_close(measure.marginal(layer), expected, rtol=0, atol=1e-9 * scale)
        once = NRM(net, composite(canonizers=stack())).attribute(x, target=1)
        torch.testing.assert_close(
            attributor.attribute(x, target=1), once, rtol=0, atol=1e-9 * float(once.abs().amax())
        )
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-12)


@pytest.mark.medium
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_plans_of_models_with_parametrizations_equal_measures(norm):
    net = small_net()
    norm(net[0])
    norm(net[7])
    net.double().eval()
    plan = Plan(net, drawn(0))
    for seed in range(4):
        expected = RelevanceMeasure(net, drawn(seed), 1)
        torch.testing.assert_close(plan(drawn(seed), 1).outputs, net(drawn(seed)))
        torch.testing.assert_close(plan(drawn(seed), 1).marginal("0"), expected.marginal("0"))


class Counting(nn.Module):
    """Counts its calls and keeps its last features in buffers; the outputs do not depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        out = self.net(x)
        self.last.copy_(out.detach())
        return out


@pytest.mark.medium
def test_models_that_write_buffers_are_measured_any_number_of_times():
    net = Counting().eval()
    attributor, plan = NRM(net), Plan(net, drawn(0))
    for seed in range(6):
        x = drawn(seed)
        expected = RelevanceMeasure(net.net, x, 1).marginal("input")
        torch.testing.assert_close(plan(x, 1).marginal("input"), expected)
        once = NRM(net.net).attribute(x, target=1)
        torch.testing.assert_close(attributor.attribute(x, target=1), once)


UPDATES = {
    "once": lambda average, new: average.copy_(new),
    "twice": lambda average, new: average.mul_(0.9).add_(0.1 * new),
    "twice through data": lambda average, new: average.data.mul_(0.9).add_(0.1 * new),
    "by an index": lambda average, new: (average.__setitem__(0, 0.0), average.__setitem__(slice(1, 3), new[1:3])),
}


class Averaged(nn.Module):
    """Scales its features by a running average, which it updates afterwards."""

    def __init__(self, update) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.update = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), update
        self.register_buffer("average", torch.rand(4, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu() * self.average
        self.update(self.average, hidden.detach().mean(0))
        return self.b(hidden)


@pytest.mark.medium
@pytest.mark.parametrize("update", UPDATES)
def test_plans_read_a_buffer_as_it_was_before_the_model_updated_it(update):
    net, twin = Averaged(UPDATES[update]).eval(), Averaged(lambda average, new: None).eval()
    plan, attributor = Plan(net, torch.ones(5, 3, dtype=torch.float64)), NRM(net)
    for seed in range(5):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(2):
            measure, expected = plan(x, 1), RelevanceMeasure(twin, x, 1)
            torch.testing.assert_close(measure.outputs, expected.outputs)
            torch.testing.assert_close(measure.marginal("input"), expected.marginal("input"))
        torch.testing.assert_close(attributor.attribute(x, target=1), NRM(twin).attribute(x, target=1))


class Graph(nn.Module):
    """A graph convolution whose adjacency is a sparse buffer, which has no single memory."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        dense = torch.eye(6, dtype=torch.float64).roll(1, 0) + torch.eye(6, dtype=torch.float64)
        self.register_buffer("adjacency", dense if layout == torch.strided else dense.to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.adjacency @ self.a(x)).relu()).mean(0, keepdim=True)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_models_with_sparse_buffers_are_measured_any_number_of_times(layout):
    net = Graph(layout).eval()
    attributor, plan = NRM(net, batched=False), Plan(net, torch.zeros(6, 3, dtype=torch.float64), batched=False)
    for seed in range(5):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = RelevanceMeasure(net, x, 1, batched=False)
        torch.testing.assert_close(plan(x, 1).marginal("input"), expected.marginal("input"))
        once = NRM(net, batched=False).attribute(x, target=1)
        torch.testing.assert_close(attributor.attribute(x, target=1), once)


@pytest.mark.medium
def test_threads_share_a_planned_measure():
    net = small_net()
    layers = ["input", *(str(number) for number in range(7))]
    plan = Plan(net, drawn(0))
    plan(drawn(0), 1).marginal("input")
    for seed in range(1, 6):
        measure, expected = plan(drawn(seed), 1), RelevanceMeasure(net, drawn(seed), 1).marginal(layers)
        assert isinstance(measure, PlannedMeasure)
        found, errors = {}, []
        begin = threading.Barrier(len(layers))

        def ask(layer: str, measure=measure, found=found, errors=errors, begin=begin) -> None:
            begin.wait()
            try:
                found[layer] = measure.marginal(layer)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(layer,)) for layer in layers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for layer in layers:
            torch.testing.assert_close(found[layer], expected[layer])
