"""TLS to a server by one of its addresses, while its certificate is checked for its name.

The driver checks the certificate for what it connects to. So where a name has several addresses, it is given a context
that knows the name. The rules are those of PostgreSQL's client.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

VERIFYING = frozenset({"require", "verify-ca", "verify-full"})
"""The modes for which there is a context; the others encrypt without checking anything, or not at all."""


class NamedContext(ssl.SSLContext):
    """A context for one server, whose name it asks for and checks, whatever the driver connects to."""

    name = ""

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Return an encrypted connection to the server of that name. Called by the event loop."""
        kwargs["server_hostname"] = self.name
        return super().wrap_bio(*args, **kwargs)


class OptionalContext(ssl.SSLContext):
    """A context for `prefer` and `allow` without a certificate of our own: TLS if the server has it."""

    def __new__(cls) -> Self:
        """Return a context that checks nothing, as these modes do."""
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["postgresql"])
        return context


def context_for(name: str, parameters: Mapping[str, str]) -> ssl.SSLContext | None:
    """Return the context for a server of a name, or None where the driver's own rules for the mode do.

    Raises PermissionError with the name of an unreadable file that matters: one that was named, or any if the mode asks
    for TLS; OSError and ValueError for other bad files.
    """
    verifies = parameters.get("sslmode") in VERIFYING
    try:
        _check_readable(parameters)
    except PermissionError:
        if verifies or parameters.get("sslcert") or parameters.get("sslkey"):
            raise
        return OptionalContext()
    return _verifying(name, parameters) if verifies else None


def _check_readable(parameters: Mapping[str, str]) -> None:
    """Open the files that a mode of TLS will use. Raises PermissionError, which names one: OpenSSL's does not."""
    mode = parameters.get("sslmode") or "prefer"
    if mode == "disable":
        return
    files = [("sslcert", "postgresql.crt"), ("sslkey", "postgresql.key")]
    if mode in VERIFYING:
        files += [("sslrootcert", "root.crt"), ("sslcrl", "root.crl")]
    paths = {name: parameters.get(name) or str(_directory() / default) for name, default in files}
    if not Path(paths["sslcert"]).exists():
        del paths["sslkey"]  # which is a key to nothing
    for path in paths.values():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError), Path(path).open("rb"):
            pass


def _verifying(name: str, parameters: Mapping[str, str]) -> NamedContext:
    context = NamedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.name = name
    mode, root = parameters["sslmode"], parameters.get("sslrootcert")
    context.check_hostname = mode == "verify-full"
    home = _directory()
    if root == "system":
        context.load_default_certs()
    elif root or (home / "root.crt").exists() or mode != "require":
        context.load_verify_locations(cafile=root or home / "root.crt")
    else:
        context.verify_mode = ssl.CERT_NONE
    revoked = parameters.get("sslcrl") or next((each for each in [home / "root.crl"] if each.exists()), None)
    if revoked:
        context.load_verify_locations(cafile=revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    _load_own(context, home, parameters)
    context.minimum_version = _version(parameters.get("ssl_min_protocol_version") or "TLSv1.2")
    if newest := parameters.get("ssl_max_protocol_version"):
        context.maximum_version = _version(newest)
    context.set_alpn_protocols(["postgresql"])
    return context


def _load_own(context: ssl.SSLContext, home: Path, parameters: Mapping[str, str]) -> None:
    own = parameters.get("sslcert") or next((each for each in [home / "postgresql.crt"] if each.exists()), None)
    if own:
        key = parameters.get("sslkey") or next((each for each in [home / "postgresql.key"] if each.exists()), None)
        context.load_cert_chain(own, keyfile=key, password=lambda: parameters.get("sslpassword", ""))


def _directory() -> Path:
    """Return where a user's certificates are. A user without a home has none."""
    try:
        return Path.home() / ".postgresql"
    except RuntimeError:
        return Path("/nonexistent")


def _version(text: str) -> ssl.TLSVersion:
    try:
        return ssl.TLSVersion[text.replace(".", "_")]
    except KeyError:
        raise ValueError("no such version of TLS") from None
