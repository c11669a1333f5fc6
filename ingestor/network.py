"""Proxy and certificate authorities, by one rule for stream and REST API.

This module reads the environment before a library does: their rules differ, and their errors quote the proxy's
password.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import ipaddress
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ingestor.address import AddressError, proxy_url
from ingestor.errors import ConfigurationError
from ingestor.redaction import outside_text, register_url, system_words

_PLAIN = {"ws", "http"}
_KINDS = ("socks", "https", "all")
"""Proxy variables in order of precedence; for a stream `wss` comes first (RFC 6455, section 4.1)."""

CERTIFICATE_NOT_YET_VALID = 9
"""X509_V_ERR_CERT_NOT_YET_VALID: this machine's clock may be wrong after a boot."""

SOCKS_PACKAGES = {"python_socks": "python-socks[asyncio]", "socksio": "socksio"}
"""The modules that stream and REST API need for a SOCKS proxy, with their packages."""


def proxy_for(url: str) -> str | None:
    """Return the proxy for a URL, with its password; None without a proxy and for this machine.

    Raises ConfigurationError, which does not quote the proxy's address, if the proxy cannot be used.
    """
    parts = urlsplit(url)
    if parts.scheme in _PLAIN:  # unencrypted traffic must not leave this machine, not even by a proxy
        return None
    proxies = getproxies()
    kinds = ("wss", *_KINDS) if parts.scheme == "wss" else _KINDS
    kind = next((kind for kind in kinds if proxies.get(kind)), None)
    host, port = parts.hostname or "", parts.port or 443
    if kind is None or is_excepted(proxies.get("no", ""), host, port) or proxy_bypass(f"{host}:{port}"):
        return None
    found = proxies[kind].strip()
    found = found if "://" in found else f"http://{found}"
    register_url(found)
    if (kind == "socks" and found.startswith("http://")) or found.startswith("socks://"):  # some systems write it so
        found = f"socks5h://{found.partition('://')[2]}"
    try:
        read = proxy_url(found)
    except AddressError as error:
        raise ConfigurationError(f"{kind.upper()}_PROXY: {error}") from None
    if read.startswith("socks"):
        _check_socks(kind, read, "python_socks" if parts.scheme == "wss" else "socksio")
    return read


def _check_socks(kind: str, proxy: str, module: str) -> None:
    if module == "socksio" and not proxy.startswith("socks5"):
        raise ConfigurationError(f"{kind.upper()}_PROXY: the REST API can be reached by SOCKS 5 only; write socks5h://")
    if importlib.util.find_spec(module) is None:
        packages = " ".join(f"'{package}'" for package in SOCKS_PACKAGES.values())
        raise ConfigurationError(
            f"{kind.upper()}_PROXY: a SOCKS proxy needs packages that are not installed. Run: pip install {packages}"
        )


def proxy_hint(status: int) -> str:
    """Return a hint for the HTTP status of a proxy; empty if the failure may be temporary."""
    match status:
        case 407:
            return "Check the user and the password in HTTPS_PROXY."
        case 401 | 403 | 405:
            return "It does not allow this host: change its rules, or name the host in NO_PROXY."
    return ""


def is_excepted(exceptions: str, host: str, port: int) -> bool:
    """Return whether `NO_PROXY` names a host: by its name or a domain above it, its address, a network (CIDR), or `*`.

    An entry may have a port, and stars in it. Names are compared in lower case.
    """
    host = host.lower().rstrip(".").strip("[]")
    with contextlib.suppress(ValueError):
        host = str(ipaddress.ip_address(host))
    return any(_covers(entry, host, port) for entry in exceptions.lower().replace(",", " ").split())


def _covers(entry: str, host: str, port: int) -> bool:
    entry = entry.partition("://")[2] or entry
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    name, colon, digits = entry.rpartition(":")
    if colon and digits.isdecimal():
        if int(digits) != port:
            return False
        entry = name
    entry = entry.strip("[]").rstrip(".")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(entry)) == host
    domain = entry.removeprefix("*").lstrip(".") if entry != "*" else entry
    return fnmatch.fnmatchcase(host, domain) or fnmatch.fnmatchcase(host, f"*.{domain}") if domain else False


def tls_context() -> ssl.SSLContext:
    """Return a context that trusts the system's authorities, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`.

    Raises ConfigurationError if these are unreadable: OpenSSL would silently trust no authority.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if path := os.environ.get(name):
            try:
                list(os.scandir(path)) if name.endswith("DIR") and ":" not in path else Path(path).stat()
                if name.endswith("FILE"):
                    ssl.create_default_context(cafile=path)
            except ssl.SSLError:
                raise ConfigurationError(f"{name}: {outside_text(path)} holds no certificates in PEM form.") from None
            except OSError as error:
                raise ConfigurationError(
                    f"{name}: {outside_text(path)} cannot be read: {system_words(error)}."
                ) from None
    return ssl.create_default_context()
