from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import UnknownLayerError
from tests.text_nets import Block

STANDARD = "resid_pre attn.q attn.k attn.v attn attn_out resid_mid mlp.neuron mlp_out resid_post".split()
PARALLEL = "resid_pre attn.q attn.k attn.v attn attn_out mlp.neuron mlp_out resid_post".split()
ALONGSIDE = ["parallel", "parallel, one norm", "parallel sum"]


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x.mean(1))
        return result


class Written(Block):
    """Pre-norm attention in a spelling of its own, with an activation function that is a sum."""

    def __init__(self, spelling: str) -> None:
        super().__init__(False)
        self.spelling = spelling

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.spelling == "einsum":
            weights = torch.einsum("nhid,nhjd->nhij", q, k).mul(0.5).softmax(-1)
            z = torch.einsum("nhij,nhjd->nhid", weights, v)
        else:
            weights = nn.functional.dropout(torch.softmax(0.5 * q @ k.transpose(-2, -1) + 0.1, -1), 0.1, self.training)
            z = weights @ v
        return self.out(z.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(0.5 * up * (1 + torch.tanh(0.8 * (up + 0.04 * torch.pow(up, 3)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "parallel":
            return self.mlp(self.two(x)) + (self.attended(self.one(x)) + x)
        if self.spelling == "parallel, one norm":
            read = self.one(x)
            return x + self.attended(read) + self.mlp(read)
        if self.spelling == "parallel sum":
            return x + (self.attended(self.one(x)) + self.mlp(self.one(x)))
        if self.spelling == "in place":
            x = self.attended(self.one(x)).add_(x)
            return x.clone().add_(self.mlp(self.two(x)))
        x = torch.add(x, self.attended(self.one(x)))
        return self.mlp(self.two(x)) + x


def measured(net: nn.Module, x: Tensor | None = None, is_difference: bool = False) -> RelevanceMeasure:
    x = torch.randn(1, 5, 8).double() if x is None else x
    return RelevanceMeasure(net, x, target=1, reference=x.flip(-1) if is_difference else None)


def drawn(*blocks: nn.Module) -> nn.Module:
    return Stack(*blocks).double().eval()


def parts(sites: list[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in sites if name.startswith(prefix)]


def check_layers(mu: RelevanceMeasure, same: dict[str, Any]) -> None:
    """Checks that sites are the same tensors as layers of the model."""
    for site, layer in same.items():
        torch.testing.assert_close(mu.marginal(site), mu.marginal(layer), atol=1e-12, rtol=0)


@pytest.mark.parametrize("is_difference", [False, True])
@pytest.mark.parametrize("spelling", ["matmul", "einsum", "in place", *ALONGSIDE])
def test_sites_do_not_depend_on_the_spelling_or_the_reference(spelling, is_difference):
    torch.manual_seed(0)
    mu = measured(drawn(Written(spelling), Written(spelling)), is_difference=is_difference)
    expected = PARALLEL if spelling.startswith("parallel") else STANDARD
    assert mu.sites == [f"blocks.{block}.{name}" for block, name in product(range(2), expected)]


@pytest.mark.medium
@pytest.mark.parametrize("spelling", ALONGSIDE)
def test_parallel_branches_are_the_outputs_of_attention_and_mlp(spelling):
    torch.manual_seed(0)
    mu = measured(drawn(Written(spelling), Written(spelling)))
    for block in range(2):
        check_layers(mu, {
            f"blocks.{block}.attn_out": f"layers.{block}.out",
            f"blocks.{block}.mlp_out": f"layers.{block}.down",
            f"blocks.{block}.mlp.neuron": at(f"layers.{block}.down", side="input"),
            f"blocks.{block}.resid_post": f"layers.{block}",
        })  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize("is_causal", [False, True])
def test_sites_are_the_tensors_that_the_modules_compute(is_causal):
    torch.manual_seed(0)
    net, x = drawn(Block(is_causal), Block(is_causal)), torch.randn(1, 5, 8).double()
    mu = measured(net, x)
    assert mu.sites == [f"blocks.{block}.{name}" for block, name in product(range(2), STANDARD)]
    same = {
        "blocks.0.resid_pre": "input",
        "blocks.1.mlp.neuron": at("layers.1.down", side="input"),
        "blocks.1.attn_out": "layers.1.out",
        "blocks.0.mlp_out": "layers.0.down",
        "blocks.1.resid_pre": "layers.0",
        "blocks.0.attn.z": "layers.0.scaled_dot_product_attention",
    } | ({"blocks.1.resid_post": "layers.1"} if is_causal else {})
    check_layers(mu, same)
    for site in mu.sites:
        total = mu(at(site)) + mu.sink(site) + mu.bypass(site)
        torch.testing.assert_close(total, torch.ones(1).double(), atol=1e-10, rtol=0)
    assert mu.shape("blocks.1.attn.v") == (1, 2, 5, 4)


@pytest.mark.medium
@pytest.mark.parametrize("is_causal", [False, True])
def test_sites_of_a_difference_are_the_same_tensors_and_absorb_nothing(is_causal):
    torch.manual_seed(0)
    mu = measured(drawn(Block(is_causal), Block(is_causal)), is_difference=True)
    assert mu.sites == [f"blocks.{block}.{name}" for block, name in product(range(2), STANDARD)]
    same = {
        "blocks.0.resid_pre": "input",
        "blocks.1.mlp.neuron": at("layers.1.down", side="input"),
        "blocks.1.attn_out": "layers.1.out",
        "blocks.1.resid_pre": "layers.0",
    }
    check_layers(mu, same)
    for site in mu.sites:
        torch.testing.assert_close(mu(at(site)) + mu.bypass(site), torch.ones(1).double(), atol=1e-10, rtol=0)
        assert float(mu.sink(site).abs()) < 1e-10
    heads = torch.stack([mu(at(f"blocks.1.attn.head.{head}")) for head in range(2)])
    torch.testing.assert_close(heads[:, 0], mu.marginal("blocks.1.attn")[0].sum((1, 2)))
    assert bool((heads.abs() > 1e-3).all())


def test_hooks_of_transformer_lens_are_sites_of_any_model():
    torch.manual_seed(0)
    mu = measured(drawn(Block(True), Block(True)))
    for hook, site in {
        "blocks.1.hook_resid_pre": "blocks.1.resid_pre",
        "blocks.1.attn.hook_v": "blocks.1.attn.v",
        "blocks.1.attn.hook_z": "blocks.1.attn",
        "blocks.0.mlp.hook_post": "blocks.0.mlp.neuron",
        "blocks.0.hook_mlp_out": "blocks.0.mlp_out",
    }.items():
        torch.testing.assert_close(mu.marginal(hook), mu.marginal(site), atol=0, rtol=0)


def attention_matrix(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of the last attention under the default composite, written out: ``(heads, query, key, d)``, by value."""
    block = net.layers[0]
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2)[0] for t in block.qkv(block.one(x)).chunk(3, -1))
    scores = q @ k.transpose(-2, -1) / 2
    weights = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    size = weights.unsqueeze(-1) * v.abs().unsqueeze(1)
    return size / size.sum(2, keepdim=True), v


@pytest.mark.medium
def test_heads_neurons_and_pairs_are_sums_over_enumerated_walks():
    torch.manual_seed(0)
    net, x = drawn(Block(True)), torch.randn(1, 5, 8).double()
    mu = measured(net, x)
    arriving = mu.marginal("blocks.0.attn")[0].detach()
    matrix, _ = attention_matrix(net, x)
    for head in range(2):
        event = at(f"blocks.0.attn.head.{head}")
        torch.testing.assert_close(mu(event)[0], arriving[head].sum())
        torch.testing.assert_close(mu(at("blocks.0.attn").head(head)), mu(event))
        for query, key in product(range(5), range(5)):
            walks = (arriving[head, query] * matrix[head, query, key]).sum()
            pair = at("blocks.0.attn").head(head).pair(query, key)
            torch.testing.assert_close(mu(pair)[0], walks.detach(), atol=1e-7, rtol=1e-5)
    neurons = mu.marginal("blocks.0.mlp.neuron")[0]
    torch.testing.assert_close(mu(at("blocks.0.mlp.neuron.7"))[0], neurons[:, 7].sum())
    both = mu(at("blocks.0.attn.head.1") & at("blocks.0.mlp.neuron.7"))
    below = mu.conditional(at("blocks.0.attn.head.1"), "blocks.0.mlp.neuron")[0]
    torch.testing.assert_close(both[0], (neurons * below)[:, 7].sum())
    assert abs(float(both)) > 1e-6


def test_encoder_and_decoder_are_separate_streams():
    torch.manual_seed(0)

    class Translation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Transformer(8, 2, 2, 1, 12, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, source, target):
            return self.head(self.net(source, target)[:, -1])

    net = Translation().double().eval()
    mu = RelevanceMeasure(net, (torch.randn(1, 4, 8).double(), torch.randn(1, 3, 8).double()), target=0)
    assert parts(mu.sites, "encoder.blocks.1.") == STANDARD
    crossing = "cross_attn.q cross_attn.k cross_attn.v cross_attn cross_attn_out resid_mid_cross".split()
    middle = STANDARD.index("mlp.neuron")
    assert parts(mu.sites, "decoder.blocks.0.") == [*STANDARD[:middle], *crossing, *STANDARD[middle:]]
    heads = mu(at("decoder.blocks.0.cross_attn").head(0)) + mu(at("decoder.blocks.0.cross_attn").head(1))
    torch.testing.assert_close(heads, mu(at("net.decoder.layers.0.multihead_attn")))


class Experts(Block):
    """An MLP whose neurons are divided among two linear layers, as those of experts are."""

    def __init__(self) -> None:
        super().__init__(True)
        del self.down
        self.parts = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.one(x))
        halves = torch.relu(self.up(self.two(x))).chunk(2, -1)
        return x + (self.parts[0](halves[0]) + self.parts[1](halves[1]))


def test_layers_that_read_parts_of_one_tensor_share_the_site_of_the_whole():
    torch.manual_seed(0)
    mu = measured(drawn(Experts()))
    assert parts(mu.sites, "blocks.0.") == STANDARD
    assert mu.shape("blocks.0.mlp.neuron") == (1, 5, 12)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(8, 12, 3, padding=1), nn.Conv1d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x.transpose(1, 2)))).transpose(1, 2)


def test_branches_that_mix_tokens_without_attention_are_mixers():
    torch.manual_seed(0)
    mu = measured(drawn(Convolved(), Convolved()))
    names = "resid_pre mixer.neuron mixer_out resid_post".split()
    assert mu.sites == [f"blocks.{block}.{name}" for block, name in product(range(2), names)]


class Routed(nn.Module):
    """A mixer, then experts whose results for their own rows are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.up = Convolved(), nn.Linear(8, 12)
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        rows = torch.relu(self.up(x)).flatten(0, 1)
        order = torch.tensor([0, 2, 4, 1, 3])
        done = torch.cat([down(part) for down, part in zip(self.downs, rows[order].split([3, 2]), strict=True)])
        return x + done[order.argsort()].view_as(x)


def test_experts_after_a_mixer_are_the_mlp_of_its_block():
    torch.manual_seed(0)
    mu = measured(drawn(Routed(), Routed()))
    names = "resid_pre mixer.neuron mixer_out resid_mid mlp.neuron mlp_out resid_post".split()
    assert mu.sites == [f"blocks.{block}.{name}" for block, name in product(range(2), names)]


class Hybrid(Block):
    """Attention and a convolution side by side, then an MLP."""

    def __init__(self) -> None:
        super().__init__(True)
        self.mixer = nn.Sequential(nn.Conv1d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv1d(12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        read = self.one(x)
        x = x + self.attended(read) + self.mixer(read.transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.relu(self.up(self.two(x))))


def test_a_mixer_beside_attention_is_named_apart_from_the_mlp():
    torch.manual_seed(0)
    mu = measured(drawn(Hybrid(), Hybrid()))
    middle = STANDARD.index("resid_mid")
    names = [*STANDARD[:middle], "mixer.neuron", "mixer_out", *STANDARD[middle:]]
    assert mu.sites == [f"blocks.{block}.{name}" for block, name in product(range(2), names)]
    check_layers(mu, {
        "blocks.1.attn_out": "layers.1.out",
        "blocks.1.mlp_out": "layers.1.down",
        "blocks.1.mlp.neuron": at("layers.1.down", side="input"),
    })  # fmt: skip
    convolved = mu.marginal("layers.1.mixer").transpose(1, 2)
    torch.testing.assert_close(mu.marginal("blocks.1.mixer_out"), convolved, atol=1e-12, rtol=0)


def test_models_without_residual_connections_have_no_sites():
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 2)).double()
    assert measured(net).sites == []


def test_the_name_of_a_layer_comes_before_that_of_a_site():
    torch.manual_seed(0)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"0": nn.ModuleDict({"attn": nn.Linear(8, 8)})})
            self.block, self.head = Block(True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.block(self.blocks["0"]["attn"](x)).mean(1))

    mu = measured(Named().double().eval())
    torch.testing.assert_close(mu(at("blocks.0.attn")), torch.ones(1).double())
    assert float(mu(at("blocks.0.attn.z"))) != pytest.approx(1)


def test_a_head_of_an_attention_module_has_the_name_of_the_site():
    torch.manual_seed(0)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})])
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head((x + self.blocks[0]["attn"](x, x, x)[0]).mean(1))

    mu = measured(Named().double().eval())
    torch.testing.assert_close(mu(at("blocks.0.attn.head.1")), mu(at("blocks.0.attn.z").head(1)))
    assert 0 < abs(float(mu(at("blocks.0.attn.head.1")))) < 1


def test_parts_of_a_site_that_do_not_exist_raise():
    torch.manual_seed(0)
    mu = measured(drawn(Block(True)))
    for name in ("blocks.3.attn", "blocks.0.mlp.head.0", "blocks.0.attn.neuron.1"):
        with pytest.raises(UnknownLayerError, match="no tap named"):
            mu(at(name))
