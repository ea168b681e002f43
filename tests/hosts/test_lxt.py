"""LXT together with this package, and its irreversible patch of Zennit: `make test-hosts`.

Every test runs in its own process, since LXT changes classes of torch and Zennit permanently.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

if importlib.util.find_spec("lxt") is None:
    pytest.skip("LXT is not installed; `make test-hosts` installs it", allow_module_level=True)

BEFORE = """
import warnings; warnings.simplefilter("ignore")
import torch; from torch import nn
from zennit.composites import EpsilonPlusFlat
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
x = torch.randn(2, 1, 6, 6)
"""


def run(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", BEFORE + code], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize(
    "order", ["import lxt.efficient\nimport nrm_plugin", "import nrm_plugin\nimport lxt.efficient"]
)
def test_both_packages_can_be_imported_in_either_order(order):
    together = run(
        order
        + """
from nrm_plugin import RelevanceMeasure
from lxt.efficient import monkey_patch_zennit
print(float(RelevanceMeasure(net, x, 1, composite=EpsilonPlusFlat()).marginal("input").sum()))
"""
    )
    alone = run(
        """
from nrm_plugin import RelevanceMeasure
print(float(RelevanceMeasure(net, x, 1, composite=EpsilonPlusFlat()).marginal("input").sum()))
"""
    )
    assert together == alone


def test_its_patch_of_zennit_raises_with_a_remedy():
    printed = run(
        """
from lxt.efficient import monkey_patch_zennit
from nrm_plugin import NRM, Normalized, RelevanceMeasure
from nrm_plugin.errors import UnsupportedRuleError
before = RelevanceMeasure(net, x, 1, composite=EpsilonPlusFlat())
monkey_patch_zennit()
def context():
    with Normalized(EpsilonPlusFlat()).context(net):
        pass
for call in (
    lambda: RelevanceMeasure(net, x, 1, composite=EpsilonPlusFlat()),
    lambda: RelevanceMeasure(net, x, 1),
    lambda: NRM(net).attribute(x, 1),
    context,
):
    try:
        call()
    except UnsupportedRuleError as error:
        print(error)
    assert not net[0]._forward_hooks and not net[0]._forward_pre_hooks
"""
    )
    assert printed.count("was replaced by lxt.efficient") == 4
    assert printed.count("another process than the one that calls monkey_patch_zennit()") == 4


def test_a_patch_of_torch_modules_alone_changes_no_measure():
    """It replaces forward methods by some with the same values; the rules are read, not run."""
    printed = run(
        """
from nrm_plugin import RelevanceMeasure
from lxt.efficient.patches import patch_method, non_linear_forward
net = nn.Sequential(nn.Linear(36, 5), nn.GELU(), nn.Linear(5, 3)).eval()
flat = x.flatten(1)
first = RelevanceMeasure(net, flat, 1).marginal("input")
patch_method(non_linear_forward, nn.GELU, keep_original=True)
try:
    second = RelevanceMeasure(net, flat, 1).marginal("input")
    print(torch.allclose(first, second))
except Exception as error:
    print(type(error).__name__, error)
"""
    )
    assert printed.strip() == "True"


def test_the_expression_on_the_page_of_special_cases_equals_its_result():
    """LXT's explicit operations patch nothing."""
    printed = run(
        """
from benchmarks.special_case_rows import ROWS
(row,) = (row for row in ROWS if row.needs == "lxt")
print(row.difference() <= row.tolerance)
"""
    )
    assert printed.strip() == "True"


ATTNLRP = """
import transformers as hf
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Pass
from zennit.types import Activation, Linear
from nrm_plugin import Normalized, RelevanceMeasure, register_kernel
from nrm_plugin.kernels.vjp_kernel import VjpKernel
from lxt.efficient import monkey_patch

def model_of(kind, options, attention):
    settings = getattr(hf, kind + "Config")(vocab_size=50, attn_implementation=attention, **options)
    model = getattr(hf, {"GPT2": "GPT2LMHeadModel"}.get(kind, kind + "ForCausalLM"))(settings)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.double().eval()

def measured(model, embeddings, attention):
    rules = LayerMapComposite([(Linear, Epsilon(1e-12)), (Activation, Pass())])
    composite = Normalized(rules, residual="sink", sums="signed", attention=attention)
    mu = RelevanceMeasure(model, {"inputs_embeds": embeddings}, (8, 4), composite=composite)
    (tap,) = (layer for layer in mu.layers if layer.startswith("input"))
    return mu.marginal(tap) * mu.output[:, None, None]

def theirs(model, embeddings):
    leaf = embeddings.clone().requires_grad_()
    model(inputs_embeds=leaf).logits[0, 8, 4].backward()
    # It assigns a share of the relevance to the position embeddings, a constant; ours assigns all to the tokens.
    added = model.transformer.wpe.weight[:9] if hasattr(model, "transformer") else 0
    return ((leaf + added) * leaf.grad).detach()

def compare(kinds, options, before_second=None):
    # Our measure of all models comes first, since the patches of LXT are permanent.
    cases = []
    for kind in kinds:
        for attention in ("eager", "sdpa"):
            torch.manual_seed(0)
            model = model_of(kind, options, attention)
            embeddings = model.get_input_embeddings()(torch.randint(3, 50, (1, 9))).detach()
            first = measured(model, embeddings, "halves")
            if before_second is not None:
                before_second()
            second = measured(model, embeddings, "value" if before_second is None else "halves")
            cases.append((kind, attention, model, embeddings, first, second))
    for kind in kinds:
        monkey_patch(getattr(hf.models, kind.lower()).__dict__["modeling_" + kind.lower()])
    for kind, attention, model, embeddings, first, second in cases:
        expected = theirs(model, embeddings)
        errors = [float((ours - expected).abs().max() / expected.abs().max()) for ours in (first, second)]
        print(kind, attention, *errors)
"""


def test_attention_by_halves_equals_its_relevance_of_a_decoder(worst):
    """LXT's relevance of the embeddings is gradient times input of the patched model, with norms in float32."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    kinds = ["Llama", "Qwen2", "Qwen3"]
    printed = run(f"{ATTNLRP}\ncompare({kinds}, {sizes | {'num_key_value_heads': 2, 'head_dim': 8}})")
    rows = [line.split() for line in printed.splitlines()]
    assert [row[:2] for row in rows] == [[kind, attention] for kind in kinds for attention in ("eager", "sdpa")]
    for kind, _, error, of_values in rows:
        worst(f"AttnLRP, {kind} against LXT", float(error))
        assert float(error) <= 1e-5
        assert float(of_values) > 1e-2


CENTRED = """
def centre():
    @register_kernel(nn.functional.layer_norm)
    def centred(call):
        source, eps = call.values[0].requires_grad_(), call.argument(4, "eps")
        weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
        with torch.enable_grad():
            deviation = (source.var(-1, keepdim=True, unbiased=False) + eps).sqrt().detach()
            output = (source - source.mean(-1, keepdim=True)) / deviation * weight + bias
        def pull(relevance):
            (gradient,) = torch.autograd.grad(output, source, relevance / output, True, torch.is_grad_enabled())
            return (source * gradient,)
        return VjpKernel(pull)
"""


def test_only_its_layer_norm_differs_since_it_subtracts_the_mean(worst):
    """With its formula in place of the identity, all else agrees."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    rows = run(f"{ATTNLRP}\n{CENTRED}\ncompare(['GPT2'], {sizes}, centre)").splitlines()
    assert len(rows) == 2
    _, _, own, error = rows[0].split()
    worst("AttnLRP, GPT-2 against LXT, with its layer norm", float(error))
    assert float(error) <= 1e-6
    assert float(own) > 1e-2
    _, _, *both = rows[1].split()  # the kernel is registered from the start
    assert max(map(float, both)) <= 1e-6
