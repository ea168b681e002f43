"""The pages on the default composite against the committed results, and the table of the short page.

Covers: nrm_plugin.composites.
"""

from __future__ import annotations

import json

from benchmarks import default_composite_page as page
from benchmarks.default_composite import RESULTS


def test_the_pages_are_generated_from_the_committed_results():
    results = json.loads(RESULTS.read_text())
    for path in (page.PAGE, page.DETAILS):
        assert page.rendered(path, results) == path.read_text()


def test_the_summary_has_the_largest_sink_and_variation_over_networks():
    def row(name, policy, pooled, sink, variation):
        return {
            "composite": name,
            "policy": policy,
            "pooled": [pooled, 0, 1],
            "flip": [-0.001, 0, 1],
            "sink": sink,
            "variation": [0, variation],
        }

    def net(pooled, sink, variation):
        rows = [row(name, page.POLICY, pooled, sink, variation) for name in page.SUMMARIZED]
        return {"rows": [*rows, row(page.CHOSEN, "sink", 0.9, 0.9, 99)]}

    untrained = {name: {page.CHOSEN: [0, variation]} for name, variation in (("a", 3.0), ("b", 2000.0))}
    table = page.summary_table({"nets": {"one": net(0.5, 0.2, 3), "two": net(0.25, 0.1, 4)}, "untrained": untrained})
    _, _, chosen, other, *_ = table.splitlines()
    assert chosen == "| **NRMDefault** | 0.50, 0.00 | 0.25, 0.00 | 0.20 | 4 | 2e+03 |"
    assert other == "| EpsilonPlus | 0.50, 0.00 | 0.25, 0.00 | 0.20 | 4 |  |"
