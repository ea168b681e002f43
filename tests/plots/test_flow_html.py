"""The HTML page of a flow graph, also in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from torch import nn

from nrm_plugin import FlowGraph, RelevanceMeasure, at, find_groups
from nrm_plugin.measure.flow_graph import FlowError
from nrm_plugin.measure.flow_heat_maps import flow_maps_and_pairs
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots.flow_html import sankey, save_sankey
from nrm_plugin.plots.flow_layout import flow_scene
from nrm_plugin.plots.flow_thumbnails import Photo
from nrm_plugin.plots.ribbons import LIGHT, short_percent
from nrm_plugin.search.group_walks import group_walks
from tests.flows import X, full_graph, measure, net


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


@pytest.fixture(scope="module")
def full() -> FlowGraph:
    return full_graph()


@pytest.fixture(scope="module")
def page(mu: RelevanceMeasure, full: FlowGraph, tmp_path_factory: pytest.TempPathFactory):
    graph = full.smaller(top=3)
    maps, pairs = flow_maps_and_pairs(mu, graph, sample=1)
    path = tmp_path_factory.mktemp("page") / "flow.html"
    image = X[1].sigmoid()
    return graph, save_sankey(graph, path, "A <b>bold</b> & odd title", maps, image=image, pairs=pairs)


def stored(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_is_one_small_file_without_external_resources(page):
    _, path = page
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    assert "<title>A &lt;b&gt;bold&lt;/b&gt; &amp; odd title</title>" in text
    assert not re.search(r"<(script|link|img|iframe|image)[^>]*(src|href)=(?!\"data:)", text)
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert "prefers-color-scheme: dark" in text
    assert "eval(" not in text


def test_joint_relevance_of_all_pairs_of_nodes_is_that_of_their_events(mu, page):
    graph, path = page
    data = stored(path)
    layers = {layer.name: layer for layer in graph.layers}

    def event(number: int):
        layer, _, group = data["nodes"][number]["key"].rpartition("/")
        if group == "off":
            return ~at(layer)
        shown = layers[layer].groups
        others = [channel for channel in range(mu.shape(layer)[1]) if channel not in shown]
        return at(layer).channel(others if group == "rest" else int(group))

    assert len(data["known"]) == 6
    for upper, lower, mass in data["pairs"]:
        assert mass == pytest.approx(float(mu(event(upper) & event(lower))[1]), abs=1e-6)
    for node in data["nodes"]:
        assert node["mass"] == pytest.approx(float(mu(event(data["nodes"].index(node)))[1]), abs=1e-9)


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
        self.wait("document.readyState === 'complete' && document.querySelector('.node')")

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

    def mouse(self, kind: str, place: list[float]) -> None:
        pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], **pressed)

    def hover(self, script: str) -> str:
        """Moves the mouse to a place ``[x, y]``, and returns the text that appears."""
        self.mouse("mouseMoved", [2, 2])
        self.wait("document.getElementById('tip').hidden")
        self.mouse("mouseMoved", self.ask(script))
        self.wait("!document.getElementById('tip').hidden")
        return self.ask("document.getElementById('tip').innerText").strip()

    def click(self, script: str) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, self.ask(script))

    def press(self, key: str, text: str = "") -> None:
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.write.close()
        self.read.close()


NODE = """(() => {{ const node = document.querySelectorAll('.node')[{number}];
  node.scrollIntoView({{block: 'center'}}); const box = node.querySelector('.hit').getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""


BAND = """(() => {{ const path = document.querySelectorAll('.band')[{number}];
  path.scrollIntoView({{block: 'center'}}); const box = path.getBoundingClientRect();
  for (let i = 1; i < 100; i++) for (let j = 1; j < 60; j++) {{
    const x = box.x + box.width * i / 100, y = box.y + box.height * j / 60;
    if (document.elementFromPoint(x, y) === path) return [x, y];
  }} return null; }})()"""

SHARES = "[...document.querySelectorAll('.node')].map(node => node.dataset.share ?? '')"
VISIBLE = """[...document.querySelectorAll('.node image')]
  .filter(one => getComputedStyle(one).display !== 'none').map(one => one.getAttribute('class'))"""
BLUE = """[...document.querySelectorAll('.node')].filter(node => node.querySelector('text.b').classList
  .contains('negative')).map(node => node.dataset.key)"""
ENLARGED = """(() => {{ const image = document.querySelectorAll('.node')[{number}].querySelector('image');
  return image && [getComputedStyle(document.querySelector('#tip img')).aspectRatio,
    image.getAttribute('width') + ' / ' + image.getAttribute('height')]; }})()"""
FOCUSED = "document.activeElement.dataset.key ?? ''"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser_without_a_network(page, mu, tmp_path, dark):
    graph, path = page
    data = stored(path)
    nodes, bands = data["nodes"], data["bands"]
    browser = Browser(tmp_path / "profile", path.as_uri(), dark)
    try:
        assert browser.ask("document.querySelectorAll('.node').length") == len(flow_scene(graph).nodes) == len(nodes)
        assert browser.ask("document.querySelectorAll('.band').length") == len(bands)
        paper = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
        visible = (
            "[...document.querySelectorAll('.node image')].filter(one => getComputedStyle(one).display !== 'none')"
        )
        assert set(browser.ask(f"{visible}.map(one => one.getAttribute('class'))")) == {"dark" if dark else "light"}
        enlarged = []
        for number, node in enumerate(nodes):  # hover
            first, second, *_ = browser.hover(NODE.format(number=number)).split("\n")
            assert (first, second) == (f"{node['layer']}, {node['name']}", f"relevance {short_percent(node['mass'])}")
            if (shapes := browser.ask(ENLARGED.format(number=number))) is not None:
                enlarged.append(shapes)
        assert enlarged
        assert all(own == shown for own, shown in enlarged)  # the text below has its place before the image is decoded
        seen = 0
        for number, band in enumerate(bands[::3]):
            if browser.ask(BAND.format(number=3 * number)) is None:
                continue  # hidden by others
            lines = browser.hover(BAND.format(number=3 * number)).split("\n")
            lower, upper = nodes[band["lower"]], nodes[band["upper"]]
            assert lines[0] == f"{lower['layer']}, {lower['name']} → {upper['layer']}, {upper['name']}"
            assert lines[1] == f"joint relevance {short_percent(band['mass'])}"
            assert lines[2].endswith(short_percent(band["mass"] / upper["mass"]))
            seen += 1
        assert seen > 3
        keys = [node["key"] for node in nodes]  # click to condition
        number = next(
            at for at, node in enumerate(nodes) if node["key"].startswith("2/") and node["key"][2:].isdecimal()
        )
        browser.click(NODE.format(number=number))
        browser.wait("!document.getElementById('all').hidden")
        given = at("2").channel(int(keys[number][2:]))
        for key, share in zip(keys, browser.ask(SHARES), strict=True):
            layer, _, group = key.rpartition("/")
            if group.isdecimal():
                expected = float(mu(at(layer).channel(int(group)), given=given, min_ratio=0)[1])
                assert share == short_percent(float(f"{expected:.6g}")) or (share == "0%" and abs(expected) < 1e-6)
        assert browser.ask("document.querySelectorAll('.node[aria-pressed=true]').length") == 1
        assert f"Relevance given {nodes[number]['layer']}" in browser.ask(
            "document.getElementById('status').textContent"
        )
        assert browser.ask(f"document.querySelectorAll('.node')[{number}].getAttribute('aria-label')").endswith(
            f"100% given {nodes[number]['name']}"
        )
        browser.press("Escape")
        browser.wait("document.getElementById('all').hidden")
        assert browser.ask(SHARES) == [short_percent(node["mass"]) for node in nodes]
        # Keyboard alone.
        browser.press("/", "/")
        assert browser.ask("document.activeElement.id") == "search"
        for letter in "input":
            browser.press(letter, letter)
        matches = sum(node["layer"] == "input" for node in nodes)
        assert browser.ask("document.querySelectorAll('.node:not(.unmatched)').length") == matches
        browser.press("Enter", "\r")
        assert browser.ask(FOCUSED).startswith("input/")
        browser.press("ArrowRight")
        assert browser.ask(FOCUSED).startswith("0/")
        column = [node["key"] for node in nodes if node["layer"] == "0"]
        for step in ("ArrowUp",) * len(column) + ("ArrowDown",):
            browser.press(step)
        assert browser.ask(FOCUSED) == column[1]
        browser.press("Enter", "\r")
        browser.wait("!document.getElementById('all').hidden")
        assert browser.ask("document.querySelector('.node[aria-pressed=true]').dataset.key") == column[1]
        assert [url for url in browser.asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        assert browser.ask("document.title") == "A <b>bold</b> & odd title"
        rows = browser.ask("document.querySelectorAll('details tr').length")
        assert rows >= len(nodes) + 2
        screenshot = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    finally:
        browser.close()
    with Image.open(io.BytesIO(screenshot)) as image:
        assert len(image.convert("RGB").resize((200, 150)).getcolors(30_000)) > 100


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_given_a_node_blue_still_marks_evidence_against_the_output(page, mu, tmp_path):
    _, path = page
    nodes = stored(path)["nodes"]
    groups = [node for node in nodes if node["kind"] == "group"]
    events = {node["key"]: at(node["layer"]).channel(int(node["key"].rpartition("/")[2])) for node in groups}
    notes = (
        "[...new Set([...document.querySelectorAll('#flow text.pale')].map(one => getComputedStyle(one).visibility))]"
    )
    browser = Browser(tmp_path / "profile", path.as_uri())
    try:
        plain = browser.ask(BLUE)
        assert plain == [node["key"] for node in nodes if node["kind"] != "off" and node["mass"] < 0]
        assert browser.ask(notes) == ["visible"]
        signs = set()
        for given in groups:
            number = nodes.index(given)
            browser.ask(f"condition({number})")
            for node, share in zip(nodes, browser.ask(SHARES), strict=True):
                both = float(mu(events[node["key"]] & events[given["key"]])[1]) if node in groups else 0.0
                if abs(both) > 1e-6:
                    assert (node["key"] in browser.ask(BLUE)) == (both < 0)
                    assert share.startswith("−") == (both * given["mass"] < 0)
                    signs.add((both < 0, given["mass"] < 0))
            assert browser.ask(notes) == ["hidden"]
            said = browser.ask("document.getElementById('status').textContent")
            assert f"numbers are shares of its {short_percent(given['mass'])}" in said
        assert len(signs) == 4
        browser.press("Escape")
        assert browser.ask(BLUE) == plain
        assert browser.ask(notes) == ["visible"]
    finally:
        browser.close()


WALK = "document.querySelectorAll('[data-walk]')[{number}]"
FILLS = "[...document.querySelectorAll('.band.on-walk')].map(one => getComputedStyle(one).fill)"
ON = "[...document.querySelectorAll('{kind}')].flatMap((one, at) => one.classList.contains('off-walk') ? [] : [at])"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_notes_below_nodes_are_those_of_the_whole_flow_only(tmp_path):
    """A share of a part in all relevance says nothing about its share given a node."""
    layers = (
        FlowLayer("output", (0,), ("zebra",), (1.0,), 0.0, 0, 0.0, 0.0),
        FlowLayer("inner", (0, 1), ("A1", "A2"), (0.4, 0.6), 0.0, 0, 0.0, 0.0),
        FlowLayer("input", (0, 1), ("part 1", "part 2"), (0.6, 0.4), 0.0, 0, 0.0, 0.0),
    )
    joints = tuple(np.pad(np.array(rows), ((0, 2), (0, 2))) for rows in ([[0.4, 0.6]], [[0.34, 0.06], [0.26, 0.34]]))
    graph = FlowGraph(layers, joints)
    maps = {node.key: np.ones((60, 60)) for node in graph.nodes if node.kind == "group"}
    left = np.arange(60) < 20
    photo = Photo(
        torch.rand(3, 60, 60), regions={"input/0": np.tile(left, (60, 1)), "input/1": np.tile(~left, (60, 1))}
    )
    path = save_sankey(graph, tmp_path / "flow.html", "zebra", maps, image=photo)
    notes = "[...document.querySelectorAll('.node text.pale')].map(one => getComputedStyle(one).visibility)"
    browser = Browser(tmp_path / "profile", path.as_uri())
    try:
        assert set(browser.ask(notes)) == {"visible"}
        browser.ask("condition(1)")
        assert set(browser.ask(notes)) == {"hidden"}
    finally:
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_walk_is_drawn_while_the_pointer_or_the_focus_is_on_it(tmp_path):
    mu = RelevanceMeasure(net(), X[:1], 2)
    groups = find_groups(mu, ["2", "0", "input"], 3)
    graph = mu.flow(["2", "0", "input"], groups=groups)
    walks = group_walks(mu, ["2", "0", "input"], groups).through_nodes(5)
    path = save_sankey(graph, tmp_path / "flow.html", walks=walks)
    data = stored(path)
    browser = Browser(tmp_path / "profile", path.as_uri())
    try:
        for number, (keys, mass) in enumerate(walks):
            walk = [at for at, node in enumerate(data["nodes"]) if node["key"] in keys]
            assert sorted(data["walks"][number]) == walk
            assert browser.ask(WALK.format(number=number) + ".textContent").endswith(short_percent(mass))
            browser.ask(WALK.format(number=number) + ".focus()")
            assert browser.ask(ON.format(kind=".node")) == walk
            drawn = [at for at, band in enumerate(data["bands"]) if {band["lower"], band["upper"]} <= set(walk)]
            assert browser.ask(ON.format(kind=".band")) == drawn
            color = to_rgb(LIGHT.positive if mass > 0 else LIGHT.negative)  # of the walk, not of the ribbons
            fill = f"rgb({', '.join(str(round(255 * part)) for part in color)})"
            assert {*browser.ask(FILLS)} <= {fill}
        browser.ask(WALK.format(number=number) + ".blur()")
        assert len(browser.ask(ON.format(kind=".node"))) == len(data["nodes"])
        browser.mouse(
            "mouseMoved",
            browser.ask(
                f"(() => {{ const box = {WALK.format(number=1)}.getBoundingClientRect(); "
                "return [box.x + 20, box.y + 5]; })()"
            ),
        )
        browser.wait("document.querySelector('.node.off-walk')")
        assert len(browser.ask(ON.format(kind=".node"))) == 3
    finally:
        browser.close()


def test_pages_of_too_wide_layers_raise():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    graph = RelevanceMeasure(wide, torch.randn(1, 8), 0).flow(["0", "input"], top=None)
    with pytest.raises(FlowError, match=r"0 shows 4096 groups, but a figure can show 40\. Show fewer"):
        sankey(graph)
    assert len(sankey(graph.smaller(top=5))) < 100_000


@pytest.mark.medium
def test_a_page_of_many_thumbnails_stays_below_three_megabytes():
    rng = torch.Generator().manual_seed(0)
    large = nn.Sequential(nn.Conv2d(3, 12, 5, 2), nn.ReLU(), nn.Conv2d(12, 12, 5, 2), nn.ReLU(), nn.Flatten(),
                        nn.Linear(12 * 13 * 13, 3)).eval()  # fmt: skip
    image = torch.rand(3, 64, 64, generator=rng)
    mu = RelevanceMeasure(large, image[None], 1)
    graph = mu.flow(["output", "2", "1", "0"], top=12)
    maps, pairs = flow_maps_and_pairs(mu, graph)
    assert len(maps) >= 25
    assert len(sankey(graph, "many", maps, image=image, pairs=pairs)) < 3_000_000
