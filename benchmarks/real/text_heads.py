"""Heads of the last block of the review classifier for one sentence: their joint relevance with words, and a flow.

``python -m benchmarks.real.text_heads`` takes a minute and writes the table and the figure of docs/text.md.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import outputs
from benchmarks.conservation import store
from nrm_plugin import explain_text
from nrm_plugin.plots import flow_figure

from .film_reviews import QUICK, TRAINED, film_reviews
from .text import loaded

SENTENCE = "never boring , never long"
HEADS, TOKENS = "blocks.5.attn", "blocks.0.resid_pre"
FIGURE = "text-heads.png"


def results(folder: Path, images: Path) -> dict[str, Any]:
    """Draws the figure; returns masses of heads and tokens, and the joint relevance of all pairs.

    Args:
        folder: The folder of the classifier.
        images: The folder of the figure.
    """
    model, tokenizer = loaded("eager", folder)
    mu = explain_text(model.double(), tokenizer, SENTENCE).measure
    ids = tokenizer(SENTENCE, return_tensors="pt")
    words = tokenizer.convert_ids_to_tokens(ids["input_ids"][0])
    first, second = (model.config.id2label[int(k)] for k in model(**ids).logits[0].argsort(descending=True))
    shape, count = mu.marginal(TOKENS).shape[1:], mu.marginal(HEADS).shape[1]
    place = torch.arange(shape[0])[:, None].expand(shape)
    over = {
        TOKENS: {f"{word} ({number})": place == number for number, word in enumerate(words)},
        HEADS: torch.arange(count)[:, None, None],
    }
    graph = mu.flow([HEADS, TOKENS], over=over, top=None, names={HEADS: [f"head {n}" for n in range(count)]})
    (joint,) = graph.joints
    upper, lower = graph.layers
    named = replace(graph, layers=(replace(upper, name="heads of block 5"), replace(lower, name="tokens")))
    flow_figure(named, f"“{SENTENCE}”: {first} rather than {second}", caption="", width=6).savefig(
        images / FIGURE, dpi=85
    )
    order = [lower.labels.index(f"{word} ({number})") for number, word in enumerate(words)]
    heads = [upper.labels.index(f"head {n}") for n in range(count)]
    return {
        "sentence": SENTENCE,
        "explained": [first, second],
        "words": words,
        "change": round(float(mu.output[0]), 4),
        "joint": [[round(float(joint[row, column]), 4) for column in order] for row in heads],
        "heads": [round(upper.masses[row], 4) for row in heads],
        "tokens": [round(lower.masses[column], 4) for column in order],
        "bypassing": [round(float(joint[-1, column]), 4) for column in order],
        "bypass": round(upper.bypass, 4),
        "sinks": [round(upper.sink, 6), round(lower.sink, 6)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use the network that is trained on few reviews")
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    files, folder = outputs.chosen(options), film_reviews(QUICK if options.quick else TRAINED)
    store("text_heads", results(folder, files.images), folder=files.results)
    files.render("text_heads")


if __name__ == "__main__":
    main()
