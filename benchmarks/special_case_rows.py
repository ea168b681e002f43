"""The rows of docs/special-cases.md: the names of each expression, and the result of the known method."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from zennit.composites import COMPOSITES, EpsilonPlus, EpsilonPlusFlat, LayerMapComposite
from zennit.layer import Sum
from zennit.rules import Epsilon, Gamma, Norm, Pass, ZPlus
from zennit.torchvision import ResNetBasicBlockCanonizer
from zennit.types import Activation, AvgPool, BatchNorm, Linear

from benchmarks import known_methods as known
from benchmarks.special_case import (
    DOUBLE,
    TINY,
    VGG,
    Made,
    Row,
    draw,
    draw_statistics,
    epsilon_everywhere,
    plain_relu,
    small,
)
from benchmarks.special_kernels import AttentionOnly, fixed_attention, halves, mean_attention
from nrm_plugin import Normalized, RelevanceMeasure, at, register_kernel, restriction

LAYERS = ["input", *(f"features.{number}" for number in (0, 3, 6, 8, 11, 13, 16, 18))]


def zennit(name: str) -> Row:
    """Returns the row of LRP with one of Zennit's composites, at every convolution."""

    def make() -> Made:
        arguments = {"low": -3.0, "high": 3.0} if "box" in name else {}
        net, x, rules = VGG(), draw(2, 3, 32, 32), COMPOSITES[name](**arguments)
        mu = RelevanceMeasure(net, x, 3, composite=Normalized(rules, residual="sink", uncovered="gradient"))
        names = {"mu": mu, "layers": LAYERS, "f": mu.output.reshape(-1, 1, 1, 1)}
        return names, known.zennit_relevance(net, x, 3, rules, LAYERS)

    expression = "[mu.marginal(layer) * f for layer in layers]"
    return Row(
        f"LRP, {COMPOSITES[name].__name__}", expression, "zennit, VGG11, 9 layers", make, 1e-9, arxiv="2106.13200"
    )


def captum_lrp() -> Made:
    from captum.attr import LRP

    net, x = VGG(), draw(2, 3, 32, 32)
    expected = LRP(net).attribute(x.clone().requires_grad_(), 3)
    return {"net": net, "x": x, "rules": epsilon_everywhere(1e-9)}, expected


def captum_layer_lrp() -> Made:
    from captum.attr import LayerLRP

    net, x = VGG(), draw(2, 3, 32, 32)
    expected = LayerLRP(net, net.features[8]).attribute(x.clone().requires_grad_(), 3)
    return {"net": net, "x": x, "rules": epsilon_everywhere(1e-9)}, expected


def input_x_gradient() -> Made:
    from captum.attr import InputXGradient

    net, x = plain_relu(), draw(3, 6)
    expected = InputXGradient(net).attribute(x.clone().requires_grad_(), 1)
    return {"net": net, "x": x, "rules": epsilon_everywhere(1e-15)}, expected


def concept() -> dict[str, Any]:
    """Returns names shared by the rows of concept relevance propagation."""
    net, x, rules = small(), draw(2, 3, 8, 8), EpsilonPlusFlat()
    mu = RelevanceMeasure(net, x, 1, composite=rules, residual="sink")
    return {"net": net, "x": x, "rules": rules, "mu": mu, "f": mu.output.reshape(-1, 1, 1, 1), "A": at("2")[3]}


def channels(count: int, *chosen: int) -> Tensor:
    """Returns the mask over channels."""
    mask = torch.zeros(1, count, 1, 1, dtype=DOUBLE)
    mask[:, list(chosen)] = 1
    return mask


def concept_formula() -> Made:
    names = {**concept(), "B": at("0")[[0, 2]]}
    masks = {"2": channels(5, 3), "0": channels(4, 0, 2)}
    return names, known.masked_relevance(names["net"], names["x"], 1, names["rules"], masks)


def concept_package() -> Made:
    from crp.attribution import CondAttribution

    names = concept()
    attribution = CondAttribution(names["net"])
    result = attribution(names["x"].clone().requires_grad_(), [{"2": [3], "y": [1]}], names["rules"])
    return names, result.heatmap


def concept_layer_package() -> Made:
    from crp.attribution import CondAttribution

    names = concept()
    attribution = CondAttribution(names["net"])
    leaf = names["x"].clone().requires_grad_()
    result = attribution(leaf, [{"2": [3], "y": [1]}], names["rules"], record_layer=["0"])
    return names, result.relevances["0"].sum((2, 3))


def concept_given_package() -> Made:
    from crp.attribution import CondAttribution

    names = concept()
    attribution = CondAttribution(names["net"])
    result = attribution(names["x"].clone().requires_grad_(), [{"2": [3], "y": [1]}], names["rules"])
    whole = attribution(names["x"].clone().requires_grad_(), [{"y": [1]}], names["rules"], record_layer=["2"])
    return names, result.heatmap / whole.relevances["2"][:, 3].sum((1, 2)).reshape(-1, 1, 1)


def graph() -> dict[str, Any]:
    """Returns a small graph, its network, and its measure."""
    edges = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 1]]).to(
        DOUBLE
    )
    adjacency = edges / (edges.sum(1, keepdim=True) * edges.sum(0, keepdim=True)).sqrt()
    net, x = known.GraphNet(adjacency, [3, 8, 8, 8]), draw(5, 3).abs()
    rules = LayerMapComposite([(Activation, Pass()), (AvgPool, Norm(TINY)), (Linear, Gamma(0.25, stabilizer=TINY))])
    target = int(net(x)[0].argmax())
    mu = RelevanceMeasure(net, x, target, composite=Normalized(rules, residual="sink"), batched=False)
    taps = ["input", "blocks.0", "blocks.1", "blocks.2"]
    walks = known.graph_walks(net, adjacency, x, target, 0.25)
    return {"mu": mu, "taps": taps, "walks": walks, "conjunction": conjunction, "union": union}


def conjunction(events: Iterator[Any]) -> Any:
    """Returns ``A & B & …``."""
    return _joined(events, lambda a, b: a & b)


def union(events: Iterator[Any]) -> Any:
    """Returns ``A | B | …``."""
    return _joined(events, lambda a, b: a | b)


def _joined(events: Iterator[Any], join: Callable[[Any, Any], Any]) -> Any:
    whole, *others = events
    for event in others:
        whole = join(whole, event)
    return whole


def gnn_lrp() -> Made:
    names = graph()
    chosen = list(itertools.product(range(5), repeat=4))[::3]
    return {**names, "chosen": chosen}, torch.tensor([[names["walks"].get(walk, 0.0)] for walk in chosen], dtype=DOUBLE)


def sgnn_lrp() -> Made:
    names = graph()
    sets = [[0, 1], [1, 2, 3], [0, 2, 3, 4]]
    inside = [sum(mass for walk, mass in names["walks"].items() if set(walk) <= set(nodes)) for nodes in sets]
    return {**names, "sets": sets}, torch.tensor(inside, dtype=DOUBLE).unsqueeze(1)


def symbolic() -> Made:
    names = graph()
    queries: list[Callable[[set[int]], bool]] = [
        lambda nodes: 1 in nodes and 3 not in nodes,
        lambda nodes: 1 in nodes or 4 in nodes,
        lambda nodes: 0 in nodes and (2 in nodes or 3 not in nodes),
    ]
    visits = [union(at(tap)[node] for tap in names["taps"]) for node in range(5)]
    expected = torch.tensor([[known.symbolic_query(names["walks"], query)] for query in queries], dtype=DOUBLE)
    return {**names, "v": visits}, expected


def pruned() -> Made:
    names = concept()
    x, kept = names["x"][:1], torch.rand(5, 4, 4) < 0.5
    mu = RelevanceMeasure(names["net"], x, 1, composite=EpsilonPlusFlat(), residual="sink")
    expected = known.masked_relevance(names["net"], x, 1, EpsilonPlusFlat(), {"2": kept.to(DOUBLE)}, prune=True)
    return {"mu": mu, "kept": kept}, expected


def splitting() -> Made:
    net = torchvision.models.resnet18(weights=None, num_classes=5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            draw_statistics(module)
        elif isinstance(module, nn.ReLU):
            module.inplace = False
    net, x = net.double().eval().requires_grad_(False), draw(1, 3, 32, 32)
    kinds = [(Activation, Pass()), (BatchNorm, Pass()), (AvgPool, Norm()), (nn.Conv2d, ZPlus()), (nn.Linear, Epsilon())]
    split = LayerMapComposite([(Sum, known.RatioSplit()), *kinds], canonizers=[ResNetBasicBlockCanonizer()])
    rules = LayerMapComposite(kinds)
    expected = known.zennit_relevance(net, x, 2, split, ["input", "layer2.0.conv1", "layer4.1.conv2"])
    layers = ["input", "layer2.0.conv1", "layer4.1.conv2"]
    return {"net": net, "x": x, "rules": rules, "layers": layers}, expected


def relative() -> Made:
    net, x = plain_relu(), draw(3, 6)
    weights = [module.weight.detach() for module in net if isinstance(module, nn.Linear)]
    return {"net": net, "x": x}, known.forward_times_backward(weights, x, 2)


def leaky() -> Made:
    """Returns the case of LRP-ε with a large ε; expected values are computed from explicit matrices."""
    net, x = plain_relu(), draw(1, 6)
    weights = [module.weight.detach() for module in net if isinstance(module, nn.Linear)]
    kernels, a = [], x[0]
    for W in weights:  # T[i, j]
        z = W @ a
        kernels.append((a[:, None] * W.T) / (z + 0.3 * torch.where(z >= 0, 1.0, -1.0).to(DOUBLE)))
        a = z.relu()
    down, expected = torch.eye(4, dtype=DOUBLE)[2], []
    for number in (2, 1, 0):
        down = kernels[number] @ down
        up = torch.ones(6, dtype=DOUBLE)
        for T in kernels[:number]:
            up = up @ T
        expected.append((down * up / (down * up).sum())[None])
    return {"net": net, "x": x, "rules": epsilon_everywhere(0.3)}, expected


def merged() -> Made:
    net, x = VGG(norm=True), draw(2, 3, 32, 32)
    expected = known.zennit_relevance(known.merged_by_hand(net), x, 3, EpsilonPlus(), ["input"])
    return {"net": net, "x": x, "EpsilonPlus": EpsilonPlus}, expected[0]


def merged_everywhere() -> Made:
    """Returns the case of norms before and after layers; expected values use dense layers with explicit borders."""
    norms = [nn.BatchNorm2d(2), nn.BatchNorm2d(3), nn.BatchNorm1d(7), nn.BatchNorm1d(7)]
    for norm in norms:
        draw_statistics(norm)
    norms[0].weight.data[1] *= -1  # values above the limit are clipped
    first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1, stride=2)
    lower, upper = nn.Linear(36, 7), nn.Linear(7, 3)
    for layer in (first, second, lower, upper):
        nn.init.normal_(layer.weight, std=0.5)  # otherwise biases absorb most of the relevance, and a measure warns
    stages = [[norms[0], nn.ReLU(), first], [norms[1], second], [nn.Flatten(), lower, norms[2]], [norms[3], upper]]
    layers = [module for stage in stages for module in (*stage, nn.ReLU())][:-1]
    net, x = nn.Sequential(*layers).double().eval().requires_grad_(False), draw(2, 2, 5, 5)
    scale, shift = norms[0](torch.ones(1, 2, 5, 5).double()), norms[0](torch.zeros(1, 2, 5, 5).double())
    affine = [
        lambda a: first((scale - shift) * a + shift),  # applied to clipped values
        *(nn.Sequential(*stage) for stage in stages[1:]),
    ]
    shapes = [(2, 5, 5), (3, 5, 5), (4, 3, 3), (7,)]
    dense = [known.densely(each, shape) for each, shape in zip(affine, shapes, strict=True)]
    parts = [part for layer in dense for part in (layer, nn.ReLU())][:-1]
    twin = nn.Sequential(known.Clipped(norms[0]), nn.Flatten(), *parts).eval().requires_grad_(False)
    torch.testing.assert_close(twin(x), net(x))
    kinds = [(Activation, Pass()), (BatchNorm, Pass()), (Linear, Epsilon(0.1))]
    by_hand = LayerMapComposite([(known.Clipped, Pass()), *kinds])
    expected = known.zennit_relevance(twin, x, 1, by_hand, ["input"])
    return {"net": net, "x": x, "kinds": kinds, "LayerMapComposite": LayerMapComposite}, expected[0]


def top_channels() -> Made:
    names = concept()
    net, x = names["net"], names["x"][:1]
    mu = RelevanceMeasure(net, x, 1, composite=EpsilonPlusFlat(), residual="sink")
    masses = []
    for c, b, a in itertools.product(range(3), range(5), range(4)):
        masks = {"4": channels(3, c), "2": channels(5, b), "0": channels(4, a)}
        masses.append(float(known.masked_relevance(net, x, 1, EpsilonPlusFlat(), masks, at="0").sum() / mu.output))
    best = sorted(masses, key=abs, reverse=True)[:10]
    return {"mu": mu, "layers": ["4", "2", "0"]}, torch.tensor(best, dtype=DOUBLE)


def errors_of_selection() -> Made:
    names = concept()
    net, x = names["net"], names["x"]
    masks = {"2": channels(5, 1, 3), "0": channels(4, 0, 2)}
    full = known.zennit_relevance(net, x, 1, EpsilonPlusFlat(), ["input"])[0] / names["f"]
    left = known.masked_relevance(net, x, 1, EpsilonPlusFlat(), masks) / names["f"]
    mse = (full - left).square().flatten(1).mean(1)
    halves = (full.abs() + left.abs()) / 2
    smape = 100 * torch.where(halves == 0, 0.0, (full - left).abs() / halves).flatten(1).mean(1)
    kept = {layer: mask[0, :, 0, 0] > 0 for layer, mask in masks.items()}
    return {"mu": names["mu"], "kept": kept, "restriction": restriction}, [mse, smape]


def reconstruction(kind: str) -> Callable[[], Made]:
    """Captum's reconstruction of the most active neuron of a channel; it starts at 1, not at the activation."""

    def make() -> Made:
        from captum.attr import NeuronDeconvolution, NeuronGuidedBackprop

        net, x = small(), draw(1, 3, 8, 8)
        activation = net[:5](x)[0]
        best = activation.flatten().argmax()
        neuron = tuple(int(i) for i in torch.unravel_index(best, activation.shape))
        method = (NeuronDeconvolution if kind == "deconvnet" else NeuronGuidedBackprop)(net, net[4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Captum warns about its hooks
            expected = method.attribute(x.clone().requires_grad_(), neuron) * activation.flatten()[best]
        return {"net": net, "x": x, "channel": neuron[0]}, expected

    return make


def attention(kind: type[known.Block]) -> Callable[[], Made]:
    """Returns a transformer block, and a twin; its gradient (times the input, except for LXT) is the known method."""

    def make() -> Made:
        net, twin, x = known.Block(), kind(), draw(2, 5, 8)
        gradient = known.input_gradient(twin, x, 1)
        names = {"net": net, "x": x, "rules": epsilon_everywhere()}  # without biases nothing is absorbed
        if kind is known.CPLRPBlock:
            register_kernel(scaled_dot_product_attention)(fixed_attention)
        return names, gradient if kind is known.LXTBlock else gradient * x

    return make


def attention_rollout() -> Made:
    layer = AttentionOnly(8, 2, 12, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.TransformerEncoder(layer, 3).double().eval()
    x = draw(2, 5, 8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    register_kernel(scaled_dot_product_attention)(mean_attention)
    register_kernel(torch.add)(halves)
    start = torch.eye(5, dtype=DOUBLE)[1][:, None].expand(2, 5, 8)
    return {"net": net, "x": x, "start": start}, known.rollout(net, x)[:, 1]


def relevant_subspaces() -> Made:
    lower, upper = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double(), nn.Linear(8, 3).double()
    x, basis = draw(4, 6), torch.linalg.qr(draw(8, 8))[0]
    whole = nn.Sequential(lower, upper)
    nn.init.constant_(lower[0].bias, 6.0)  # the formula divides by activations
    activation = lower(x).detach()
    relevance = known.zennit_relevance(whole, x, 1, epsilon_everywhere(), ["0"])[0]
    into, back = nn.Linear(8, 8, bias=False).double(), nn.Linear(8, 8, bias=False).double()
    into.weight.data, back.weight.data = basis.T.clone(), basis.clone()
    names = {"lower": lower, "into": into, "back": back, "upper": upper, "x": x, "rules": epsilon_everywhere()}
    return {**names, "f": whole(x)[:, 1:2].detach()}, known.subspaces(activation, relevance, basis)


ROWS = [
    *map(zennit, ("epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box")),
    *map(zennit, ("epsilon_alpha2_beta1_flat", "excitation_backprop", "beta_smooth")),
    Row("Captum's LRP", 'NRM(net, rules, residual="sink").attribute(x, 3)', "captum, LRP, VGG11", captum_lrp, 1e-6),
    Row(
        "Captum's LayerLRP",
        'LayerNRM(net, net.features[8], composite=rules, residual="sink").attribute(x, 3)',
        "captum, LayerLRP, VGG11",
        captum_layer_lrp,
        1e-6,
    ),
    Row(
        "Input × gradient (LRP-0, ReLU, no biases)",
        'NRM(net, rules, residual="sink").attribute(x, 1)',
        "captum, InputXGradient",
        input_x_gradient,
        1e-9,
    ),
    Row(
        "Concept relevance propagation",
        'mu.marginal("input", joint=A & B) * f',
        "formula: masks in the backward pass, two layers",
        concept_formula,
        arxiv="2206.03208",
    ),
    Row(
        "Concept relevance propagation, heat map",
        '(mu.marginal("input", joint=A) * f).sum(1)',
        "zennit-crp, CondAttribution",
        concept_package,
        needs="crp",
        arxiv="2206.03208",
    ),
    Row(
        "Concept relevance propagation, channels of a lower layer",
        'mu.joint("2", "0")[:, 3] * mu.output[:, None]',
        "zennit-crp, record_layer",
        concept_layer_package,
        needs="crp",
        arxiv="2206.03208",
    ),
    Row(
        "Concept relevance propagation, heat map divided by the relevance of the concept",
        'mu.marginal("input", given=A).sum(1)',
        "zennit-crp, CondAttribution",
        concept_given_package,
        needs="crp",
        arxiv="2206.03208",
    ),
    Row(
        "GNN-LRP",
        "torch.stack([mu(conjunction(at(tap)[node] for tap, node in zip(taps, walk))) * mu.output for walk in chosen])",
        "formula: 209 walks, one by one",
        gnn_lrp,
        1e-9,
        arxiv="2006.03589",
    ),
    Row(
        "sGNN-LRP (Xiong et al., ICML 2022)",
        "torch.stack([mu(conjunction(at(tap)[nodes] for tap in taps)) * mu.output for nodes in sets])",
        "formula: sum over the walks in a subgraph",
        sgnn_lrp,
        1e-9,
    ),
    Row(
        "Symbolic XAI, v[k] = union(at(tap)[k] for tap in taps)",
        "torch.stack([mu(query) * mu.output for query in (v[1] & ~v[3], v[1] | v[4], v[0] & (v[2] | ~v[3]))])",
        "formula: sum over walks, by their set of nodes",
        symbolic,
        1e-9,
        arxiv="2408.17198",
    ),
    Row(
        "Pruned LRP",
        'mu.marginal("input", given=at("2")[kept]) * mu(at("2")) * mu.output',
        "formula: masked and rescaled in the backward pass",
        pruned,
        arxiv="2404.14271",
    ),
    Row(
        "LRP for ResNet, splitting by ratio",
        'LayerNRM(net, layers, composite=Normalized(rules, residual="sink", sums="ratio")).attribute(x, 2)',
        "formula: a Zennit rule on Zennit's sums, ResNet-18",
        splitting,
        1e-9,
        arxiv="2407.09115",
    ),
    Row(
        "Relative rule, reconstructed from an abstract",
        'RelevanceMeasure(net, x, 2, composite=NRMRelative()).marginal(["input", "1", "3"], given=~ABSORBED, '
        "min_ratio=0)",
        "formula: contributions without denominators, forward × backward / Z",
        relative,
        1e-9,
        arxiv="2501.14322",
    ),
    Row(
        "Any leaky rule, globally normalized",
        'RelevanceMeasure(net, x, 2, composite=rules, residual="sink").marginal(["3", "1", "input"], given=~ABSORBED, '
        "min_ratio=0)",
        "formula: forward × backward / Z",
        leaky,
        1e-9,
    ),
    Row(
        "Batch-norm fusion",
        'NRM(net, EpsilonPlus(canonizers=[FuseBatchNorm()]), residual="sink").attribute(x, 3)',
        "zennit, on VGG11 with manually merged norms",
        merged,
        1e-9,
        arxiv="2002.11018",
    ),
    Row(
        "Batch-norm fusion, norm → conv with zero padding, norm → ReLU → conv, norm → dense, dense → norm",
        'NRM(net, LayerMapComposite(kinds, canonizers=[FuseBatchNorm()]), residual="sink").attribute(x, 1)',
        "zennit, on explicit dense layers",
        merged_everywhere,
        1e-9,
        arxiv="2002.11018",
    ),
    Row(
        "Critical paths: the ten largest of 60 walks",
        "torch.tensor([walk.mass for walk in top_walks(mu, layers, k=10).walks], dtype=torch.float64)",
        "formula: every walk as a masked pass",
        top_channels,
    ),
    Row(
        "Neuron selection: MSE and SMAPE",
        "[restriction(mu, kept).mse, restriction(mu, kept).smape]",
        "formula, on masked passes",
        errors_of_selection,
        arxiv="2412.05686",
    ),
    Row(
        "Deconvolution, one neuron (not a measure)",
        'reconstruct(net, x, at("4").channel(channel), "deconvnet", strongest=True).images',
        "captum, NeuronDeconvolution",
        reconstruction("deconvnet"),
    ),
    Row(
        "Guided backpropagation, one neuron (not a measure)",
        'reconstruct(net, x, at("4").channel(channel), "guided_backprop", strongest=True).images',
        "captum, NeuronGuidedBackprop",
        reconstruction("guided_backprop"),
        arxiv="1412.6806",
    ),
    Row(
        "AttnLRP",
        'NRM(net, Normalized(rules, residual="sink", sums="signed", attention="halves")).attribute(x, 1)',
        "LXT's own operations",
        attention(known.LXTBlock),
        1e-6,
        needs="lxt",
        arxiv="2402.05602",
    ),
    Row(
        "AttnLRP",
        'NRM(net, Normalized(rules, residual="sink", sums="signed", attention="halves")).attribute(x, 1)',
        "formula: gradient × input on a modified copy of the model",
        attention(known.AttnLRPBlock),
        1e-6,
        arxiv="2402.05602",
    ),
    Row(
        "CP-LRP, with the kernel FixedAttention",
        'NRM(net, Normalized(rules, residual="sink", sums="signed")).attribute(x, 1)',
        "formula: gradient × input on a modified copy of the model",
        attention(known.CPLRPBlock),
        1e-6,
        arxiv="2202.07304",
    ),
    Row(
        "Attention rollout, with the kernels MeanAttention and halves",
        'RelevanceMeasure(net, x, start=start, composite=NRMAbsolute()).marginal("input").sum(-1)',
        "formula: product of matrices",
        attention_rollout,
        1e-5,
        arxiv="2005.00928",
    ),
    Row(
        "PRCA, DRSA: relevance of directions",
        'RelevanceMeasure(nn.Sequential(lower, into, back, upper), x, 1, composite=rules, residual="sink")'
        '.marginal("1") * f',
        "formula: (uᵀa)(uᵀc)",
        relevant_subspaces,
        1e-9,
        arxiv="2212.14855",
    ),
]
