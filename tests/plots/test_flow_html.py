"""The HTML page of a flow graph, also in a browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nrm_plugin import FlowGraph, RelevanceMeasure
from nrm_plugin.errors import MissingExtraError
from nrm_plugin.measure.flow_graph import FlowError
from nrm_plugin.measure.flow_heat_maps import flow_maps
from nrm_plugin.plots import flow_html
from nrm_plugin.plots.flow import drawn_nodes
from nrm_plugin.plots.flow_html import sankey, sankey_figure, save_sankey
from nrm_plugin.plots.ribbons import percent
from tests.flows import drawn, full_graph, measure


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


@pytest.fixture(scope="module")
def full() -> FlowGraph:
    return full_graph()


@pytest.fixture(scope="module")
def page(mu: RelevanceMeasure, full: FlowGraph, tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("plotly")
    graph = full.smaller(top=3)
    maps = flow_maps(mu, graph, sample=1)
    path = tmp_path_factory.mktemp("page") / "flow.html"
    return graph, save_sankey(graph, path, "A <b>bold</b> & odd title", maps)


def test_the_page_is_one_file_without_external_resources(page):
    _, path = page
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 6_000_000
    assert "A &lt;b&gt;bold&lt;\\u002fb&gt; &amp; odd title" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=(?!\"data:)", text)
    assert "prefers-color-scheme: dark" in text


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)


class Browser:
    """A page in headless Chromium, driven through two pipes with null-terminated JSON, as in its debugging protocol."""

    def __init__(self, folder: Path, url: str, dark: bool = False) -> None:
        down, up = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,1000",
                   f"--blink-settings=preferredColorScheme={0 if dark else 1}"]  # fmt: skip
        command = f'exec "$0" "$@" 3<&{down[0]} 4>&{up[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, BROWSER, *options], pass_fds=[down[0], up[1]], stderr=subprocess.DEVNULL
        )
        for end in (down[0], up[1]):
            os.close(end)
        self.write, self.read = os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb")
        self.number, self.left, self.asked, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.navigate", url=url)
        self.wait("document.querySelector('.sankey-link') && document.title")

    def call(self, method: str, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            while b"\0" not in self.left:
                part = self.read.read1(1 << 20)
                assert part, "the browser went away"
                self.left += part
            text, _, self.left = self.left.partition(b"\0")
            answer = json.loads(text)
            if answer.get("method") == "Network.requestWillBeSent":
                self.asked.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def ask(self, script: str):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str) -> None:
        end = time.monotonic() + 60
        while not self.ask(f"!!({script})"):
            assert time.monotonic() < end, f"waited in vain for {script}"
            time.sleep(0.05)

    def hover(self, script: str) -> str:
        """Moves the mouse to a place ``[x, y]`` and returns what the label says, line by line."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
        self.wait("!document.querySelector('.hoverlayer .hovertext')")
        x, y = self.ask(script)
        for step in (1, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)
        self.wait("document.querySelector('.hoverlayer .hovertext')")
        return self.ask(LABEL)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.write.close()
        self.read.close()


LABEL = """[...document.querySelectorAll('.hoverlayer .hovertext text')].map(text => {
  const lines = [...text.querySelectorAll('tspan.line')];
  return (lines.length ? lines : [text]).map(line => line.textContent).join('\\n');
}).join('\\n')"""


NODE = """(() => {{ const box = document.querySelectorAll('.sankey-node .node-rect')[{number}].getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""


LINK = """(() => {{ const path = document.querySelectorAll('.sankey-link')[{number}];
  const box = path.getBoundingClientRect();
  const inside = (x, y) => document.elementFromPoint(x, y) === path;
  for (let i = 1; i < 200; i++) for (let j = 1; j < 60; j++) {{
    const x = box.x + box.width * i / 200, y = box.y + box.height * j / 60;
    if (inside(x, y) && inside(x + 1, y)) return [x, y];
  }} return null; }})()"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_hover_labels_in_a_browser_without_a_network(page, tmp_path, dark):
    graph, path = page
    browser = Browser(tmp_path / "profile", path.as_uri(), dark)
    try:
        nodes = [node for node in graph.nodes if node.kind == "group" or abs(node.mass) > 1e-6]
        assert browser.ask("document.querySelectorAll('.sankey-link').length") == len(drawn(graph))
        assert browser.ask("document.querySelectorAll('.sankey-node').length") == len(nodes)
        browser.wait("document.querySelector('.main-svg').style.background")
        paper = browser.ask("getComputedStyle(document.querySelector('.main-svg')).backgroundColor")
        assert paper == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
        by_label = {f"{node.layer} {node.label}": node for node in nodes}
        seen = set()
        for number in range(len(nodes)):
            first, mass = browser.hover(NODE.format(number=number)).split("\n")
            node = by_label[first]
            assert mass == f"mass {percent(node.mass)}"

            seen.add(node.key)
        assert seen == {node.key for node in nodes}
        edges = {(f"{e.upper.layer} {e.upper.label} → {e.lower.layer} {e.lower.label}"): e for e in graph.edges}
        hovered = set()
        for number in range(0, len(drawn(graph)), 4):
            if browser.ask(LINK.format(number=number)) is None:
                continue  # hidden by others
            name, joint, *given = browser.hover(LINK.format(number=number)).split("\n")
            edge = edges[name]
            assert joint == f"joint relevance {percent(edge.mass)}"
            for line, condition in zip(given, (edge.given_upper, edge.given_lower), strict=False):
                assert line.rpartition(": ")[2] == percent(condition)
            hovered.add(name)
        assert len(hovered) > 3
        assert [url for url in browser.asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        shown = [node for node in nodes if node.kind == "group" and node.layer != "input"]
        assert browser.ask("document.querySelectorAll('.layer-above image').length") == len(shown)
        assert browser.ask("document.title") == "A <b>bold</b> & odd title"
        screenshot = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    finally:
        browser.close()
    with Image.open(io.BytesIO(screenshot)) as image:
        assert len(image.convert("RGB").resize((200, 150)).getcolors(30_000)) > 100


def test_nodes_fit_into_the_figure_where_signs_cancel(full):
    pytest.importorskip("plotly")
    for graph in (full, full.smaller(top=1), full.smaller(top=3)):
        figure = sankey_figure(graph)
        nodes = [node for layer in graph.layers[::-1] for _, node in drawn_nodes(layer)]
        (drawn_,) = figure.data
        inner = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
        sizes = np.zeros((2, len(nodes)))
        for side, ends in enumerate((drawn_.link.source, drawn_.link.target)):
            np.add.at(sizes[side], list(ends), list(drawn_.link.value))
        heights, y = sizes.max(0), np.array(drawn_.node.y)
        columns = [[n for n, node in enumerate(nodes) if node.layer == layer.name] for layer in graph.layers]
        pad = drawn_.node.pad
        unit = min((inner - pad * (len(column) - 1)) / heights[column].sum() for column in columns)
        for column in columns:
            ends = [(y[n] * inner - heights[n] * unit / 2, y[n] * inner + heights[n] * unit / 2) for n in column]
            assert all(low[1] + pad <= high[0] + 0.5 for low, high in itertools.pairwise(ends))
            assert ends[0][0] >= -0.5
            assert ends[-1][1] <= inner + 0.5


def test_without_plotly_the_extra_is_named(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nrm-plugin\[html\]'"):
        sankey(full.smaller(top=2))


def test_pages_of_too_wide_layers_raise():
    pytest.importorskip("plotly")
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    graph = RelevanceMeasure(wide, torch.randn(1, 8), 0).flow(["0", "input"], top=None)
    with pytest.raises(FlowError, match=r"0 shows 4096 groups, and a figure has room for 40\. Show fewer"):
        sankey(graph)
    assert len(sankey(graph.smaller(top=5))) < 6_000_000


def test_quotation_marks_stay_as_they_are():
    """plotly decodes &amp;, &lt; and &gt;, but would show the entity of a quotation mark."""
    assert flow_html._escaped('"it\'s" <b> & 猫') == '"it\'s" &lt;b&gt; &amp; 猫'
