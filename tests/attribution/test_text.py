"""Explanations of text models.

Covers: nrm_plugin.attribution.text_predictions.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nrm_plugin import NRMDefault, RelevanceMeasure, at, explain_text
from nrm_plugin.errors import DifferenceError, InputError, TargetError, UnknownLayerError
from tests.text_nets import WORDS, StubTokenizer, text_net

TEXT = "a dull boring film , and yet fine"


def measured(kind: str, text: str, target: int, **options: object) -> RelevanceMeasure:
    """The same measure without this package's reading of text: embedded ids as inputs of the part above."""
    model, ids = text_net(kind), StubTokenizer()(text, return_tensors="pt")["input_ids"]

    class Above(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x):
            x = x + self.net.places[: x.shape[1]]
            for block in self.net.blocks:
                x = block(x)
            return self.net.head(x.mean(1)) if kind == "class" else self.net.head(x[:, options["at"]])

    rest = {key: value for key, value in options.items() if key != "at"}
    return RelevanceMeasure(Above(), model.embedding(ids).detach(), target, **rest)


def test_a_class_is_explained_by_the_rows_of_the_embedding():
    explanation = explain_text(text_net("class"), StubTokenizer(), TEXT, reference=None)
    logits = text_net("class")(StubTokenizer()(TEXT, return_tensors="pt")["input_ids"])["logits"][0]
    chosen = int(logits.argmax())
    mu = measured("class", TEXT, chosen, against=1 - chosen)
    torch.testing.assert_close(explanation.tokens, mu.marginal("input", over="position")[0])
    assert explanation.target == ("negative", "positive")[chosen]
    assert explanation.against == ("negative", "positive")[1 - chosen]
    assert explanation.output == pytest.approx(float(logits.max() - logits.min()))
    assert float(explanation.words.sum()) + explanation.absorbed == pytest.approx(1)
    assert [word.text for word in explanation.text.words] == ["[CLS]", *TEXT.split(), "[SEP]"]


def test_a_class_that_is_behind_has_positive_evidence_in_its_favour():
    ahead = explain_text(text_net("class"), StubTokenizer(), TEXT)
    behind = explain_text(text_net("class"), StubTokenizer(), TEXT, ahead.against)
    torch.testing.assert_close(behind.words, -ahead.words)
    assert behind.output < 0
    assert float(behind.words.sum()) + behind.absorbed == pytest.approx(-1)


def test_the_token_behind_a_mask_and_the_next_token_are_found_without_being_asked_for():
    masked = explain_text(text_net("mask"), StubTokenizer(), "a [MASK] film", "dull", against="fine", reference=None)
    mu = measured("mask", "a [MASK] film", WORDS.index("dull"), against=WORDS.index("fine"), at=2)
    torch.testing.assert_close(masked.tokens, mu.sign[0] * mu.marginal("input", over="position")[0])
    assert (masked.kind, masked.target, masked.against) == ("mask", "dull", "fine")
    plain = StubTokenizer(has_class_token=False)
    following = explain_text(text_net("next"), plain, "a dull", "film", against=None, reference=None)
    assert (following.kind, following.against) == ("next", "")
    ids = torch.tensor([[WORDS.index("a"), WORDS.index("dull")]])
    assert following.output == pytest.approx(float(text_net("next")(ids)["logits"][0, -1, WORDS.index("film")]))


def test_the_class_of_a_token_needs_its_position():
    model = text_net("token", 3)
    with pytest.raises(InputError, match=r"the class of each token: give position=, one of 0 '\[CLS\]', 1 'a'"):
        explain_text(model, StubTokenizer(), "a film")
    explanation = explain_text(model, StubTokenizer(), "a film", position=2)
    assert explanation.kind == "token"
    assert explanation.target.startswith("class ")
    with pytest.raises(InputError, match="position=9 is out of range: the text has 4 tokens"):
        explain_text(model, StubTokenizer(), "a film", position=9)


def test_units_and_conditions_are_those_of_the_measure():
    explanation = explain_text(
        text_net("class"),
        StubTokenizer(),
        TEXT,
        layers=["blocks.1.attn.z", "blocks.0.up"],
        given="blocks.1.attn.head.1",
    )
    mu = explanation.measure
    assert mu is not None
    for row in explanation.layers["blocks.1.attn.z"]:
        head = at("blocks.1.attn.z").head(int(row.title.removeprefix("head ")))
        assert row.mass == pytest.approx(float(mu.sign * mu(head)))
        assert float(row.relevance.sum()) == pytest.approx(row.mass)
    assert len(explanation.layers["blocks.0.up"]) == 5
    assert [abs(row.mass) for row in explanation.layers["blocks.0.up"]] == sorted(
        (abs(row.mass) for row in explanation.layers["blocks.0.up"]), reverse=True
    )
    (given,) = explanation.given
    assert given.title == "blocks.1.attn.head.1"
    assert abs(float(given.relevance.sum())) == pytest.approx(1)


def test_a_condition_without_relevance_says_so():
    explanation = explain_text(text_net("class"), StubTokenizer(), TEXT, given=at("blocks.1.attn.v") & ~at("output"))
    assert explanation.reference == "[MASK]"
    assert explanation.given[0].relevance is None
    assert explanation.given[0].problem == "no relevance passes through these walks"


def test_a_reference_is_a_text_of_as_many_tokens_or_a_token_for_all():
    model, tokenizer = text_net("class"), StubTokenizer()
    explanation = explain_text(model, tokenizer, "a dull film", reference="a fine film")
    assert [round(float(value), 9) != 0 for value in explanation.words] == [False, False, True, False, False]
    first, second = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("a dull film", "a fine film"))
    chosen = ("negative", "positive").index(explanation.target)
    changes = (model(first)["logits"] - model(second)["logits"])[0]
    assert abs(explanation.output) == pytest.approx(abs(float(changes[chosen] - changes[1 - chosen])))
    masked = explain_text(model, tokenizer, "a dull film", reference="[MASK]")
    assert [bool(value) for value in masked.words.abs() > 1e-9] == [False, True, True, True, False]
    with pytest.raises(DifferenceError, match="has 4 tokens and the text has 5"):
        explain_text(model, tokenizer, "a dull film", reference="a film")


@pytest.mark.parametrize("kind", ["class", "mask", "next"])
def test_masks_in_place_of_the_words_are_the_reference_by_default_and_absorb_nothing(kind):
    tokenizer, model = StubTokenizer(has_class_token=kind != "next"), text_net(kind)
    text = "a [MASK] dull film" if kind == "mask" else TEXT
    explanation = explain_text(model, tokenizer, text)
    chosen = explain_text(model, tokenizer, text, reference="[MASK]")
    torch.testing.assert_close(explanation.tokens, chosen.tokens)
    assert explanation.reference == chosen.reference == "[MASK]"
    special = [number for number, word in enumerate(explanation.text.words) if word.is_special]
    assert len(special) == {"class": 2, "mask": 3, "next": 0}[kind]
    assert float(explanation.words[special].abs().sum()) < 1e-50
    assert float(explanation.words.sum()) == pytest.approx(1 if explanation.output > 0 else -1, abs=1e-12)
    assert explanation.absorbed == pytest.approx(0, abs=1e-12)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    masked = torch.where(torch.isin(ids, torch.tensor(tokenizer.all_special_ids[2:])), ids, 4)
    logits, others = (model(row)["logits"][0] for row in (ids, masked))
    if kind != "class":
        place = 2 if kind == "mask" else -1
        logits, others = logits[place], others[place]
    best = int(logits.argmax())
    shares = logits.masked_fill(torch.arange(len(logits)) == best, -torch.inf).softmax(0)
    change = (logits - others)[best] - (shares * (logits - others)).sum()
    assert explanation.output == pytest.approx(float(change), rel=1e-9)


def test_a_linear_model_has_the_share_of_each_word_in_the_change_from_masks():
    model, tokenizer = text_net("class"), StubTokenizer()
    model.blocks = nn.ModuleList()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    target = int(model(ids[None])["logits"].argmax())
    weight = model.head.weight[target] - model.head.weight[1 - target]
    terms = (model.embedding.weight[ids] - model.embedding.weight[4]) @ weight
    terms[[0, -1]] = 0
    torch.testing.assert_close(explain_text(model, tokenizer, TEXT).tokens, terms / terms.sum().abs())


@pytest.mark.medium
def test_rules_or_no_reference_explain_the_prediction_itself():
    model, tokenizer = text_net("class"), StubTokenizer()
    plain = explain_text(model, tokenizer, TEXT, reference=None)
    for options in ({"composite": NRMDefault()}, {"residual": "redistribute"}, {"gain_limit": 2.0}):
        explanation = explain_text(model, tokenizer, TEXT, **options)
        assert explanation.reference == ""
        torch.testing.assert_close(explanation.words, plain.words)
    assert explain_text(model, tokenizer, TEXT, reference="[MASK]", composite=NRMDefault()).reference == "[MASK]"


@pytest.mark.parametrize("reason", ["no token", "no word", "no change", "another path"])
def test_without_a_reference_that_can_be_compared_the_prediction_itself_is_explained(reason):
    model, tokenizer, text = text_net("class"), StubTokenizer(), "a film"
    if reason == "no token":
        tokenizer.mask_token = None
    if reason == "no word":
        model, text = text_net("mask"), "[MASK]"
    if reason == "no change":
        model.embedding.weight[[5, 8]] = model.embedding.weight[4].clone()
    if reason == "another path":
        model.blocks.append(Chosen())
    explanation = explain_text(model, tokenizer, text)
    assert explanation.reference == ""
    assert float(explanation.words.sum()) + explanation.absorbed == pytest.approx(1)
    if reason == "another path":
        with pytest.raises(DifferenceError, match="topk"):
            explain_text(model, tokenizer, text, reference="[MASK]")


class Chosen(nn.Module):
    """Adds the token that has the largest first channel, as a router does."""

    def forward(self, x):
        return x + x[:, x[0, :, 0].topk(1).indices.tolist()[0]][:, None]


def test_unknown_classes_tokens_and_layers_are_named():
    model, tokenizer = text_net("class"), StubTokenizer()
    with pytest.raises(TargetError, match=r"target='nice' is not a class of the model. Its classes are 'negative'"):
        explain_text(model, tokenizer, TEXT, "nice")
    with pytest.raises(TargetError, match=r"against=2 is out of range: the model has 2 outputs"):
        explain_text(model, tokenizer, TEXT, against=2)
    with pytest.raises(TargetError, match=r"target=1.5 is neither a name nor an index"):
        explain_text(model, tokenizer, TEXT, 1.5)
    with pytest.raises(UnknownLayerError, match=r"no tap named 'blocks\.7\.attn'"):
        explain_text(model, tokenizer, TEXT, layers="blocks.7.attn")
    causal, plain = text_net("next"), StubTokenizer(has_class_token=False)
    with pytest.raises(
        TargetError, match=r"target='boring' consists of 2 tokens, 'bor', '##ing'.*such as target='bor'"
    ):
        explain_text(causal, plain, TEXT, "boring")
    with pytest.raises(TargetError, match=r"target='swift' is not in the vocabulary"):
        explain_text(causal, plain, TEXT, "swift")


def test_texts_and_models_that_do_not_fit_raise():
    model, tokenizer = text_net("class"), StubTokenizer()
    with pytest.raises(InputError, match="text is 3, expected a string"):
        explain_text(model, tokenizer, 3)
    with pytest.raises(InputError, match="has no tokens"):
        explain_text(text_net("next"), StubTokenizer(has_class_token=False), "  ")
    with pytest.raises(InputError, match="has 22 tokens, but the model accepts at most 16"):
        explain_text(model, tokenizer, "a " * 20)
    with pytest.raises(InputError, match="position=1 applies to models that predict tokens"):
        explain_text(model, tokenizer, TEXT, position=1)
    with pytest.raises(InputError, match=r"the text has 2 masks; choose one by position=, from \[1, 3\]"):
        explain_text(text_net("mask"), tokenizer, "[MASK] film [MASK]")
    with pytest.raises(InputError, match=r"the tokens behind masks. Put \[MASK\] into the text, or give position="):
        explain_text(text_net("mask"), tokenizer, "a film")
    with pytest.raises(InputError, match="Load the model with its head"):
        explain_text(Headless(), tokenizer, "a film")


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 8)

    def forward(self, input_ids, attention_mask=None):
        return {"last_hidden_state": self.embedding(input_ids)}


def test_words_of_a_slow_tokenizer_are_the_same():
    fast, slow = (explain_text(text_net("class"), StubTokenizer(is_fast), TEXT) for is_fast in (True, False))
    assert [word.text for word in fast.text.words] == [word.text for word in slow.text.words]
    torch.testing.assert_close(fast.words, slow.words)


def test_a_class_is_found_by_its_own_spelling_before_another_case_and_an_ambiguous_name_raises():
    model = text_net("class")
    model.config.id2label = {0: "US", 1: "us"}
    assert explain_text(model, StubTokenizer(), TEXT, "us").against == "US"
    assert explain_text(model, StubTokenizer(), TEXT, "US").against == "us"
    with pytest.raises(TargetError, match=r"target='Us' is the name of 2 classes. Give the index: \[0, 1\]"):
        explain_text(model, StubTokenizer(), TEXT, "Us")
    model.config.id2label = {0: "same", 1: "same"}
    with pytest.raises(TargetError, match=r"against='same' is the name of 2 classes"):
        explain_text(model, StubTokenizer(), TEXT, against="same")


def test_arguments_of_a_wrong_type_or_without_a_meaning_are_named():
    model, tokenizer = text_net("next"), StubTokenizer(has_class_token=False)
    with pytest.raises(TargetError, match="target='' is neither a name nor an index"):
        explain_text(model, tokenizer, TEXT, "")
    with pytest.raises(InputError, match=r"position=1.0 is not the index of a token, one of 0 'a'"):
        explain_text(model, tokenizer, TEXT, position=1.0)
    with pytest.raises(InputError, match="reference=5 is neither a text nor a token"):
        explain_text(model, tokenizer, TEXT, reference=5)
    with pytest.raises(InputError, match=r"the text 'a \\ud800 film' is not valid Unicode"):
        explain_text(model, tokenizer, "a \ud800 film")
    with pytest.raises(TargetError, match="against=0: the model has a single output"):
        explain_text(text_net("class", 1), StubTokenizer(), TEXT, against=0)


class Positions(nn.Module):
    """The model for a class, with fewer positions or rows than it gets, or with another forward pass."""

    def __init__(self, places: int = 16, rows: int = len(WORDS), is_broken: bool = False) -> None:
        super().__init__()
        self.net = text_net("class")
        self.net.places = nn.Parameter(self.net.places[:places])
        self.net.embedding = nn.Embedding.from_pretrained(self.net.embedding.weight[:rows])
        self.is_broken = is_broken
        self.config = SimpleNamespace(id2label={}, vocab_size=rows, max_position_embeddings=places)

    def forward(self, input_ids):
        if self.is_broken:
            raise KeyError("choices")
        return self.net(input_ids)


def test_a_model_that_fails_on_the_text_says_why():
    explanation = explain_text(Positions(), StubTokenizer(), TEXT)  # without the attention mask that it does not take
    torch.testing.assert_close(explanation.words, explain_text(text_net("class"), StubTokenizer(), TEXT).words)
    with pytest.raises(InputError, match=r"the text has 11 tokens, but Positions has 6 positions. Shorten the text"):
        explain_text(Positions(places=6), StubTokenizer(), TEXT)
    with pytest.raises(InputError, match=r"the tokenizer has the id 16, but the ids of Positions end at 11"):
        explain_text(Positions(rows=12), StubTokenizer(), TEXT)
    with pytest.raises(InputError, match=r"Positions fails on the 11 tokens of the text.*KeyError: 'choices'"):
        explain_text(Positions(is_broken=True), StubTokenizer(), TEXT)


def test_one_number_per_token_is_not_read_as_classes():
    class Discriminator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.config = text_net("token"), SimpleNamespace(num_labels=2, vocab_size=len(WORDS))

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.net(input_ids)["logits"][..., 0]}

    with pytest.raises(InputError, match="Discriminator returns one number for each of the 11 tokens"):
        explain_text(Discriminator(), StubTokenizer(), TEXT)


class Decoding(nn.Module):
    """An encoder and a decoder without attention: the mean of the encoded rows is added to each decoded row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.starts = nn.Embedding(len(WORDS), 8).double(), nn.Embedding(len(WORDS), 8).double()
        self.head = nn.Linear(8, len(WORDS)).double()
        self.config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=2, vocab_size=len(WORDS))

    def forward(self, input_ids, decoder_input_ids, attention_mask=None):
        encoded = self.embedding(input_ids).mean(1, keepdim=True)
        return {"logits": self.head(encoded + self.starts(decoder_input_ids))}


def test_the_start_token_of_a_decoder_is_no_word_also_of_a_text_of_one_token():
    model, tokenizer = Decoding().eval(), StubTokenizer(has_class_token=False)
    one, two = (explain_text(model, tokenizer, text, 5, reference=None) for text in ("dull", "dull dull"))
    assert one.output == pytest.approx(two.output)  # the mean of equal rows
    assert one.decoder == pytest.approx(two.decoder)
    assert 0 < one.decoder < 1
    assert float(one.words.sum()) == pytest.approx(float(two.words.sum()))
    assert float(one.words.sum()) + one.decoder + one.absorbed == pytest.approx(1)


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_decoding_starts_at_the_first_token_of_a_text_if_no_other_token_is_set(place):
    model, tokenizer = Decoding().eval(), StubTokenizer(has_class_token=False)
    expected = explain_text(model, tokenizer, TEXT, 5)
    model.config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=None, vocab_size=len(WORDS))
    with pytest.raises(InputError, match="not known where decoding starts"):
        explain_text(model, tokenizer, TEXT, 5)
    settings = model.config if place == "config" else SimpleNamespace()
    settings.bos_token_id = 2
    setattr(model, place, settings)
    assert explain_text(model, tokenizer, TEXT, 5).output == expected.output
