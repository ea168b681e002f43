"""The command `explain-text` and the sites of models of transformers in folders: `make test-hosts`."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed; `make test-hosts` installs it", allow_module_level=True)

import transformers as hf

from nrm_plugin import RelevanceMeasure, at, explain_text
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.text_models import TextModelError, text_model
from tests.hosts.text_models import MODELS, SIZES, build, saved

hf.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
TEXT = "A dog chased the ball, unbelievably."
TEXTS = {name: TEXT for name in MODELS} | {"masked": "A dog [MASK] the ball."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODELS:
            saved(name, folder / name)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_explained_from_the_shell_as_in_python(name, folders, tmp_path, capsys):
    position = ["--position", "2"] if name == "tagger" else []
    arguments = ["--model", str(folders / name), "--out", str(tmp_path), *position]
    assert main(["explain-text", TEXTS[name], *arguments]) == 0, capsys.readouterr().err
    (stored,) = json.loads((tmp_path / "texts.json").read_text())["texts"]
    loaded = text_model(str(folders / name))  # training a tokenizer twice may give other tokens
    model, tokenizer = loaded.model, loaded.tokenizer
    explanation = explain_text(model, tokenizer, TEXTS[name], position=2 if position else None)
    torch.testing.assert_close(torch.tensor(stored["word_relevance"]), explanation.words, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        kind = {} if name != "decoding" else {"decoder_input_ids": torch.tensor([[0]])}
        logits = model(**tokenizer(TEXTS[name], return_tensors="pt"), **kind).logits
    mask = tokenizer(TEXTS[name])["input_ids"].index(tokenizer.mask_token_id) if name == "masked" else -1
    place = {"masked": mask, "tagger": 2, "decoding": 0}.get(name, -1)
    row = logits[0] if logits.ndim == 2 else logits[0, place]
    assert stored["predictions"][0][1] == pytest.approx(float(row.softmax(0).max()), rel=1e-4)
    total = sum(stored["word_relevance"]) + stored["decoder"] + stored["absorbed"]
    assert total == pytest.approx(1 if stored["output"] > 0 else -1, abs=1e-5)
    assert stored["reference"] == ("[MASK]" if tokenizer.mask_token else None)
    if stored["reference"]:
        assert stored["absorbed"] == pytest.approx(0, abs=1e-5 * max(1, stored["variation"]))
    printed = capsys.readouterr().out.replace(str(tmp_path), "folder").replace(str(folders), "models")
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("name", ["causal", "llama", "decoding"])
def test_words_are_those_of_the_text(name, folders):
    model, tokenizer = build(name)
    explanation = explain_text(model, tokenizer, TEXT)
    words = [word for word in explanation.text.words if not word.is_special]
    assert (
        "".join(" " * (word.has_space_before and number > 0) + word.text for number, word in enumerate(words)) == TEXT
    )
    assert "unbelievably" in " ".join(word.text for word in words)


def test_a_next_token_is_compared_with_another_one(folders):
    loaded = text_model(str(folders / "causal"))
    explanation = explain_text(loaded.model, loaded.tokenizer, "The capital of", "the", against="as")
    assert (explanation.target, explanation.against) == (" the", " as")
    ids = loaded.tokenizer("The capital of", return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**ids).logits[0, -1]
    first, second = (loaded.tokenizer.encode(f" {word}")[0] for word in ("the", "as"))
    assert explanation.output == pytest.approx(float(logits[first] - logits[second]), rel=1e-4)


def test_a_folder_without_a_head_or_a_tokenizer_says_so(folders, tmp_path):
    model, tokenizer = build("classifier")
    model.bert.save_pretrained(tmp_path / "trunk")
    tokenizer.save_pretrained(tmp_path / "trunk")
    with pytest.raises(TextModelError, match="holds BertModel, which has no head"):
        text_model(str(tmp_path / "trunk"))
    model.save_pretrained(tmp_path / "silent")
    with pytest.raises(TextModelError, match="silent contains no tokenizer"):
        text_model(str(tmp_path / "silent"))


# -- sites ----------------------------------------------------------------------------------------------------------

STANDARD = "resid_pre attn.q attn.k attn.v attn attn_out resid_mid mlp.neuron mlp_out resid_post".split()
PARALLEL = [name for name in STANDARD if name != "resid_mid"]
CROSS = "cross_attn.q cross_attn.k cross_attn.v cross_attn cross_attn_out resid_mid_cross".split()
MIXER = "resid_pre mixer.neuron mixer_out resid_post".split()
KINDS = dict.fromkeys(["Falcon", "GPT-NeoX", "GPT-J"], PARALLEL)
KINDS |= dict.fromkeys(["Mamba", "Falcon-Mamba", "Mamba-2"], MIXER)
FAMILIES = """BERT DistilBERT RoBERTa GPT-2 Llama Mistral Mixtral BLOOM ViT Whisper~encoder Mamba Qwen2 Qwen3 Qwen3-MoE
Gemma~2 Gemma~3 Phi-3 Falcon OPT GPT-NeoX GPT-J Electra ALBERT DeBERTa DeBERTa-v2 XLNet ModernBERT MPNet Falcon-Mamba
Mamba-2 DeiT BEiT DINOv2 AST Wav2Vec2 HuBERT""".replace("~", "_").split()


def measured(name: str, is_difference: bool = False) -> RelevanceMeasure:
    """The measure of a family; of the difference from one token in place of all, or from other pixels or sounds."""
    from tests.hosts import test_transformers as families
    from tests.hosts.further_models import FURTHER

    if name in families.MODELS:
        model = families.build(name, "eager" if name in ("BLOOM", "Mamba") else "sdpa")
        *_, make, target, output = families.MODELS[name]
        inputs = make()
    else:
        model, inputs = families.further(name)
        target, output = FURTHER[name].target, FURTHER[name].output
    reference = None
    if is_difference:
        whole = inputs if isinstance(inputs, dict) else {"only": inputs}
        other = {key: value.flip(-1) if value.is_floating_point() else 0 * value + 2 for key, value in whole.items()}
        reference = other if isinstance(inputs, dict) else other["only"]
    return RelevanceMeasure(model, inputs, target, output=output, reference=reference)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_sites_of_its_blocks_and_conserves_relevance_there(name, worst):
    mu = measured(name.replace("_", " "))
    expected = KINDS.get(name, STANDARD)
    assert mu.sites == [f"blocks.{number}.{site}" for number in range(2) for site in expected]
    for site in mu.sites:
        error = float((mu(at(site)) + mu.sink(site) + mu.bypass(site) - 1).abs() / mu.variation(site).clamp(min=1))
        worst("conservation at sites", error)
        assert error <= 1e-5, site


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("Mixtral", "Qwen3-MoE")])
def test_sites_of_a_difference_are_those_of_the_output_and_nothing_is_absorbed_there(name, worst):
    mu = measured(name.replace("_", " "))
    nu = measured(name.replace("_", " "), is_difference=True)
    assert nu.sites == mu.sites
    bound = max(1.0, *(float(nu.variation(site)) for site in nu.sites))
    for site in nu.sites:
        assert sorted(nu.shape(site)[-2:]) == sorted(mu.shape(site)[-2:])  # keys are read as the transpose
        error = max(float(value.abs()) for value in (nu(at(site)) + nu.bypass(site) - 1, nu.sink(site))) / bound
        worst("conservation of differences at sites", error)
        assert error <= 1e-5, site


@pytest.mark.parametrize("name", ["T5", "BART", "mBART", "Pegasus"])
def test_encoders_and_decoders_have_their_own_blocks(name):
    middle = STANDARD.index("mlp.neuron")
    decoder = [*STANDARD[:middle], *CROSS, *STANDARD[middle:]]
    mu = measured(name)
    assert mu.sites == [
        f"{part}.blocks.{number}.{site}"
        for part, sites in (("encoder", STANDARD), ("decoder", decoder))
        for number in range(2)
        for site in sites
    ]
    for site in mu.sites:
        error = float((mu(at(site)) + mu.sink(site) + mu.bypass(site) - 1).abs() / mu.variation(site).clamp(min=1))
        assert error <= 1e-5, site


MODULES = {
    "BERT": {
        "blocks.1.resid_pre": "bert.encoder.layer.0", "blocks.1.mlp_out": "bert.encoder.layer.1.output.dense",
        "blocks.1.attn_out": "bert.encoder.layer.1.attention.output.dropout",
        "blocks.0.mlp.neuron": "bert.encoder.layer.0.intermediate",
    },
    "GPT-2": {
        "blocks.1.resid_pre": "transformer.h.0", "blocks.1.attn_out": "transformer.h.1.attn[0]",
        "blocks.1.mlp_out": "transformer.h.1.mlp", "blocks.0.mlp.neuron": "transformer.h.0.mlp.act",
        "blocks.1.resid_post": "transformer.h.1",
    },
    "Llama": {
        "blocks.1.resid_pre": "model.layers.0", "blocks.1.attn_out": "model.layers.1.self_attn.o_proj",
        "blocks.1.mlp_out": "model.layers.1.mlp", "blocks.1.resid_post": "model.layers.1",
        "blocks.1.attn": "model.layers.1.self_attn.scaled_dot_product_attention",
    },
    "Mixtral": {"blocks.1.mlp_out": "model.layers.1.mlp", "blocks.1.resid_post": "model.layers.1"},
    "Mamba": {"blocks.1.mixer_out": "backbone.layers.1.mixer", "blocks.1.resid_pre": "backbone.layers.0"},
    "GPT-NeoX": {
        "blocks.1.mlp_out": "gpt_neox.layers.1.mlp", "blocks.1.resid_post": "gpt_neox.layers.1",
        "blocks.1.attn_out": "gpt_neox.layers.1.attention.dense",
    },
    "T5": {
        "encoder.blocks.1.attn_out": "encoder.block.1.layer.0.SelfAttention.o",
        "decoder.blocks.1.cross_attn_out": "decoder.block.1.layer.1.EncDecAttention.o",
        "decoder.blocks.1.mlp_out": "decoder.block.1.layer.2.DenseReluDense",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_sites_are_the_tensors_of_the_modules_that_people_know(name):
    mu = measured(name)
    for site, layer in MODULES[name].items():
        known = mu.marginal(layer)
        torch.testing.assert_close(mu.marginal(site).reshape(known.shape), known, atol=1e-6, rtol=0)


def small(kind: str, config: str, **options: object) -> torch.nn.Module:
    """A model with random weights and biases; skips if this version of transformers does not have it."""
    if not hasattr(hf, kind):
        pytest.skip(f"this version has no {kind}")
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(hf, kind)(getattr(hf, config)(num_labels=3, **options)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.1)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


MOBILE = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_shared", [True, False])
def test_mobilebert_has_the_sites_of_its_bottlenecks(attention, is_shared, worst):
    reads = {"key_query_shared_bottleneck": is_shared, "use_bottleneck_attention": not is_shared}
    options = {"vocab_size": 50, **SIZES, **MOBILE, **reads, "attn_implementation": attention}
    model = small("MobileBertForSequenceClassification", "MobileBertConfig", **options)
    inputs = {"input_ids": torch.randint(3, 50, (1, 7))}
    mu = RelevanceMeasure(model, inputs, 0, output="logits")
    middle = "resid_mid0 mlp0.neuron mlp0_out resid_mid1 mlp1.neuron mlp1_out resid_mid2 resid_post".split()
    assert mu.sites == [f"blocks.{number}.{site}" for number in range(2) for site in [*STANDARD[:6], *middle]]
    for site in mu.sites:
        error = float((mu(at(site)) + mu.sink(site) + mu.bypass(site) - 1).abs() / mu.variation(site).clamp(min=1))
        worst("conservation at sites", error)
        assert error <= 1e-5, site
    for block in range(2):
        layer = f"mobilebert.encoder.layer.{block}"
        same = {
            "attn_out": f"{layer}.attention.output.dense",
            "mlp0.neuron": f"{layer}.ffn.0.intermediate",
            "mlp0_out": f"{layer}.ffn.0.output.dense",
            "mlp1_out": f"{layer}.output.dense",
        }
        for site, known in same.items():
            torch.testing.assert_close(mu.marginal(f"blocks.{block}.{site}"), mu.marginal(known), atol=1e-6, rtol=0)
        read = mu.marginal(at(f"{layer}.attention.output.dense", side="input"))
        for head, columns in enumerate(read.split(4, -1)):
            event = mu(at(f"blocks.{block}.attn.head.{head}"))[0]
            torch.testing.assert_close(event, columns.sum(), atol=1e-6, rtol=0)
            assert abs(float(event)) > 1e-4


def test_models_that_scale_or_project_the_stream_have_the_sites_of_their_blocks():
    text = {"vocab_size": 50, **SIZES, "num_key_value_heads": 2}
    doge = small("DogeForSequenceClassification", "DogeConfig", **text, pad_token_id=0)
    mu = RelevanceMeasure(doge, {"input_ids": torch.randint(3, 50, (1, 7))}, 0, output="logits")
    assert mu.sites == [f"blocks.{number}.{site}" for number in range(2) for site in STANDARD]
    stages = {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "num_query_pool": 2}
    hiera = small("HieraForImageClassification", "HieraConfig", image_size=[64, 64], **stages)
    mu = RelevanceMeasure(hiera, torch.randn(1, 3, 64, 64), 0, output="logits")
    assert mu.sites == [f"blocks.{number}.{site}" for number in range(4) for site in STANDARD]
    out = mu.marginal("hiera.encoder.stages.1.layers.0.attn.proj")
    torch.testing.assert_close(mu.marginal("blocks.1.attn_out").reshape(out.shape), out, atol=1e-6, rtol=0)
    columns = mu.marginal(at("hiera.encoder.stages.1.layers.0.attn.proj", side="input")).sum((0, 1)).split(8)
    for head, known in enumerate(columns):
        torch.testing.assert_close(mu(at(f"blocks.1.attn.head.{head}"))[0], known.sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_queries_and_keys_receive_relevance_with_halves(name):
    from nrm_plugin import Normalized, NRMDefault
    from tests.hosts import test_transformers as families

    rules = Normalized(NRMDefault(), attention="halves")
    for attention in ("eager", "sdpa"):
        mu = families.measure(name, families.build(name, attention), composite=rules)
        assert mu.sites == [f"blocks.{number}.{site}" for number in range(2) for site in STANDARD]
        for letter in "qkv":
            assert float(mu.marginal(f"blocks.0.attn.{letter}").abs().sum()) > 1e-4


# -- ids and pixels -------------------------------------------------------------------------------------------------


def vilt() -> tuple[torch.nn.Module, dict[str, torch.Tensor], object, dict[str, torch.Tensor]]:
    config = hf.ViltConfig(vocab_size=50, image_size=32, patch_size=8, num_labels=3, **SIZES)
    inputs = {"input_ids": torch.randint(3, 50, (1, 7)), "pixel_values": torch.randn(1, 3, 32, 32)}
    return hf.ViltForQuestionAnswering(config), inputs, 0, {"pixel_mask": torch.ones(1, 32, 32, dtype=torch.long)}


def llava() -> tuple[torch.nn.Module, dict[str, torch.Tensor], object, dict[str, torch.Tensor]]:
    vision = hf.CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=8, **SIZES)
    text = hf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49, vision_feature_layer=-1)
    ids = torch.randint(3, 48, (1, 22))
    ids[0, 2:18] = 49
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    return hf.LlavaForConditionalGeneration(config), inputs, (21, 4), {}


@pytest.mark.parametrize(("make", "prefixes"), [(vilt, [""]), (llava, ["encoder.", ""])])
def test_ids_and_pixels_both_receive_relevance(make, prefixes, worst):
    torch.manual_seed(0)
    model, inputs, target, others = make()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    mu = RelevanceMeasure(model.eval(), inputs, target, additional_forward_kwargs=others)
    words, pixels = mu.ends
    assert words.endswith(("word_embeddings", "embed_tokens"))
    assert pixels == "input"
    assert mu.sites == [f"{p}blocks.{n}.{site}" for p in prefixes for n in range(2) for site in STANDARD]
    masses = [float(mu.marginal(end).sum()) for end in mu.ends]
    assert min(map(abs, masses)) > 0.01
    assert sum(masses) + float(mu.sink_above([at(end) for end in mu.ends])) == pytest.approx(1, abs=1e-5)
    for layer in [*mu.ends, *mu.sites]:
        error = float((mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1).abs() / mu.variation(layer).clamp(min=1))
        worst("conservation, ids and pixels", error)
        assert error <= 1e-5, layer
    swapped = RelevanceMeasure(
        model, inputs, target, additional_forward_kwargs=others, reference={"pixel_values": 0 * inputs["pixel_values"]}
    )
    assert float(swapped.marginal(words).abs().max()) < 1e-9  # differences of 0 count as 1e-18
    assert float(swapped.marginal(pixels).sum()) == pytest.approx(1, abs=1e-3)


# -- decoders that read characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_decoders_trained_on_characters_conserve_relevance_at_every_tap_and_site(kind, worst):
    from benchmarks.real import decoders

    model = decoders._train(kind, 20).double().requires_grad_(False)
    assert not model.training
    assert decoders.bits(model) < 6  # log2 of the number of characters is 6.4
    question = decoders.questions_of(model)[0]
    filled = question.filled(" ")
    for reference in (None, {"input_ids": filled}):
        mu = decoders.measured(question, reference=reference)
        assert mu.sites == [f"blocks.{number}.{site}" for number in range(decoders.LAYERS) for site in STANDARD]
        found = decoders.totals(mu)
        worst("conservation, characters", max(found["error"], found["error at sites"]))
        assert max(found["error"], found["error at sites"]) <= 1e-5  # the norms of a Llama compute in float32
    assert float(mu.output) == pytest.approx(float(question.of_ids(question.ids) - question.of_ids(filled)), abs=1e-4)
    torch.testing.assert_close(decoders.integrated(" ")(question).sum(), mu.output[0], atol=0.05, rtol=0.05)
