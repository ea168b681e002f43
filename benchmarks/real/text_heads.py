"""Heads of the last block of the review classifier for one sentence: their joint relevance with words, and a flow.

``python -m benchmarks.real.text_heads`` takes a minute and writes the table and the figure of docs/text.md.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import outputs
from benchmarks.conservation import store
from nrm_plugin import FlowGraph, explain_text
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots import flow_figure
from nrm_plugin.plots.flow_finding import flow_finding

from .film_reviews import QUICK, TRAINED, film_reviews
from .text import loaded

SENTENCE = "never boring , never long"
HEADS, TOKENS = "blocks.5.attn", "blocks.0.resid_pre"
FIGURE = "text-heads.png"


def results(folder: Path) -> dict[str, Any]:
    """Returns masses of heads and tokens, and the joint relevance of all pairs.

    Args:
        folder: The folder of the classifier.
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


def flow(found: dict[str, Any]) -> FlowGraph:
    """Returns the flow of the stored numbers, with tokens as the lower layer."""
    heads, tokens = (tuple(found[name]) for name in ("heads", "tokens"))
    words = tuple(f"“{word}” ({number})" for number, word in enumerate(found["words"]))
    upper = FlowLayer("block 5", tuple(range(len(heads))), tuple(f"head {n}" for n in range(len(heads))), heads, 0.0, 0,
                      found["sinks"][0], found["bypass"])  # fmt: skip
    lower = FlowLayer("tokens", tuple(range(len(tokens))), words, tokens, 0.0, 0, found["sinks"][1], 0.0)
    joint = np.zeros((len(heads) + 2, len(tokens) + 2))
    joint[:-2, :-2], joint[-1, :-2] = found["joint"], found["bypassing"]
    return FlowGraph((upper, lower), (joint,))


def draw(found: dict[str, Any], images: Path) -> None:
    """Draws the figure into a folder."""
    graph = flow(found)
    upper, lower = graph.layers
    finding = flow_finding(replace(graph, layers=(upper, replace(lower, name="input"))), "the difference")
    first, second = found["explained"]
    heading = f"“{found['sentence']}”: {first} rather than {second}, compared with the masked text"
    flow_figure(graph, heading, caption="", finding=finding, width=6).savefig(images / FIGURE, dpi=85)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use the network that is trained on few reviews")
    parser.add_argument("--render", action="store_true", help="rewrite the table and the figure only")
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    files = outputs.chosen(options)
    if not options.render:
        found = results(film_reviews(QUICK if options.quick else TRAINED))
        store("text_heads", found, folder=files.results)
    files.render("text_heads")
    draw(json.loads((files.results / "text_heads.json").read_text()), files.images)


if __name__ == "__main__":
    main()
