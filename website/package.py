"""Builds the packages of a release and looks at them: ``python -m website.package dist`` (``make package``).

A wheel is built from the source archive, their contents are compared with the checkout, ``twine check`` reads the
description, and the wheel is installed into an empty environment, where a measure is taken. The dependencies are those
of the environment that runs this; ``--with-dependencies`` has pip find and install them as a user's would.
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
"""Bytes of a package: the embedded model and digits are most of it."""
DATA = {"py.typed", "__init__.pyi", "demo/digits_vgg.safetensors", "demo/digits_test.safetensors"}
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
print("nrm-plugin", nrm_plugin.__version__, "measures in an environment of its own")
"""


def version() -> str:
    """The version in the checkout."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/nrm_plugin/version.py").read_text(), re.M)
    assert found
    return found[1]


def wheel_faults(names: set[str]) -> list[str]:
    """What is wrong with the list of files of a wheel."""
    package = ROOT / "src/nrm_plugin"
    sources = {f"nrm_plugin/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    wanted = sources | {f"nrm_plugin/{name}" for name in DATA}
    inside = {name for name in names if not name.startswith(f"nrm_plugin-{version()}.dist-info/")}
    faults = [f"lacks {name}" for name in sorted(wanted - inside)]
    faults += [f"should not have {name}" for name in sorted(inside - wanted)]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        faults.append("lacks its license")
    return faults


def archive_faults(names: set[str]) -> list[str]:
    """What is wrong with the list of files of a source archive, without its folder."""
    return [f"lacks {name}" for name in sorted(NEEDED - names)] + [
        f"should not have {name}" for name in sorted(names) if NEVER.search(name)
    ]


def run(*command: object, **settings: object) -> None:
    """A command that must not fail."""
    subprocess.run([str(part) for part in command], check=True, **settings)  # type: ignore[call-overload]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the packages")
    parser.add_argument("--with-dependencies", action="store_true", help="pip installs them, too")
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
    """Installs a wheel into an empty environment and takes a measure there, away from the checkout."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    run(python, "-m", "pip", "install", "-q", *([] if with_dependencies else ["--no-deps"]), wheel)
    # Packages of a path have no editable installs among them, those are only read in a site's own folder.
    path = {} if with_dependencies else {"PYTHONPATH": sysconfig.get_path("purelib")}
    environment = {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **path}
    run(python, "-c", TRY, cwd=folder, env=environment)
    run(folder / "env/bin/nrm-plugin", "--version", cwd=folder, env=environment)


if __name__ == "__main__":
    main()
