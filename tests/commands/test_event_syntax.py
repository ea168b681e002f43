"""Event expressions equal events constructed in Python, and errors give the position in the expression."""

from __future__ import annotations

import pytest

from nrm_plugin import ABSORBED, at
from nrm_plugin.commands.event_syntax import ConditionError, parse


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("features.28[3,7]", at("features.28").channel([3, 7])),
        ("a[ 3 , 5:8,5 ]", at("a").channel([3, 5, 6, 7])),
        ("a", at("a")),
        ("relu:1[2]", at("relu:1").channel([2])),
        ("my-layer_2.x[0]", at("my-layer_2.x").channel([0])),
        ("~a[1]", ~at("a").channel([1])),
        ("~~a", at("a")),
        ("a&b|c", (at("a") & at("b")) | at("c")),
        ("a|b&c", at("a") | (at("b") & at("c"))),
        ("(a | b) & ~c[1]", (at("a") | at("b")) & ~at("c").channel([1])),
        ("~(a&b)", ~(at("a") & at("b"))),
        ("~a&b", ~at("a") & at("b")),
        ("~ABSORBED & a", ~ABSORBED & at("a")),
        ("'body[0]'[3]", at("body[0]").channel([3])),
        ("~'b[x[1]]' & \"a | b\"[2]", ~at("b[x[1]]") & at("a | b").channel([2])),
        ("'ABSORBED' | .input[1]", at("ABSORBED") | at(".input").channel([1])),
    ],
)  # fmt: skip
def test_text_is_the_event_of_python(text: str, event):
    assert parse(text).event == event


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected the name of a layer at character 1, got the end"),
        ("  ", "got the end"),
        ("a[3", "expected ']' after the channels at character 4, got the end"),
        ("a[]", "expected channels such as 3,7 or 10:20 in the brackets at character 2"),
        ("a[3,]", "got ''"),
        ("a[x]", "got 'x'"),
        ("a[-1]", "got '-1'"),
        ("a[1.5]", "got '1.5'"),
        ("a[9:3]", "a range that ends after its start"),
        ("a[99999999999]", "got '99999999999'"),
        ("a & ", "expected the name of a layer at character 5, got the end"),
        ("a & | b", "at character 5, got |"),
        ("a b", "expected '&' or '|' between two parts at character 3, got b"),
        ("(a", "expected ')'"),
        ("a)", "got )"),
        ("[3]", "expected the name of a layer at character 1, got ["),
        ("a[3][4]", "got ["),
        ("~" * 500 + "a", "nested parentheses"),
        ("(" * 500 + "a", "nested parentheses"),
        ("__import__('os')", "at character 11, got ("),
    ],
)  # fmt: skip
def test_errors_name_the_place_in_the_text(text: str, words: str):
    with pytest.raises(ConditionError) as raised:
        parse(text)
    assert words in str(raised.value)
