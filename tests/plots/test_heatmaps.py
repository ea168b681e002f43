"""Figures show the given numbers.

Covers: nrm_plugin.plots.ribbons, nrm_plugin.plots.arrays.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from PIL import Image

from nrm_plugin.errors import InputError
from nrm_plugin.plots import heatmaps
from nrm_plugin.plots.heatmaps import Budget
from nrm_plugin.plots.ribbons import NEGATIVE, POSITIVE, Column, Ribbon, percent, short_percent, times

VALUES = torch.tensor([[0.3, -0.1, 0.0], [0.02, -0.4, 0.1]])
GREY, COLORS = torch.rand(1, 2, 3), torch.rand(3, 2, 3)


def maps_of(figure: Figure) -> list[np.ndarray]:
    """Arrays of all colored heat maps of a figure, in the order of drawing."""
    images = [image for axes in figure.axes for image in axes.images]
    return [np.asarray(image.get_array()) for image in images if image.get_cmap().name == heatmaps.DIVERGING]


def limits_of(figure: Figure) -> set[tuple[float, float]]:
    images = [image for axes in figure.axes for image in axes.images if image.get_cmap().name == heatmaps.DIVERGING]
    return {tuple(round(value, 6) for value in image.get_clim()) for image in images}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def ribbons(axes: Axes) -> list[PathPatch]:
    return [patch for patch in axes.patches if isinstance(patch, PathPatch)]


def width(ribbon: PathPatch) -> float:
    """Width of a ribbon at its start: the path follows its upper edge and returns along the lower one."""
    heights = ribbon.get_path().vertices[:, 1]
    return float(heights[0] - heights[7])


COLUMNS = [Column("low", "note", ["7", "9"], [0.5, 0.25]), Column("high", "note", ["1", "2"], [0.4, -0.2])]
RIBBONS = [Ribbon((0, 0), 0.3, "A"), Ribbon((0, 1), -0.1), Ribbon((1, 0), 0.08, "B"), Ribbon((1, 1), 0.05)]


# -- heat maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [None, GREY, COLORS], ids=["alone", "grey", "colours"])
def test_heat_map_is_symmetric_about_white(image: torch.Tensor | None):
    figure = heatmaps.heat_map(VALUES, "title", image)
    (shown,) = maps_of(figure)
    np.testing.assert_allclose(shown, VALUES)
    assert limits_of(figure) == {(-0.4, 0.4)}
    assert figure.axes[0].get_title() == "title"


def test_the_limit_of_a_heat_map_can_be_given():
    assert limits_of(heatmaps.heat_map(VALUES, limit=2.0)) == {(-2.0, 2.0)}


@pytest.mark.medium
def test_the_colour_bar_is_extended_if_values_exceed_the_limit():
    for limit, extend in ((0.3, "both"), (0.41, "neither"), (2.0, "neither"), (None, "neither")):
        figures = [
            heatmaps.heat_map(VALUES, limit=limit),
            heatmaps.image_and_heat_map(COLORS, VALUES, limit=limit),
            heatmaps.heat_maps([VALUES / 2, VALUES], ["a", "b"], limit=limit),
        ]
        for figure in figures:
            bar = next(axes._colorbar for axes in figure.axes if hasattr(axes, "_colorbar"))
            assert bar.extend == extend
            bound = round(limit or 0.4, 6)
            assert limits_of(figure) == {(-bound, bound)}


def test_a_heat_map_of_zeros_is_white(tmp_path: Path):
    path = heatmaps.save(heatmaps.heat_map(torch.zeros(2, 3)), tmp_path / "white.png")
    with Image.open(path) as image:
        assert min(image.convert("RGB").getpixel((image.width // 3, image.height // 3))) > 240


def test_colours_show_the_sign():
    figure = heatmaps.heat_map(VALUES)
    shown = next(image for image in figure.axes[0].images)
    red, _, blue = shown.to_rgba(np.array([0.4]))[0][:3]
    assert red > blue
    red, _, blue = shown.to_rgba(np.array([-0.4]))[0][:3]
    assert blue > red


def test_maps_of_a_grid_have_a_common_scale():
    figure = heatmaps.heat_maps([VALUES, 2 * VALUES, VALUES], ["a", "b", "c"], "heading", GREY, columns=3)
    for shown, factor in zip(maps_of(figure), (1, 2, 1), strict=True):
        np.testing.assert_allclose(shown, factor * VALUES)
    assert limits_of(figure) == {(-0.8, 0.8)}
    assert [axes.get_title() for axes in figure.axes][:4] == ["image", "a", "b", "c"]


def test_maps_beside_an_image_have_scales_of_their_own():
    figure = heatmaps.image_and_heat_map(COLORS, [VALUES, 3 * VALUES], ("image", "a", "b"), limit=[None, 0.9])
    for shown, factor in zip(maps_of(figure), (1, 3), strict=True):
        np.testing.assert_allclose(shown, factor * VALUES)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["image", "a", "b"]
    assert [axes.images[-1].get_clim()[1] for axes in panels[1:]] == pytest.approx([0.4, 0.9])
    assert [axes._colorbar.extend for axes in figure.axes if hasattr(axes, "_colorbar")] == ["neither", "both"]


def test_images_of_one_channel_are_grey_and_of_three_channels_coloured():
    figure = heatmaps.image_and_heat_map(GREY, VALUES)
    assert figure.axes[0].images[0].get_cmap().name == "Greys"
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), GREY[0])
    figure = heatmaps.image_and_heat_map(COLORS, VALUES)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), COLORS.movedim(0, -1))


def test_the_outline_is_closed_at_the_border():
    ink = torch.zeros(1, 6, 6)
    ink[0, 0:3, 2:4] = 1
    figure = heatmaps.heat_map(torch.ones(6, 6), image=ink)
    (lines,) = figure.axes[0].collections
    (path,) = lines.get_paths()
    assert path.vertices[0] == pytest.approx(path.vertices[-1])  # closed
    assert path.vertices.min(0) == pytest.approx([1.5, -0.5], abs=0.01)
    assert path.vertices.max(0) == pytest.approx([3.5, 2.5], abs=0.01)


@pytest.mark.parametrize("size", [0.2, 3e-4, 2e-7])
def test_the_colour_bar_is_in_percent(size: float, tmp_path: Path):
    figure = heatmaps.heat_map(size * VALUES / 0.4)
    heatmaps.save(figure, tmp_path / "bar.png")
    bar = figure.axes[-1]
    assert not bar.get_title()
    labels = {text.get_text(): text.get_position()[1] for text in bar.get_yticklabels()}
    assert len(labels) > 2
    for label, place in labels.items():
        assert label.endswith("%")
        assert "e" not in label
        assert float(label.replace("−", "-").rstrip("%")) * 0.01 == pytest.approx(place, abs=1e-12)


@pytest.mark.parametrize("cells", [2, (3, 2)])
def test_maps_are_drawn_as_sums_over_cells(cells):
    values = np.random.default_rng(0).standard_normal((6, 6))
    figure = heatmaps.heat_map(values, cells=cells, image=np.ones((3, 6, 6)))
    drawn = figure.axes[0].images[-1]
    sides = (2, 2) if cells == 2 else cells
    expected = values.reshape(sides[0], 6 // sides[0], sides[1], 6 // sides[1]).sum((1, 3))
    np.testing.assert_allclose(np.asarray(drawn.get_array()), expected)
    assert tuple(drawn.get_extent()) == (-0.5, 5.5, 5.5, -0.5)


# -- flows --------------------------------------------------------------------------------------------------------


def test_bars_and_ribbons_have_a_common_scale():
    axes = heatmaps.flow(COLUMNS, RIBBONS).axes[0]
    marginals = [value for column in COLUMNS for value in column.marginals]
    unit = bars(axes)[0].get_height() / 0.5
    assert [bar.get_height() / unit for bar in bars(axes)] == pytest.approx([abs(value) for value in marginals])
    assert sorted(width(one) / unit for one in ribbons(axes)) == pytest.approx([0.05, 0.08, 0.1, 0.3])
    assert [to_hex(bar.get_facecolor()) for bar in bars(axes)] == [POSITIVE, POSITIVE, POSITIVE, NEGATIVE]
    blue = [one for one in ribbons(axes) if to_hex(one.get_facecolor()) == NEGATIVE]
    assert [width(one) / unit for one in blue] == pytest.approx([0.1])


def test_bars_do_not_overlap_and_ribbons_end_at_their_bars():
    axes = heatmaps.flow(COLUMNS, RIBBONS).axes[0]
    spans = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars(axes)]
    assert spans[0][0] > spans[1][1]
    assert spans[2][0] > spans[3][1]
    assert all(0 <= low < high <= 1 for low, high in spans)
    (widest,) = [one for one in ribbons(axes) if width(one) == max(map(width, ribbons(axes)))]
    start, end = widest.get_path().vertices[0, 1], widest.get_path().vertices[3, 1]
    assert spans[0][0] <= start <= spans[0][1] + 1e-9
    assert spans[2][0] <= end <= spans[2][1] + 1e-9


def test_ribbons_of_one_node_do_not_overlap():
    axes = heatmaps.flow(COLUMNS, RIBBONS).axes[0]
    for at in (0, 1):
        ends = [(one.get_path().vertices[3 * at, 1], width(one)) for one in ribbons(axes)]
        for (top, _), (below, height) in itertools.pairwise(sorted(ends)):
            assert below - height >= top - 1e-9


def test_marks_and_labels_are_written():
    written = texts(heatmaps.flow(COLUMNS, RIBBONS))
    assert {"A", "B", "low", "high", "7", "9", "1", "2", "50%", "−20%"} <= set(written)
    assert "height: relevance; red positive, blue negative" in written


def test_colours_are_explained_only_if_both_are_visible():
    written = texts(heatmaps.flow([COLUMNS[0], Column("high", "", ["1", "2"], [0.4, 0.2])], RIBBONS[:1]))
    assert "height: relevance" in written


def test_hairline_ribbons_are_widened_and_the_factor_is_written():
    thin = [Ribbon(one.nodes, one.value / 100, one.mark) for one in RIBBONS]
    figure = heatmaps.flow(COLUMNS, thin)
    unit = bars(figure.axes[0])[0].get_height() / 0.5
    assert sorted(width(one) / unit for one in ribbons(figure.axes[0])) == pytest.approx([0.05, 0.08, 0.1, 0.3])
    assert "height: relevance, ribbons widened 100 times; red positive, blue negative" in texts(figure)


def test_a_flow_of_three_layers_draws_each_ribbon_twice():
    columns = [*COLUMNS, Column("top", "", ["4"], [0.9])]
    axes = heatmaps.flow(columns, [Ribbon((0, 1, 0), 0.2, "A"), Ribbon((1, 0, 0), 0.1)]).axes[0]
    assert len(ribbons(axes)) == 4
    assert sorted({round(one.get_path().vertices[0, 0]) for one in ribbons(axes)}) == [0, 1]


@pytest.mark.medium
@pytest.mark.parametrize("marginals", [[], [0.0], [0.0, 0.0], [0.01] * 40], ids=["none", "zero", "zeros", "many"])
def test_empty_zero_and_long_columns_are_drawn(marginals: list[float], tmp_path: Path):
    labels = [str(number) for number in range(len(marginals))]
    column = Column("layer", "", labels, marginals)
    assert heatmaps.save(heatmaps.flow([column, column], []), tmp_path / "odd.png").stat().st_size > 1000


@pytest.mark.medium
def test_joint_figures_show_all_parts():
    figure = heatmaps.joint(GREY, VALUES, COLUMNS, RIBBONS, [VALUES, 3 * VALUES], ["A", "B"], "heading")
    for shown, factor in zip(maps_of(figure), (1, 1, 3), strict=True):
        np.testing.assert_allclose(shown, factor * VALUES, rtol=1e-6)
    assert limits_of(figure) == {(-0.4, 0.4), (-1.2, 1.2)}
    scales = [axes.get_ylim() for axes in figure.axes if axes.get_label() == "<colorbar>"]
    np.testing.assert_allclose(scales, [(-0.4, 0.4), (-1.2, 1.2)], rtol=1e-6)
    assert figure.get_suptitle() == "heading"


# -- budgets ------------------------------------------------------------------------------------------------------


def test_the_bars_of_a_budget_sum_to_one():
    budget = Budget("sample", [1.0, 0.7], [0.0, 0.2], [0.0, 0.1], [1.0, 0.8], GREY)
    axes = heatmaps.budgets(["output", "input"], [budget], "heading", "plain").axes[0]
    spans = sorted((bar.get_x(), bar.get_width()) for bar in bars(axes) if round(bar.get_y()) == 1 and bar.get_width())
    np.testing.assert_allclose(spans, [(0.0, 0.7), (0.7, 0.2), (0.9, 0.1)])
    assert len({to_hex(bar.get_facecolor()) for bar in bars(axes)}) == 3
    line = next(line for line in axes.lines if line.get_label() == "plain")
    np.testing.assert_allclose(line.get_xydata(), [[1.0, 0], [0.8, 1]])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the output on top


def test_negative_shares_are_left_of_zero():
    axes = heatmaps.budgets(["input"], [Budget("sample", [1.2], [-0.2], [0.0])]).axes[0]
    assert {(bar.get_x(), bar.get_width()) for bar in bars(axes)} == {(0.0, 1.2), (0.0, -0.2)}


def test_a_bypass_of_zero_is_not_in_the_legend():
    figure = heatmaps.budgets(["input"], [Budget("sample", [0.9], [0.1], [0.0], [0.5])], reference="plain Zennit")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["mass: crosses the layer", "sink: absorbed above", "plain Zennit"]


def test_panels_without_a_sample_are_empty():
    figure = heatmaps.budgets(["input"], [Budget(str(number), [1.0], [0.0], [0.0]) for number in range(5)])
    assert [axes.axison for axes in figure.axes] == [True] * 5 + [False] * 3


# -- all ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0468, "4.7%"), (0.2, "20%"), (1.0, "100%"), (-0.0512, "−5.1%"), (0.00013, "0.013%"), (0.0, "0%"),
     (4e-9, "4.0e−07%")],
)  # fmt: skip
def test_percent_has_two_digits(value: float, text: str):
    assert percent(value) == text


def test_a_saved_file_is_a_png_of_the_size_of_the_figure(tmp_path: Path):
    figure = heatmaps.heat_map(VALUES)
    path = heatmaps.save(figure, tmp_path / "map.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == pytest.approx(figure.get_size_inches() * heatmaps.DPI, abs=1)


def test_a_missing_folder_raises(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        heatmaps.save(heatmaps.heat_map(VALUES), tmp_path / "none" / "map.png")


def test_no_pyplot_figure_is_created():
    before = plt.get_fignums()
    heatmaps.joint(GREY, VALUES, COLUMNS, RIBBONS, [VALUES], ["A"])
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("value", "text"), [(0.0468, "4.7%"), (-1.0, "−100%"), (0.0, "0%"), (3e-9, "3.0e−07%"), (-5e-55, "0%")]
)
def test_shares_have_two_digits_and_rounding_errors_are_zero(value: float, text: str):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: heatmaps.heat_map(torch.rand(4, 4, 3)), r"has shape \(H, W\), got \(4, 4, 3\)"),  # not an image
        (lambda: heatmaps.heat_map(torch.rand(1, 3, 4, 4), cells=2), r"has shape \(H, W\), got \(1, 3, 4, 4\)"),
        (lambda: heatmaps.heat_map(torch.full((2, 2), torch.nan)), "nan or infinite"),
        (lambda: heatmaps.heat_map(torch.rand(4, 4), image=torch.rand(4, 4, 3)), r"\(3, H, W\), got \(4, 4, 3\)"),
        (lambda: heatmaps.heat_map(torch.rand(4, 4), cells=0), "cells=0: give one number of at least 1"),
        (lambda: heatmaps.heat_map(torch.rand(4, 4), limit=-1.0), "limit=-1.0 must be positive"),
        (lambda: heatmaps.heat_maps([torch.rand(4, 4)] * 3, ["one"]), "3 heat maps with 1 titles"),
    ],
    ids=["channels last", "batch", "nan", "image", "cells", "limit", "titles"],
)
def test_maps_that_would_be_drawn_as_something_else_raise(draw, message):
    with pytest.raises(InputError, match=message):
        draw()


def test_maps_and_images_in_bfloat16_are_drawn():
    values = torch.tensor([[0.5, -1.0]])
    figure = heatmaps.heat_map(values.bfloat16(), image=torch.rand(3, 1, 2).bfloat16())
    drawn = figure.axes[0].images[-1]
    np.testing.assert_array_equal(drawn.get_array(), values.numpy())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0%"),
        (1e-17, "0%"),
        (-5.6e-5, "<0.1%"),
        (9.9e-4, "<0.1%"),
        (0.001, "0.10%"),
        (-0.0012, "−0.12%"),
        (1, "100%"),
    ],
)
def test_small_shares_of_flows_are_rounded(value: float, text: str):
    assert short_percent(value) == text


def test_ratios_have_a_decimal_below_ten():
    assert [times(ratio) for ratio in (0.44, 2, 9.94, 9.96, 36.2)] == ["×0.4", "×2.0", "×9.9", "×10", "×36"]
