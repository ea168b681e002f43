from __future__ import annotations

import re

from nrm_plugin import explain_text
from nrm_plugin.plots import text_page
from tests.text_nets import StubTokenizer, text_net

TEXT = "a dull <b>film</b> , and yet fine"


def test_a_page_shows_every_word_with_its_share_and_no_script():
    explanation = explain_text(text_net("class"), StubTokenizer(), TEXT)
    page = text_page(explanation)
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "<b>film" not in page
    shown = re.findall(r'<span[^>]* title="([^"]*)">([^<]*)</span>', page)
    assert [word for _, word in shown] == ["[CLS]", *TEXT.replace("<", "&lt;").replace(">", "&gt;").split(), "[SEP]"]
    shares = [float(share.replace("−", "-").rstrip("%")) for share, _ in shown]
    for share, value in zip(shares, explanation.words.tolist(), strict=True):
        assert abs(share - 100 * value) <= 0.06 * max(1, abs(100 * value))


def test_layers_and_conditions_have_their_own_rows():
    explanation = explain_text(
        text_net("class"),
        StubTokenizer(),
        TEXT,
        layers="blocks.0.attn.z",
        given=["blocks.1.attn.head.0", "blocks.0.up"],
    )
    page = text_page([explanation, explanation], "Two texts")
    assert "<title>Two texts</title>" in page
    assert page.count("<h2>") == 2
    assert page.count("blocks.0.attn.z: the most relevant units") == 2
    assert page.count("<h5>head ") == 4
    assert page.count("of the relevance of these walks") == 4
