"""Builds and checks the packages of a release: ``python -m website.package dist`` (``make package``).

A wheel is built from the source archive, their contents are compared with the checkout, ``twine check`` validates the
description, and the wheel is installed into an empty environment, in which a measure is computed. The dependencies are
those of the calling environment; with ``--with-dependencies``, pip installs them as for a user.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 2 << 20
"""Maximum size of a package in bytes, most of which are the embedded model and digits."""
DATA = {
    "py.typed", "__init__.pyi", "demo/digits_vgg.safetensors", "demo/digits_test.safetensors", "demo/cat.jpg",
    "plots/flow_page.css", "plots/flow_page.js",
}  # fmt: skip
NEVER = re.compile(r"(^|/)(\.git/|\.venv|__pycache__|\.pytest_cache|\.hypothesis|build/|dist/|.*\.(pyc|log|pt|pth)$)")
NEEDED = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "Makefile", "docs/measure.md", "tests/conftest.py"}
TRY = """
import importlib.metadata, pathlib, sys, torch, nrm_plugin
from nrm_plugin import RelevanceMeasure
from nrm_plugin.demo import load_digits, load_model
assert pathlib.Path(nrm_plugin.__file__).is_relative_to(sys.prefix), nrm_plugin.__file__
assert importlib.metadata.version("nrm-plugin") == nrm_plugin.__version__
images, labels = load_digits()
mu = RelevanceMeasure(load_model(), images[:2], labels[:2])
total = mu.marginal("input").flatten(1).sum(1) + mu.sink("input")
assert torch.allclose(total, torch.ones(2), atol=1e-5), total
print("nrm-plugin", nrm_plugin.__version__, "works in an empty environment")
"""


def version() -> str:
    """Returns the version of the checkout."""
    line = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/nrm_plugin/__init__.py").read_text(), re.M)
    assert line
    return line[1]


def wheel_faults(names: set[str]) -> list[str]:
    """Returns the faults in the list of files of a wheel."""
    package = ROOT / "src/nrm_plugin"
    sources = {f"nrm_plugin/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected = sources | {f"nrm_plugin/{name}" for name in DATA}
    packaged = {name for name in names if not name.startswith(f"nrm_plugin-{version()}.dist-info/")}
    faults = [f"lacks {name}" for name in sorted(expected - packaged)]
    faults += [f"should not have {name}" for name in sorted(packaged - expected)]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        faults.append("lacks its license")
    return faults


def archive_faults(names: set[str]) -> list[str]:
    """Returns the faults in the list of files of a source archive, given without the top-level folder."""
    return [f"lacks {name}" for name in sorted(NEEDED - names)] + [
        f"should not have {name}" for name in sorted(names) if NEVER.search(name)
    ]


def run(*command: object, **settings: object) -> None:
    """Runs a command, and raises an error if it fails."""
    subprocess.run([str(part) for part in command], check=True, **settings)  # type: ignore[call-overload]


def main() -> None:
    """Builds and checks the packages from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the packages")
    parser.add_argument("--with-dependencies", action="store_true", help="let pip install the dependencies")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("nrm_plugin-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", args.out, ROOT)
    archive, wheel = args.out / f"nrm_plugin-{version()}.tar.gz", args.out / f"nrm_plugin-{version()}-py3-none-any.whl"
    with tarfile.open(archive) as opened:
        faults = archive_faults({name.partition("/")[2] for name in opened.getnames() if "/" in name})
    with zipfile.ZipFile(wheel) as opened_wheel:
        faults += wheel_faults(set(opened_wheel.namelist()))
    faults += [f"{path.name} has {path.stat().st_size} bytes" for path in (wheel,) if path.stat().st_size > MOST]
    if faults:
        sys.exit("\n".join(faults))
    run(sys.executable, "-m", "twine", "check", "--strict", archive, wheel)
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel.resolve(), Path(folder), args.with_dependencies)


def try_out(wheel: Path, folder: Path, with_dependencies: bool) -> None:
    """Installs a wheel into an empty environment and computes a measure there, outside of the checkout."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    run(python, "-m", "pip", "install", "-q", *([] if with_dependencies else ["--no-deps"]), wheel)
    # On PYTHONPATH, editable installs such as this package are ignored: they are only read in a site directory.
    path = {} if with_dependencies else {"PYTHONPATH": sysconfig.get_path("purelib")}
    environment = {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **path}
    run(python, "-c", TRY, cwd=folder, env=environment)
    run(folder / "env/bin/nrm-plugin", "--version", cwd=folder, env=environment)


if __name__ == "__main__":
    main()
