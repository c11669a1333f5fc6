"""The proxy of the environment, read here before the library does: its errors quote the password."""

from __future__ import annotations

from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ingestor.address import AddressError, proxy_url
from ingestor.errors import ConfigurationError
from ingestor.redaction import register_url

_KINDS = ("wss", "socks", "https")
"""Whose proxy is taken, the first that is set: as the library chooses it (RFC 6455, section 4.1)."""


def proxy_for(url: str) -> str | None:
    """Return the proxy for a stream, with its password; None where there is none, and on this machine.

    Raises ConfigurationError, which says nothing of the address, where it can't be read.
    """
    parts = urlsplit(url)
    if parts.scheme == "ws":  # unencrypted is for this machine only, so it must not leave by a proxy either
        return None
    if proxy_bypass(f"{parts.hostname}:{parts.port or 443}"):
        return None
    proxies = getproxies()
    kind = next((kind for kind in _KINDS if proxies.get(kind)), None)
    if kind is None:
        return None
    found = proxies[kind] if "://" in proxies[kind] else f"http://{proxies[kind]}"
    if kind == "socks" and found.startswith("http://"):  # as some systems name it
        found = f"socks5h://{found.removeprefix('http://')}"
    register_url(found)
    try:
        return proxy_url(found)
    except AddressError as error:
        raise ConfigurationError(f"{kind.upper()}_PROXY: {error}") from None
