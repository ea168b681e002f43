"""The tables of the page on critical paths.

Covers: nrm_plugin.search.selection, nrm_plugin.search.group_walks.
"""

from __future__ import annotations

from benchmarks import critical_paths_page as page


def test_the_summary_compares_other_methods_with_the_selection():
    behind = {"marginal (ε, z⁺)": [0.1, 0.05, 0.2], "marginal (absolute)": [-0.1, -0.2, -0.05]}
    others = {"plain LRP": [0.0, -0.1, 0.1], "LayerConductance": [0.1, 0.0, 0.2]}
    rows = [
        {"method": method, "kept": kept, "fill": fill, "probability": [0.75, 0, 1], "behind_select_neurons": interval}
        for kept, fill in page.SUMMARIZED["digits_vgg"]
        for method, interval in {page.CHOSEN: [0, 0, 0], **behind, **others}.items()
    ]
    table = page.selection_summary({"nets": [{"net": "digits_vgg", "channels": [8, 8], "rows": rows}]})["selection"]
    cells = "0.75 | 0.75, worse | 0.75, better | 0.75, level | 0.75, level"
    assert table.splitlines()[2] == f"| digits, VGG, 16 | 31 | zero | {cells} |"
    assert len(table.splitlines()) == 6


def test_the_summary_of_walks_has_multiples_of_the_largest_and_of_the_greedy_walks():
    row = {"size": 96, "rule": "one", "certified": 3, "walks": 5, "largest": 0.5, "missed": 0.25, "mass": 3.0}
    row |= {"greedy_mass": 2.0, "seconds": 12.1, "greedy_seconds": 2.8}
    table = page.top_walks_summary({"rows": [row]})["walks"]
    assert table.splitlines()[2] == "| 96 × 96 | one | 3 of 5 | 0.5 × | 1.50 × | 12, 3 |"


def test_large_factors_have_two_digits_and_commas():
    assert [page.rounded(value) for value in (0.734, 2.66, 84_321, 41_300_000)] == [
        "0.73",
        "2.7",
        "84,000",
        "41,000,000",
    ]
