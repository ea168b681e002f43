"""Two small decoders, trained here on single characters, and the characters on which their predictions depend.

``python -m benchmarks.real.decoders`` trains a GPT-2 and a Llama of transformers on the language reference that Python
ships with (``pydoc_data``), which takes minutes on two cores, checks totals, sinks and sites, compares explanations of
the next character with ablation, and writes the results as JSON, the tables of ``docs/text.md`` and their image.
``--quick`` trains for few batches and explains few texts.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import outputs, tables
from benchmarks.conservation import conservation_check, largest_error, store
from benchmarks.train_demo import reproducible
from nrm_plugin import RelevanceMeasure
from nrm_plugin.plots import text_figure

from . import packages
from .stored import locked
from .text import interval

UNKNOWN, BEGIN = "<unk>", "<s>"
"""A token that does not occur in training, and the token at the beginning of every text."""
SEEN, RARE = 64, 30
"""Number of characters before the predicted one, and smallest number of occurrences of a character with a token."""
STEPS, FEW_STEPS, BATCH = 1500, 100, 32
"""Number of batches for training, the same in a quick run, and batch size."""
FEW_TEXTS = 4
"""Number of texts of a quick run."""
TEXTS, DRAWS, TOGETHER, INTEGRATED = 40, 2, 4, 32
"""Number of texts, of draws of each character, of characters that are replaced together, and of integration steps."""
WIDTH, LAYERS, HEADS = 96, 3, 4
KINDS = ("GPT-2", "Llama")
SHOWN = 12
Values = Callable[["Question"], Tensor]


@functools.cache
def topics() -> tuple[str, str]:
    """Returns the language reference for training, and a tenth of its topics that is held out."""
    from pydoc_data.topics import topics as every

    named = sorted(every.items(), key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
    held = len(named) // 10
    return "\n\n".join(text for _, text in named[held:]), "\n\n".join(text for _, text in named[:held])


@functools.cache
def alphabet() -> list[str]:
    """Returns the tokens: the special ones, then the characters, the most frequent first."""
    counted = Counter(topics()[0]).most_common()
    return [UNKNOWN, BEGIN, *(letter for letter, count in counted if count >= RARE)]


def encoded(text: str) -> Tensor:
    """Returns the ids of the characters; rare characters are omitted."""
    ids = {letter: number for number, letter in enumerate(alphabet())}
    return torch.tensor([ids[letter] for letter in text if letter in ids])


def built(kind: str) -> nn.Module:
    """Returns a decoder with random weights."""
    import transformers as hf

    shared: dict[str, Any] = {"vocab_size": len(alphabet()), "bos_token_id": 1, "eos_token_id": 1}
    if kind == "GPT-2":
        sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": SEEN + 1}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **shared))
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": SEEN + 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **shared))


def windows(ids: Tensor, starts: Tensor) -> Tensor:
    """Returns the ids from each start, preceded by the token for the beginning of a text, ``(N, 1 + SEEN)``."""
    rows = ids[starts[:, None] + torch.arange(SEEN)]
    return torch.cat([torch.ones_like(rows[:, :1]), rows], 1)


@torch.no_grad()
def bits(model: nn.Module) -> float:
    """Returns the cross entropy per held-out character, in bits."""
    ids = encoded(topics()[1])
    rows = windows(ids, torch.arange(0, len(ids) - SEEN, SEEN))
    logits = torch.cat([model(input_ids=part).logits[:, :-1] for part in rows.split(64)])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())) / float(np.log(2))


def trained(kind: str, steps: int = STEPS) -> nn.Module:
    """Returns the decoder in evaluation mode, trained at the first call and then read from the cache."""
    from transformers import AutoModelForCausalLM

    name = f"characters-{kind.lower()}" if steps == STEPS else f"characters-{kind.lower()}-{steps}"
    folder: Path = packages.cache() / "trained" / name
    with locked(folder):
        if not folder.is_dir():
            with packages.completed(folder) as partial:
                _train(kind, steps).save_pretrained(partial)
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def _train(kind: str, steps: int) -> nn.Module:
    ids = encoded(topics()[0])
    with reproducible(0):
        model = built(kind).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
        for _ in tqdm(range(steps), desc=kind, unit="batch"):
            rows = windows(ids, torch.randint(len(ids) - SEEN, (BATCH,)))
            optimizer.zero_grad()
            logits = model(input_ids=rows).logits[:, :-1]
            torch.autograd.backward(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


class Question:
    """The question why a decoder predicts the most likely character rather than the second most likely one.

    Attributes:
        ids: The ids, ``(1, 1 + SEEN)``.
        target, other: The two most likely characters.
        draws: The same text with every character drawn by its frequency, several times, ``(DRAWS, 1 + SEEN)``.
    """

    def __init__(self, model: nn.Module, ids: Tensor, seed: int) -> None:
        self.model, self.ids = model, ids
        self.table = model.get_input_embeddings()
        with torch.no_grad():
            self.target, self.other = model(input_ids=ids).logits[0, -1].topk(2).indices.tolist()
        source = encoded(topics()[0])
        drawn = torch.randint(len(source), (DRAWS, SEEN), generator=torch.Generator().manual_seed(seed))
        self.draws = torch.cat([ids[:, :1].repeat(DRAWS, 1), source[drawn]], 1)

    def difference(self, logits: Tensor) -> Tensor:
        """Returns the difference of the two logits at the last character, ``(N,)``."""
        return logits[:, -1, self.target] - logits[:, -1, self.other]

    def of_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the same difference, for embedded characters."""
        return self.difference(self.model(inputs_embeds=embeddings, logits_to_keep=1).logits)

    @torch.no_grad()
    def of_ids(self, ids: Tensor) -> Tensor:
        """Returns the same difference, for ids ``(…, 1 + SEEN)``."""
        return self.difference(self.model(input_ids=ids.flatten(0, -2), logits_to_keep=1).logits).view(ids.shape[:-1])

    def filled(self, token: str) -> Tensor:
        """Returns the ids with one token in place of every character."""
        ids = self.ids.clone()
        ids[:, 1:] = alphabet().index(token)
        return ids

    @functools.cached_property
    def ablation(self) -> Tensor:
        """Mean decrease of the difference if a single character is replaced by a random one, ``(1 + SEEN,)``."""
        rows = self.ids.repeat(DRAWS, 1 + SEEN, 1)
        for place in range(1, 1 + SEEN):
            rows[:, place, place] = self.draws[:, place]
        return self.of_ids(self.ids) - self.of_ids(rows).mean(0)

    def srg(self, relevance: Tensor) -> float:
        """Returns the mean difference with least relevant characters replaced first, minus most relevant first."""
        order = relevance[1:].argsort(stable=True) + 1
        return self._curve(order) - self._curve(order.flip(0))

    def _curve(self, order: Tensor) -> float:
        rows = self.ids.repeat(DRAWS, 1 + len(order) // TOGETHER, 1)
        for number, places in enumerate(order.split(TOGETHER)):
            rows[:, number + 1 :, places] = self.draws[:, None, places]
        return float(self.of_ids(rows).mean())


def measured(question: Question, **options: Any) -> RelevanceMeasure:
    """Returns the measure of the difference."""
    output: Any = lambda returned: returned["logits"][:, -1]  # noqa: E731
    target, inputs = question.target, {"input_ids": question.ids}
    return RelevanceMeasure(question.model, inputs, target, against=question.other, output=output, **options)


def _relevance(mu: RelevanceMeasure) -> Tensor:
    return mu.sign[0] * mu.marginal(mu.ends[0], over="position")[0]


def default(question: Question) -> Tensor:
    """Returns the relevance of the characters by the default composite."""
    return _relevance(measured(question))


def secants(token: str) -> Values:
    """Returns the relevance of the difference to a text of one token."""
    return lambda question: _relevance(measured(question, reference={"input_ids": question.filled(token)}))


def integrated(token: str) -> Values:
    """Returns integrated gradients from a text of one token."""

    def values(question: Question) -> Tensor:
        method = IntegratedGradients(question.of_embeddings)
        start, end = question.table(question.filled(token)), question.table(question.ids)
        return method.attribute(end, start, n_steps=INTEGRATED).sum(-1)[0]

    return values


def product(question: Question) -> Tensor:
    """Returns gradient times input."""
    leaf = question.table(question.ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(question.of_embeddings(leaf).sum(), leaf)
    return (gradient * leaf.detach()).sum(-1)[0]


def random(question: Question) -> Tensor:
    """Returns random numbers."""
    return torch.randn(1 + SEEN, generator=torch.Generator().manual_seed(int(question.ids.sum())))


METHODS: dict[str, Values] = {
    "NRMDefault": default,
    "secants to <unk>": secants(UNKNOWN),
    "secants to <s>": secants(BEGIN),
    "secants to spaces": secants(" "),
    "IntegratedGradients, <unk>": integrated(UNKNOWN),
    "IntegratedGradients, spaces": integrated(" "),
    "InputXGradient": product,
    "one character drawn anew": lambda question: question.ablation,
    "random": random,
}


def totals(mu: RelevanceMeasure) -> dict[str, Any]:
    """Returns the conservation at every tap and at every site, absorbed mass, and the names of the sites."""
    return {**conservation_check(mu), "sites": len(mu.sites), "error at sites": largest_error(mu, mu.sites)[0]}


def compared(questions: list[Question]) -> list[dict[str, Any]]:
    """Returns SRG, correlation with ablation and share of the last eight characters of each method, the best first."""
    found: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for question in tqdm(questions, unit="text"):
        ablated = question.ablation[1:]
        for name, method in METHODS.items():
            values = method(question).detach()
            size = values[1:].abs()
            together = torch.corrcoef(torch.stack([values[1:], ablated]))[0, 1]
            near = size[-8:].sum() / size.sum().clamp(min=1e-12)
            found[name].append([question.srg(values), float(together), float(near)])
    own = np.array(found["NRMDefault"])[:, 0]
    spaces = np.array(found["secants to spaces"])[:, 1]
    rows = []
    for name, values in found.items():
        scores = np.array(values)
        row = {"method": name, "SRG": interval(scores[:, 0]), "SRG, difference": interval(scores[:, 0] - own)}
        row["correlation"] = interval(scores[:, 1])
        row["correlation, secants to spaces minus this"] = interval(spaces - scores[:, 1])
        rows.append({**row, "last eight": interval(scores[:, 2])})
    return sorted(rows, key=lambda row: -row["SRG"][0])


def questions_of(model: nn.Module, count: int = TEXTS) -> list[Question]:
    """Returns questions about held-out texts that start at random positions."""
    ids = encoded(topics()[1])
    starts = torch.randint(len(ids) - SEEN, (count,), generator=torch.Generator().manual_seed(0))
    return [Question(model, row[None], number) for number, row in enumerate(windows(ids, starts))]


def drawn(shown: dict[str, Question], images: Path) -> None:
    """Draws the image into a folder: one held-out text, explained for both decoders."""
    methods = ("NRMDefault", "one character drawn anew", "InputXGradient")
    maps, titles = [], []
    for kind, question in shown.items():
        predicted = " rather than ".join(repr(alphabet()[index]) for index in (question.target, question.other))
        for method in methods:
            values = METHODS[method](question).detach()
            maps.append(values / values.abs().max() / 10)
            titles.append(f"{kind}, {predicted}: {tables.TEXT_METHODS.get(method, method)}")
    question = next(iter(shown.values()))
    letters = ["␣" if letter == " " else letter for letter in (alphabet()[index] for index in question.ids[0])]
    figure = text_figure(letters[1:], torch.stack(maps)[:, 1:], titles, limit=0.1)
    figure.axes[-1].set_visible(False)
    figure.savefig(images / "text-characters.png", dpi=110)


def described(kind: str, model: nn.Module, texts: int) -> dict[str, Any]:
    """Returns all measurements of one decoder."""
    questions = questions_of(model, texts)
    reference = {"input_ids": questions[0].filled(" ")}
    checks: dict[str, dict[str, Any]] = {"NRMDefault": {}, "secants to spaces": {"reference": reference}}
    row = {"net": kind, "parameters": sum(p.numel() for p in model.parameters()), "bits": bits(model)}
    row["totals"] = {name: totals(measured(questions[0], **options)) for name, options in checks.items()}
    exact = Question(copy.deepcopy(model).double(), questions[0].ids, 0)
    row["totals"]["secants to spaces, float64"] = totals(measured(exact, reference=reference))
    return {**row, "rows": compared(questions)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"train for {FEW_STEPS} batches, explain {FEW_TEXTS} texts"
    )
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    files, texts = outputs.chosen(options), FEW_TEXTS if options.quick else TEXTS
    models = {kind: trained(kind, FEW_STEPS if options.quick else STEPS) for kind in KINDS}
    shown = {kind: questions_of(model)[SHOWN] for kind, model in models.items()}
    nets = [described(kind, model, texts) for kind, model in models.items()]
    digest = hashlib.sha256("".join(topics()).encode()).hexdigest()
    settings = {"text": "pydoc_data.topics", "sha256": digest, "characters": len(alphabet()) - 2, "texts": texts}
    found = {**settings, "seen": SEEN, "draws": DRAWS, "nets": nets}
    store("real_decoders", found, "captum", "transformers", folder=files.results)
    files.render("real_decoders")
    drawn(shown, files.images)


if __name__ == "__main__":
    main()
