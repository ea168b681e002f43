"""The pages on speed against the committed results.

Covers: nrm_plugin.measure.measure.
"""

from __future__ import annotations

import json

from benchmarks import speed_page as page
from benchmarks.speed import RESULTS


def test_the_pages_are_generated_from_the_committed_results():
    results = json.loads(RESULTS.read_text())
    for path in (page.PAGE, page.DETAILS):
        assert page.rendered(path, results) == path.read_text()


def test_times_above_their_target_are_marked():
    def run(threads, seconds):
        times = {page.PLAIN: 1.0, "zennit, EpsilonPlus": 4.0, f"{page.MARGINALS}EpsilonPlus": seconds, page.MAPS: 3.0}
        return {"model": "vgg16", "threads": threads, "allocator": "default", "seconds": times | {page.BARE: 2.0}}

    peaks = {"nothing": 100, "plain": 150, "NRMDefault": 225}
    runs = [run(1, 1.5), run(2, 3.0), run(1, 9.0) | {"allocator": "retains memory"}]
    tables = page.summaries({"runs": runs, "peak memory of vgg16 in MiB": peaks})
    assert "| VGG16 | EpsilonPlus | 1.5 | 3 ✗ | 0.375 | 0.75 ✗ | 1.6, 0.5 |" in tables["marginals"]
    assert f"| {page.MAPS} | {page.BARE} | 1.5 | 1.5 | 2 |" in tables["queries"]
    assert "| NRMDefault | 125 | 2.50 |" in tables["peaks"]
