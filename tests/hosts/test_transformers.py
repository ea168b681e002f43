"""Unmodified models of Hugging Face with random weights: `make test-hosts`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed; `make test-hosts` installs it", allow_module_level=True)

import transformers as hf

from nrm_plugin import ABSORBED, Normalized, NRMDefault, RelevanceMeasure, at, coverage
from nrm_plugin.errors import UnsupportedOperationError
from tests.hosts.further_models import FURTHER, INPUTS, UNSUPPORTED
from tests.recording.test_memory_estimate import allocated

hf.logging.set_verbosity_error()
warnings.simplefilter("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}
TEXT, IMAGE = {"vocab_size": 50, **SIZES}, {"image_size": 32, "patch_size": 8, **SIZES}
LAST = (6, 4)
"""Token 4 after the last of seven tokens."""


def ids(length: int = 7) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 50, (1, length), generator=torch.Generator().manual_seed(1))}


def both() -> dict[str, Tensor]:
    return {**ids(), "decoder_input_ids": ids(4)["input_ids"]}


def image() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def spectrum() -> Tensor:
    return torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(1))


T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 3}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
WHISPER = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
WHISPER |= {"num_mel_bins": 8, "max_source_positions": 10, "pad_token_id": 0}
BLOOM = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}

Row = tuple[str, str, dict[str, Any], Callable[[], Any], Any, str | None]
MODELS: dict[str, Row] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT, ids, 0, None),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, ids, 0, None),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, ids, 0, None),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, ids, LAST, None),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}, ids, LAST, None),
    "Mistral": (
        "MistralForCausalLM", "MistralConfig", {**TEXT, "num_key_value_heads": 2, "sliding_window": 4}, ids, LAST, None,
    ),
    "Mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_key_value_heads": 2, "num_local_experts": 3}, ids, LAST,
        None,
    ),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", BLOOM, ids, LAST, None),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, both, (3, 4), None),
    "ViT": ("ViTForImageClassification", "ViTConfig", IMAGE, image, 0, None),
    "Swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 3}, image, 0, None),
    "CLIP vision": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**IMAGE, "projection_dim": 5}, image, 0, "image_embeds",
    ),
    "Whisper encoder": ("WhisperEncoder", "WhisperConfig", WHISPER, spectrum, (3, 4), "last_hidden_state"),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {**TEXT, "state_size": 4}, ids, LAST, None),
}  # fmt: skip


def build(name: str, attention: str) -> nn.Module:
    """A model with random weights and biases; skips if this version does not support the attention."""
    kind, config, options, *_ = MODELS[name]
    torch.manual_seed(0)
    whisper = hf.models.whisper.modeling_whisper
    try:
        settings = getattr(hf, config)(**options, attn_implementation=attention)
        model: nn.Module = getattr(hf if hasattr(hf, kind) else whisper, kind)(settings).eval()
    except ValueError as error:
        pytest.skip(str(error)[:80])
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "bias" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model


def plain(model: nn.Module, inputs: Any, output: str | None) -> Tensor:
    with torch.no_grad():
        returned = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return returned[output or "logits"]


def measure(name: str, model: nn.Module, **options: Any) -> RelevanceMeasure:
    *_, inputs, target, output = MODELS[name]
    return RelevanceMeasure(model, inputs(), target, output=output, **options)


def entry(mu: RelevanceMeasure) -> str:
    """The tap of the input: pixels, or the embeddings of the ids."""
    if "input" in mu.layers:
        return "input"
    return next(layer for layer in mu.layers if any(word in layer for word in ("embed", "wte", "shared")))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_conserved_at_every_tap(name, attention, worst):
    model = build(name, attention)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    *_, inputs, target, output = MODELS[name]
    expected = plain(model, inputs(), output)[0][target]
    mu = measure(name, model)
    torch.testing.assert_close(mu.output, expected[None], atol=1e-5, rtol=1e-5)
    assert len(mu.layers) > 30
    for layer in mu.layers:
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        scaled = float((error.abs() / mu.variation(layer).clamp(min=1)).max())
        worst(f"conservation, {name}", scaled)
        assert scaled <= 1e-5, layer
    assert float(mu.sink(entry(mu), kind="residual").abs().max()) <= 0.05
    assert float(mu.marginal(entry(mu)).abs().sum()) > 0.01
    torch.testing.assert_close(plain(model, inputs(), output)[0][target], expected, atol=0, rtol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


NOT_COMPARED = ("Mamba", "BLOOM", "Mixtral")  # no attention, one implementation of it, and none in float64


@pytest.mark.parametrize("attention", ["value", "halves"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_COMPARED])
def test_eager_and_fused_attention_have_the_same_measure(name, attention):
    eager, fused = (build(name, kind).double() for kind in ("eager", "sdpa"))
    fused.load_state_dict(eager.state_dict())
    *_, inputs, target, output = MODELS[name]
    values = inputs()
    values = values if isinstance(values, dict) else values.double()
    rules = Normalized(NRMDefault(), attention=attention)
    mu, nu = (RelevanceMeasure(m, values, target, output=output, composite=rules) for m in (eager, fused))
    tap = entry(mu)
    bound = 1e-6 * float(mu.variation(tap).max())
    torch.testing.assert_close(mu.marginal(tap), nu.marginal(tap), atol=bound, rtol=0)
    torch.testing.assert_close(mu.sink(tap), nu.sink(tap), atol=bound, rtol=0)


LAYERS = {
    "BERT": "bert.encoder.layer.1.attention",
    "GPT-2": "transformer.h.1.attn",
    "Llama": "model.layers.1.self_attn",
}


@pytest.mark.parametrize("name", LAYERS)
def test_heads_and_token_pairs_are_selected_by_layer(name):
    eager, fused = (build(name, kind).double() for kind in ("eager", "sdpa"))
    fused.load_state_dict(eager.state_dict())
    mu, nu = (measure(name, model) for model in (eager, fused))
    layer = at(LAYERS[name])
    heads = torch.stack([mu(layer.head(h)) for h in range(4)])
    assert float(heads.abs().min()) > 1e-4
    torch.testing.assert_close(heads, torch.stack([nu(layer.head(h)) for h in range(4)]), atol=1e-6, rtol=0)
    for event in (layer.head(1).token(2), layer.head(3).pair(4, 2), layer.pair(6, [0, 1])):
        torch.testing.assert_close(mu(event), nu(event), atol=1e-6, rtol=0)
    tap = next(tap for tap in nu.layers if tap.startswith(LAYERS[name]) and "scaled_dot" in tap)
    torch.testing.assert_close(nu(at(tap)), heads.sum(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_embeddings_can_be_passed_instead_of_ids(name):
    model = build(name, "sdpa")
    *_, inputs, target, _ = MODELS[name]
    input_ids = inputs()["input_ids"]
    embeddings = model.get_input_embeddings()(input_ids).detach()
    by_ids = RelevanceMeasure(model, {"input_ids": input_ids}, target)
    by_embeddings = RelevanceMeasure(model, {"inputs_embeds": embeddings}, target)
    tap = next(layer for layer in by_embeddings.layers if layer.startswith("input"))
    torch.testing.assert_close(by_ids.marginal(entry(by_ids)), by_embeddings.marginal(tap))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_padding_receives_no_relevance_and_changes_none(name, attention):
    model = build(name, attention)
    tokens = ids()["input_ids"]
    padded = torch.cat([tokens, torch.full((1, 3), 2)], 1)
    target = MODELS[name][4]
    mask = {"attention_mask": torch.tensor([[1] * 7 + [0] * 3])}
    alone = RelevanceMeasure(model, {"input_ids": tokens}, target)
    mu = RelevanceMeasure(model, {"input_ids": padded}, target, additional_forward_kwargs=mask)
    relevance = mu.marginal(entry(mu))
    assert not relevance[:, 7:].any()
    torch.testing.assert_close(relevance[:, :7], alone.marginal(entry(alone)), atol=1e-4, rtol=1e-3)


# -- further models -------------------------------------------------------------------------------------------------


def further(name: str) -> tuple[nn.Module, Any]:
    """A model and its inputs; skips if this version of transformers does not have the model."""
    row = FURTHER[name]
    if not hasattr(hf, row.kind) or not hasattr(hf, row.config):
        pytest.skip(f"this version has no {row.kind}")
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, row.kind)(getattr(hf, row.config)(**row.options)).eval()
    for parameter_name, parameter in model.named_parameters():
        if (parameter.ndim == 1 and "bias" in parameter_name) or not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model, INPUTS[row.inputs]


@pytest.mark.filterwarnings("ignore")  # warnings of transformers itself
@pytest.mark.parametrize("name", FURTHER)
def test_a_further_model_conserves_relevance_or_names_the_operation_without_a_kernel(name, worst):
    row, (model, inputs) = FURTHER[name], further(name)
    torch.manual_seed(0)
    expected = plain(model, inputs, row.output)[0][row.target]
    torch.manual_seed(0)
    if name in UNSUPPORTED:
        with pytest.raises(UnsupportedOperationError, match=UNSUPPORTED[name]):
            RelevanceMeasure(model, inputs, row.target, output=row.output).marginal("output", joint=~ABSORBED)
        return
    mu = RelevanceMeasure(model, inputs, row.target, output=row.output)
    torch.testing.assert_close(mu.output, expected[None], atol=1e-5, rtol=1e-5)
    for layer in {
        *mu.layers[:: len(mu.layers) // 24 + 1],
        *mu.layers[-2:],
    }:  # a subset, since every query first checks all weights
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        scaled = float((error.abs() / mu.variation(layer).clamp(min=1)).max())
        worst("conservation, further models", scaled)
        assert scaled <= 1e-5, layer
    assert float(mu.sink(mu.layers[0], kind="residual").abs().max()) <= 0.05
    assert float(mu.marginal(mu.layers[0]).abs().sum()) > 0.01


# -- memory ---------------------------------------------------------------------------------------------------------

LONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 256, "n_layer": 4, "n_head": 4}),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 768, "num_hidden_layers": 3,
         "num_attention_heads": 4},
    ),
    "Gemma 2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {**SIZES, "hidden_size": 256, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024},
    ),
    "Mixtral": (
        "MixtralForCausalLM", "MixtralConfig",
        {**SIZES, "hidden_size": 192, "num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 512},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_peak_of_a_decoder_is_estimated_within_a_fifth(name, worst):
    kind, config, options = LONG[name]
    if not hasattr(hf, kind):
        pytest.skip(f"this version has no {kind}")
    torch.manual_seed(0)
    model = getattr(hf, kind)(getattr(hf, config)(vocab_size=800, **options)).eval()
    inputs = ids(384)
    estimate = coverage(model, inputs, memory=True).peak

    def measured() -> None:
        mu = RelevanceMeasure(model, inputs, (383, 3), output="logits")
        mu.marginal(mu.ends[0])

    peak = allocated(measured)
    worst("memory estimate of decoders, ratio", max(estimate / peak, peak / estimate))
    assert peak / 1.2 < estimate < peak * 1.2
