from __future__ import annotations

from types import SimpleNamespace

import torch

from nrm_plugin.attribution.words import Tokens, Word, merged


def fast(words: list[int | None], offsets: list[tuple[int, int]]) -> SimpleNamespace:
    return SimpleNamespace(word_ids=words, offsets=offsets)


def test_pieces_of_a_word_are_merged_with_the_letters_of_the_text():
    text = "Never BORING, no"
    encoding = fast([None, 0, 1, 1, 2, 3, None], [(0, 0), (0, 5), (6, 9), (9, 12), (12, 13), (14, 16), (0, 0)])
    tokens = ["[CLS]", "never", "bor", "##ing", ",", "no", "[SEP]"]
    words = merged(text, [2, 7, 8, 9, 10, 11, 3], tokens, {2, 3}, encoding)
    assert [(word.text, word.tokens, word.has_space_before, word.is_special) for word in words] == [
        ("[CLS]", (0,), False, True),
        ("Never", (1,), True, False),
        ("BORING", (2, 3), True, False),
        (",", (4,), False, False),
        ("no", (5,), True, False),
        ("[SEP]", (6,), True, True),
    ]


def test_a_token_of_a_space_alone_belongs_to_the_word_after_it():
    words = merged("a  film", [0, 1, 2], ["▁a", "▁", "film"], set(), fast([0, 1, 1], [(0, 1), (1, 3), (3, 7)]))
    assert [(word.text, word.tokens, word.has_space_before) for word in words] == [
        ("a", (0,), True),
        ("film", (1, 2), True),
    ]


def test_a_letter_that_is_split_into_bytes_is_shown_once():
    text = "so 🙂!"
    words = merged(
        text, [0, 1, 2, 3], ["so", "Ġð", "Ł", "!"], set(), fast([0, 1, 1, 2], [(0, 2), (2, 4), (3, 4), (4, 5)])
    )
    assert [word.text for word in words] == ["so", "🙂", "!"]


def test_tokenizers_without_offsets_are_read_by_their_prefixes():
    def texts(*tokens: str) -> list[str]:
        return [word.text for word in merged("", range(len(tokens)), tokens, {0}, None)]

    assert texts("[CLS]", "un", "##kind", ".") == ["[CLS]", "unkind", "."]
    assert texts("<s>", "ĠA", "Ġfil", "m", "Ġ") == ["<s>", "A", "film", "␣"]
    assert texts("<s>", "▁A", "▁fil", "m") == ["<s>", "A", "film"]
    assert texts("<s>", "A", "film") == ["<s>", "A", "film"]


def test_values_of_a_word_are_the_sum_over_its_tokens():
    words = (Word("[CLS]", (0,), is_special=True), Word("boring", (1, 2)), Word("film", (3,)))
    tokens = Tokens("boring film", torch.zeros(1, 4), ("[CLS]", "bor", "##ing", "film"), words)
    values = torch.tensor([[0.7, 0.1, -0.3, 0.1], [0.0, 1.0, 2.0, 4.0]])
    torch.testing.assert_close(tokens.of_words(values), torch.tensor([[0.7, -0.2, 0.1], [0.0, 3.0, 4.0]]))
    assert tokens.largest(torch.tensor([0.7, -0.2, 0.1])) == torch.tensor(0.2)  # without the special token
    assert tokens.largest(torch.tensor([0.5, 0.0, 0.0])) == 0.5
    assert tokens.largest(torch.zeros(3)) == 1
