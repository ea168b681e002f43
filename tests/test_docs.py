"""Every Python snippet of the README and the docs runs as printed, and every command on a page exists."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from nrm_plugin.commands.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_the_snippets_of_a_page_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    exec(compile("\n".join(snippets), page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_resolve(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


# -- commands: they are not run, only their modules, options, targets and tests are looked up -------------------------

WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MEASURED = re.compile(r"\d[eE][-+]?\d|<!-- |\d × |\d ?%|\btimes (?:a|one|the)\b")
"""Signs of a measured number: an exponent, a generated table, a factor, a percentage."""


def commands(text: str) -> Iterator[str]:
    """Code between backticks and the lines of shell blocks, without comments."""
    shell = re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"(?:^    \S.*\n)+", text, re.M)
    prose = re.sub(r"```.*?```|``.*?``", "", text, flags=re.S)
    for code in (*re.findall(r"`([^`]+)`", prose), *"".join(shell).replace("\\\n", " ").splitlines()):
        yield re.sub(r"\s+", " ", re.sub(r"\s#.*", "", code)).strip()


def faults_of(command: str) -> list[str]:
    """The parts of a command that do not exist: a module, an option, a target of make, a test."""
    if re.search(r"…|\b[A-Z]{4,}\b(?!=)", command):  # a placeholder
        return []
    words = shlex.split(command) if command.count('"') % 2 == 0 else []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    name = words[0].rpartition("/")[2] if words else ""
    if name == "python" and words[1:2] == ["-m"]:
        return _of_module(words[2], words[3:])
    if name == "make":
        return _of_make(words[1:])
    if name == "pytest" and len(words) > 1:
        return _of_tests(words[1:])
    if name == "nrm-plugin" and len(words) > 2 and "--help" not in words:
        parser().parse_args(words[1:])  # exits if parsing fails
    return []


def _of_module(module: str, rest: list[str]) -> list[str]:
    stem = ROOT / module.replace(".", "/")
    candidates = [stem.with_suffix(".py"), stem / "__main__.py"]
    candidates += [ROOT / "src" / path.relative_to(ROOT) for path in candidates]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return [f"no module {module}"]
    return [f"{module} has no option {word}" for word in rest if word.startswith("--") and word not in _options(path)]


@cache
def _options(path: Path) -> frozenset[str]:
    """The options that a script adds to its parser."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    adding = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return frozenset(arg.value for call in adding for arg in call.args if isinstance(arg, ast.Constant))


def _of_make(words: list[str]) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for line in re.findall(r"^([\w -]+):", makefile, re.M) for target in line.split()}
    hosts = set(re.findall(r"^HOSTS \?= (.*)", makefile, re.M)[0].split())
    faults = [f"make has no target {word}" for word in words if "=" not in word and word not in targets]
    for word in words:
        if word.startswith("HOSTS="):
            faults += [f"no host {host}" for host in set(word[6:].split()) - hosts]
    return faults


def _of_tests(words: list[str]) -> list[str]:
    expression = words[words.index("-k") + 1] if "-k" in words else ""
    files = [word for word in words if word.startswith("tests/")]
    names: list[str] = []
    for word in files:
        path, _, test = word.partition("::")
        if not (ROOT / path).exists():
            return [f"no file {path}"]
        names += [
            f"{Path(path).name} {name}" for name in re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.M)
        ]
        if test and not any(name.endswith(f" {test}") for name in names):
            return [f"{path} has no {test}"]
    pages = [f"test_docs.py {page.name}" for page in PAGES] if "tests/test_docs.py" in files else []
    missed = [part for part in expression.split(" or ") if not any(part in name for name in (*names, *pages))]
    return [f"no test of {words} matches {part}" for part in missed] + ([] if files else [f"no tests in {words}"])


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    faults = [fault for command in commands(page.read_text()) for fault in faults_of(command)]
    assert not faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_with_measured_numbers_names_a_command_that_reproduces_them(page: Path) -> None:
    text = re.sub(r"```py.*?```", "", page.read_text(), flags=re.S)
    reproducing = [line for line in commands(text) if re.match(r"(?:\S+/)?(?:make|pytest|python -m) ", line)]
    assert reproducing or not MEASURED.search(text)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python -m benchmarks.sped", "no module"),
        ("python -m benchmarks.speed --quik", "no option"),
        (".venv/bin/python -m website.package dist --without", "no option"),
        ("make benhc", "no target"),
        ('make test-hosts HOSTS="crp crq"', "no host"),
        ("pytest tests/test_nothing.py", "no file"),
        ("pytest tests/test_docs.py::test_nothing", "has no test_nothing"),
        ("pytest tests/test_docs.py -k nothing_of_this", "matches"),
    ],
)
def test_a_command_that_does_not_exist_is_reported(command: str, fault: str) -> None:
    assert any(fault in message for message in faults_of(command))
    assert not faults_of("python -m benchmarks.speed --quick")
    with pytest.raises(SystemExit):
        faults_of("nrm-plugin explain cat.jpg --modle vgg16")
