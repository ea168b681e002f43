"""The benchmark of decoders that read characters: its text, and its metrics against slow definitions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.real import decoders


class Tiny(nn.Module):
    """A causal model in the form of transformers, without that package."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        count = len(decoders.alphabet())
        self.table, self.mix, self.head = nn.Embedding(count, 8), nn.Linear(8, 8), nn.Linear(8, count)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, logits_to_keep: int = 0):
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        weights = torch.arange(1.0, x.shape[1] + 1)[:, None] / x.shape[1]
        hidden = torch.tanh(self.mix((x * weights).cumsum(1)))
        return SimpleNamespace(logits=self.head(hidden[:, -logits_to_keep:]))


@pytest.fixture
def question() -> decoders.Question:
    ids = decoders.encoded(decoders.topics()[1])
    return decoders.Question(Tiny().eval().requires_grad_(False), decoders.windows(ids, torch.tensor([200])), 3)


def value(question: decoders.Question, ids: Tensor) -> float:
    logits = question.model(input_ids=ids[None]).logits[0, -1]
    return float(logits[question.target] - logits[question.other])


def test_held_out_topics_are_not_in_training_and_ids_are_the_characters():
    own, held = decoders.topics()
    assert 0.02 < len(held) / len(own) < 0.3
    assert held[:300] not in own
    letters = decoders.alphabet()
    assert letters[:3] == ["<unk>", "<s>", " "]
    assert min(own.count(letter) for letter in letters[2:]) >= decoders.RARE
    assert "".join(letters[number] for number in decoders.encoded("for x in y:\n")) == "for x in y:\n"
    row = decoders.windows(decoders.encoded(held), torch.tensor([5]))[0]
    assert row[0] == 1
    assert row[1:].tolist() == decoders.encoded(held)[5 : 5 + decoders.SEEN].tolist()


def test_ablation_draws_one_character_anew(question):
    for place in (1, 30, decoders.SEEN):
        falls = []
        for draw in question.draws:
            ids = question.ids[0].clone()
            ids[place] = draw[place]
            falls.append(value(question, question.ids[0]) - value(question, ids))
        assert float(question.ablation[place]) == pytest.approx(sum(falls) / len(falls), abs=1e-5)
    assert float(question.ablation[0]) == 0


def test_srg_is_the_area_between_both_orders(question):
    relevance = torch.randn(1 + decoders.SEEN, generator=torch.Generator().manual_seed(1))
    order = sorted(range(1, 1 + decoders.SEEN), key=lambda place: float(relevance[place]))
    means = []
    for places in (order, order[::-1]):
        values = []
        for draw in question.draws:
            ids = question.ids[0].clone()
            values.append(value(question, ids))
            for start in range(0, len(places), decoders.TOGETHER):
                chosen = places[start : start + decoders.TOGETHER]
                ids[chosen] = draw[chosen]
                values.append(value(question, ids))
        means.append(sum(values) / len(values))
    assert question.srg(relevance) == pytest.approx(means[0] - means[1], abs=1e-5)
    assert question.srg(-relevance) == pytest.approx(means[1] - means[0], abs=1e-5)


def test_references_keep_the_token_of_the_beginning_and_draws_are_of_the_text(question):
    filled = question.filled(" ")[0]
    assert filled[0] == question.ids[0, 0] == 1
    assert set(filled[1:].tolist()) == {decoders.alphabet().index(" ")}
    assert bool((question.draws[:, 0] == 1).all())
    assert bool((question.draws[:, 1:] > 1).all())
    integrated = decoders.integrated(" ")(question)
    change = value(question, question.ids[0]) - value(question, filled)
    assert float(integrated.sum()) == pytest.approx(change, abs=0.02 * max(1, abs(change)))
