"""Names of models on the hub without a network: a cached model is loaded, and any other name fails at once."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from nrm_plugin.commands import hub_names
from nrm_plugin.commands.cli import main

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A client of the hub with one cached model, and no proxy."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    constants = SimpleNamespace(HF_HUB_OFFLINE=False, ENDPOINT="http://127.0.0.1:1")
    client = SimpleNamespace(
        constants=constants, try_to_load_from_cache=lambda name, file: f"/{file}" if name == "cached" else None
    )
    modules = {"huggingface_hub": client, "huggingface_hub.constants": constants}
    monkeypatch.setattr(hub_names, "extra", lambda module, _: modules[module])
    return constants


def test_a_name_that_is_neither_local_nor_cached_fails_at_once_without_a_network(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["explain-text", "a dull film", "--model", "wrong"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("no folder wrong", "local cache", "cannot be reached"):
        assert part in line


def test_a_cached_model_is_loaded_without_a_network():
    assert hub_names.is_offline("cached")


def test_a_hub_that_accepts_connections_is_asked(hub):
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub.ENDPOINT = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert not hub_names.is_offline("wrong")
        hub.HF_HUB_OFFLINE = True
        assert hub_names.is_offline("cached")


def test_a_proxy_is_asked_in_place_of_the_hub(hub, monkeypatch):
    hub.ENDPOINT = "https://hub.invalid"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_names.is_reachable()


def test_a_slow_lookup_of_the_address_is_not_awaited(hub, monkeypatch):
    released = hub_names.threading.Event()

    def slow(*_):
        released.wait(30)
        raise OSError

    monkeypatch.setattr(hub_names.socket, "create_connection", slow)
    assert not hub_names.is_reachable(timeout=0.01)
    released.set()
