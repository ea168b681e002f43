"""Large models of transformers in small: limited memory, checkpoints, device maps, quantized layers."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate", "torchao", "bitsandbytes")):
    pytest.skip("packages are not installed; `make test-hosts` installs them", allow_module_level=True)

import transformers as hf
from accelerate import cpu_offload, dispatch_model
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import ModelStateError

hf.logging.set_verbosity_error()
warnings.simplefilter("ignore")

LAYERS = 4
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}
MAMBA = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4}
IDS = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(1))
ONE, BOTH = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), ONE),
    "llama, eager": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, attn_implementation="eager")), ONE),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), ONE),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA, num_local_experts=4)), ONE),
    "gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA, head_dim=16)), ONE),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), BOTH),
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)), ONE),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, intermediate_size=96)), ONE),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def measure(model: nn.Module, name: str = "llama", **settings: Any) -> RelevanceMeasure:
    return RelevanceMeasure(model, MODELS[name][1], (-1, 7), **settings)


@pytest.mark.parametrize("limit", [20_000, 200_000])
@pytest.mark.parametrize("name", MODELS)
def test_a_recording_in_parts_has_the_same_numbers(name, limit):
    whole, mu = measure(made(name), name), measure(made(name), name, max_memory=limit)
    assert mu.parts > 1
    assert (mu.layers, mu.sites) == (whole.layers, whole.sites)
    torch.testing.assert_close(mu.marginal(mu.layers), whole.marginal(whole.layers), rtol=0, atol=1e-7)
    upper, lower = "blocks.2.resid_post", "blocks.1.resid_post"
    if lower in mu.sites:
        event = at(upper).channel(3) & ~at(lower).channel(2)
        torch.testing.assert_close(mu(event), whole(event), rtol=0, atol=1e-7)
        torch.testing.assert_close(mu.joint(upper, lower), whole.joint(upper, lower), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_blocks_are_kept_and_run_once_more(name):
    mu = measure(made(name), name, max_memory=200_000)
    blocks = [call.name for call in mu._recording.parts._first.stored]
    assert len(blocks) >= LAYERS
    assert any(block.endswith(".0") for block in blocks)
    mu.marginal("output")
    assert mu._recording.parts._uses_stored


@pytest.mark.parametrize("max_memory", [None, 100_000])
def test_gradient_checkpointing(max_memory):
    whole, model = measure(made("llama")), made("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for mode in (False, True):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = mode  # only then the blocks of transformers are checkpoints
        if mode:
            assert any(module.training for module in model.modules())
        mu = measure(model, max_memory=max_memory)
        layers = [layer for layer in mu.layers if layer in whole.layers]  # a checkpoint has no cache
        assert len(layers) > 20 * LAYERS
        torch.testing.assert_close(mu.marginal(layers), whole.marginal(layers), rtol=0, atol=1e-7)


@pytest.mark.parametrize("max_memory", [None, 100_000])
def test_a_device_map(max_memory):
    whole, model = measure(made("llama")), made("llama")
    blocks = {f"model.layers.{k}": "cpu" for k in range(LAYERS)}
    rest = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    dispatched = dispatch_model(model, {**blocks, **rest}, main_device="cpu", force_hooks=True)
    mu = measure(dispatched, max_memory=max_memory)
    assert {*whole.layers} <= {*mu.layers}  # and the moves between devices
    torch.testing.assert_close(mu.marginal(whole.layers), whole.marginal(whole.layers), rtol=1e-6, atol=1e-7)


def test_offloaded_weights_are_an_error():
    with pytest.raises(ModelStateError, match="offload"):
        measure(cpu_offload(made("llama"), torch.device("cpu")))


def int8(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig())
    return model


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent, _, child = name.rpartition(".")
            layer = make(module)
            layer.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), child, layer.to("cpu").eval())
    return model


def four_bits(model: nn.Module) -> nn.Module:
    return replaced(model, lambda m: Linear4bit(m.in_features, m.out_features, bias=False, compute_dtype=torch.float32))


def eight_bits(model: nn.Module) -> nn.Module:
    return replaced(model, lambda m: Linear8bitLt(m.in_features, m.out_features, bias=False, has_fp16_weights=False))


def dequantized(model: nn.Module) -> nn.Module:
    """The model with plain layers, whose weights are the outputs of the quantized layers at unit vectors."""
    plain = copy.deepcopy(made("llama"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                rows = [module(row[None])[0] for row in torch.eye(module.in_features)]
            plain.get_submodule(name).weight.data = torch.stack(rows, 1)
    return plain


QUANTIZED = {"torchao": (int8, 1e-5), "four bits": (four_bits, 0.02), "eight bits": (eight_bits, 0.02)}
"""Ways to quantize, and the largest difference relative to V; layers of bitsandbytes round their inputs as well."""


@pytest.mark.parametrize("max_memory", [None, 100_000])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_layers(name, max_memory):
    quantize, tolerance = QUANTIZED[name]
    model = quantize(made("llama"))
    mu = measure(model, max_memory=max_memory)
    full = measure(dequantized(model))
    assert mu.sites == full.sites
    for layer in ("model.embed_tokens", "model.layers.1", "model.layers.3"):
        variation = float(full.variation(layer))
        total = mu.marginal(layer).sum() + mu.sink(layer) + mu.bypass(layer)
        torch.testing.assert_close(total, torch.ones(()).expand(total.shape), rtol=0, atol=1e-5 * variation)
        torch.testing.assert_close(mu.marginal(layer), full.marginal(layer), rtol=0, atol=tolerance * variation)
