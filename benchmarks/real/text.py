"""Comparison of explanations of a text classifier by how well they find the words on which the prediction depends.

``python -m benchmarks.real.text`` explains held-out film reviews for MiniLM (:mod:`benchmarks.real.film_reviews`),
masks tokens in the order of their relevance, and writes the results as JSON, the table of ``docs/text.md`` and its
image. It needs transformers, and compares with gim-explain where that is installed. ``--add LXT`` adds AttnLRP to
stored results; LXT needs transformers 4. ``--quick`` explains a few reviews for a network that is trained on few.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import outputs, tables
from benchmarks.conservation import store
from nrm_plugin import Normalized, NRMDefault, RelevanceMeasure
from nrm_plugin.plots import text_figure

from .film_reviews import QUICK, TRAINED, Review, film_reviews, reviews
from .stored import stored

COUNT, FEW, RESAMPLED, STEPS = 250, 10, 2000, 32
"""Number of reviews, the same in a quick run, resamples, and integration steps."""
SHORTEST, LONGEST = 6, 40
SHOWN = "A film that was unbelievably long, and yet I was never bored."


class Question:
    """One text, and the difference of the two logits that is explained.

    Attributes:
        ids: The ids, ``(1, T)``.
        words: Positions of the tokens that are not special.
        sign: 1 if the predicted class is "positive", so that the difference is positive minus negative, otherwise -1.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, text: str) -> None:
        self.model, self.mask = model, tokenizer.mask_token_id
        self.ids = tokenizer(text, return_tensors="pt")["input_ids"]
        self.words = list(range(1, self.ids.shape[1] - 1))
        self.embeddings = model.get_input_embeddings()(self.ids).detach()
        masked = self.ids.clone()
        masked[0, self.words] = self.mask
        self.masked, self.baseline = masked, model.get_input_embeddings()(masked).detach()
        with torch.no_grad():
            logits = model(input_ids=self.ids).logits[0]
        self.target = int(logits.argmax())
        self.sign = 1.0 if self.target == 1 else -1.0

    def difference(self, embeddings: Tensor) -> Tensor:
        """Returns the logit of the predicted class minus that of the other one, ``(N,)``."""
        logits = self.model(inputs_embeds=embeddings).logits
        return self.sign * (logits[:, 1] - logits[:, 0])

    def gradient(self) -> Tensor:
        """Returns the gradient of the difference at the embeddings."""
        leaf = self.embeddings.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.difference(leaf).sum(), leaf)
        return gradient


def measured(question: Question, **options: Any) -> Tensor:
    """Returns the relevance of the tokens by the measure of the difference."""
    options = {"against": 1 - question.target, **options}
    mu = RelevanceMeasure(question.model, {"input_ids": question.ids}, question.target, **options)
    return mu.sign[0] * mu.marginal(mu.ends[0], over="position")[0]


def secants(question: Question) -> Tensor:
    """Returns the relevance of the difference to the text of masks."""
    return measured(question, reference={"input_ids": question.masked})


def halves(question: Question) -> Tensor:
    """Returns the measure with the rules of AttnLRP for attention."""
    return measured(question, composite=Normalized(NRMDefault(), attention="halves"))


def integrated(question: Question) -> Tensor:
    """Returns integrated gradients from the text of masks."""
    method = IntegratedGradients(question.difference)
    return method.attribute(question.embeddings, question.baseline, n_steps=STEPS).sum(-1)[0]


def gim(question: Question) -> Tensor:
    """Returns gradient interaction modifications, from the text of masks."""
    from gim import GIM

    with GIM(question.model):
        gradient = question.gradient()
    return (gradient * (question.embeddings - question.baseline)).sum(-1)[0]


def rollout(question: Question) -> Tensor:
    """Returns attention rollout to the class token; it has no sign."""
    with torch.no_grad():
        model, _ = loaded("eager", Path(question.model.name_or_path))
        attentions = model(input_ids=question.ids, output_attentions=True).attentions
    joint = torch.eye(question.ids.shape[1])
    for attention in attentions:
        mixed = attention[0].mean(0) / 2 + torch.eye(len(joint)) / 2
        joint = mixed @ joint
    return joint[0]


def occlusion(question: Question) -> Tensor:
    """Returns the decrease of the difference if a single token is masked, with one forward pass per token."""
    rows = question.embeddings.repeat(len(question.words), 1, 1)
    for row, position in enumerate(question.words):
        rows[row, position] = question.baseline[0, position]
    values = torch.zeros(question.ids.shape[1])
    with torch.no_grad():
        values[question.words] = question.difference(question.embeddings) - question.difference(rows)
    return values


def random(question: Question) -> Tensor:
    """Returns random numbers."""
    return torch.randn(question.ids.shape[1], generator=torch.Generator().manual_seed(int(question.ids.sum())))


def product(question: Question) -> Tensor:
    """Computes gradient times input; under LXT's patches, AttnLRP."""
    return (question.gradient() * question.embeddings).sum(-1)[0]


METHODS: dict[str, Callable[[Question], Tensor]] = {
    "NRMDefault": measured,
    "NRMDefault, halves": halves,
    "secants to masks": secants,
    "InputXGradient": product,
    "IntegratedGradients": integrated,
    "gim-explain": gim,
    "attention rollout": rollout,
    "occlusion": occlusion,
    "random": random,
}


@torch.no_grad()
def curve(question: Question, order: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the difference of logits and the softmax of the class while tokens are masked one after another."""
    rows = question.ids.repeat(len(order) + 1, 1)
    for number, position in enumerate(order):
        rows[number + 1 :, position] = question.mask
    logits = question.model(input_ids=rows).logits
    difference = question.sign * (logits[:, 1] - logits[:, 0])
    return difference.numpy(), torch.sigmoid(difference).numpy()


def scores(question: Question, relevance: Tensor) -> list[float]:
    """Returns SRG, the area between both curves of the difference of logits, and ABPC, the same for the softmax."""
    ordered = sorted(question.words, key=lambda position: float(relevance[position]))
    least, most = curve(question, ordered), curve(question, ordered[::-1])
    return [round(float(upper.mean() - lower.mean()), 4) for upper, lower in zip(least, most, strict=True)]


def scored(
    model: nn.Module, tokenizer: Any, review: Review, methods: dict[str, Callable[[Question], Tensor]]
) -> dict[str, list[float]]:
    """Returns the scores of each method for one review, from the cache if they have been computed."""
    settings = repr((review.text, list(methods), Path(model.name_or_path).name))

    def compute() -> dict[str, np.ndarray]:
        question = Question(model, tokenizer, review.text)
        return {name: np.array(scores(question, method(question).detach())) for name, method in methods.items()}

    found = stored("review", hashlib.sha256(settings.encode()).hexdigest(), compute)
    return {name: found[name].tolist() for name in methods}


def chosen_reviews(tokenizer: Any, count: int) -> list[Review]:
    """Returns the first held-out reviews of a medium length."""
    _, held = reviews()
    fitting = [r for r in held if SHORTEST <= len(tokenizer(r.text)["input_ids"]) - 2 <= LONGEST]
    return fitting[:count]


@functools.cache
def loaded(attention: str, folder: Path) -> tuple[nn.Module, Any]:
    """Returns the classifier of a folder with one implementation of attention, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def interval(values: np.ndarray) -> list[float]:
    """Returns the mean, and 95% interval of the mean over texts, by the bootstrap."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))
    means = values[drawn].mean(1)
    return [float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]


def summary(per_text: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Returns one row per method, the best first, with paired differences to NRMDefault."""
    arrays = {name: np.array(rows) for name, rows in per_text.items()}
    own = arrays["NRMDefault"]
    rows = []
    for name, values in arrays.items():
        row: dict[str, Any] = {"method": name}
        for column, metric in enumerate(("SRG", "ABPC")):
            row[metric] = interval(values[:, column])
            row[f"{metric}, difference"] = interval(values[:, column] - own[:, column])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["SRG"][0])


def drawn(model: nn.Module, tokenizer: Any, methods: list[str], images: Path) -> None:
    """Draws the image into a folder: one sentence, explained by several methods, each divided by its largest value."""
    question = Question(model, tokenizer, SHOWN)
    maps = []
    for method in methods:
        values = METHODS[method](question)
        values = values - values[question.words].mean() if method == "attention rollout" else values
        values[[0, -1]] = 0
        maps.append(values.detach() / values.abs().max() / 10)
    tokens = tokenizer.convert_ids_to_tokens(question.ids[0])
    titles = [tables.TEXT_METHODS.get(method, method) for method in methods]
    figure = text_figure(tokens, torch.stack(maps), titles, special=tokenizer.all_special_tokens, limit=0.1)
    for bar in figure.axes[len(methods) :]:
        bar.set_visible(False)
    figure.savefig(images / "text-films.png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", choices=["LXT"], help="measure this method alone and add it to the stored results")
    parser.add_argument("--quick", action="store_true", help=f"explain {FEW} reviews")
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    files, count = outputs.chosen(options), FEW if options.quick else COUNT
    file = files.results / "real_text.json"
    before = json.loads(file.read_text()) if options.add else {"per text": {}}
    if options.add:
        from lxt.efficient import monkey_patch
        from transformers.models.bert import modeling_bert

        monkey_patch(modeling_bert)
    model, tokenizer = loaded("sdpa", film_reviews(QUICK if options.quick else TRAINED))
    names = [name for name in METHODS if name != "gim-explain" or importlib.util.find_spec("gim")]
    methods = {"AttnLRP (LXT)": product} if options.add else {name: METHODS[name] for name in names}
    per_text: dict[str, list[list[float]]] = {name: [] for name in methods}
    for review in tqdm(chosen_reviews(tokenizer, count), unit="text"):
        for name, found in scored(model, tokenizer, review, methods).items():
            per_text[name].append(found)
    every = {**before["per text"], **per_text}
    store("real_text", {"texts": count, "rows": summary(every), "per text": every}, "captum", folder=files.results)
    files.render("real_text")
    if not options.add:
        methods_shown = ["NRMDefault", "secants to masks", "IntegratedGradients", "attention rollout"]
        drawn(model, tokenizer, methods_shown, files.images)


if __name__ == "__main__":
    main()
