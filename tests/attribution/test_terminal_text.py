from __future__ import annotations

import re
import unicodedata

import pytest

from nrm_plugin import explain_text
from nrm_plugin.attribution.terminal_text import colored
from tests.text_nets import StubTokenizer, text_net

CODE = re.compile(r"\x1b\[[\d;]*m")
TEXT = "a dull boring film , and yet fine"


def cells(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in CODE.sub("", line))


@pytest.mark.medium
@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("color", [False, True])
def test_no_line_is_wider_than_the_terminal(width, color):
    words = "dull 映画映画映画映画映画映画映画映画映画映画映画映画 fine " + "x" * 90
    explanation = explain_text(
        text_net("class"),
        StubTokenizer(),
        words,
        layers=["blocks.0.attn.z", "blocks.1.up"],
        given="blocks.0.attn.head.1",
    )
    lines = explanation.lines(width, color)
    assert max(map(cells, lines)) <= width
    assert any(CODE.search(line) for line in lines) is color


def test_the_table_lists_the_strongest_words_with_bars_of_their_sign():
    explanation = explain_text(text_net("class"), StubTokenizer(), TEXT)
    rows = [line.split() for line in str(explanation).splitlines() if re.search(r" % +[+-]+$", line)]
    words = {word.text: float(value) for word, value in zip(explanation.text.words, explanation.words, strict=True)}
    values = [float(row[-3]) for row in rows]
    assert [abs(value) for value in values] == sorted((abs(value) for value in values), reverse=True)
    for row in rows:
        assert float(row[-3]) == pytest.approx(100 * words[row[0]], abs=0.06)
        assert set(row[-1]) == {"+" if words[row[0]] > 0 else "-"}


def test_colours_show_the_sign_and_the_text_stays_whole():
    explanation = explain_text(text_net("class"), StubTokenizer(), TEXT)
    (line,) = colored(explanation.text, explanation.words, 80, True)
    assert CODE.sub("", line) == f"[CLS] {TEXT} [SEP]"
    strongest = max(
        (n for n, word in enumerate(explanation.text.words) if not word.is_special),
        key=lambda n: abs(float(explanation.words[n])),
    )
    shade = 124 if explanation.words[strongest] > 0 else 25
    assert f"\x1b[48;5;{shade}m\x1b[38;5;231m{explanation.text.words[strongest].text}" in line


def test_units_are_heads_neurons_or_channels_and_signs_among_their_words_are_quoted():
    layers = ["blocks.0.attn", "blocks.0.mlp.neuron", "blocks.0.mlp.post", "blocks.0.mlp_out"]
    explanation = explain_text(text_net("class"), StubTokenizer(), "dull , and fine", layers=layers)
    kinds = {layer: {row.title.split()[0] for row in rows} for layer, rows in explanation.layers.items()}
    assert kinds == dict(zip(layers, ({"head"}, {"neuron"}, {"neuron"}, {"channel"}), strict=True))
    used = [line for line in str(explanation).splitlines() if line.startswith("    ")]
    assert any('"," ' in line for line in used)
    assert not any(", , " in line or line.lstrip().startswith(", ") for line in used)


def test_a_target_that_is_behind_is_marked():
    ahead = explain_text(text_net("class"), StubTokenizer(), TEXT, reference=None)
    behind = explain_text(text_net("class"), StubTokenizer(), TEXT, ahead.against, reference=None)
    assert "it is behind" not in str(ahead)
    assert "it is behind; + is evidence for it" in str(behind)
    assert f"difference {behind.output:.4g}" in str(behind)


def test_the_reference_is_named_with_the_change_from_it():
    text = "fine film"
    pair = [explain_text(text_net("class"), StubTokenizer(), text, target) for target in ("negative", "positive")]
    risen, fallen = sorted(pair, key=lambda explanation: -explanation.output)
    assert risen.output == pytest.approx(-fallen.output)
    for explanation in pair:
        assert f'change {explanation.output:.4g} from the reference "[MASK]"' in " ".join(str(explanation).split())
        assert "it is behind" not in str(explanation)
    assert "it is further ahead with the reference" in str(fallen)
    assert "it is further ahead" not in str(risen)
    assert max(map(len, fallen.lines(width=40))) <= 40
    assert "it is further ahead with the reference; + is evidence for it" in " ".join(
        " ".join(fallen.lines(40)).split()
    )
