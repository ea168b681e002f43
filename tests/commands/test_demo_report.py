"""The figures of the demo show values of the measure.

Covers: nrm_plugin.commands.demo_figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.commands import demo_figures
from nrm_plugin.commands.demo_figures import UPPER
from nrm_plugin.commands.demo_report import demo_report
from nrm_plugin.commands.demo_values import DemoError, choose
from nrm_plugin.commands.options import MISCLASSIFIED
from nrm_plugin.demo import load_digits, load_model

README_FIGURE = Path(__file__).parents[2] / "docs/images/demo.png"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model()


@pytest.fixture(scope="module")
def mu(model: nn.Module) -> RelevanceMeasure:
    images, labels = load_digits()
    (sample,), _ = choose(model, images, labels, ["6"])
    return RelevanceMeasure(model, images[sample.index : sample.index + 1], sample.predicted, against="rest")


@pytest.mark.slow
def test_figures_show_the_values_of_the_measure(monkeypatch: pytest.MonkeyPatch, mu: RelevanceMeasure, tmp_path: Path):
    drawn: dict[str, tuple] = {}
    for name in ("joint_figure", "image_and_heat_map", "heat_maps", "budgets"):
        original = getattr(demo_figures, name)

        def spy(*args, name=name, original=original, **kwargs):
            drawn[name] = args
            return original(*args, **kwargs)

        monkeypatch.setattr(demo_figures, name, spy)
    report = demo_report(["6"], tmp_path)
    relevance = mu.marginal("input")[0].sum(0)
    torch.testing.assert_close(drawn["image_and_heat_map"][1], relevance)
    torch.testing.assert_close(drawn["joint_figure"][2], relevance)
    mass = mu.marginal(UPPER, over="channel")[0]
    for shown, title in zip(*drawn["heat_maps"][:2], strict=True):
        channel = int(title.split()[1])
        assert float(title.split("(")[1].rstrip("%)")) == pytest.approx(100 * float(mass[channel]), rel=0.05)
        torch.testing.assert_close(shown, mu.marginal("input", given=at(UPPER)[channel])[0].sum(0))
    (panel,) = drawn["budgets"][1]
    assert panel.mass == pytest.approx([float(row.mass) for row in report.rows])
    assert panel.reference == pytest.approx([float(row.plain) for row in report.rows])


@pytest.mark.slow
def test_titles_of_heat_maps_end_before_the_color_bar(monkeypatch: pytest.MonkeyPatch, model: nn.Module):
    drawn: dict[Path, Figure] = {}
    monkeypatch.setattr(demo_figures, "save_figure", lambda figure, path: drawn.update({path: figure}))
    images, labels = load_digits()
    for sample in choose(model, images, labels, ["6", MISCLASSIFIED])[0]:
        image = images[sample.index]
        _, path, _ = demo_figures.save_sample(model, sample, image, Path(), "rest")
        drawn[path].draw_without_rendering()
        _, right, bar = drawn[path].axes
        assert "rather than" in right.get_title()
        assert right.title.get_window_extent().x1 < bar.get_window_extent().x0


@pytest.mark.slow
def test_figures_have_a_reasonable_size(tmp_path: Path):
    report = demo_report(["1", MISCLASSIFIED], tmp_path)
    names = [f"{sample}-{kind}.png" for sample in ("1", MISCLASSIFIED) for kind in ("joint", "pixels", "channels")]
    assert [path.name for path in report.figures] == [*names, "budgets.png"]
    assert [path.name for path in report.flow] == ["1-flow.png", "1-flow.html"]
    assert sorted(tmp_path.iterdir()) == sorted([*report.figures, *report.flow])
    for path in [*report.figures, report.flow[0]]:
        with Image.open(path) as figure:
            assert figure.format == "PNG"
            assert 600 < figure.width < 2000
            assert 400 < figure.height < (2000 if path == report.flow[0] else 1200)
            assert len(figure.convert("RGB").getcolors(figure.width * figure.height)) > 50
        assert path.stat().st_size < 700_000


def test_the_number_of_threads_is_restored_after_an_error(tmp_path: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(DemoError):
            demo_report(["none"], tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_the_figure_of_the_readme_is_one_of_the_demo(tmp_path: Path):
    path = next(path for path in demo_report(["6"], tmp_path).figures if path.name == "6-joint.png")
    assert README_FIGURE.stat().st_size < 300_000
    with Image.open(README_FIGURE) as shown, Image.open(path) as written:
        assert shown.size == written.size
        # Fonts differ between machines; the heat map of the pixels, at the lower left, does not.
        box = (20, 450, 310, 740)
        a, b = (torch.tensor(bytearray(one.convert("RGB").crop(box).tobytes())).float() for one in (shown, written))
        assert (a - b).abs().mean() < 8
