"""Dictionaries from files, against the published forward passes of their packages, written out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nrm_plugin import Crosscoder, Dictionary, load_dictionary, load_transcoders
from nrm_plugin.errors import InputError

D, F = 4, 6


def weights_of(kind: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)} if kind == "gated" else {"b_enc": (F,)}
    shapes |= {"threshold": (F,)} if kind.startswith("jumprelu") else {}
    shapes |= {"W_skip": (D, D)} if kind == "skip_transcoder" else {}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].abs() / 2
    return weights


def features(kind: str, config: dict, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The encoder of SAELens."""
    if "transcoder" not in kind and config.get("apply_b_dec_to_input", True):
        x = x - w["b_dec"]
    if kind == "gated":
        gate = (x @ w["W_enc"] + w["b_gate"] > 0).float()
        return gate * torch.relu(x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    pre = x @ w["W_enc"] + w["b_enc"]
    if config.get("rescale_acts_by_decoder_norm"):
        pre = pre * w["W_dec"].norm(dim=-1)
    if kind == "topk":
        values, indices = pre.topk(config["k"], -1)
        pre = torch.zeros_like(pre).scatter(-1, indices, values)
    if "threshold" in w:
        return torch.relu(pre) * (pre > w["threshold"])
    return torch.relu(pre)


def reconstruction(kind: str, config: dict, w: dict[str, Tensor], x: Tensor) -> Tensor:
    f = features(kind, config, w, x)
    if config.get("rescale_acts_by_decoder_norm"):
        f = f / w["W_dec"].norm(dim=-1)
    y = f @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].T if "W_skip" in w else y


CASES = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False, "normalize_activations": "none", "activation_fn": "relu"}),
    ("gated", {}),
    ("jumprelu", {}),
    ("topk", {"k": 2}),
    ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    ("transcoder", {"apply_b_dec_to_input": False}),
    ("skip_transcoder", {"apply_b_dec_to_input": False}),
    ("jumprelu_transcoder", {"apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_dictionaries_of_saelens_compute_the_same(tmp_path, kind, config):
    w = weights_of(kind)
    save_file(w, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": kind, "d_in": D, "d_sae": F, **config}))
    one = load_dictionary(tmp_path)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.encode(x), features(kind, config, w, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.reconstruct(x), reconstruction(kind, config, w, x), rtol=1e-4, atol=1e-5)
    assert one.reads == ("input" if "transcoder" in kind else "output")


def test_old_configurations_of_topk_are_read(tmp_path):
    w = weights_of("standard")
    save_file(w, tmp_path / "sae_weights.safetensors")
    config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert load_dictionary(tmp_path).k == 2


@pytest.mark.parametrize("name", ["layer_{}.safetensors", "config.yaml"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_transcoders_of_circuit_tracer_compute_the_same(tmp_path, name, is_transposed):
    draw, all_weights = torch.Generator().manual_seed(0), []
    for layer in range(2):
        w = {key: torch.randn(shape, generator=draw) for key, shape in
             {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "W_skip": (D, D)}.items()}  # fmt: skip
        all_weights.append(w)
        stored = w | {"W_dec": w["W_dec"].T.contiguous()} if is_transposed else w
        save_file(stored, tmp_path / (f"layer_{layer}.safetensors" if "layer" in name else f"own_{layer}.safetensors"))
    if name == "config.yaml":
        entries = "".join(f"  - {{layer: {k}, id: x, filepath: own_{k}.safetensors}}\n" for k in range(2))
        (tmp_path / name).write_text(f"feature_input_hook: mlp.hook_in\ntranscoders:\n{entries}")
    found = load_transcoders(tmp_path, "h.{}.mlp")
    assert list(found) == ["h.0.mlp", "h.1.mlp"]
    x = torch.randn(5, D, generator=draw)
    for w, one in zip(all_weights, found.values(), strict=True):
        f = torch.relu(x @ w["W_enc"].T + w["b_enc"])
        torch.testing.assert_close(one.encode(x), f)
        torch.testing.assert_close(one.reconstruct(x), f @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T)


def test_cross_layer_transcoders_of_circuit_tracer_compute_the_same(tmp_path):
    draw, layers = torch.Generator().manual_seed(0), 3
    encoders, decoders = [], []
    for layer in range(layers):
        shapes = {"W_enc": (F, D), "b_enc": (F,), "b_dec": (D,)}
        enc = {f"{name}_{layer}": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        enc[f"threshold_{layer}"] = torch.full((F,), 0.2)
        dec = {f"W_dec_{layer}": torch.randn(F, layers - layer, D, generator=draw)}
        save_file(enc, tmp_path / f"W_enc_{layer}.safetensors")
        save_file(dec, tmp_path / f"W_dec_{layer}.safetensors")
        encoders.append(enc)
        decoders.append(dec[f"W_dec_{layer}"])
    found = load_transcoders(tmp_path, "h.{}.mlp")
    assert isinstance(found, Crosscoder)
    x = torch.randn(layers, 5, D, generator=draw)
    f = [one.encode(x[k]) for k, one in enumerate(found.dictionaries.values())]
    for k, enc in enumerate(encoders):
        pre = x[k] @ enc[f"W_enc_{k}"].T + enc[f"b_enc_{k}"]
        torch.testing.assert_close(f[k], pre * (pre > 0.2))
        total = sum(f[j] @ decoders[j][:, k - j] for j in range(k + 1)) + enc[f"b_dec_{k}"]
        own = found.dictionaries[f"h.{k}.mlp"].reconstruct(x[k])
        across = sum(f[j] @ found.decoders[f"h.{j}.mlp", f"h.{k}.mlp"] for j in range(k))
        torch.testing.assert_close(own + across, total)


def test_invalid_folders_raise(tmp_path):
    with pytest.raises(InputError, match=r"no cfg\.json in"):
        load_dictionary(tmp_path)
    save_file(weights_of("standard"), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"normalize_activations": "layer_norm"}))
    with pytest.raises(InputError, match="normalize_activations='layer_norm'"):
        load_dictionary(tmp_path)
    with pytest.raises(InputError, match="no transcoders in"):
        load_transcoders(tmp_path, "h.{}.mlp")
    with pytest.raises(InputError, match="in place of the number"):
        load_transcoders(tmp_path, "h.0.mlp")
    (tmp_path / "config.yaml").write_text("feature_input_hook: hook_resid_mid\n")
    with pytest.raises(InputError, match="read 'hook_resid_mid', which is not the input"):
        load_transcoders(tmp_path, "h.{}.mlp")
    (tmp_path / "config.yaml").write_text("transcoders: [{layer: 0, filepath: 'hf://a/b/c.safetensors'}]\n")
    with pytest.raises(InputError, match="only local files are read"):
        load_transcoders(tmp_path, "h.{}.mlp")
    assert Dictionary(torch.eye(2), torch.eye(2)).reads == "output"


def saved(folder, config: dict, weights: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))


UNKNOWN = [
    ({"architecture": "abstopk", "k": 2}, "architecture='abstopk'"),
    ({"architecture": "batchtopk", "k": 2}, "architecture='batchtopk'"),
    ({"architecture": "matching_pursuit"}, "architecture='matching_pursuit'"),
    ({"activation_fn_str": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
    ({"architecture": "topk"}, "has no k, the number of active features"),
    ({"architecture": "gated"}, r"sae_weights\.safetensors' has no tensor 'r_mag'; it has 'W_dec', 'W_enc'"),
]


@pytest.mark.parametrize(("config", "message"), UNKNOWN, ids=lambda value: "" if isinstance(value, dict) else value)
def test_dictionaries_of_saelens_that_compute_something_else_raise(tmp_path, config, message):
    saved(tmp_path, config, weights_of("standard"))
    with pytest.raises(InputError, match=message):
        load_dictionary(tmp_path)


def test_damaged_files_raise(tmp_path):
    saved(tmp_path, {}, weights_of("standard"))
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(InputError, match=r"cfg\.json in .* cannot be read: Expecting property name"):
        load_dictionary(tmp_path)
    saved(tmp_path, {}, weights_of("standard"))
    (tmp_path / "sae_weights.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"sae_weights\.safetensors' cannot be read"):
        load_dictionary(tmp_path)
    save_file(
        {"W_enc_0": torch.ones(F, D), "b_enc_0": torch.ones(F), "b_dec_0": torch.ones(D)},
        tmp_path / "W_enc_0.safetensors",
    )
    with pytest.raises(InputError, match=r"W_dec_0\.safetensors' cannot be read: No such file"):
        load_transcoders(tmp_path, "h.{}.mlp")


def test_short_formats_are_folded_in_single_precision(tmp_path):
    w = {name: value.bfloat16() for name, value in weights_of("standard").items()}
    saved(tmp_path, {}, w)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    expected = features("standard", {}, {name: value.float() for name, value in w.items()}, x)
    torch.testing.assert_close(load_dictionary(tmp_path).encode(x), expected, rtol=1e-5, atol=1e-6)


def test_thresholds_of_circuit_tracer_may_be_negative_but_not_on_a_logarithmic_scale(tmp_path):
    w = weights_of("transcoder") | {"activation_function.threshold": torch.full((F,), -0.5)}
    w["W_enc"] = w["W_enc"].T.contiguous()
    save_file(w, tmp_path / "layer_0.safetensors")
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    pre = x @ w["W_enc"].T + w["b_enc"]
    torch.testing.assert_close(load_transcoders(tmp_path, "h.{}")["h.0"].encode(x), pre * (pre > -0.5))
    save_file(w | {"log_thresholds": torch.zeros(F)}, tmp_path / "layer_0.safetensors")
    with pytest.raises(InputError, match="have log_thresholds"):
        load_transcoders(tmp_path, "h.{}")


@pytest.mark.parametrize(
    "changed", [{"threshold": torch.ones(F, 1)}, {"threshold": float("nan")}, {"k": 1.5}], ids=["shape", "nan", "k"]
)
def test_settings_that_would_be_read_otherwise_raise(changed):
    with pytest.raises(InputError, match=next(iter(changed))):
        Dictionary(torch.ones(D, F), torch.ones(F, D), **changed)
