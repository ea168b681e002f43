"""Names of models on the Hugging Face Hub: whether they are in the local cache and whether the hub is reachable.

Without a network, the client of the hub repeats each request for many seconds and then prints a long traceback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, NRMError, extra, printable


class TextModelError(NRMError, OSError):
    """Raised if a model or its tokenizer cannot be loaded."""


TIMEOUT = 1.5
"""Seconds after which the hub counts as unreachable."""


def is_offline(name: str) -> bool:
    """Returns True if a model can be loaded without network access, from a folder or from the local Hub cache.

    Neither torch nor transformers is imported, so a wrong name fails immediately.

    Raises:
        TextModelError: If there is no such folder or it has no configuration, or if the name is not in the local cache
            and the hub cannot be reached.
    """
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise TextModelError(
            f"{printable(name)} has no config.json, so it is not a model saved by transformers. Save it with "
            "model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        )
    if folder.exists():
        return True
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise TextModelError(f"there is no folder {printable(name)}.")
    if is_reachable():
        return False
    if is_cached(name):
        return True
    raise TextModelError(
        f"there is no folder {printable(name)}, no model of this name in the local cache of the Hugging Face Hub, and "
        "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set). Check the path, or download the model once "
        "while online."
    )


def is_cached(name: str) -> bool:
    """Returns True if the configuration of a model is in the local cache of the hub."""
    with contextlib.suppress(ValueError):  # not a valid name
        return isinstance(extra("huggingface_hub", "text").try_to_load_from_cache(name, "config.json"), str)
    return False


def is_reachable(timeout: float = TIMEOUT) -> bool:
    """Returns True if the hub or its proxy accepts connections.

    Args:
        timeout: Limit in seconds for both the lookup of the address and the connection.
    """
    try:
        constants = extra("huggingface_hub.constants", "text")
    except MissingExtraError:  # without the client, transformers itself reports what is missing
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    done: list[bool] = []
    # Looking up an address has no time limit of its own, so it is left behind if it takes too long.
    thread = threading.Thread(target=_connect, args=(*_address(constants.ENDPOINT), timeout, done), daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(done)


def _connect(host: str, port: int, timeout: float, done: list[Any]) -> None:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout):
        done.append(True)


def _address(endpoint: str) -> tuple[str, int]:
    """Returns the host and port of an address or, if the environment sets one, of its proxy."""
    url = urllib.parse.urlsplit(endpoint)
    proxies = {} if urllib.request.proxy_bypass(url.hostname or "") else urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy:
        url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


__all__ = ["TextModelError", "is_cached", "is_offline", "is_reachable"]
