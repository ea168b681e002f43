"""Models of TransformerLens (before 4.0) and of nnsight are taken as they are: `make test-hosts HOSTS="hooked"`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if any(importlib.util.find_spec(package) is None for package in ("transformer_lens", "nnsight")):
    pytest.skip("TransformerLens and nnsight are not installed; `make test-hosts` does", allow_module_level=True)

from nrm_plugin import RelevanceMeasure, at

pytestmark = pytest.mark.filterwarnings("ignore")  # of both packages


def test_hooks_of_transformer_lens_are_taps_and_its_model_has_sites():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", seed=0
    )
    mu = RelevanceMeasure(HookedTransformer(config).eval(), torch.randint(3, 50, (1, 7)), (6, 4))
    for layer in mu.layers:
        error = float((mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1).abs() / mu.variation(layer).clamp(min=1))
        assert error <= 1e-5, layer
    for site, hook in {
        "blocks.1.resid_pre": "blocks.1.hook_resid_pre",
        "blocks.1.resid_mid": "blocks.1.hook_resid_mid",
        "blocks.1.resid_post": "blocks.1.hook_resid_post",
        "blocks.1.mlp.neuron": "blocks.1.mlp.hook_post",
        "blocks.1.attn_out": "blocks.1.hook_attn_out",
        "blocks.1.mlp_out": "blocks.1.hook_mlp_out",
    }.items():
        torch.testing.assert_close(mu.marginal(site), mu.marginal(hook), atol=1e-7, rtol=0)
    for head in range(4):
        expected = mu(at("blocks.1.attn.hook_z")[:, head])
        torch.testing.assert_close(mu(at(f"blocks.1.attn.head.{head}")), expected, atol=1e-6, rtol=0)
        values = mu.marginal("blocks.1.attn.v")[:, head].sum()
        torch.testing.assert_close(values, mu(at("blocks.1.attn.hook_v")[:, head])[0], atol=1e-6, rtol=0)


def test_a_wrapped_model_of_nnsight_is_measured_as_the_model():
    import transformers
    from nnsight import NNsight

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ).eval()
    inputs = {"input_ids": torch.randint(3, 50, (1, 7))}
    expected = RelevanceMeasure(model, inputs, (6, 4))
    mu = RelevanceMeasure(NNsight(model), inputs, (6, 4))
    torch.testing.assert_close(mu.marginal("blocks.0.attn"), expected.marginal("blocks.0.attn"))
    assert mu.sites == expected.sites
