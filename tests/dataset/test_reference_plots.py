"""The figure of reference examples."""

from __future__ import annotations

import math

import pytest

from nrm_plugin.dataset.crops import crops
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.dataset.reference_plots import reference_figure
from nrm_plugin.errors import InputError


@pytest.mark.medium
def test_the_figure_has_a_row_for_each_channel(net, data):
    references = find_references(net, data, ["2"], 3).of("2")
    rows = crops(net, data, references, [0, 3])
    for style, lines in (("mask", 1), ("plain", 1), ("heat", 1), ("both", 2)):
        figure = reference_figure(rows, style, "of $5", dark=style == "plain", labels={3: "the $third"})
        assert len(figure.axes) == 2 * 3 * lines
        figure.canvas.draw()
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert texts == ["channel 0", r"the \$third"]
    titles = [axes.get_title() for axes in reference_figure(rows, unit="").axes]
    assert titles[0] == f"{float(references.values[0, 0]):.3g}"
    for wrong in ({}, {number: rows[0] for number in range(17)}):
        with pytest.raises(InputError, match="a figure can show"):
            reference_figure(wrong)
    with pytest.raises(InputError, match="style="):
        reference_figure(rows, "blur")
    assert math.isclose(sum(crop.value for crop in rows[0]), float(references.values[0].sum()), rel_tol=1e-6)
