"""Text colored by relevance shows the given numbers, for any tokens."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import InputError
from nrm_plugin.plots.ribbons import DARK, LIGHT
from nrm_plugin.plots.text import ink_on, luminance, shade, text_figure, text_html

TOKENS = ["[CLS]", "the", "film", "was", "un", "##kind", "<script>", "&", '"x"', "$a$", "[SEP]", "[PAD]"]
SPECIAL = ["[CLS]", "[SEP]", "[PAD]"]
VALUES = torch.tensor([0.1, 0.02, -0.3, 0.0, 0.2, 0.24, -0.05, 0.01, 0.0, 0.1, -0.02, 0.0])


def words(figure: Figure, panel: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


def boxes(figure: Figure, panel: int = 0) -> list[FancyBboxPatch]:
    return [patch for patch in figure.axes[panel].patches if isinstance(patch, FancyBboxPatch)]


def drawn(figure: Figure) -> None:
    figure.canvas.draw_idle()
    figure.draw_without_rendering()


class Reader(HTMLParser):
    """Tags, and the text inside the spans of the paragraphs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(page)
        assert not self.stack, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "p" in self.stack else ""


def tokens_of(page: str) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in Reader(page).tags if tag == "span" and "title" in attrs]


def test_each_token_has_the_colour_of_its_relevance():
    figure = text_figure(TOKENS, VALUES, special=SPECIAL)
    assert words(figure) == [token.removeprefix("##") for token in TOKENS]
    for box, value in zip(boxes(figure), VALUES.tolist(), strict=True):
        assert box.get_facecolor()[:3] == pytest.approx(shade(value / 0.3, LIGHT), abs=1e-6)
    assert to_hex(boxes(figure)[2].get_facecolor()) == LIGHT.negative
    assert to_hex(boxes(figure)[3].get_facecolor()) == LIGHT.paper
    drawn(figure)


@pytest.mark.slow
def test_the_colour_bar_is_centred_at_zero_and_in_percent_of_the_total():
    figure = text_figure(TOKENS, VALUES)
    bar = figure.axes[-1]
    drawn(figure)
    assert [label.get_text() for label in bar.get_yticklabels()] == ["−30%", "0%", "30%"]
    cut = text_figure(TOKENS, VALUES, limit=0.1)
    drawn(cut)
    assert [label.get_text() for label in cut.axes[-1].get_yticklabels()] == ["−10%", "0%", "10%"]
    assert "≤ −10%" in text_html(TOKENS, VALUES, limit=0.1)
    assert "≤" not in text_html(TOKENS, VALUES)
    assert "<b>−30%</b>" in text_html(TOKENS, VALUES)


def test_several_maps_have_a_common_scale_and_a_title_each():
    maps = torch.stack([VALUES, VALUES / 2])
    figure = text_figure(TOKENS, maps, ["all", "head 2"], heading="tokens")
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["all", "head 2"]
    assert boxes(figure, 1)[2].get_facecolor()[:3] == pytest.approx(shade(-0.5, LIGHT), abs=1e-6)
    page = text_html(TOKENS, maps, ["all", "<i>head</i>"], heading="a & b")
    assert "&lt;i&gt;head&lt;/i&gt;" in page
    assert "<h4>a &amp; b</h4>" in page
    assert len(tokens_of(page)) == 2 * len(TOKENS)


def test_the_html_escapes_its_tokens_and_has_no_scripts_or_external_resources():
    page = text_html([*TOKENS, '"><img src=x onerror=alert(1)>', "</style>"], [*VALUES.tolist(), 0.1, 0.1])
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags} <= {"style", "div", "p", "span", "b", "i"}
    assert all(not name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert not re.search(r"http|url\(|@import|<script", page)
    assert '<script>&"x"$a$' in reader.text.replace(" ", "")
    assert [attrs["title"] for attrs in tokens_of(page)][:3] == ["10%", "2.0%", "−30%"]
    strengths = [attrs.get("style") for attrs in tokens_of(page)]
    assert strengths[:4] == ["--a:0.333", "--a:0.067", "--a:1.000", None]
    assert "prefers-color-scheme:dark" in page


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_tokens_have_contrast_on_every_colour(palette):
    for value in np.linspace(-1, 1, 401):
        color = shade(float(value), palette)
        bright, ink = luminance(color), luminance(to_rgb(ink_on(color)))
        assert (max(bright, ink) + 0.05) / (min(bright, ink) + 0.05) >= 4.5


def test_letters_are_black_or_white_on_both_backgrounds():
    page = text_html(["strong", "weak", "none"], [1.0, 0.1, 0.0])
    strong, weak, none = tokens_of(page)
    assert strong["class"] == "p w k"
    assert weak["class"] == "p"
    assert "class" not in none


def test_special_tokens_and_padding_are_marked():
    figure = text_figure(TOKENS, VALUES, special=SPECIAL)
    assert [text.get_style() == "italic" for text in figure.axes[0].texts] == [token in SPECIAL for token in TOKENS]
    marked = [
        "x" in (attrs.get("class") or "").split() for attrs in tokens_of(text_html(TOKENS, VALUES, special=SPECIAL))
    ]
    assert marked == [token in SPECIAL for token in TOKENS]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["un", "##kind", "words"], "unkind words"),
        (["Ġun", "kind", "Ġwords", "Ċ"], "unkind words↵"),
        (["▁un", "kind", "▁words"], "unkind words"),
        (["un", "kind"], "un kind"),
        (["a", "", "Ġ"], "a␣ ␣"),
    ],
)
def test_tokens_are_joined_to_the_words_of_the_tokenizer(tokens, text):
    assert Reader(text_html(tokens, [0.1] * len(tokens))).text == text


@pytest.mark.medium
def test_long_texts_and_long_tokens_are_broken_into_lines():
    tokens = ["word"] * 300 + ["x" * 500] + ["漢字" * 40]
    figure = text_figure(tokens, [0.1] * len(tokens), width=5)
    axes = figure.axes[0]
    columns = axes.get_xlim()[1]
    for box in boxes(figure):
        assert box.get_x() >= 0
        assert box.get_x() + box.get_width() <= columns
    rows = {round(box.get_y()) for box in boxes(figure)}
    assert len(rows) > 30
    assert max(rows) < axes.get_ylim()[0]
    assert "".join(words(figure)) == "".join(tokens)
    for row in rows:  # nothing over anything else
        line = sorted((box.get_x(), box.get_width()) for box in boxes(figure) if round(box.get_y()) == row)
        assert all(x + wide <= after + 1e-9 for (x, wide), (after, _) in itertools.pairwise(line))


def test_letters_are_inside_their_boxes():
    figure = text_figure(["mmmmmmmmmm", "iiiiiiiiii", "WWWWWWWWWW"] * 8, [0.1] * 24)
    figure.draw_without_rendering()
    for text, box in zip(figure.axes[0].texts, boxes(figure), strict=True):
        assert text.get_window_extent().width <= 1.02 * box.get_window_extent().width


def test_invalid_arguments_raise():
    for tokens, values, options, message in (
        ("text", [0.1], {}, "tokens must be a list of strings"),
        ([1, 2], [0.1, 0.2], {}, "tokens must be a list of strings"),
        (["a", "b"], [0.1], {}, r"shape \(1,\), but there are 2 tokens"),
        (["a"], torch.zeros(1, 1, 1), {}, "of one sample"),
        ([], [], {}, "there are 0 tokens"),
        (["a"], [float("nan")], {}, "nan or inf"),
        (["a"], [[0.1], [0.2]], {}, "each of the 2 maps"),
        (["a"], [0.1], {"titles": "x"}, "a list of one title"),
        (["a"], [0.1], {"limit": 0}, "give a positive number"),
    ):
        for make in (text_figure, text_html):
            with pytest.raises(InputError, match=message):
                make(tokens, values, **options)


def test_zeros_have_the_colour_of_the_background():
    figure = text_figure(["a", "b"], [0.0, 0.0])
    assert {to_hex(box.get_facecolor()) for box in boxes(figure)} == {LIGHT.paper}
    drawn(figure)


def test_maps_of_heads_have_the_joint_relevance_of_tokens():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(40, 2)).eval()
    mu = RelevanceMeasure(net, torch.tensor([[1, 5, 2, 7, 3]]), 1)
    heads = [at("1.layers.0.self_attn").head(h) for h in range(2)]
    maps = mu.marginal("0", joint=heads)[:, 0].sum(-1)
    assert maps.shape == (2, 5)
    figure = text_figure(list("abcde"), maps, ["head 0", "head 1"])
    strongest = float(maps.abs().max())
    for panel, row in enumerate(maps.tolist()):
        for box, value in zip(boxes(figure, panel), row, strict=True):
            assert box.get_facecolor()[:3] == pytest.approx(shade(value / strongest, LIGHT), abs=1e-6)


def test_values_in_bfloat16_are_those_of_the_figure_in_float32():
    short = VALUES.bfloat16()
    assert text_html(TOKENS, short) == text_html(TOKENS, short.float())
